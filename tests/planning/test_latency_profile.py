"""The latency table, by a clock that runs at one tick for each weight that is multiplied."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import hap
from hap import Budget, HapError, decide
from hap.batches import device_of
from hap.implants import FORMS, Option
from hap.planning import Latency, latency_profile, time_layers, ways
from hap.planning.latency_cache import LatencyCache, describe, processor
from hap.planning.latency_parts import Timed
from hap.planning.latency_table import Grid, LatencyTable


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Instead of seconds: parameters / 1000, or elements; the model takes twice its layers. Notes what was timed."""
    seen: list[str] = []

    def count(models, args, **_):
        found = {}
        for name, model in models.items():
            model()  # it runs
            seen.append(name)
            elements = model.args[0].numel() if isinstance(model.module, nn.ReLU) else 0
            took = sum(p.numel() for p in model.parameters()) / 1000 + elements
            found[name] = Latency(0, 0, 0, 1, 1, least=2 * took if name == "dense" else took)
        return found

    monkeypatch.setattr(latency_profile, "measure_latency", count)
    return seen


def test_the_dense_models_time_is_what_was_measured(net, structure, inputs, timed) -> None:
    table = time_layers(net, structure, (inputs,))
    dense = hap.CostModel(structure, table).dense
    assert dense.latency == pytest.approx(2 * sum(p.numel() for p in net.parameters()) / 1000)


def test_what_lies_between_the_layers_shrinks_as_operations_on_their_outputs_do(timed) -> None:
    """By the clock of this test in proportion to the elements, and all of it together is what is left of the model."""
    model, x = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.zeros(1, 2, 8, 8)
    table = time_layers(model, hap.trace(model, (x,)), (x,))
    first, second = table.between["0"], table.between["2"]
    whole = sum(p.numel() for p in model.parameters()) / 1000
    assert first.at(8, 1) + second.at(4, 1) == pytest.approx(whole)
    assert first.at(8, 1) / second.at(4, 1) == pytest.approx(8 * 36 / (4 * 16))
    assert first.at(4, 1) == pytest.approx(first.at(8, 1) / 2) and table.scale == 1


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
        for i, rows in enumerate(grid.rows):
            for j, columns in enumerate(grid.columns):
                biases = rows * (layer.groups if layer.transposed else 1)
                taken = rows * columns * int(np.prod(layer.kernel)) + biases
                assert grid.milliseconds[i][j] == pytest.approx(taken / 1000), (layer.module, rows, columns)
    assert len(table.layers["1"].rows) > 2 and len(table.layers["1"].columns) == 1  # depthwise: only rows shrink


def test_a_latency_budget_is_met(net, structure, inputs, sensitivity, timed) -> None:
    table = time_layers(net, structure, (inputs,))
    for mode in ("paper", "optimal"):
        plan = decide(structure, sensitivity(structure), Budget(latency=0.6), mode=mode, implant_ratio=0, latency=table)
        assert plan.small.latency <= 0.6 * plan.dense.latency
        assert hap.Plan.from_json(plan.to_json()) == plan


def test_interpolation() -> None:
    grid = Grid([2, 4], [1, 3, 5], [[1.0, 2.0, 5.0], [3.0, 6.0, 7.0]])
    widths = [(2, 1), (4, 5), (3, 1), (3, 4), (9, 9), (1, 0)]
    assert [grid.at(*width) for width in widths] == [1.0, 7.0, 2.0, 5.0, 7.0, 1.0]
    table = LatencyTable("here", 0.5, {"a": grid})
    assert table.milliseconds("a", 2, 1) == 0.5
    assert table.milliseconds("never runs", 2, 1) == 0


def test_noise_does_not_make_narrow_layers_slow() -> None:
    assert latency_profile._falling([[5.0, 2.0], [1.0, 3.0]]) == [[1.0, 2.0], [1.0, 3.0]]


WAY = ("low-rank", 2)


def test_an_implanted_layer_is_two_parts_and_what_joins_them() -> None:
    """What lies between the layers is as for the full layer; a part that is not there takes no time."""
    implants, joins = {"a": {WAY: Grid([2], [1], [[0.5]])}}, {"a": Grid([4], [1], [[0.25]])}
    between = {"a": Grid([4], [1], [[7.0]])}
    table = LatencyTable("here", 0.8, {"a": Grid([2, 4], [1], [[2.0], [4.0]])}, implants, joins, between)
    assert table.milliseconds("a", 4, 1) == pytest.approx(0.8 * 4 + 7)
    assert table.milliseconds("a", 4, 1, 2, WAY) == pytest.approx(0.8 * (2 + 0.5 + 0.25) + 7)
    assert table.milliseconds("a", 4, 1, 4, WAY) == pytest.approx(0.8 * 0.5 + 7)
    with pytest.raises(HapError, match="no times of pointwise implants in 'a'"):
        table.milliseconds("a", 4, 1, 2, ("pointwise", None))


