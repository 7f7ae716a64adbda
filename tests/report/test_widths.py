from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hap.errors import HapError
from hap.planning.plan import Plan
from hap.report import LayerWidth, width_plot, widths
from hap.types import Layer, Structure


def test_widths_count_kept_and_implanted_filters(plan: Plan) -> None:
    assert widths(plan) == (LayerWidth("first", 4, 3, 0), LayerWidth("tied", 5, 2, 2), LayerWidth("last", 2, 2, 0))


def test_an_implant_of_a_pruned_filter_is_not_counted(plan: Plan) -> None:
    implants = {"tied": dataclasses.replace(plan.implants["tied"], indices=(1, 4))}
    assert widths(dataclasses.replace(plan, implants=implants))[1] == LayerWidth("tied", 5, 3, 1)


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
