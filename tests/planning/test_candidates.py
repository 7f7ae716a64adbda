from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import hap
from hap import HapError
from hap.planning.candidates import candidates, implantable
from hap.planning.constraints import constraints


def names(structure: hap.Structure) -> set[str]:
    return {layer.module for layer in implantable(structure)}


def test_least_sensitive_first(structure, sensitivity) -> None:
    given = sensitivity(structure)
    found = candidates(structure, given, constraints(structure), with_implants=True)
    assert (np.diff(found.score) >= 0).all()
    for i in range(len(found)):
        if found.layer[i] < 0:
            assert found.score[i] == given.scores[found.families[found.family[i]].name][found.unit[i]]


@pytest.mark.parametrize("floor", [1, 3, 100])
def test_the_most_sensitive_units_are_no_candidates(structure, sensitivity, floor) -> None:
    given = sensitivity(structure)
    found = candidates(structure, given, constraints(structure, floor=floor), with_implants=False)
    for i, family in enumerate(found.families):
        units = set(found.unit[found.family == i].tolist())
        order = given.scores[family.name].argsort().tolist()
        assert units == set(order[: max(0, family.size - floor)])


def test_filters_are_candidates_where_their_channel_stays(structure, sensitivity) -> None:
    """Alone stand filters of the residual stream and of a group that several layers write; others go with the unit."""
    given = sensitivity(structure)
    found = candidates(structure, given, constraints(structure), with_implants=True)
    alone = {found.layers[k].module for k in found.layer[found.layer >= 0].tolist()}
    assert {"stem", "back"} <= alone
    assert not {"inner", "left", "right"} & alone
    k = next(i for i, layer in enumerate(found.layers) if layer.module == "narrow")
    for i in np.flatnonzero(found.layer == k).tolist():  # whole groups, at the price of their sum
        first = int(found.unit[i])
        assert first % 2 == 0 and found.score[i] == pytest.approx(
            float(given.filters["narrow"][first : first + 2].sum())
        )


def test_filters_without_a_score_are_no_candidates(structure, sensitivity) -> None:
    given = dataclasses.replace(sensitivity(structure), filters={})
    assert (candidates(structure, given, constraints(structure), with_implants=True).layer < 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["scores", "filters"])
def test_scores_that_are_not_finite_are_refused(structure, sensitivity, value, where) -> None:
    """Also in the unit that the floor would keep: NaN sorts last."""
    given = sensitivity(structure)
    name = "inner" if where == "scores" else "back"
    getattr(given, where)[name][0] = value
    with pytest.raises(HapError, match="random gave scores that are not finite at '(inner|back)'"):
        candidates(structure, given, constraints(structure), with_implants=True)


@pytest.mark.parametrize("where, name", [("scores", "inner"), ("filters", "back")])
def test_a_foreign_sensitivity_is_refused(structure, sensitivity, where, name) -> None:
    given = sensitivity(structure)
    getattr(given, where)[name] = torch.zeros(99)
    with pytest.raises(HapError, match=f"the sensitivity does not fit the structure at '{name}'") as error:
        candidates(structure, given, constraints(structure), with_implants=True)
    assert error.value.got == "shape (99,)"


def test_a_sensitivity_without_a_family_is_refused(structure, sensitivity) -> None:
    given = sensitivity(structure)
    del given.scores["inner"]
    with pytest.raises(HapError, match="does not fit the structure at 'inner'") as error:
        candidates(structure, given, constraints(structure), with_implants=True)
    assert error.value.got == "none"


def test_larger_convolutions_are_implantable(structure) -> None:
    """Not pointwise ones, not linear layers, not a part of the few wide groups of `wide`."""
    assert names(structure) == {"stem", "inner", "back", "depthwise", "narrow", "left", "right"}


def test_ignored_layers_get_no_implants(net, inputs) -> None:
    """Those that share units with them do."""
    assert names(hap.trace(net, (inputs,), ignore=["inner"])) == names(hap.trace(net, (inputs,))) - {"inner"}


def test_transposed_convolutions_are_not_implantable() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ConvTranspose1d(4, 4, 3), nn.Conv1d(4, 2, 3))
    assert names(hap.trace(model, (torch.zeros(1, 2, 9),))) == {"0", "2"}


def test_a_model_that_is_a_convolution_has_no_place_for_an_implant() -> None:
    assert names(hap.trace(nn.Conv1d(2, 4, 3), (torch.zeros(1, 2, 9),))) == set()


def test_tied_convolutions_are_not_implanted() -> None:
    """One of the two would keep the large weight, and the promised cost would be wrong."""
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3), nn.Conv1d(4, 2, 3))
    example = (torch.zeros(1, 4, 9),)
    assert names(hap.trace(model, example)) == {"0", "1", "2"}
    model[1].weight = model[0].weight
    assert names(hap.trace(model, example)) == {"2"}