def test_implants_take_the_time_of_their_own_size(net, structure, inputs, timed) -> None:
    """Every form that applies, in a dense, a grouped and a linear layer, at all widths of the grid."""
    layers = [structure.layer(name) for name in ("back", "narrow", "hidden")]
    ways = {
        layer.module: [
            (name, rank)
            for name, form in FORMS.items()
            if form.applies(layer)
            for rank in form.ranks(layer, layer.filters, structure.tensors[layer.weight].shape[1])[-1:]
        ]
        for layer in layers
    }
    table = time_layers(net, structure, (inputs,), implants=ways)
    assert {form for found in ways.values() for form, _ in found} == set(FORMS)
    for layer in layers:
        bias = net.get_submodule(layer.module).bias is not None
        assert list(table.implants.get(layer.module, {})) == ways[layer.module]
        for way, grid in table.implants.get(layer.module, {}).items():
            for i, rows in enumerate(grid.rows):
                for j, columns in enumerate(grid.columns):
                    expected = FORMS[way[0]].weights(layer, rows, columns, way[1]) + bias * rows
                    assert grid.milliseconds[i][j] <= expected / 1000 + 1e-12  # noise is evened out downwards
            assert grid.milliseconds[-1][-1] == pytest.approx(expected / 1000)
            assert table.joins[layer.module].at(layer.filters, 1) == 0


def test_options_are_the_ways_to_time(structure) -> None:
    given = {"back": (Option("pointwise", None, torch.ones(8)), Option("depthwise", 2, torch.ones(8)))}
    assert ways(structure, given, mode="optimal") == {"back": (("pointwise", None), ("depthwise", 2))}
    papers = ways(structure, {}, mode="paper")
    assert papers["back"] == (("pointwise", None),) and "pointwise" not in papers and "head" not in papers


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("factor", [0.1, 0.9, 3.0, 1e6])
def test_implants_do_not_make_the_model_slower(structure, sensitivity, slow_implants, factor, joint) -> None:
    """Also where a plan for parameters alone would; and a plan never loses more than one without implants."""
    given, table = sensitivity(structure), slow_implants(structure, factor)
    if joint:
        scores = torch.cat([given.scores[f.name] for f in structure.families])
        given = dataclasses.replace(given, gram=torch.diag(2 * scores) + 0.05)
    undone = torch.full((12,), 0.1, dtype=torch.float64)
    offered = {
        layer.module: (Option("pointwise", None, undone[: layer.filters]),)
        for layer in structure.layers
        if layer.kernel == (3, 3) and layer.module != "depthwise"
    }

    def plan(budget: Budget, **more) -> hap.Plan:
        return decide(structure, given, budget, mode="optimal", latency=table, **more)

    free, held = plan(Budget(params=0.5), options=offered), plan(Budget(params=0.5, latency=1.0), options=offered)
    alone = plan(Budget(params=0.5, latency=1.0))
    assert free.implants and (factor < 1 or free.small.latency > free.dense.latency)
    assert held.small.latency <= held.dense.latency and held.small.params <= 0.5 * held.dense.params
    assert free.predicted <= held.predicted * 1.02 and held.predicted <= alone.predicted
    assert (
        held.small.latency
        == pytest.approx(by_hand(held, table))
        == pytest.approx(
            hap.CostModel(structure, table)(
                {name: np.isin(np.arange(structure.family(name).size), d.prune) for name, d in held.decisions.items()},
                held.implants,
            ).latency
        )
    )
    assert bool(held.implants) == (factor < 1e6)


@pytest.mark.parametrize("factor", [0.1, 0.9, 3.0, 1e6])
def test_slow_implants_do_not_drive_units_out_by_the_paper_s_rule(
    structure, sensitivity, slow_implants, factor
) -> None:
    """They are used where less leaves with them than without."""
    table = slow_implants(structure, factor)
    for seed, budget in enumerate(
        [Budget(params=0.6, latency=1.0), Budget(latency=0.7), Budget(macs=0.5, latency=0.6)]
    ):
        given = sensitivity(structure, seed)
        plan, alone = (decide(structure, given, budget, implant_ratio=ratio, latency=table) for ratio in (0.1, 0.0))
        lost, alone_lost = (
            sum(float(given.scores[name][list(d.prune)].sum()) for name, d in found.decisions.items())
            for found in (plan, alone)
        )
        assert plan.small.latency <= budget.latency * plan.dense.latency
        assert bool(plan.implants) == (lost < alone_lost), "implants are there to keep units"
        assert factor != 0.1 or plan.implants
        assert factor != 1e6 or not plan.implants


