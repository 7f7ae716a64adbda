"""The spectrum of sensitivities, and what the plan makes of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from hap.errors import HapError
from hap.planning.constraints import constraints
from hap.planning.plan import Plan
from hap.report.figures import COLOURS, Tier, new_figure, save_png
from hap.types import Family, Layer, Sensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TIERS: tuple[Tier, ...] = ("keep", "implant", "prune")
_WORDS: dict[Tier, str] = {"keep": "kept", "implant": "implanted", "prune": "pruned"}
_MARKERS: dict[Tier, str] = {"keep": "o", "implant": "D", "prune": "s"}
_SPAN = 1e6  # of a log scale: scores closer to 0 differ in nothing that matters
_MOST_BARS = 300  # with more candidates than this, error bars become a band

_Part = tuple[NDArray[np.float64], NDArray[np.float64], list[Tier]]  # scores, standard errors, tiers


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The candidates' scores in ascending order, each with its standard error and tier; arrays of one length."""

    scores: NDArray[np.float64]
    stderr: NDArray[np.float64]
    tiers: NDArray[np.str_]


def spectrum(sensitivity: Sensitivity, plan: Plan) -> Spectrum:
    """All that the plan decided on: units that could go, and the filters of implanted layers that were ranked alone.

    A unit with one producer counts as implanted when that filter is; where several layers write a
    unit, their filters are ranked and shown one by one. Scores that are not
    finite are left out; a standard error that is not finite counts as unknown, 0.

    Raises:
        HapError: the sensitivity is of another model, or no score is left.
    """
    parts: list[_Part] = [
        (_values(sensitivity.scores, f.name, f.size), _values(sensitivity.stderr, f.name, f.size), tiers)
        for f, tiers in _candidates(sensitivity, plan)
    ]
    for layer in plan.structure.layers:
        loose = _loose_filters(layer, plan)
        if loose:
            scores = _values(sensitivity.filters, layer.module, layer.filters)
            errors = _values(sensitivity.filters_stderr, layer.module, layer.filters)
            implanted = plan.filters[layer.module].indices
            tiers: list[Tier] = ["implant" if i in implanted else "keep" for i in loose]
            parts.append((scores[loose], errors[loose], tiers))
    return _sorted(parts)


def sensitivity_plot(sensitivity: Sensitivity, plan: Plan, path: str | os.PathLike[str]) -> None:
    """A PNG of the sensitivities in ascending order, with standard errors, by what the plan does.

    The scale is logarithmic; where scores are not positive, or very far below the largest, it is
    linear around zero, and the axis says so.

    Raises:
        HapError: see `spectrum`; or matplotlib is missing, or the file cannot be written.
    """
    data = spectrum(sensitivity, plan)
    figure = new_figure(8.0, 4.8)
    axes, lanes = figure.subplots(2, 1, sharex=True, height_ratios=[7, 1])
    _draw_scores(axes, data)
    _draw_lanes(lanes, data)
    source = f"{sensitivity.samples:,} samples" if sensitivity.samples else "no data"
    axes.set_title(f"{len(data.scores):,} candidates by {sensitivity.criterion}, {source}", loc="left", fontsize=11)
    save_png(figure, path)


def _sorted(parts: list[_Part]) -> Spectrum:
    scores = np.concatenate([part[0] for part in parts] or [np.zeros(0)])
    stderr = np.concatenate([part[1] for part in parts] or [np.zeros(0)])
    tiers = np.array([tier for part in parts for tier in part[2]], np.str_)
    order = np.argsort(scores, kind="stable")
    order = order[np.isfinite(scores[order])]
    if not order.size:
        raise HapError("there is no sensitivity to plot", expected="at least one unit with a finite score")
    return Spectrum(scores[order], np.nan_to_num(stderr[order], posinf=0.0), tiers[order])


def _values(scores: Mapping[str, torch.Tensor], name: str, size: int) -> NDArray[np.float64]:
    values = scores.get(name)
    if values is None or values.shape != (size,):
        raise HapError(
            "the sensitivity does not fit the plan",
            expected=f"{size} values for {name!r}",
            got="none" if values is None else f"shape {tuple(values.shape)}",
            remedy="plot the sensitivity that the plan was decided from",
        )
    return values.detach().cpu().double().numpy()


