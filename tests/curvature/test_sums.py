from __future__ import annotations

import pytest
import torch

from hap.curvature.gram import Gram
from hap.curvature.moments import Moments
from hap.curvature.sums import Sums

ROWS = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
TERMS = torch.tensor([1.0, 2, 0, 4, 5, 1, 1, 3, 2])
CUTS = (0, 2, 2, 7, 9)


class Case:
    """A kind of part: how it takes rows i to j, and what it says in the end."""

    def __init__(self, make, add, result):
        self.make, self.add, self.result = make, add, result

    def of(self, i, j):
        part = self.make()
        if j > i:
            self.add(part, i, j)
        return part


CASES = {
    "moments": Case(Moments, lambda m, i, j: m.add(ROWS[i:j], TERMS[i:j]), lambda m: torch.cat([m.mean, m.stderr()])),
    "gram": Case(lambda: Gram(4), lambda g, i, j: g.add(ROWS[i:j]), lambda g: g.total()),
    "sums": Case(Sums, lambda s, i, j: s.add(a=ROWS[i:j].sum(0), b=float(j - i)), lambda s: s["a"] / s["b"]),
}


@pytest.fixture(params=list(CASES))
def kind(request):
    return CASES[request.param]


def copied(part):
    return {name: tensor.clone() for name, tensor in part.state().items()}


def test_merged_parts_say_what_the_whole_says(kind):
    whole, merged = kind.of(0, 9), kind.make()
    for i, j in zip(CUTS, CUTS[1:], strict=False):  # one of them is empty
        merged.merge(copied(kind.of(i, j)))
    torch.testing.assert_close(kind.result(merged), kind.result(whole), rtol=1e-12, atol=1e-12)


def test_a_cleared_part_takes_its_own_state_to_the_bit(kind):
    part = kind.of(0, 6)
    state, expected = part.state(), kind.of(0, 6)
    kind.add(expected, 6, 9)
    part.clear()
    assert part.state() == {}
    part.merge(state)
    kind.add(part, 6, 9)
    assert torch.equal(kind.result(part), kind.result(expected))