def test_a_latency_that_cannot_be_had_says_what_can(structure, sensitivity, slow_implants) -> None:
    """To ask for each part alone works; nothing above 1 is said, nor to allow what was allowed."""
    given, table = sensitivity(structure), slow_implants(structure, 1e6)
    for budget in (Budget(params=0.6, latency=0.01), Budget(params=0.001, latency=1.0)):
        with pytest.raises(HapError, match="cannot be reached") as error:
            decide(structure, given, budget, implant_ratio=0.3, latency=table)
        lowest = {k: float(v) for k, v in (part.split(" kept >= ") for part in error.value.expected.split(", "))}
        assert all(value <= 1 for value in lowest.values()) and "allow implants" not in error.value.remedy
        for name in budget.limits:
            decide(structure, given, Budget(**{name: lowest[name]}), implant_ratio=0.3, latency=table)
    with pytest.raises(HapError, match="each part of it can, but not all of them at once"):
        decide(structure, given, Budget(params=lowest["params"], latency=1.0), implant_ratio=0.3, latency=table)


def by_hand(plan: hap.Plan, table: LatencyTable) -> float:
    """The latency of a plan, layer by layer."""
    total = 0.0
    for layer in plan.structure.layers:
        shape = list(plan.structure.tensors[layer.weight].shape)
        for name, decision in plan.decisions.items():
            for member in plan.structure.family(name).members:
                if member.parameter == layer.weight:
                    shape[member.axis] -= len(decision.prune) * len(member.indices[0])
        implant = plan.implants.get(layer.module)
        share = (len(implant.indices), (implant.form, implant.rank)) if implant else ()
        total += table.milliseconds(layer.module, shape[layer.output_axis], shape[1 - layer.output_axis], *share)
    return total


def test_a_plan_needs_the_times_of_its_implants(net, structure, inputs, sensitivity, timed) -> None:
    table = time_layers(net, structure, (inputs,))
    offered = {"back": (Option("pointwise", None, torch.zeros(8)),)}
    with pytest.raises(HapError, match="no times of pointwise implants in 'back'"):
        decide(structure, sensitivity(structure), Budget(latency=0.6), mode="optimal", options=offered, latency=table)


def test_timing_draws_nothing() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)), torch.zeros(1, 3, 4, 4)
    structure = hap.trace(model, (x,))
    before = torch.get_rng_state()
    time_layers(model, structure, (x,), implants={"0": [("pointwise", None)]})
    assert torch.equal(torch.get_rng_state(), before)


