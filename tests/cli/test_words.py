"""Errors of the library as the command line says them."""

from __future__ import annotations

import pytest

from hap.cli.prune import prune
from hap.cli.words import in_options
from hap.errors import HapError
from hap.planning.budget import check_measured, unreachable
from hap.planning.constraints import constraints
from hap.types import Budget, Cost, Family, Structure

DENSE, LOWEST = Cost(1000, 1000), Cost(300, 250)


def said(error: HapError) -> str:
    return str(in_options(error, prune))


def test_budgets() -> None:
    with pytest.raises(HapError) as error:
        Budget(params=1.5)
    assert "--keep-params is out of range" in said(error.value)
    with pytest.raises(HapError) as error:
        Budget()
    assert "--keep-params, --keep-macs, --keep-latency or --keep-heads" in said(error.value)
    assert "for example --keep-params 0.5" in said(error.value)
    with pytest.raises(HapError) as error:
        check_measured(Budget(heads=0.5), DENSE)
    assert "--keep-heads 0.5, and none" in said(error.value) and "hap inspect --frozen" in said(error.value)
    text = said(unreachable(LOWEST, DENSE, Budget(params=0.01, macs=0.5)))
    assert "--keep-params >= 0.3000, --keep-macs >= 0.2500" in text and "--keep-params 0.01, --keep-macs 0.5" in text
    assert "--floor, --min-width, --protect or --round-to, or give --inexact" in text
    assert "Budget" not in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("implant_ratio is out of range", "--implant-ratio is out of range"),
        ("minimum of 'conv1' is out of range", "--min-width of 'conv1' is out of range"),
        ("batch_size is too small", "--batch-size is too small"),
        ("joint=True with mode='optimal'", "--joint with --mode optimal"),
        ("leave joint out, or joint=False", "leave joint out, or --no-joint"),
        ("leave it out: hap.trace(..., ignore=['conv1'])", "leave it out: --ignore 'conv1'"),
        ("please report it; ignore= leaves modules alone", "please report it; --ignore leaves modules alone"),
        ("pass --overwrite (overwrite=True)", "pass --overwrite"),
        ("unknown module to protect 'x'", "unknown module to protect 'x'"),
        ("the dense one of 'max_length.weight'", "the dense one of 'max_length.weight'"),
        ("'max_length' is no column", "'max_length' is no column"),
        ("there is no file /runs/seed=3/net", "there is no file /runs/seed=3/net"),
        ("there is no file ./seed=3.pt", "there is no file ./seed=3.pt"),
        ("image_size is out of range", "--image-size is out of range"),
        ("channels_last is out of range", "channels_last is out of range"),
        ("check the model's name and classes=", "check the model's name and classes="),
    ],
)
def test_arguments_are_called_by_their_options(text: str, words: str) -> None:
    """Those that the command has; names of other things stay."""
    assert said(HapError("", remedy=text)) == said(HapError("", remedy=words))
    assert in_options(HapError(text), prune).what == words


def test_bounds_that_contradict_each_other() -> None:
    structure = Structure((Family("conv1", "channel", 4, True, ()),), (), (), {}, {})
    with pytest.raises(HapError) as error:
        constraints(structure, minimum={"conv1": 3}, maximum={"conv1": 2})
    assert "raise --max-width, or lower --min-width, --floor or --round-to" in said(error.value)
