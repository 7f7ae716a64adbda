from __future__ import annotations

import pytest
import torch

from hap.curvature import CRITERIA, Criterion, Problem, Scores, Taylor, measure, register
from hap.errors import HapError


class Constant(Criterion):
    """Every unit scores the number of examples seen."""

    name = "constant"

    def score(self, problem: Problem) -> Scores:
        seen = sum(len(x) for x, _ in problem.batches(self.name))
        like = {f.name: torch.full((f.size,), float(seen)) for f in problem.structure.families}
        return Scores(seen, 0, like, {name: torch.zeros_like(value) for name, value in like.items()})


@pytest.fixture
def registry():
    """The registry, put back afterwards."""
    before = dict(CRITERIA)
    yield CRITERIA
    CRITERIA.clear()
    CRITERIA.update(before)


def test_an_instance_needs_no_registration(conv):
    result = measure(conv.model, conv.batches, None, conv.structure, criterion=Constant(), samples=5)
    assert result.criterion == "constant"
    assert result.samples == 5
    assert result.scores["stem"].tolist() == [5.0, 5.0]
    assert result.scores["stem"].dtype == torch.float64
    assert result.filters == {}


def test_a_registered_name(conv, registry):
    assert register(Constant) is Constant
    assert register(Constant) is Constant  # a module that is imported twice does no harm
    assert (
        measure(conv.model, conv.batches, None, conv.structure, criterion="constant").scores["conv1"].tolist()
        == [7] * 6
    )


def test_a_name_is_taken_once(registry):
    class Impostor(Constant):
        name = "taylor"

    with pytest.raises(HapError, match="there is a criterion 'taylor' already"):
        register(Impostor)
    assert registry["taylor"] is Taylor


def test_the_names_are_these():
    assert set(CRITERIA) == {
        "bn-scale",
        "empirical-fisher",
        "feature-rank",
        "gate-empirical",
        "gate-fisher",
        "gate-ggn",
        "gate-gradient",
        "gate-taylor",
        "ggn-quadratic",
        "ggn-trace",
        "group-l1",
        "group-l2",
        "head-gradient",
        "hessian-quadratic",
        "hessian-trace",
        "l1",
        "magnitude",
        "random",
        "taylor",
        "whc",
    }
    assert all(criterion.name == name for name, criterion in CRITERIA.items())


def test_generators_depend_on_seed_and_key_only(conv):
    def draw(seed, *key):
        problem = Problem(conv.model, None, None, conv.structure, samples=1, seed=seed)
        return torch.rand(4, generator=problem.generator(*key)).tolist()

    torch.rand(3)  # the global generator plays no part
    assert draw(0, "a", 1) == draw(0, "a", 1)
    assert len({tuple(d) for d in (draw(0, "a", 1), draw(1, "a", 1), draw(0, "b", 1), draw(0, "a", 2))}) == 4


def test_progress_sees_every_batch(conv):
    seen = []

    def progress(items, description, total=None):
        for item in items:
            seen.append(description)
            yield item

    measure(conv.model, conv.batches, None, conv.structure, criterion="taylor", progress=progress)
    assert seen == ["taylor"] * 2
