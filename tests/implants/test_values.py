"""Narrow values: against what they are defined to be, and against others of the same rank."""

from __future__ import annotations

import pytest
import torch

from hap.implants.values import Contexts, fit_values, shared, undone

HEADS, WIDTH, OUTPUTS, RANK = 3, 6, 10, 2


def drawn(group: int) -> tuple[Contexts, torch.Tensor, torch.Tensor]:
    """Moments, the contexts (tokens, heads, group * width) that they are of, and how the output layer reads them."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(HEADS, group * WIDTH, group * WIDTH, dtype=torch.float64, generator=generator)
    z = torch.einsum(
        "thi,hij->thj", torch.randn(400, HEADS, len(mix[0]), dtype=torch.float64, generator=generator), mix
    )
    weight = torch.randn(HEADS, OUTPUTS, group * WIDTH, dtype=torch.float64, generator=generator)
    mean = z.mean(0)
    second = torch.einsum("thi,thj->hij", z - mean, z - mean) / len(z)
    return Contexts(second, mean, {}), z, weight


def missed(z: torch.Tensor, weight: torch.Tensor, value: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Head by head, the variance of what the output lacks; every member of a group reads its own narrow context."""
    parts = z.unflatten(-1, (-1, WIDTH))
    small = torch.einsum("thgi,hir->thgr", parts, value).flatten(2)
    lack = torch.einsum("thi,hoi->tho", z, weight) - torch.einsum("thi,hoi->tho", small, output)
    return lack.var(0, unbiased=False).sum(-1)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_what_is_undone(group: int) -> None:
    found, z, weight = drawn(group)
    values = fit_values(found, weight, RANK, group)
    whole = torch.einsum("thi,hoi->tho", z, weight).var(0, unbiased=False).sum(-1)
    share = undone(found, values, weight, group)
    assert torch.allclose(share, missed(z, weight, values.value, values.output) / whole, atol=1e-9)
    assert (share > 0.01).all() and (share < 1).all()
    assert torch.allclose(
        values.value.norm(dim=1), torch.ones(HEADS, RANK, dtype=torch.float64)
    )  # as large as they are
    assert torch.allclose(
        values.shift, ((weight - values.output @ shared(values.value, group).mT) @ found.mean[..., None])[..., 0]
    )


@pytest.mark.parametrize("group", [1, 2])
def test_the_output_weights_are_the_best_for_their_values(group: int) -> None:
    """Regression: no change of them lowers what is missed; alone, no change of the values either."""
    found, z, weight = drawn(group)
    values = fit_values(found, weight, RANK, group)
    best, generator = missed(z, weight, values.value, values.output), torch.Generator().manual_seed(1)
    for scale in (1e-3, 1e-1):
        for _ in range(20):
            value, output = (
                x + scale * torch.randn(x.shape, dtype=x.dtype, generator=generator)
                for x in (values.value, values.output)
            )
            assert (missed(z, weight, values.value, output) > best).all()
            assert group > 1 or (missed(z, weight, value, output) > best).all()


def test_a_group_is_served_better_than_by_its_members_alone() -> None:
    """Solved together, the output weights of a group make use of what its contexts have in common."""
    found, z, weight = drawn(2)
    values = fit_values(found, weight, RANK, 2)
    kept, each = shared(values.value, 2), []
    for member in range(2):
        own = slice(member * WIDTH, (member + 1) * WIDTH)
        second, basis = found.context[:, own, own], values.value
        each.append(weight[:, :, own] @ second @ basis @ torch.linalg.inv(basis.mT @ second @ basis))
    alone = torch.cat(each, -1)
    assert kept.shape == (HEADS, 2 * WIDTH, 2 * RANK)
    assert (missed(z, weight, values.value, values.output) < missed(z, weight, values.value, alone)).all()


@pytest.mark.parametrize("group", [1, 2])
def test_a_rank_above_the_number_of_outputs_has_all_its_columns(group: int) -> None:
    """Of one output a group reads as many directions as it has members: nothing is missed."""
    found, _, weight = drawn(group)
    values = fit_values(found, weight[:, :1], 4, group)
    assert values.value.shape == (HEADS, WIDTH, 4) and values.output.shape == (HEADS, 1, group * 4)
    assert (undone(found, values, weight[:, :1], group) < 1e-9).all()


@pytest.mark.parametrize("group", [1, 3])
def test_nothing_is_undone_where_nothing_is_missing(group: int) -> None:
    """Contexts that span no more than the rank, and heads that are silent."""
    found, z, weight = drawn(group)
    basis = torch.linalg.qr(
        torch.randn(HEADS, WIDTH, RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    )[0]
    span = shared(basis @ basis.mT, group)
    low = Contexts(span @ found.context @ span, found.mean, {})
    assert (undone(low, fit_values(low, weight, RANK, group), weight, group) < 1e-9).all()
    silent = fit_values(found, 0 * weight, RANK, group)
    assert not undone(found, silent, 0 * weight, group).any() and not silent.output.any()
