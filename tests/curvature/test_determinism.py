"""Same seed, same bits; and what may change with the order of the batches."""

from __future__ import annotations

import pytest
import torch

from hap.curvature import CRITERIA, measure

FIT = sorted(set(CRITERIA) - {"bn-scale"})  # these networks have layers without batch norm
# No random numbers, and a mean over examples or batches: the order of the batches changes rounding only.
ANY_ORDER = sorted(n for n in FIT if not CRITERIA[n].default_draws and n != "random")
IN_ORDER = sorted(set(FIT) - set(ANY_ORDER) - {"random"})


def flat(case, batches, **options):
    found = measure(case.model, batches, None, case.structure, **options)
    return torch.cat([case.flat(found.scores, found.filters), case.flat(found.stderr, found.filters_stderr)])


@pytest.mark.parametrize("criterion", FIT)
def test_the_same_seed_gives_the_same_bits(mlp, criterion):
    once = flat(mlp, mlp.batches, criterion=criterion, seed=3)
    assert torch.equal(once, flat(mlp, mlp.batches, criterion=criterion, seed=3))


@pytest.mark.parametrize("criterion", ANY_ORDER)
def test_the_order_of_batches_does_not_matter_without_chance(mlp, criterion):
    there, back = (flat(mlp, b, criterion=criterion) for b in (mlp.batches, mlp.batches[::-1]))
    torch.testing.assert_close(there, back, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("criterion", IN_ORDER)
def test_random_draws_belong_to_a_place_in_the_order(mlp, criterion):
    there, back = (flat(mlp, b, criterion=criterion) for b in (mlp.batches, mlp.batches[::-1]))
    assert not torch.allclose(there, back)
