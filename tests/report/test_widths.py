from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import hap
from hap.errors import HapError
from hap.planning.plan import Plan
from hap.report import LayerWidth, width_plot, widths
from hap.types import Budget, Layer, Sensitivity, Structure


def test_widths_count_kept_and_implanted_filters(plan: Plan) -> None:
    first, tied, last = widths(plan)
    assert first == LayerWidth("first", "filters", 4, 3, 0) and tied == LayerWidth("tied", "filters", 5, 2, 2)
    assert last == LayerWidth("last", "filters", 2, 2, 0)


def test_an_implant_of_a_pruned_filter_is_not_counted(plan: Plan) -> None:
    implants = {"tied": dataclasses.replace(plan.implants["tied"], indices=(1, 4))}
    assert widths(dataclasses.replace(plan, implants=implants))[1] == LayerWidth("tied", "filters", 5, 3, 1)


def colours(path: Path) -> set[tuple[int, ...]]:
    """The colours that fill a visible area."""
    values, counts = np.unique(np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3), axis=0, return_counts=True)
    return {tuple(map(int, value)) for value, count in zip(values, counts, strict=True) if count > 40}


BLUE, ORANGE, GREY = (0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0xE4, 0xE4, 0xE4)


def test_width_plot_shows_all_three_parts(plan: Plan, tmp_path: Path) -> None:
    width_plot(plan, tmp_path / "widths.png")
    assert colours(tmp_path / "widths.png") >= {BLUE, ORANGE, GREY}


def test_width_plot_has_no_implants_where_the_plan_has_none(plan: Plan, tmp_path: Path) -> None:
    width_plot(dataclasses.replace(plan, implants={}), tmp_path / "widths.png")
    assert ORANGE not in colours(tmp_path / "widths.png")


def many_layers(plan: Plan, count: int) -> Plan:
    layers = tuple(
        Layer(f"encoder.{i}.attention.projection.of.the.output", f"{i}.weight", None, 64, 0, (), 1, False, 1)
        for i in range(count)
    )
    return dataclasses.replace(plan, structure=Structure((), (), layers, {}, {}), decisions={}, implants={})


def test_width_plot_grows_with_the_layers(plan: Plan, tmp_path: Path) -> None:
    """A row stays as high as its label, 7 points, however many there are."""
    heights = []
    for count in (5, 35):
        width_plot(many_layers(plan, count), tmp_path / "widths.png")
        heights.append(Image.open(tmp_path / "widths.png").height)
    assert heights[1] - heights[0] > 30 * 7 / 72 * 150


def test_width_plot_needs_a_layer(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(HapError, match="no layer to plot"):
        width_plot(many_layers(plan, 0), tmp_path / "widths.png")
    assert list(tmp_path.iterdir()) == []


def test_heads_are_counted_as_heads(heads: tuple[Sensitivity, Plan]) -> None:
    """Once, though three layers write them; other linear layers have neurons."""
    found = {row.module: (row.counted, row.dense, row.kept, row.implanted) for row in widths(heads[1])}
    neurons = {f"{block}.{name}": n for block in (0, 1) for name, n in (("o", 16), ("up", 20), ("down", 16))}
    assert found == {"0.q": ("heads", 4, 2, 0), "1.q": ("heads", 4, 0, 2)} | {
        name: ("neurons", size, size, 0) for name, size in neurons.items()
    }


def test_each_kind_has_a_scale_of_its_own(heads: tuple[Sensitivity, Plan], tmp_path: Path, drawn: list[Figure]) -> None:
    """And no part where nothing of it has gone."""
    sensitivity, plan = heads
    both = hap.decide(plan.structure, sensitivity, Budget(params=0.6, heads=0.6), implant_ratio=0)
    for found in (
        plan,
        both,
        dataclasses.replace(plan, structure=dataclasses.replace(plan.structure, families=()), implants={}),
    ):
        width_plot(found, tmp_path / "widths.png")
    titles = [[axes.get_title(loc="left").split()[3] for axes in figure.axes] for figure in drawn]
    assert titles == [["heads"], ["heads", "neurons"], ["neurons"]]
    assert drawn[0].axes[0].get_title(loc="left") == "4 of 8 heads remain"
    assert [axes.get_xlim()[1] for axes in drawn[1].axes] == pytest.approx([1.18 * 4, 1.18 * 20])


def test_narrow_heads_are_shown_as_implants(heads: tuple[Sensitivity, Plan], tmp_path: Path) -> None:
    width_plot(heads[1], tmp_path / "widths.png")
    assert ORANGE in colours(tmp_path / "widths.png")
