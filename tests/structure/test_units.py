from __future__ import annotations

import numpy as np

from hap.structure.units import Units


def test_tied_ids_have_one_root() -> None:
    units = Units()
    a, b, c = units.fresh(3), units.fresh(3), units.fresh(3)
    units.tie(a, b)
    units.tie(b, c[::-1])
    assert units.roots(a).tolist() == units.roots(b).tolist() == units.roots(c[::-1]).tolist()
    assert len(set(units.roots(a).tolist())) == 3


def test_tie_broadcasts() -> None:
    units = Units()
    grid = units.fresh(6).reshape(2, 3)
    units.tie(grid[:1], grid)
    assert (units.roots(grid)[0] == units.roots(grid)[1]).all()
    assert len(set(units.roots(grid).ravel().tolist())) == 3


def test_ids_tied_to_nothing_are_frozen() -> None:
    units = Units()
    ids = units.fresh(2)
    units.tie(None, ids)
    assert set(units.frozen) == set(ids.tolist())


def test_the_first_reason_is_kept() -> None:
    units = Units()
    ids = units.fresh(1)
    units.freeze(ids, "first")
    units.freeze(ids, "second")
    assert units.frozen == {0: "first"}


def test_an_axis_that_reads_and_writes_is_a_consumer() -> None:
    for order in (("consumer", "producer"), ("producer", "consumer")):
        units = Units()
        ids = units.own("weight", 0, 4)
        for role in order:
            units.play(ids, role)
        assert units.roles == {("weight", 0): "consumer"}


def test_grids_lose_the_same_positions_of_every_row() -> None:
    units = Units()
    grid = units.fresh(6).reshape(2, 3)
    units.grids.append(grid)
    units.settle_grids()
    assert (units.roots(grid)[0] == units.roots(grid)[1]).all()


def test_a_grid_of_whole_rows_stays_one() -> None:
    units = Units()
    grid = units.fresh(6).reshape(2, 3)
    units.tie(grid[:, :1], grid)
    units.grids.append(grid)
    units.settle_grids()
    assert len(set(units.roots(grid).ravel().tolist())) == 2


def test_grids_that_depend_on_each_other_settle() -> None:
    """The first grid is rectangular only after the second one has been settled, and then again not."""
    units = Units()
    ids = units.fresh(8)
    units.grids += [ids.reshape(2, 4), ids.reshape(4, 2)]
    units.settle_grids()
    for grid in units.grids:
        roots = units.roots(grid)
        assert (roots == roots[:1]).all() or (roots == roots[:, :1]).all()
    assert len(np.unique(units.roots(ids))) == 2
