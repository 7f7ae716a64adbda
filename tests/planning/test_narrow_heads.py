"""Heads to keep, to make narrow and to prune."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hap
from hap.errors import HapError
from hap.implants import HEAD, VALUES, Option, heads_of
from hap.planning import CostModel, Implant, compose
from hap.planning.cost import Share
from hap.planning.problem import Implantable

X = torch.randn(8, 5, 12, generator=torch.Generator().manual_seed(0))
HEADS, WIDTH = 6, 4


class Block(nn.Module):
    """Attention with 6 heads of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, HEADS * WIDTH) for _ in range(3))
        self.o = nn.Linear(HEADS * WIDTH, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(Block(), Block(), nn.Flatten(), nn.Linear(60, 3)).eval()


@pytest.fixture(scope="module")
def structure(model: nn.Module) -> hap.Structure:
    return hap.trace(model, (X,))


def offered(structure: hap.Structure, *shares: tuple[int, float], form: str = HEAD) -> dict[str, tuple[Option, ...]]:
    """Ranks, with what each leaves undone of every head."""
    ones = torch.ones(HEADS, dtype=torch.float64)
    return {name: tuple(Option(form, rank, share * ones) for rank, share in shares) for name in heads_of(structure)}


def scored(structure: hap.Structure, scores: list[list[float]]) -> hap.Sensitivity:
    values = {f.name: torch.tensor(s, dtype=torch.float64) for f, s in zip(structure.families, scores, strict=True)}
    return hap.Sensitivity("by hand", 1, 0, values, {name: torch.zeros_like(s) for name, s in values.items()})


SCORES = [[1.0, 5.0, 2.0, 9.0, 4.0, 8.0], [3.0, 6.0, 7.0, 10.0, 11.0, 12.0]]


def test_cost_is_that_of_as_many_full_heads(structure) -> None:
    """The formula against the cost of a pruned model, and against the definition."""
    cost = CostModel(structure)
    (first, second) = structure.families
    masks = {first.name: np.arange(HEADS) == 5, second.name: np.zeros(HEADS, dtype=bool)}
    for indices, rank in (((0, 2), 2), ((0, 1, 2), 2), ((0, 1, 2, 3), 1), ((1,), 2)):
        parts = WIDTH // rank
        same = dict(masks)
        same[first.name] = np.arange(HEADS) >= HEADS - 1 - len(indices) + -(-len(indices) // parts)
        assert cost(masks, {"0": Implant(indices, HEAD, rank)}) == cost(same, {})
        saved, whole = len(indices) - -(-len(indices) // parts), cost(masks, {})
        values = cost(masks, {"0": Implant(indices, VALUES, rank)})
        assert whole.params - values.params == saved * WIDTH * (12 + 1 + 12)  # rows, their biases, and columns
        assert whole.heads - values.heads == saved * WIDTH * (12 + 12)
        assert whole.macs - values.macs == saved * WIDTH * (12 + 12) * X.shape[1]


@pytest.mark.parametrize("form", [HEAD, VALUES])
def test_no_more_heads_share_a_place_than_are_left(structure, form: str) -> None:
    cost = CostModel(structure)
    for gone, saved in ((3, 2), (4, 1), (5, 0)):
        place = cost.place(np.array([gone, 0]))
        one = place.layer("0") - place.layer("0", Share(2, form, 1)) if gone < 5 else np.zeros(3)
        assert np.array_equal(place.layer("0") - place.layer("0", Share(4, form, 1)), saved * one)


def test_the_papers_rule_halves_the_most_sensitive(structure) -> None:
    plan = hap.decide(
        structure,
        scored(structure, SCORES),
        hap.Budget(heads=0.5),
        implant_ratio=0.5,
        options=offered(structure, (2, 0)),
    )
    # of the eight least sensitive the upper half becomes narrow: 1 and 5 of the first module, 1 and 2 of the second
    assert plan.implants == {"0": Implant((1, 5), HEAD, 2), "1": Implant((1, 2), HEAD, 2)}
    assert [decision.prune for decision in plan.decisions.values()] == [(0, 2, 4), (0,)]
    assert plan.small.heads == 0.5 * plan.dense.heads


def by_the_rule(keep: float, ratio: float) -> tuple[list[list[int]], list[list[int]]]:
    """For each module the heads that become narrow and those that leave: the least n that meets the budget."""
    order = sorted((score, m, unit) for m, row in enumerate(SCORES) for unit, score in enumerate(row))
    order = [found for found in order if found[0] < max(SCORES[found[1]])]  # one stays full
    for n in range(len(order) + 1):
        narrow, gone = ([[], []] for _ in range(2))
        for i, (_, module, unit) in enumerate(order[:n]):
            (gone if i < n - math.ceil(ratio * n) else narrow)[module].append(unit)
        for module in range(2):
            if len(narrow[module]) % 2:  # who finds no other to share a place goes
                gone[module].append(narrow[module].pop(0))
        if 2 * HEADS - sum(map(len, gone)) - sum(map(len, narrow)) // 2 <= keep * 2 * HEADS:
            return [sorted(units) for units in narrow], [sorted(units) for units in gone]
    raise AssertionError


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("keep", [0.85, 0.6, 0.5])
def test_the_papers_rule_meets_the_budget(structure, keep: float, ratio: float) -> None:
    scores = scored(structure, SCORES)
    plan = hap.decide(
        structure, scores, hap.Budget(heads=keep), implant_ratio=ratio, options=offered(structure, (2, 0.1))
    )
    assert keep - 1 / 12 < plan.small.heads / plan.dense.heads <= keep
    narrow, gone = by_the_rule(keep, ratio)
    assert plan.implants == {str(m): Implant(tuple(units), HEAD, 2) for m, units in enumerate(narrow) if units}
    pruned = [decision.prune for decision in plan.decisions.values()]
    assert all(set(some) <= set(every) for some, every in zip(pruned, gone, strict=True))  # one may be taken back
    assert sum(map(len, gone)) - sum(map(len, pruned)) <= 1


def exhaustive(scores: list[list[float]], share: float, keep: float, saves: float) -> float:
    """The least predicted loss over all choices: how many heads of each module leave, or become narrow by two."""
    best = np.inf
    ranked = [sorted(s) for s in scores]
    numbers = [(gone, narrow) for gone in range(HEADS) for narrow in range(0, HEADS - gone + 1, 2)]
    for choice in itertools.product(numbers, repeat=2):
        left = sum(HEADS - gone - narrow // 2 * saves for gone, narrow in choice)
        if left <= keep * 2 * HEADS + 1e-9:
            # for given numbers, who leaves is least sensitive, and who becomes narrow comes next
            loss = sum(sum(s[:g]) + share * sum(s[g : g + n]) for s, (g, n) in zip(ranked, choice, strict=True))
            best = min(best, loss)
    return best


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("keep", [0.8, 0.5, 0.34])
@pytest.mark.parametrize(("form", "saves"), [(HEAD, 1), (VALUES, 0.5)])
def test_optimal_is_the_best_of_all_choices(structure, keep: float, share: float, form: str, saves: float) -> None:
    plan = hap.decide(
        structure,
        scored(structure, SCORES),
        hap.Budget(heads=keep),
        mode="optimal",
        options=offered(structure, (2, share), form=form),
    )
    assert plan.small.heads <= keep * plan.dense.heads
    assert plan.predicted == pytest.approx(exhaustive(SCORES, share, keep, saves), rel=0.05)
    assert {implant.form for implant in plan.implants.values()} <= {form}


def test_steps_fill_places() -> None:
    """From three heads, of which four share a place, one more fills it; back, the three go at once."""
    nothing = np.zeros((1, 8))
    layer = Implantable("", 1, np.arange(8), (), nothing, (4,))
    assert [layer.step(0, n, smaller=True) for n in (0, 3, 4)] == [4, 1, 4]
    assert [layer.step(0, n, smaller=False) for n in (8, 7, 4)] == [4, 3, 4]


def test_joint_choice_makes_heads_narrow_too(structure) -> None:
    scores = scored(structure, SCORES)
    gram = torch.diag(2 * torch.tensor([s for row in SCORES for s in row], dtype=torch.float64)) + 0.2
    scores = dataclasses.replace(scores, gram=gram)
    plans = [
        hap.decide(structure, scores, hap.Budget(heads=0.5), mode="optimal", joint=True, options=options)
        for options in (None, offered(structure, (2, 0.05)), offered(structure, (2, 0.05), (1, 0.1)))
    ]
    assert plans[1].implants and not plans[0].implants
    assert plans[0].predicted > plans[1].predicted > plans[2].predicted
    assert 1 in {implant.rank for implant in plans[2].implants.values()}


@pytest.mark.parametrize("more", [{"round_to": 2}, {"protect": ["0"], "units": ["head"]}, {"implant_ratio": 0.0}])
def test_where_heads_stay_full(structure, more) -> None:
    given = {"implant_ratio": 0.5, **more}
    for mode in ("paper", "optimal"):
        plan = hap.decide(
            structure,
            scored(structure, SCORES),
            hap.Budget(heads=0.75),
            mode=mode,
            options=offered(structure, (2, 0.0)),
            **given,
        )
        assert "0" not in plan.implants and bool(plan.implants) == ("protect" in more)


def test_a_rank_that_does_not_divide_is_refused(structure) -> None:
    with pytest.raises(HapError, match="cannot become narrow in this way"):
        hap.decide(
            structure,
            scored(structure, SCORES),
            hap.Budget(heads=0.5),
            mode="optimal",
            options=offered(structure, (3, 0.1)),
        )


def test_the_whole_way(model, structure) -> None:
    """Measured, planned, applied, verified; the plan survives JSON, and follows on a plan that prunes."""
    batches = [(X, torch.arange(8) % 3)]
    first = hap.prune(model, batches, None, hap.Budget(heads=0.8), implant_ratio=0)
    for mode in ("paper", "optimal"):
        second = hap.prune(first.model, batches, None, hap.Budget(heads=0.6), mode=mode, implant_ratio=0.5)
        assert second.plan.options["joint"] == (mode == "optimal")
        whole = compose(first.plan, second.plan)
        assert hap.Plan.from_json(whole.to_json()) == whole
        again = hap.apply(model, whole, init="zeros")
        again.load_state_dict(second.model.state_dict())
        with torch.no_grad():
            assert torch.equal(again(X), second.model(X))


def test_a_damaged_plan_is_refused(structure) -> None:
    plan = hap.decide(
        structure,
        scored(structure, SCORES),
        hap.Budget(heads=0.5),
        implant_ratio=0.5,
        options=offered(structure, (2, 0.0)),
    )
    gone = plan.decisions[structure.families[0].name].prune
    kept = plan.implants["0"].indices
    for bad in (
        Implant(gone[:1], HEAD, 2),
        Implant(kept, HEAD, 3),
        Implant(kept, HEAD, None),
        Implant(kept[::-1], HEAD, 2),
        Implant((kept[0], *kept), HEAD, 2),
    ):
        with pytest.raises(HapError, match="this plan is damaged"):
            hap.Plan.from_json(dataclasses.replace(plan, implants={"0": bad}).to_json())


def test_heads_that_were_not_measured_stay_full(structure) -> None:
    """A score of zero that stands for no measurement does not make them free."""
    (first, second) = structure.families
    scores = dataclasses.replace(scored(structure, SCORES), skipped={first.name: "its layer is not called"})
    plan = hap.decide(structure, scores, hap.Budget(heads=0.8), mode="optimal", options=offered(structure, (2, 0.1)))
    assert list(plan.implants) == ["1"] and not plan.decisions[first.name].prune
    assert plan.predicted > 0