def _candidates(sensitivity: Sensitivity, plan: Plan) -> Iterator[tuple[Family, list[Tier]]]:
    """The families that the plan was free to prune, or has implanted, with what becomes of each unit."""
    names = "protect", "units", "inexact"
    given = {name: plan.options[name] for name in names if name in plan.options}
    rooms = constraints(plan.structure, **given, skipped=sensitivity.skipped).rooms
    for family in plan.structure.families:
        tiers = _unit_tiers(family, plan)
        if rooms[family.name].most or set(tiers) != {"keep"}:
            yield family, tiers


def _unit_tiers(family: Family, plan: Plan) -> list[Tier]:
    implanted = {
        (layer.weight, layer.output_axis): set(plan.filters[layer.module].indices)
        for layer in plan.structure.layers
        if layer.module in plan.filters
    }
    tiers: list[Tier] = ["keep"] * family.size
    for member in family.roles("producer") if len(family.roles("producer")) == 1 else ():
        filters = implanted.get((member.parameter, member.axis), set())
        for unit, positions in enumerate(member.indices):
            if not filters.isdisjoint(positions):
                tiers[unit] = "implant"
    for heads, implant in plan.narrowed.values():
        for unit in implant.indices if heads.family.name == family.name else ():
            tiers[unit] = "implant"
    for unit in plan.decisions[family.name].prune:
        tiers[unit] = "prune"
    return tiers


def _loose_filters(layer: Layer, plan: Plan) -> list[int]:
    """The filters of an implanted layer that were ranked on their own: their channel has other writers, or none."""
    if layer.module not in plan.filters:
        return []
    tied = {
        position
        for family in plan.structure.families
        for member in family.members
        if (member.parameter, member.axis) == (layer.weight, layer.output_axis)
        for unit, positions in enumerate(member.indices)
        if len(family.roles("producer")) == 1 or unit in plan.decisions[family.name].prune
        for position in positions
    }
    return [i for i in range(layer.filters) if i not in tied]


def _draw_scores(axes: Axes, data: Spectrum) -> None:
    rank = np.arange(1, len(data.scores) + 1)
    low, high = data.scores - data.stderr, data.scores + data.stderr
    _set_scale(axes, data.scores, high.max())
    if len(rank) > _MOST_BARS:
        axes.fill_between(rank, low, high, color="#DDDDDD", linewidth=0, label="± standard error")
    else:
        axes.vlines(rank, low, high, color="#BBBBBB", linewidth=0.8, label="± standard error")
    size = 14 if len(rank) <= _MOST_BARS else 4
    for tier in _TIERS:
        mine = data.tiers == tier
        if mine.any():
            axes.scatter(
                rank[mine],
                data.scores[mine],
                size,
                COLOURS[tier],
                marker=_MARKERS[tier],
                linewidth=0,
                label=f"{_WORDS[tier]} ({mine.sum():,})",
                zorder=4 if tier == "implant" else 3,  # the fewest, so not below the others
            )
    axes.legend(frameon=False, loc="upper left", fontsize=9, markerscale=1 if size > 4 else 2.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)


def _set_scale(axes: Axes, scores: NDArray[np.float64], highest: float) -> None:
    sizes = np.abs(scores[scores != 0])
    if not sizes.size:
        axes.set_ylabel("sensitivity")
    elif scores[0] >= sizes.max() / _SPAN:
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(0.5 * scores[0], 1.5 * highest)  # errors as large as their score end at the lower edge
        axes.set_ylabel("sensitivity (log scale)")
    else:
        # The smallest of signed scores is small by chance: do not spend decades on it.
        linear = 10.0 ** np.floor(np.log10(max(np.quantile(sizes, 0.05), sizes.max() / _SPAN)))
        axes.set_yscale("symlog", linthresh=linear)
        axes.set_ylabel(f"sensitivity (log scale, linear within ±{linear:g})")


def _draw_lanes(axes: Axes, data: Spectrum) -> None:
    """One lane per tier: where in the order its candidates are, which overlapping points do not show."""
    rank = np.arange(1, len(data.scores) + 1)
    present = [tier for tier in _TIERS if (data.tiers == tier).any()]
    width = max(0.4, 300 / len(rank))
    axes.eventplot(
        [rank[data.tiers == tier] for tier in present],
        lineoffsets=range(len(present)),
        linelengths=0.8,
        linewidths=width,
        colors=[COLOURS[tier] for tier in present],
    )
    axes.set_yticks(range(len(present)), [_WORDS[tier] for tier in present], fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("rank, from the least sensitive")
