"""How wide each layer is, before and after."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from hap.errors import HapError
from hap.planning.plan import Plan
from hap.report.figures import COLOURS, new_figure, save_png
from hap.types import Family, Layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LONGEST_NAME = 44
_TALLEST = 400.0  # inches; more pixels than 2^16 cannot be drawn
_ROW, _HEAD = 0.17, 0.85  # inches: of a bar, and of a part's title and axis

Counted = Literal["filters", "heads", "neurons"]


@dataclass(frozen=True)
class LayerWidth:
    """What one layer writes: of the `dense` ones, `kept` stay whole and `implanted` get a smaller replacement.

    Attributes:
        module: the layer's name; of heads that of the first layer that writes them.
        counted: what the numbers count: a convolution's filters, a linear layer's neurons, attention heads.
    """

    module: str
    counted: Counted
    dense: int
    kept: int
    implanted: int


def widths(plan: Plan) -> tuple[LayerWidth, ...]:
    """The width of every convolution and linear layer, in the order of the forward pass.

    The layers that write the same attention heads are one row.
    """
    pruned = _pruned(plan)
    heads = {
        (member.parameter, member.axis): family
        for family in plan.structure.families
        if family.kind == "head"
        for member in family.roles("producer")
    }
    rows: dict[str, LayerWidth] = {}
    for layer in plan.structure.layers:
        place = (layer.weight, layer.output_axis)
        if place in heads:
            rows.setdefault(heads[place].name, _heads(heads[place], plan))
        else:
            rows[layer.module] = _width(layer, pruned.get(place, set()), plan)
    return tuple(rows.values())


def width_plot(plan: Plan, path: str | os.PathLike[str]) -> None:
    """A PNG with one bar per layer: its dense width, and what is left of it, whole and implanted.

    Filters, neurons and heads have a part each: their numbers do not compare. A kind of which all stay as they are has
    none, unless that is so of each.

    Raises:
        HapError: the model has no layers, matplotlib is missing, or the file cannot be written.
    """
    rows = widths(plan)
    if not rows:
        raise HapError("there is no layer to plot", expected="a convolution or linear layer in the plan's structure")
    changed = {row.counted for row in rows if row.kept < row.dense} or {row.counted for row in rows}
    parts = [[row for row in rows if row.counted == kind] for kind in get_args(Counted) if kind in changed]
    heights = [_HEAD + _ROW * len(part) for part in parts]
    figure = new_figure(8.0, min(sum(heights), _TALLEST))
    drawn = figure.subplots(len(parts), 1, squeeze=False, height_ratios=[len(part) + 1 for part in parts])[:, 0]
    for axes, part in zip(drawn, parts, strict=True):
        _draw_part(axes, part, implants=any(row.implanted for row in rows))
    drawn[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0.2, fontsize=9)
    save_png(figure, path)


def _draw_part(axes: Axes, rows: Sequence[LayerWidth], *, implants: bool) -> None:
    _draw_bars(axes, rows, implants)
    axes.set_yticks(range(len(rows)), [_short(r.module) for r in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first layer on top, no empty rows at the ends
    axes.set_xlim(0, 1.18 * max(r.dense for r in rows))  # room for the numbers
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.locator_params(axis="x", integer=True)
    dense, left = sum(r.dense for r in rows), sum(r.kept + r.implanted for r in rows)
    axes.set_title(f"{left:,} of {dense:,} {rows[0].counted} remain", loc="left", fontsize=11)


def _draw_bars(axes: Axes, rows: Sequence[LayerWidth], implants: bool) -> None:
    places = range(len(rows))
    kept, implanted = [r.kept for r in rows], [r.implanted for r in rows]
    axes.barh(places, [r.dense for r in rows], height=0.78, color="#E4E4E4", label="dense")
    axes.barh(places, kept, height=0.78, color=COLOURS["keep"], label="kept")
    if implants:
        axes.barh(
            places,
            implanted,
            left=kept,
            height=0.78,
            color=COLOURS["implant"],
            hatch="//////",
            edgecolor="white",
            linewidth=0,
            label="implanted",
        )
    for place, row in zip(places, rows, strict=True):
        text = f"{row.kept}" + (f" + {row.implanted}" if row.implanted else "") + f" of {row.dense}"
        axes.text(row.dense, place, f" {text}", va="center", fontsize=7, color="#555555")


def _pruned(plan: Plan) -> dict[tuple[str, int], set[int]]:
    """For every axis that carries units, the positions that leave."""
    gone: dict[tuple[str, int], set[int]] = {}
    for family in plan.structure.families:
        for member in family.members:
            positions = gone.setdefault((member.parameter, member.axis), set())
            for unit in plan.decisions[family.name].prune:
                positions.update(member.indices[unit])
    return gone


def _heads(family: Family, plan: Plan) -> LayerWidth:
    narrow = sum(len(i.indices) for heads, i in plan.narrowed.values() if heads.family.name == family.name)
    kept = len(plan.decisions[family.name].keep)
    return LayerWidth(family.name, "heads", family.size, kept - narrow, narrow)


def _width(layer: Layer, pruned: set[int], plan: Plan) -> LayerWidth:
    implant = plan.filters.get(layer.module)
    implanted = len(set(implant.indices) - pruned) if implant else 0
    kept = layer.filters - len(pruned) - implanted
    return LayerWidth(layer.module, "filters" if layer.kernel else "neurons", layer.filters, kept, implanted)


def _short(name: str) -> str:
    """The end of a long name: that is what tells layers apart."""
    return name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]