def test_the_cache_saves_measuring(net, structure, inputs, timed, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "latency.json"
    first = time_layers(net, structure, (inputs,), cache=path)
    assert timed
    timed.clear()
    again = time_layers(net, structure, (inputs,), cache=path)
    assert not timed and again == first
    (device,) = json.loads(path.read_text())
    assert "torch" in device and first.device == device
    assert [p.name for p in path.parent.iterdir()] == ["latency.json"]


def test_two_runs_share_a_cache(tmp_path: Path) -> None:
    """Both began before either wrote."""
    one, other = (LatencyCache(tmp_path / "latency.json", torch.device("cpu")) for _ in range(2))
    one.put("a", 1.0)
    one.write()
    other.put("b", 2.0)
    other.write()
    both = LatencyCache(tmp_path / "latency.json", torch.device("cpu"))
    assert (both.get("a"), both.get("b")) == (1.0, 2.0)


def test_implants_are_kept_in_the_cache(net, structure, inputs, timed, tmp_path: Path) -> None:
    given = {"cache": tmp_path / "latency.json", "implants": ways(structure, {}, mode="paper")}
    first = time_layers(net, structure, (inputs,), **given)
    timed.clear()
    assert time_layers(net, structure, (inputs,), **given) == first and not timed


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
    with pytest.raises(HapError, match="too little of this model can be timed"):
        time_layers(model, hap.Structure((), (), (), {}, {}), (torch.zeros(1, 2),))


class Conv1D(nn.Module):
    """The linear layer of GPT-2 in transformers, with a weight of shape (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = nn.Parameter(torch.ones(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


def test_a_model_of_layers_that_cannot_be_timed_is_refused(timed) -> None:
    """Rather than planned by the few others; where these are most, it is timed."""
    x = torch.zeros(2, 4)
    few = nn.Sequential(Conv1D(4, 8), nn.ReLU(), nn.Linear(8, 60))
    assert list(time_layers(few, hap.trace(few, (x,)), (x,)).layers) == ["2"]
    timed.clear()
    most = nn.Sequential(Conv1D(4, 60), nn.ReLU(), nn.Linear(60, 2))
    with pytest.raises(HapError, match="too little of this model") as error:
        time_layers(most, hap.trace(most, (x,)), (x,))
    assert error.value.got == "67% of them in other layers: 0" and not timed


def test_the_cache_tells_models_apart_by_memory_format_and_inputs_by_dtype(timed, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), torch.zeros(2, 3, 8, 8)
    structure = hap.trace(model, (x,))
    for memory in (torch.contiguous_format, torch.channels_last):
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            timed.clear()
            time_layers(model.to(memory_format=memory), structure, (given,), cache=tmp_path / "latency.json")
            assert "dense" in timed


def test_no_model_is_given_another_ones_time(timed, tmp_path: Path) -> None:
    """The same tensors and inputs, but another stride: the model is timed again."""
    x = torch.zeros(1, 3, 16, 16)
    for stride in (1, 4):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=stride), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        timed.clear()
        time_layers(model, hap.trace(model, (x,)), (x,), cache=tmp_path / "latency.json")
        assert "dense" in timed


class Adapted(nn.Linear):
    """With two more weights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.ones(3, inputs)), nn.Parameter(torch.ones(outputs, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + nn.functional.linear(nn.functional.linear(x, self.down), self.up)


def test_a_module_of_several_weights_is_timed_once(timed) -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Adapted(8, 8)), torch.zeros(1, 4)
    table = time_layers(model, hap.trace(model, (x,)), (x,))
    assert table.layers["2"].at(8, 8) == pytest.approx((8 * 8 + 8) / 1000)


class Three(nn.Conv2d):
    """A constructor of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)


class Same(nn.Conv2d):
    """Pads by itself, as timm's convolutions do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.nn.functional.pad(x, (2, 2, 2, 2)))


def test_subclasses_of_convolutions_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch's own kind, with inputs that give as many outputs."""
    made = []

    def count(models, args, **_):
        made.extend((model.module, model()) for model in models.values())
        return {name: Latency(0, 0, 0, 1, 1, least=1.0) for name in models}

    monkeypatch.setattr(latency_profile, "measure_latency", count)
    model, x = (
        nn.Sequential(Three(3, 8), nn.ReLU(), Same(8, 4, 5), nn.ConvTranspose2d(4, 2, 2)),
        torch.zeros(1, 3, 4, 4),
    )
    structure = hap.trace(model, (x,))
    assert list(time_layers(model, structure, (x,)).layers) == [layer.module for layer in structure.layers]
    shapes = {tuple(y.shape[2:]) for module, y in made if type(module) is nn.Conv2d}
    assert shapes == {(4, 4)} and not any(isinstance(module, (Three, Same)) for module, _ in made)


def test_what_was_timed_before_an_interruption_is_kept(net, structure, inputs, timed, tmp_path: Path) -> None:
    def interrupted(layers, *_):
        yield from itertools.islice(layers, 2)
        raise KeyboardInterrupt

    path = tmp_path / "latency.json"
    with pytest.raises(KeyboardInterrupt):
        time_layers(net, structure, (inputs,), cache=path, progress=interrupted)
    (times,) = json.loads(path.read_text()).values()
    assert set(times) == set(timed)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_real_measurement(memory) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=memory)
    x = torch.zeros(1, 3, 8, 8).contiguous(memory_format=memory)
    structure = hap.trace(model, (x,))
    table = time_layers(model, structure, (x,), implants={"2": [("pointwise", None), ("depthwise", 1)]})
    assert hap.CostModel(structure, table).dense.latency > 0
    assert table.joins["2"].at(4, 1) > 0 and not table.implants.get("0")
    assert all(np.array(grid.milliseconds).min() > 0 for grid in table.implants["2"].values())
    assert len(table.layers["2"].rows) > 1  # its filters may not leave, but be implanted


def test_the_device_of_a_cache_names_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines that share a home directory do not share times."""
    monkeypatch.setattr(
        "hap.planning.latency_cache.Path.read_text", lambda *_, **__: "x: y\nmodel name\t: Tin 3 @ 1 Hz"
    )
    processor.cache_clear()
    assert processor() == "Tin 3 @ 1 Hz" and "cpu Tin 3 @ 1 Hz, " in describe(torch.device("cpu"))
    processor.cache_clear()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_timed_part_without_weights_says_where_it_runs(device: str) -> None:
    """A GPU is waited for only where the part is known to run on one."""
    assert device_of(Timed(nn.ReLU(), (torch.empty(3, device=device),))) == torch.device(device)
