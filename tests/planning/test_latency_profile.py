"""The latency table, by a clock that runs at one tick for each weight that is multiplied."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import hap
from hap import Budget, HapError, decide
from hap.planning import Latency, latency_profile, time_layers
from hap.planning.latency_table import Grid, LatencyTable


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Instead of seconds: parameters / 1000; the whole model takes twice its layers. Notes what was timed."""
    seen: list[str] = []

    def count(models, args, **_):
        found = {}
        for name, model in models.items():
            model()  # it runs
            seen.append(name)
            took = sum(p.numel() for p in model.parameters()) / 1000
            found[name] = Latency(2 * took if name == "dense" else took, 0, 0, 1, 1)
        return found

    monkeypatch.setattr(latency_profile, "measure_latency", count)
    return seen


def test_the_dense_models_time_is_what_was_measured(net, structure, inputs, timed) -> None:
    table = time_layers(net, structure, (inputs,))
    dense = hap.CostModel(structure, table).dense
    assert dense.latency == pytest.approx(2 * sum(p.numel() for p in net.parameters()) / 1000)


def test_narrower_layers_take_the_time_of_their_own_size(timed) -> None:
    """Grouped, depthwise, transposed and linear layers are built at the widths that the surgery would give them."""
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=2),
        nn.ConvTranspose2d(8, 6, 2), nn.ConvTranspose2d(6, 4, 2, groups=2), nn.Conv2d(4, 4, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    x = torch.zeros(1, 2, 16, 16)
    structure = hap.trace(model, (x,))
    table = time_layers(model, structure, (x,))
    for layer in structure.layers:
        grid, weight = table.layers[layer.module], model.get_submodule(layer.module).weight
        assert grid.rows[-1] == weight.shape[layer.output_axis]
        assert grid.columns[-1] == weight.shape[1 - layer.output_axis]
        for i, rows in enumerate(grid.rows.tolist()):
            for j, columns in enumerate(grid.columns.tolist()):
                biases = rows * (layer.groups if layer.transposed else 1)
                taken = rows * columns * int(np.prod(layer.kernel)) + biases
                assert grid.milliseconds[i, j] == pytest.approx(taken / 1000), (layer.module, rows, columns)
    assert len(table.layers["1"].rows) > 2 and len(table.layers["1"].columns) == 1  # depthwise: only rows shrink


def test_a_latency_budget_is_met(net, structure, inputs, sensitivity, timed) -> None:
    table = time_layers(net, structure, (inputs,))
    for mode in ("paper", "optimal"):
        plan = decide(structure, sensitivity(structure), Budget(latency=0.6), mode=mode, implant_ratio=0, latency=table)
        assert plan.small.latency <= 0.6 * plan.dense.latency
        assert hap.Plan.from_json(plan.to_json()) == plan


def test_interpolation() -> None:
    grid = Grid(np.array([2, 4]), np.array([1, 3, 5]), np.array([[1.0, 2.0, 5.0], [3.0, 6.0, 7.0]]))
    rows, columns = np.array([2, 4, 3, 3, 9, 1]), np.array([1, 5, 1, 4, 9, 0])
    assert grid.at(rows, columns).tolist() == [1.0, 7.0, 2.0, 5.0, 7.0, 1.0]
    table = LatencyTable("here", 2.0, {"a": grid})
    assert table.milliseconds("a", rows[:1], columns[:1]).tolist() == [2.0]
    assert table.milliseconds("never runs", rows, columns) == 0


def test_noise_does_not_make_narrow_layers_slow() -> None:
    times = np.array([[5.0, 2.0], [1.0, 3.0]])
    assert latency_profile._falling(times).tolist() == [[1.0, 2.0], [1.0, 3.0]]


def test_the_cache_saves_measuring(net, structure, inputs, timed, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "latency.json"
    first = time_layers(net, structure, (inputs,), cache=path)
    assert timed
    timed.clear()
    again = time_layers(net, structure, (inputs,), cache=path)
    assert not timed and again.scale == first.scale
    (device,) = json.loads(path.read_text())
    assert "torch" in device and first.device == device
    assert [p.name for p in path.parent.iterdir()] == ["latency.json"]


def test_another_input_is_measured_anew(net, structure, inputs, timed, tmp_path: Path) -> None:
    time_layers(net, structure, (inputs,), cache=tmp_path / "latency.json")
    timed.clear()
    time_layers(net, structure, (inputs[:1],), cache=tmp_path / "latency.json")
    assert timed


@pytest.mark.parametrize("text", ["", "[]", '{"here": 3}', '{"here": {"a": "slow"}}'])
def test_another_file_is_no_cache(net, structure, inputs, tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(HapError, match="holds no measured times"):
        time_layers(net, structure, (inputs,), cache=path)
    assert path.read_text() == text


def test_a_latency_budget_needs_a_table(structure, sensitivity) -> None:
    with pytest.raises(HapError, match="needs times measured on your device"):
        decide(structure, sensitivity(structure), Budget(latency=0.5))


def test_a_model_without_layers_that_run_is_refused(timed) -> None:
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(HapError, match="no layer of this model could be timed"):
        time_layers(model, hap.Structure((), (), (), {}, {}), (torch.zeros(1, 2),))


def test_a_real_measurement(net, structure, inputs) -> None:
    table = time_layers(net, structure, (inputs,))
    assert hap.CostModel(structure, table).dense.latency > 0
