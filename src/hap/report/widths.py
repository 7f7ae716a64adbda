"""How wide each layer is, before and after."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hap.errors import HapError
from hap.planning.plan import Plan
from hap.report.figures import COLOURS, new_figure, save_png
from hap.types import Layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LONGEST_NAME = 44
_TALLEST = 400.0  # inches; more pixels than 2^16 cannot be drawn


@dataclass(frozen=True)
class LayerWidth:
    """The filters of one layer: of the `dense` ones, `kept` stay whole and `implanted` get a smaller replacement."""

    module: str
    dense: int
    kept: int
    implanted: int


def widths(plan: Plan) -> tuple[LayerWidth, ...]:
    """The width of every convolution and linear layer, in the order of the forward pass."""
    pruned = _pruned(plan)
    return tuple(
        _width(layer, pruned.get((layer.weight, layer.output_axis), set()), plan) for layer in plan.structure.layers
    )


def width_plot(plan: Plan, path: str | os.PathLike[str]) -> None:
    """A PNG with one bar per layer: its dense width, and what is left of it, whole and implanted.

    Raises:
        HapError: the model has no layers, matplotlib is missing, or the file cannot be written.
    """
    rows = widths(plan)
    if not rows:
        raise HapError("there is no layer to plot", expected="a convolution or linear layer in the plan's structure")
    figure = new_figure(8.0, min(1.2 + 0.17 * len(rows), _TALLEST))
    axes = figure.add_subplot()
    _draw_bars(axes, rows)
    axes.set_yticks(range(len(rows)), [_short(r.module) for r in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first layer on top, no empty rows at the ends
    axes.set_xlim(0, 1.18 * max(r.dense for r in rows))  # room for the numbers
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("filters")
    dense, left = sum(r.dense for r in rows), sum(r.kept + r.implanted for r in rows)
    axes.set_title(f"{left:,} of {dense:,} filters remain", loc="left", fontsize=11)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0.2, fontsize=9)
    save_png(figure, path)


def _draw_bars(axes: Axes, rows: tuple[LayerWidth, ...]) -> None:
    places = range(len(rows))
    kept, implanted = [r.kept for r in rows], [r.implanted for r in rows]
    axes.barh(places, [r.dense for r in rows], height=0.78, color="#E4E4E4", label="dense")
    axes.barh(places, kept, height=0.78, color=COLOURS["keep"], label="kept")
    if any(implanted):
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


def _width(layer: Layer, pruned: set[int], plan: Plan) -> LayerWidth:
    implant = plan.filters.get(layer.module)
    implanted = len(set(implant.indices) - pruned) if implant else 0
    for heads, narrow in plan.narrowed.values():
        if layer in heads.projections:
            implanted = sum(len(heads.member(layer.weight).indices[unit]) for unit in narrow.indices)
    return LayerWidth(layer.module, layer.filters, layer.filters - len(pruned) - implanted, implanted)


def _short(name: str) -> str:
    """The end of a long name: that is what tells layers apart."""
    return name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]
