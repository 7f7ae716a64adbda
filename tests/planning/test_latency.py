"""By a clock that only the models move: no test depends on how fast the machine is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hap import HapError
from hap.planning import latency
from hap.planning.latency import LEAST, WARMUP, measure_latency


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def perf_counter(self) -> float:
        return self.now


class Model(nn.Module):
    """Takes `seconds` of the clock, `slow` times as long in its first calls; in evaluation mode only."""

    def __init__(self, clock: Clock, name: str, seconds: float, slow: int = 0) -> None:
        super().__init__()
        self.clock, self.name, self.seconds, self.slow = clock, name, seconds, slow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        first = self.clock.calls.count(self.name) < self.slow
        self.clock.calls.append(self.name)
        self.clock.now += self.seconds * (100 if first else 1)
        return x


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(latency, "time", found)
    return found


def test_models_take_turns(clock) -> None:
    models = {"dense": Model(clock, "dense", 0.004), "small": Model(clock, "small", 0.001)}
    found = measure_latency(models, (torch.zeros(1),), runs=6)
    assert clock.calls == ["dense", "small"] * (WARMUP + 6)
    assert found["dense"].median == pytest.approx(4) and found["small"].median == pytest.approx(1)
    assert found["dense"].ratio == pytest.approx(1) and found["small"].ratio == pytest.approx(0.25)
    assert found["dense"].runs == found["small"].runs == 6


def test_the_first_turns_do_not_count(clock) -> None:
    found = measure_latency({"a": Model(clock, "a", 0.001, slow=WARMUP)}, (torch.zeros(1),), runs=5)["a"]
    assert found.low == pytest.approx(1) and found.high == pytest.approx(1)


def test_a_busy_machine_disturbs_all_alike(clock) -> None:
    """The ratio is taken turn by turn, so that it is right though every turn takes another time."""
    model = Model(clock, "a", 0.0)

    def busier(*_: object) -> None:
        model.seconds += 0.001 if clock.calls.count("a") % 2 == 0 else 0.0

    model.register_forward_pre_hook(busier)
    first, second = measure_latency({"first": model, "second": model}, (torch.zeros(1),), runs=5).values()
    assert first.low < first.median < first.high
    assert second.ratio == pytest.approx(1)


def test_slow_models_are_timed_less_often(clock) -> None:
    found = measure_latency({"a": Model(clock, "a", 10.0)}, (torch.zeros(1),), runs=50, seconds=5.0)["a"]
    assert found.runs == LEAST
    found = measure_latency({"a": Model(clock, "a", 1.0)}, (torch.zeros(1),), runs=50, seconds=9.5 + WARMUP)["a"]
    assert LEAST < found.runs == 10 < 50


def test_modes_are_put_back(clock) -> None:
    models = {"training": Model(clock, "t", 0.1).train(), "evaluating": Model(clock, "e", 0.1).eval()}
    measure_latency(models, (torch.zeros(1),), runs=2)
    assert (models["training"].training, models["evaluating"].training) == (True, False)


@pytest.mark.parametrize("runs", [1, 0, -1])
def test_too_few_runs_are_refused(clock, runs) -> None:
    with pytest.raises(HapError, match="too little to time") as error:
        measure_latency({"a": Model(clock, "a", 0.1)}, (torch.zeros(1),), runs=runs)
    assert error.value.got == f"1 models, {runs} runs"
    assert not clock.calls


def test_no_model_is_refused() -> None:
    with pytest.raises(HapError, match="too little to time"):
        measure_latency({}, ())
