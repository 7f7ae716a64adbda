"""The most telling models of the support matrix, as `make support` runs them all."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import time
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import hap

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

SUBSET = (
    "torchvision/mnasnet1_0",
    "torchvision/shufflenet_v2_x1_0",
    "torchvision/swin",
    "timm/edgenext_xx_small",
    "timm/levit_128s",
    "timm/vit_tiny_patch16_224",
    "Hugging Face/bert, eager",
    "Hugging Face/albert, sdpa",
    "Hugging Face/deberta-v2",
    "Hugging Face/gpt2, sdpa",
    "Hugging Face/llama, sdpa",
    "Hugging Face/t5, eager",
    "Hugging Face/vit, eager",
    "user code/attention: fused qkv, reshape",
    "user code/nn.TransformerEncoder",
    "user code/split, shuffle, glu",
)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of the benchmark as running its script does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize("key", SUBSET)
def test_model_is_green(load, key: str) -> None:
    case = next(case for case in load("support_cases").CASES if case.key == key)
    pytest.importorskip(case.needs)
    row = load("support_check").check(case)
    assert row["status"] == "green", f"{row['step']}: {row['message']}"


def test_names_are_unique_and_every_group_is_there(load) -> None:
    cases = load("support_cases").CASES
    assert max(Counter(case.key for case in cases).values()) == 1
    assert Counter(case.group for case in cases).keys() == {"torchvision", "timm", "Hugging Face", "user code"}


class Net(nn.Module):
    """Two layers; the tests below break it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def checked(load, model: nn.Module) -> dict[str, Any]:
    example = load("support_case").Example(model, (torch.randn(2, 4),))
    return load("support_check").check(load("support_case").Case("group", "name", "torch", lambda: example))


def test_row_of_a_small_network(load) -> None:
    row = checked(load, Net())
    assert (row["status"], row["families"], row["units"]) == ("green", {"neuron": 1}, {"neuron": 12})
    assert row["parameters"] == 99 and row["reachable"] == round(1 - 11 / 99, 4)  # 4 + 1 + 3 + 3 are left
    assert row["kept"] <= 0.7 and row["cut_families"] == 1 and row["error"] < 1e-14
    assert row["frozen"] == {"reads an input of fixed size": round(48 / 99, 4), "the model's output": round(39 / 99, 4)}
    assert row["fisher"] == "ok"
    json.dumps(row)


def test_a_wrong_result_is_told_from_a_refusal_and_a_failure(load, monkeypatch: pytest.MonkeyPatch) -> None:
    check: ModuleType = load("support_check")
    found = hap.Verification(False, 1e-3, 70, 70)
    monkeypatch.setattr(check.hap, "verify", lambda *_, **__: found)
    row = checked(load, Net())
    assert (row["status"], row["step"]) == ("wrong", "verify") and "relative error 1.0e-03" in row["message"]
    monkeypatch.setattr(check.hap, "verify", lambda *_, **__: 1 / 0)
    row = checked(load, Net())
    assert (row["status"], row["step"]) == ("failed", "verify") and row["message"].startswith("ZeroDivisionError")
    row = checked(load, nn.Linear(4, 3))
    assert (row["status"], row["step"]) == ("refused", "plan") and "no prunable family" in row["message"]


def test_a_model_that_loads_to_something_else_is_wrong(load, monkeypatch: pytest.MonkeyPatch) -> None:
    right = hap.load

    def spoiled(*args: Any) -> Any:
        model, plan = right(*args)
        model.down.bias.data += 1e-3
        return model, plan

    monkeypatch.setattr(load("support_check").hap, "load", spoiled)
    row = checked(load, Net())
    assert (row["status"], row["message"]) == ("wrong", "the loaded model gives other outputs than the saved one")


def test_a_model_that_exports_to_something_else_is_wrong(load, monkeypatch: pytest.MonkeyPatch) -> None:
    check: ModuleType = load("support_check")
    monkeypatch.setattr(check, "_difference", lambda example, one, other: float(not isinstance(other, Net)))
    row = checked(load, Net())
    assert (row["status"], row["step"]) == ("wrong", "export") and "relative error 1.0e+00" in row["message"]


def test_difference_is_relative_and_sees_shapes(load) -> None:
    check: ModuleType = load("support_check")
    example = SimpleNamespace(args=(torch.ones(2, 2),), kwargs={})
    one = nn.Linear(2, 2, bias=False)
    nn.init.constant_(one.weight, 4.0)
    other = nn.Linear(2, 2, bias=False)
    nn.init.constant_(other.weight, 3.0)
    assert check._difference(example, one, one) == 0
    assert check._difference(example, one, other) == 0.25
    assert check._difference(example, one, nn.Linear(2, 3)) == float("inf")


def test_weights_show_mistakes(load) -> None:
    """Scales of one, shifts of zero and batch norms that have seen nothing are gone."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 2))
    nn.init.normal_(model[4].weight, std=0.002)
    inputs = 5 + torch.randn(8, 2, 4, 4)
    load("support_lively").enliven(load("support_case").Example(model, (inputs,)))
    assert model[1].weight.std() > 0 and model[3].bias.std() > 0 and model[4].weight.std() > 0.1
    assert not model[1].training and model[1].momentum == 0.1
    torch.testing.assert_close(model[1].running_mean, model[0](inputs).mean((0, 2, 3)))


@pytest.mark.slow
def test_a_process_that_takes_too_long_is_one_failed_row(load) -> None:
    """The parent says at which step; it waits no longer than it was told."""
    support = load("support")
    case = next(case for case in load("support_cases").CASES if case.key == "user code/U-Net")
    start = time.monotonic()
    row = support._guarded(multiprocessing.get_context("forkserver"), case, 0.1)
    assert row["status"] == "failed" and row["message"] == "not done after 0.1 s"
    assert time.monotonic() - start < 30
