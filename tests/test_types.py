"""Records that pass between the layers, as a session shows them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import hap


@pytest.fixture(scope="module")
def result() -> hap.pipeline.Result:
    """Of a network with 20 units."""
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    batches = [(torch.rand(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3)]
    return hap.prune(model, batches, None, hap.Budget(params=0.5), implant_ratio=0)


def test_records_show_their_numbers_in_one_line(result: hap.pipeline.Result) -> None:
    """And not their tensors and indices."""
    plan = result.plan
    gone = sum(len(decision.prune) for decision in plan.decisions.values())
    params, macs = plan.small.params / plan.dense.params, plan.small.macs / plan.dense.macs
    assert repr(plan) == f"Plan(prunes {gone} of 20 units, implants 0, params {params:.2f}x, MACs {macs:.2f}x)"
    assert repr(result.structure) == "Structure(20 units in 2 families, 3 layers, 3 frozen axes)"
    assert repr(result.sensitivity) == "Sensitivity(gate-fisher of 20 units in 2 families, 8 samples, with pairs)"
    error = result.verification.max_relative_error
    assert repr(result) == f"Result(Sequential, {plan!r}, verified to {error:.1e})"


def test_implants_are_counted_whatever_their_form(result: hap.pipeline.Result) -> None:
    implants = {"0": hap.planning.Implant((0, 3), "lowrank", 2), "2": hap.planning.Implant((1,), "lowrank", 1)}
    assert "implants 3, " in repr(dataclasses.replace(result.plan, implants=implants))


def test_criteria_without_data_say_so(result: hap.pipeline.Result) -> None:
    model = nn.Sequential(nn.Linear(6, 2000), nn.ReLU(), nn.Linear(2000, 3))
    structure = hap.trace(model, (torch.rand(2, 6),))
    found = hap.measure(model, None, None, structure, criterion="magnitude")
    assert repr(found) == "Sensitivity(magnitude of 2,000 units in 1 families, no data)"
