from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from hap.errors import HapError
from hap.planning.plan import Plan
from hap.report import sensitivity_plot, spectrum
from hap.types import Sensitivity


def change(sensitivity: Sensitivity, **first: list[float]) -> Sensitivity:
    """The sensitivity with other values for the family `first`."""
    fields: dict[str, Any] = {}
    for name, values in first.items():
        fields[name] = {**getattr(sensitivity, name), "first": torch.tensor(values, dtype=torch.float64)}
    return dataclasses.replace(sensitivity, **fields)


def test_spectrum_holds_units_and_loose_filters_in_order(sensitivity: Sensitivity, plan: Plan) -> None:
    """Filters 1 to 3 of `tied` are units: they count once, with the score of their unit."""
    data = spectrum(sensitivity, plan)
    assert data.scores.tolist() == [0.1, 0.2, 0.3, 0.5, 2.0, 3.0, 4.0, 7.0, 9.0]
    assert data.stderr.tolist() == [0.01, 0.02, 0.03, 0.05, 0.2, 0.3, 0.4, 0.7, 0.9]
    assert data.tiers.tolist() == ["prune", "prune", "implant", "implant", "keep", "keep", "keep", "keep", "keep"]


def test_filters_of_a_unit_with_several_writers_count_one_by_one(sensitivity: Sensitivity, plan: Plan) -> None:
    """`tied` gets a second producer: its kept units' filters (2 and 3) are candidates of their own."""
    first, tied = plan.structure.families
    second = dataclasses.replace(tied.members[1], role="producer")
    tied = dataclasses.replace(tied, members=(tied.members[0], second))
    structure = dataclasses.replace(plan.structure, families=(first, tied))
    data = spectrum(sensitivity, dataclasses.replace(plan, structure=structure))
    found = list(zip(data.scores.tolist(), data.tiers.tolist(), strict=True))
    assert (0.5, "keep") in found and found.count((70.0, "implant")) == 1 and found.count((70.0, "keep")) == 1
    assert (0.2, "prune") in found and len(found) == 11


def test_filters_of_layers_without_implants_are_no_candidates(sensitivity: Sensitivity, plan: Plan) -> None:
    data = spectrum(sensitivity, dataclasses.replace(plan, implants={}))
    assert data.scores.tolist() == [0.1, 0.2, 0.5, 2.0, 3.0, 4.0, 9.0]
    assert set(data.tiers.tolist()) == {"keep", "prune"}


def test_values_that_are_not_finite(sensitivity: Sensitivity, plan: Plan) -> None:
    inf, nan = float("inf"), float("nan")
    data = spectrum(change(sensitivity, scores=[inf, nan, -inf, 2.0], stderr=[0.0, 0.0, 0.0, nan]), plan)
    assert data.scores.tolist() == [0.2, 0.3, 0.5, 2.0, 7.0, 9.0]
    assert data.stderr.tolist()[3] == 0.0


@pytest.mark.parametrize("missing", [{}, {"first": torch.zeros(3), "tied": torch.zeros(3)}])
def test_a_sensitivity_of_another_model_is_refused(
    sensitivity: Sensitivity, plan: Plan, missing: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(HapError, match="does not fit the plan"):
        spectrum(dataclasses.replace(sensitivity, scores=missing), plan)


def test_nothing_to_plot(sensitivity: Sensitivity, plan: Plan) -> None:
    empty = dataclasses.replace(plan, structure=dataclasses.replace(plan.structure, families=(), layers=()))
    with pytest.raises(HapError, match="no sensitivity to plot"):
        spectrum(sensitivity, empty)


def test_plot_is_a_picture_with_title_and_legend(
    sensitivity: Sensitivity, plan: Plan, tmp_path: Path, drawn: list[Figure]
) -> None:
    sensitivity_plot(sensitivity, plan, tmp_path / "new" / "spectrum.png")
    with Image.open(tmp_path / "new" / "spectrum.png") as image:
        assert image.format == "PNG" and image.width >= 1000 and len(image.getcolors(1 << 20) or []) > 50
    axes = drawn[0].axes[0]
    assert axes.get_title(loc="left") == "9 candidates by gate-fisher, 1,024 samples"
    legend = axes.get_legend()
    assert legend and [text.get_text() for text in legend.get_texts()] == [
        "± standard error",
        "kept (5)",
        "implanted (2)",
        "pruned (2)",
    ]


@pytest.mark.parametrize(
    ("scores", "scale", "label"),
    [
        ([4.0, 3.0, 0.1, 2.0], "log", "sensitivity (log scale)"),
        ([4.0, 3.0, 0.0, 2.0], "symlog", "linear within ±0.1"),
        ([4.0, -3.0, -0.01, 2.0], "symlog", "linear within ±0.01"),
        ([4.0, 1e-30, 1e-30, 1e-30], "symlog", "linear within ±1e-06"),
    ],
)
def test_scale_fits_the_scores(
    sensitivity: Sensitivity,
    plan: Plan,
    tmp_path: Path,
    drawn: list[Figure],
    scores: list[float],
    scale: str,
    label: str,
) -> None:
    sensitivity_plot(change(sensitivity, scores=scores), plan, tmp_path / "spectrum.png")
    axes = drawn[0].axes[0]
    assert axes.get_yscale() == scale and label in axes.get_ylabel()


def test_scores_that_are_all_zero_are_drawn(
    sensitivity: Sensitivity, plan: Plan, tmp_path: Path, drawn: list[Figure]
) -> None:
    zeros = {name: torch.zeros_like(values) for name, values in sensitivity.scores.items()}
    without = dataclasses.replace(plan, implants={})
    sensitivity_plot(dataclasses.replace(sensitivity, scores=zeros, stderr=zeros), without, tmp_path / "spectrum.png")
    assert drawn[0].axes[0].get_yscale() == "linear"


def test_errors_of_many_candidates_are_a_band(
    sensitivity: Sensitivity, plan: Plan, tmp_path: Path, drawn: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    sensitivity_plot(sensitivity, plan, tmp_path / "bars.png")
    monkeypatch.setattr("hap.report.sensitivities._MOST_BARS", 8)
    sensitivity_plot(sensitivity, plan, tmp_path / "band.png")
    kinds = [{type(artist).__name__ for artist in figure.axes[0].collections} for figure in drawn]
    assert "LineCollection" in kinds[0] and "LineCollection" not in kinds[1]
    assert any("Poly" in kind or "FillBetween" in kind for kind in kinds[1])


def test_units_that_could_not_go_are_left_out(heads: tuple[Sensitivity, Plan]) -> None:
    """Neurons, where heads alone may leave; families without scores; units behind a normalisation."""
    sensitivity, plan = heads
    assert spectrum(sensitivity, plan).tiers.tolist() == ["prune"] * 4 + ["keep", "implant"] * 2
    free = dataclasses.replace(plan, options={**plan.options, "units": None})
    assert len(spectrum(sensitivity, free).scores) == 8 + 2 * 20
    skipping = dataclasses.replace(sensitivity, skipped={"0.up": "for a test"})
    assert len(spectrum(skipping, free).scores) == 8 + 20
    mixed = tuple(dataclasses.replace(f, exact=f.kind == "head") for f in plan.structure.families)
    inexact = dataclasses.replace(free, structure=dataclasses.replace(plan.structure, families=mixed))
    assert len(spectrum(sensitivity, inexact).scores) == 8
