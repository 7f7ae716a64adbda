"""Ids are rearranged as data are: the oracle is torch, applied to a tensor that holds the ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hap.structure.units import Units
from hap.structure.value import Value, across, align, along, axis_ids, reshape, support


def full(value: Value) -> np.ndarray:
    (factor,) = value.factors
    return np.broadcast_to(factor, value.shape)


@pytest.mark.parametrize(
    ("shape", "axis", "target"),
    [
        ((2, 6, 4, 4), 1, (2, 96)),
        ((2, 6, 4, 4), 1, (2, 2, 3, 4, 4)),
        ((2, 6, 4, 4), 1, (2, 6, 16)),
        ((2, 6, 4), 1, (12, 4)),
        ((1, 6, 1, 1), 1, (6,)),
        ((6,), 0, (1, 6, 1)),
        ((2, 6, 4), 1, (2, 3, 8)),
        ((2, 5, 6), 2, (2, 5, 3, 2)),
    ],
)
def test_reshape_moves_ids_like_data(shape: tuple[int, ...], axis: int, target: tuple[int, ...]) -> None:
    units = Units()
    value = Value(shape, (along(units.fresh(shape[axis]), axis, len(shape)),))
    want = torch.from_numpy(full(value).copy()).reshape(target).numpy()
    assert (full(reshape(units, value, target, "view")) == want).all()
    assert not units.frozen


@given(
    st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4), st.integers(0, 3), st.randoms(use_true_random=False)
)
def test_reshape_there_and_back_keeps_every_id(shape: list[int], axis: int, random) -> None:
    axis %= len(shape)
    units = Units()
    value = Value(tuple(shape), (along(units.fresh(shape[axis]), axis, len(shape)),))
    factors = [n for n in shape if n > 1] or [1]
    random.shuffle(factors)
    there = reshape(units, value, tuple(factors), "view")
    back = reshape(units, there, tuple(shape), "view")
    if there.factors and back.factors and not units.frozen:
        flat = torch.from_numpy(full(value).copy()).flatten().numpy()
        assert (full(there).ravel() == flat).all()
        assert (full(back) == full(value)).all()


def test_two_axes_of_units_cannot_be_merged() -> None:
    units = Units()
    ids = [units.fresh(2), units.fresh(3)]
    value = Value((2, 3), (along(ids[0], 0, 2), along(ids[1], 1, 2)))
    assert reshape(units, value, (6,), "flatten").factors == ()
    assert len(units.frozen) == 5


def test_an_open_leading_axis_makes_the_groups_leave_as_a_whole() -> None:
    units = Units()
    value = Value((6,), (units.fresh(6),))
    split = reshape(units, value, (3, 2), "view", 0)
    assert [support(f) for f in split.factors] == [{0}]
    assert len(set(units.roots(np.arange(6)).tolist())) == 3


def test_three_axes_out_of_one_shrink_along_the_last() -> None:
    units = Units()
    reshape(units, Value((12,), (units.fresh(12),)), (2, 2, 3), "view")
    units.settle_grids()
    assert not units.frozen
    assert units.roots(np.arange(12)).tolist() == [0, 1, 2] * 4


def test_an_axis_split_over_two_is_rearranged_as_one() -> None:
    """A key head repeated for its query heads, while the head's width has ids too."""
    units = Units()
    ids = units.fresh(6).reshape(1, 2, 1, 3)
    (out,) = reshape(units, Value((5, 2, 4, 3), (ids,)), (5, 8, 3), "reshape").factors
    assert out.shape == (1, 8, 3)
    assert out[0, :, 0].tolist() == [0, 0, 0, 0, 3, 3, 3, 3]


def test_align_ties_aligned_units() -> None:
    units = Units()
    a, b = units.fresh(3), units.fresh(3)
    out = align(units, [Value((2, 3, 4), (along(a, 1, 3),)), Value((3, 1), (along(b, 0, 2),))], (2, 3, 4), "add")
    assert units.roots(a).tolist() == units.roots(b).tolist() == units.roots(out.factors[0].ravel()).tolist()
    assert not units.frozen


def test_align_freezes_what_meets_a_fixed_size() -> None:
    units = Units()
    align(units, [Value((2, 3), (along(units.fresh(3), 1, 2),)), Value((2, 3))], (2, 3), "add")
    assert len(units.frozen) == 3
    units = Units()
    align(units, [Value((2, 3), (along(units.fresh(3), 1, 2),)), Value((2, 1))], (2, 3), "add")
    assert not units.frozen


def test_axis_ids_ties_what_cannot_be_told_apart() -> None:
    units = Units()
    value = Value((2, 3), (units.fresh(6).reshape(2, 3),))
    assert axis_ids(units, value, 0) is not None
    assert len(set(units.roots(np.arange(6)).tolist())) == 2
    assert axis_ids(units, Value((2, 3)), 0) is None


def test_across_keeps_the_other_axes() -> None:
    units = Units()
    value = across(units, Value((2, 3), (units.fresh(6).reshape(2, 3),)), {0})
    assert [support(f) for f in value.factors] == [{1}]
    assert len(set(units.roots(np.arange(6)).tolist())) == 3
