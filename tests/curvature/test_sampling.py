from __future__ import annotations

import logging

import pytest
import torch

from hap.curvature import CRITERIA, Criterion, Problem, Scores, measure
from hap.curvature.moments import Moments
from hap.curvature.sampling import MARGIN, Merged, misplaced, until_settled
from hap.errors import HapError
from hap.types import Structure

ADDITIVE = sorted(name for name, criterion in CRITERIA.items() if criterion.additive)


class Rows(Criterion):
    """Scores whose terms for each example are the batches themselves."""

    name = "rows"
    additive = True
    covers_data = True

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def score(self, problem: Problem) -> Scores:
        self.problems.append(problem)
        moments = Moments()
        for rows, _ in problem.batches(self.name):
            moments.add(rows)
        return Scores(moments.count, 0, {"u": moments.mean}, {"u": moments.stderr()})


class Blocks(Rows):
    """The same; its own errors, far too small, hold given the data."""

    covers_data = False

    def score(self, problem: Problem) -> Scores:
        found = super().score(problem)
        return Scores(found.samples, 2, found.scores, {"u": found.stderr["u"] * 1e-3})


def problem_of(rows: torch.Tensor, samples: int, batch: int = 48) -> Problem:
    data = [(part, part) for part in rows.split(batch)]
    return Problem(torch.nn.Identity(), iter(data), None, Structure((), (), (), {}, {}), samples)


def noisy(means: torch.Tensor, examples: int, noise: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return means + noise * torch.randn(examples, len(means), generator=generator, dtype=torch.float64)


def repeated(batches, times: int):
    return [batch for _ in range(times) for batch in batches]


def test_chunks_merge_into_what_all_rows_give():
    rows = noisy(torch.arange(5.0), 301, 3.0)
    merged = Merged()
    for part in rows.split([128, 128, 44, 1]):
        merged.add(Rows().score(problem_of(part, 10**6)), covers_data=True)
    found = merged.scores()
    assert found.samples == 301
    torch.testing.assert_close(found.scores["u"], rows.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.stderr["u"], rows.std(0) / 301**0.5, rtol=1e-12, atol=0)


def test_chunks_merge_by_their_terms():
    """Long texts first, short ones after: every token weighs the same."""
    lengths = torch.cat([torch.full((96,), 40.0), torch.full((64,), 5.0), torch.full((140,), 12.0)]).double()
    sums = noisy(torch.arange(5.0), 300, 3.0) * lengths.unsqueeze(1)
    whole, merged = Moments(), Merged()
    whole.add(sums, lengths)
    for rows, terms in zip(sums.split([96, 64, 140]), lengths.split([96, 64, 140]), strict=True):
        part = Moments()
        part.add(rows, terms)
        merged.add(Scores(len(rows), 0, {"u": part.mean}, {"u": part.stderr()}, terms=part.terms), covers_data=True)
    found = merged.scores()
    assert found.terms == lengths.sum()
    torch.testing.assert_close(found.scores["u"], whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.stderr["u"], whole.stderr(), rtol=0.02, atol=0)


def test_errors_given_the_data_are_replaced_by_the_spread_between_blocks():
    rows = noisy(torch.arange(4.0), 64 * 32, 3.0)
    found = until_settled(Blocks(), problem_of(rows, len(rows)), keep=0.5, risk=1e-9)
    blocks = torch.stack([block.mean(0) for block in rows.split(32)])
    torch.testing.assert_close(found.stderr["u"], blocks.std(0) / 64**0.5, rtol=1e-9, atol=0)


def test_each_example_is_read_once_and_each_chunk_has_its_own_seed():
    rows = noisy(torch.zeros(4), 1000, 1.0)
    criterion = Rows()
    found = until_settled(criterion, problem_of(rows, 700), keep=0.5, risk=0.01)
    assert [problem.samples for problem in criterion.problems] == [128, 128, 256, 188]
    assert found.samples == 700
    torch.testing.assert_close(found.scores["u"], rows[:700].mean(0), rtol=1e-12, atol=1e-12)
    assert len({problem.seed for problem in criterion.problems}) == 4


def test_stops_when_the_cut_is_settled_whatever_the_rest_is():
    # Units 0-3 tie, and so do 4-7; noise matters only for a cut within one of the two.
    rows = noisy(torch.tensor([0.0] * 4 + [1.0] * 4), 2048, 1.0)
    assert until_settled(Rows(), problem_of(rows, 2048), keep=0.5, risk=0.05).samples == 128
    assert until_settled(Rows(), problem_of(rows, 2048), keep=0.75, risk=0.05).samples == 2048


def test_a_smaller_risk_takes_more_examples():
    # Scores spread evenly over [0, 1] with errors e: 2 x integral of Phi(-x / e) = 0.8 e of the units are misplaced.
    rows = noisy(torch.linspace(0, 1, 256), 4096, 2.0)
    used = [until_settled(Rows(), problem_of(rows, 4096), keep=0.5, risk=risk).samples for risk in (0.2, 0.1, 0.05)]
    assert used == [128, 512, 2048]


def test_the_cap_and_the_end_of_the_data_warn(caplog):
    rows = noisy(torch.zeros(8), 300, 1.0)
    with caplog.at_level(logging.WARNING, logger="hap"):
        until_settled(Rows(), problem_of(rows, 200), keep=0.5, risk=0.05)
        until_settled(Rows(), problem_of(rows, 8192), keep=0.5, risk=0.05)
    assert "not settled after 200 examples, the cap" in caplog.messages[0]
    assert "not settled after 300 examples, all there are" in caplog.messages[1]
    with caplog.at_level(logging.WARNING, logger="hap"):
        until_settled(Rows(), problem_of(rows + torch.arange(8) * 9, 200), keep=0.5, risk=0.05)
    assert len(caplog.messages) == 2


def test_misplaced_by_hand():
    phi = torch.distributions.Normal(0.0, 1.0).cdf
    scores, stderr = torch.tensor([4.0, 0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 2.0, 0.0])
    # Three stay: the cut is at 0.5. The unit without error is in its place.
    expected = float(phi(torch.tensor([-3.5, -0.5, -0.25])).sum()) / 4
    assert misplaced(scores, stderr, 0.75) == pytest.approx(expected, rel=1e-5)
    assert misplaced(scores, stderr, 1.0) == 0
    assert misplaced(torch.zeros(4), torch.zeros(4), 0.5) == 0  # dead units: it is all one which of them leave


@pytest.mark.parametrize("criterion", [Rows, Blocks])
def test_the_promise_is_kept(criterion):
    """Over 60 runs the real fraction is at most the risk, and not so far below that examples are wasted."""
    wrong = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(1000 + seed)
        truth = torch.exp(torch.randn(40, generator=generator, dtype=torch.float64))
        noise = torch.randn(2048, 40, generator=generator, dtype=torch.float64)
        rows = truth * torch.exp(1.5 * noise - 1.5**2 / 2)
        found = until_settled(criterion(), problem_of(rows, 2048), keep=0.5, risk=0.1).scores["u"]
        wrong.append(len(set(found.argsort()[:20].tolist()) ^ set(truth.argsort()[:20].tolist())) / 40)
    values = torch.tensor(wrong)
    error = float(values.std()) / 60**0.5
    assert float(values.mean()) < MARGIN * 0.1 + 3 * error
    assert float(values.mean()) > 0.02


@pytest.mark.parametrize("criterion", ADDITIVE)
def test_every_additive_criterion(conv, criterion):
    batches, draws = repeated(conv.batches, 20), 4 if CRITERIA[criterion].default_draws > 1 else None
    options = {"criterion": criterion, "samples": "auto", "cap": 140, "risk": 1e-12, "draws": draws}
    found = measure(conv.model, batches, None, conv.structure, **options)
    assert found.samples == (128 if criterion == "feature-rank" else 140)  # all ranks of this network are full: exact
    for family in conv.structure.families:
        assert found.scores[family.name].shape == (family.size,)
        assert found.stderr[family.name].isfinite().all()
    assert found.filters.keys() == found.filters_stderr.keys() != set()


@pytest.mark.parametrize("criterion", ["gate-ggn", "gate-empirical", "gate-gradient", "feature-rank"])
def test_without_draws_auto_gives_what_the_number_gives(conv, criterion):
    data, gram = repeated(conv.batches, 40), criterion == "gate-ggn"
    auto = measure(
        conv.model, data, None, conv.structure, criterion=criterion, samples="auto", cap=200, risk=1e-12, gram=gram
    )
    plain = measure(conv.model, data, None, conv.structure, criterion=criterion, samples=auto.samples, gram=gram)
    assert auto.samples == plain.samples == (128 if criterion == "feature-rank" else 200)
    for found, expected in zip(
        (auto.scores, auto.stderr, auto.filters, auto.filters_stderr),
        (plain.scores, plain.stderr, plain.filters, plain.filters_stderr),
        strict=True,
    ):
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-14)
    if gram:
        torch.testing.assert_close(auto.gram, plain.gram, rtol=1e-9, atol=1e-14)


