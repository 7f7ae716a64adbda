from __future__ import annotations

import dataclasses

from hap.planning import Decision, Implant
from hap.surgery.layout import layout


def test_pruned_positions_go_and_implanted_ones_come_last(plan) -> None:
    kept = layout(plan).kept
    assert kept["stem.weight", 0] == (2, 5, 6, 7, 0, 3)
    assert kept["depthwise.weight", 0] == kept["inner.weight", 1] == kept["norm.running_var", 0] == (2, 5, 6, 7, 0, 3)
    assert kept["inner.bias", 0] == (1, 3, 5, 2, 4)
    assert kept["fc.weight", 1][:32] == (*range(16, 32), *range(48, 64))


def test_without_implants_the_order_stays(plan) -> None:
    kept = layout(dataclasses.replace(plan, implants={})).kept
    assert kept["stem.weight", 0] == (0, 2, 3, 5, 6, 7)


def test_what_loses_nothing_is_not_touched(plan) -> None:
    whole = {f.name: Decision(tuple(range(f.size)), ()) for f in plan.structure.families}
    nothing = dataclasses.replace(plan, implants={}, decisions=whole)
    assert layout(nothing).kept == {}
    assert list(layout(nothing).of("stem.weight", 0, 8)) == list(range(8))
    only_stem = dataclasses.replace(plan, decisions=whole, implants={"stem": Implant((0,), "pointwise")})
    assert layout(only_stem).kept["stem.weight", 0] == (1, 2, 3, 4, 5, 6, 7, 0)
    assert ("inner.weight", 0) not in layout(only_stem).kept
