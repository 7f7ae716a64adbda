"""Passes that stop at layers: in order, one at a time, and gone afterwards, whatever happens."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import hap
from hap.surgery import lockstep
from hap.surgery.lockstep import Pass, in_lockstep, thread_state

HERE = thread_state(torch.device("cpu"))


class Branching(nn.Module):
    """Calls its layers in an order that the batch decides; `c` for some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(2, 2, dtype=torch.float64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (self.a, self.b) if x[0, 0] > 0 else (self.b, self.a)
        x = second(first(x))
        return self.c(x) if len(x) > 2 else x


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_children())


def batch(sign: int, size: int = 2) -> tuple[torch.Tensor, None]:
    return sign * torch.ones(size, 2, dtype=torch.float64), None


@contextmanager
def all_gone(*models: nn.Module) -> Iterator[None]:
    """No thread and no hook is left behind."""
    before = threading.active_count()
    yield
    assert threading.active_count() == before
    modules = [module for model in models for module in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_stops_at_each_layer_with_all_batches() -> None:
    model = Branching()
    data = [batch(1, 3), batch(1, 4)]
    with all_gone(model), torch.no_grad():
        seen = {
            name: list(found) for name, found in in_lockstep(model, model, layers(model), layers(model), data, HERE)
        }
        assert list(seen) == ["a", "b", "c"]
        for (x, y, of), given in zip(seen["b"], data, strict=True):
            assert torch.equal(x, model.a(given[0])) and torch.equal(y, model.b(x)) and of is given


def test_a_layer_that_changes_at_its_stop_is_called_as_it_is_then() -> None:
    first, second = Branching(), Branching()
    before = torch.clone(second.a.weight)
    read = {}
    with torch.no_grad():
        for name, found in in_lockstep(first, second, layers(first), layers(second), [batch(1, 3)], HERE):
            [(x, y, _)] = found
            read[name] = x, y
            first.get_submodule(name).weight.zero_()
        assert torch.equal(read["b"][0], first.a.bias.expand(3, 2))  # what `a` gives with its new weights
        assert torch.equal(second.a.weight, before)
        assert torch.equal(read["c"][1], second(batch(1, 3)[0]))


def test_batches_that_disagree_do_not_wait_for_each_other_for_ever() -> None:
    model = Branching()
    data = [batch(1), batch(-1), batch(1, 3)]
    with all_gone(model):
        stops = in_lockstep(model, model, layers(model), layers(model), data, HERE)
        assert [(name, len(list(found))) for name, found in stops] == [("a", 2), ("b", 3), ("c", 1)]


def test_a_batch_is_left_out_where_the_other_model_does_not_come() -> None:
    model, other = Branching(), Branching()
    other.forward = lambda x: other.b(x)
    with all_gone(model, other):
        stops = in_lockstep(model, other, layers(model), layers(other), [batch(1, 3)], HERE)
        assert [(name, len(list(found))) for name, found in stops] == [("a", 0), ("b", 0), ("c", 0)]


def test_what_follows_the_last_layer_is_not_run() -> None:
    """Nor are the second model's outputs there kept for all batches."""
    model, calls = Branching(), []
    model.c.register_forward_hook(lambda *_: calls.append("c"))
    wanted = {"a": model.a}
    stops = in_lockstep(model, model, wanted, wanted, [batch(1, 3), batch(1, 3)], HERE)
    [threads] = [[threading.active_count() for _ in found] for _, found in stops]
    assert threads[1] == threads[0] and not calls


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_nothing_is_left_of_passes_that_are_not_needed_any_more(steps: int) -> None:
    model = Branching()
    with (
        all_gone(model),
        closing(in_lockstep(model, model, layers(model), layers(model), [batch(1), batch(-1)], HERE)) as stops,
    ):
        for _, found in itertools.islice(stops, steps):
            next(found)


def test_what_a_model_raises_arrives() -> None:
    model, other = Branching(), Branching()
    other.b = nn.Linear(3, 2)
    with all_gone(model, other), pytest.raises(hap.HapError, match="cannot read this batch: mat1 and mat2"):
        for _, found in in_lockstep(model, other, layers(model), layers(other), [batch(1), batch(1)], HERE):
            list(found)


def test_threads_work_in_the_state_of_their_owner() -> None:
    seen = []

    class Looking(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            dtype = torch.get_autocast_dtype("cpu")
            seen.append(
                (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), dtype, torch.is_autocast_enabled("cpu"))
            )
            return x

    for inference, enabled in itertools.product((False, True), repeat=2):
        with torch.inference_mode(inference), torch.autocast("cpu", torch.float16, enabled):
            state = thread_state(torch.device("cpu"))
        assert not Pass(Looking(), batch(1), "input", state).advance()
        assert seen.pop() == (inference, False, torch.float16, enabled)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="threads are counted where Linux lists them")
def test_threads_of_the_cpu_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP starts a pool in each pass; without a bound here 96 threads beside the 32 passes."""

    def running() -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Threads:"))
        return int(line.split()[1])

    monkeypatch.setattr(lockstep, "THREADS", 32)
    before = torch.get_num_threads()
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).requires_grad_(False)
    data, found = [(torch.ones(1 << 13, 16), None) for _ in range(16)], []
    try:
        torch.set_num_threads(4)
        model(data[0][0])
        start = running()
        state = thread_state(torch.device("cpu"), passes=2 * len(data))
        places = {"0": model[0], "2": model[2]}
        for _, pairs in in_lockstep(model, model, places, places, data, state):
            list(pairs)
            found.append(running() - start)
        assert 16 <= max(found) <= 32 + 32
        left = []
        thread = threading.Thread(target=lambda: left.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert left == [4] and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
