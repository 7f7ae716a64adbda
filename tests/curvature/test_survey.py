from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hap.curvature import measure
from hap.curvature.rows import Rows
from hap.curvature.survey import survey
from hap.structure import trace

L, C = 4, 6


class Tokens(nn.Module):
    """Two layers on tokens, between a rearrangement and the one that undoes it; then a classifier."""

    def __init__(self, there: Callable[[torch.Tensor], torch.Tensor], back: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.a, self.b, self.fc = nn.Linear(C, 8), nn.Linear(8, C), nn.Linear(C, 3)
        self.there, self.back = there, back

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(self.a(self.there(x)).tanh())
        return self.fc(self.back(y, x).mean(1))


LAYOUTS = {
    "windows": (lambda x: x.view(-1, 2, C), lambda y, x: y.view(x.shape), Rows(0)),
    "windows side by side": (
        lambda x: x.view(len(x), 2, 2, C).transpose(0, 1).reshape(-1, 2, C),
        lambda y, x: y.view(2, len(x), 2, C).transpose(0, 1).reshape(x.shape),
        Rows(0, inner=True),
    ),
    "positions first": (lambda x: x.transpose(0, 1), lambda y, x: y.transpose(0, 1), Rows(1)),
    "flat": (lambda x: x.reshape(-1, C), lambda y, x: y.view(x.shape), Rows(0)),
}


def batches(size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, L, C, generator=generator, dtype=torch.float64)
    return [(x[i : i + size], torch.arange(len(x[i : i + size])) % 3) for i in range(0, 8, size)]


@pytest.mark.parametrize("size", [1, 4, 8])  # 4 samples of 4 positions look alike from outside
@pytest.mark.parametrize("name", LAYOUTS)
def test_samples_are_found_wherever_they_are(name: str, size: int) -> None:
    there, back, rows = LAYOUTS[name]
    plain, model = Tokens(lambda x: x, lambda y, x: y).double(), Tokens(there, back).double()
    data = batches(size)
    structure = trace(plain, data[0][:1])
    want = measure(plain, data, None, structure, criterion="gate-ggn", gram=True)
    have = measure(model, data, None, structure, criterion="gate-ggn", gram=True)
    torch.testing.assert_close(have.scores, want.scores, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(have.stderr, want.stderr, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(have.filters, want.filters, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(have.gram, want.gram, rtol=1e-9, atol=1e-12)
    if size > 1:
        assert survey(model, structure, data[0]).rows["b", "in"] == rows


class Mixed(nn.Module):
    """A family that can be followed, and one whose reader is used as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(C, 5), nn.Linear(5, 7), nn.Linear(7, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(self.a(x).relu(), self.b.weight, self.b.bias)
        return self.d(self.c(y.relu()).relu())


def test_a_family_that_cannot_be_followed_is_skipped(caplog) -> None:
    model, x = Mixed(), torch.randn(8, C, generator=torch.Generator().manual_seed(2))
    structure = trace(model, (x,))
    found = measure(model, [(x, None)], None, structure, criterion="gate-ggn", gram=True)
    assert set(found.scores) == {"b", "c"}
    assert found.skipped == {"a": "it is read by 'b', which the model's forward never calls as a module"}
    assert "family 'a' stays, for want of a score" in caplog.text
    assert found.gram is not None and found.gram.shape == (16, 16)
    assert not found.gram[:5].any() and not found.gram[:, :5].any()
    torch.testing.assert_close(found.gram.diagonal()[5:] / 2, torch.cat([found.scores["b"], found.scores["c"]]))


def test_an_iterator_is_read_once() -> None:
    model, data = Tokens(lambda x: x, lambda y, x: y).double(), batches(4)
    structure = trace(model, data[0][:1])
    once = measure(model, iter(data), None, structure, criterion="gate-ggn")
    again = measure(model, data, None, structure, criterion="gate-ggn")
    assert once.samples == again.samples == 8
    assert all(torch.equal(once.scores[name], again.scores[name]) for name in again.scores)


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_example_does_not_say_where_samples_are_and_the_next_batches_do(name: str) -> None:
    there, back, _ = LAYOUTS[name]
    plain, model = Tokens(lambda x: x, lambda y, x: y).double(), Tokens(there, back).double()
    [(x, y)] = batches(8)
    data = [(x[:1], y[:1]), (x[1:2], y[1:2]), (x[2:], y[2:])]
    structure = trace(plain, (x,))
    want = measure(plain, data, None, structure, criterion="gate-ggn")
    have = measure(model, iter(data), None, structure, criterion="gate-ggn")
    torch.testing.assert_close(have.scores, want.scores, rtol=1e-9, atol=1e-12)
    assert have.samples == 8