def test_the_seed_decides(conv):
    options = {"criterion": "gate-fisher", "samples": "auto", "cap": 140, "risk": 1e-12}
    data = repeated(conv.batches, 20)
    one, same, other = (measure(conv.model, data, None, conv.structure, seed=s, **options) for s in (1, 1, 2))
    assert torch.equal(one.scores["conv1"], same.scores["conv1"])
    assert not torch.equal(one.scores["conv1"], other.scores["conv1"])


@pytest.mark.parametrize("criterion", ["taylor", "empirical-fisher", "gate-taylor", "magnitude"])
def test_other_criteria_ask_for_a_number(conv, criterion):
    with pytest.raises(HapError, match="cannot tell when it has seen enough"):
        measure(conv.model, conv.batches, None, conv.structure, criterion=criterion, samples="auto")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"samples": "many"}, "no such number of samples"),
        ({"samples": 64, "keep": 0.5}, "nothing is to be settled"),
        ({"samples": "auto", "keep": 0.0}, "keep is out of range"),
        ({"samples": "auto", "keep": 1.5}, "keep is out of range"),
        ({"samples": "auto", "cap": 0}, "no samples to use"),
        ({"samples": "auto", "risk": 0.0}, "risk is out of range"),
        ({"samples": "auto", "risk": 1.0}, "risk is out of range"),
    ],
)
def test_bad_options(conv, options, what):
    with pytest.raises(HapError, match=what):
        measure(conv.model, conv.batches, None, conv.structure, **options)


def test_no_data(conv):
    with pytest.raises(HapError, match="there is no data"):
        measure(conv.model, [], None, conv.structure, samples="auto")
