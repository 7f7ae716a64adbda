"""The law of the package, on the zoo and on torchvision's models: small model = gated dense model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

import hap
from hap import zoo
from hap.surgery.verify import _gated

ZOO = {name: (lambda name=name: zoo.build(name), zoo.MODELS[name].input_shape) for name in zoo.MODELS}
SMALLER = {"resnet50": 32, "mobilenetv2": 64, "wideresnet32": 16, "preresnet29": 16, "preresnet164": 8}
ZOO |= {name: (ZOO[name][0], (3, size, size)) for name, size in SMALLER.items()}  # than the images they are made for
TORCHVISION = {
    "resnet18": 64,
    "mobilenet_v3_small": 64,
    "densenet121": 64,
    "shufflenet_v2_x1_0": 64,
    "regnet_y_400mf": 64,
    "resnext50_32x4d": 64,
    "convnext_tiny": 64,
    "efficientnet_b0": 64,
    "vgg11_bn": 64,
    "googlenet": 64,
    "inception_v3": 96,
}
NO_INITIALISATION = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **ZOO,
    **{
        name: (
            lambda name=name: models.get_model(name, weights=None, **NO_INITIALISATION.get(name, {})),
            (3, size, size),
        )
        for name, size in TORCHVISION.items()
    },
}


def lively(model: nn.Module, inputs: torch.Tensor) -> nn.Module:
    """Random scales and shifts, and running statistics of real activations: no signal vanishes."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
            elif parameter.ndim == 1 or name == "layer_scale":
                parameter.data = 0.5 + torch.rand(parameter.shape, generator=generator)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model.eval()
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model(inputs)
    return model.eval()


def random_sensitivity(structure: hap.Structure, seed: int = 0) -> hap.Sensitivity:
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    return hap.Sensitivity(
        criterion="random",
        samples=0,
        draws=0,
        scores={f.name: draw(f.size) for f in structure.families},
        stderr={f.name: torch.zeros(f.size) for f in structure.families},
        filters={layer.module: draw(layer.filters) for layer in structure.layers},
    )


def macs(model: nn.Module, inputs: torch.Tensor) -> int:
    """Multiply-accumulates per sample, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    return counter.get_total_flops() // (2 * len(inputs))


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, nn.Module, torch.Tensor, hap.Structure]:
    """A model in float32 with its inputs and structure."""
    build, shape = CASES[request.param]
    inputs = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    model = lively(build(), torch.randn(4, *shape, generator=torch.Generator().manual_seed(2)))
    return request.param, model, inputs, hap.trace(model, (inputs,))


@pytest.mark.parametrize("implant_ratio", [0.0, 0.3])
def test_small_is_gated_dense(case: Any, implant_ratio: float) -> None:
    """About 30 % of the parameters leave; the rest computes what the dense model does with closed gates."""
    _, model, inputs, structure = case
    plan = hap.decide(structure, random_sensitivity(structure), hap.Budget(params=0.7), implant_ratio=implant_ratio)
    small = hap.apply(model, plan)
    found = hap.verify(model, small, plan, (inputs,), tolerance=1e-10)
    assert found.ok, found
    assert sum(p.numel() for p in small.parameters()) == plan.small.params
    assert 0.693 <= plan.small.params / plan.dense.params <= 0.7
    assert bool(plan.implants) == (implant_ratio > 0)


def test_the_gates_matter(case: Any) -> None:
    """The comparison above is not of two constants: closed gates change the dense model's outputs."""
    _, model, inputs, structure = case
    plan = hap.decide(structure, random_sensitivity(structure), hap.Budget(params=0.7), implant_ratio=0)
    reference = _gated(model, model, plan).eval()
    with torch.no_grad():
        dense, gated = model(inputs).double(), reference(inputs.double())
    assert (dense - gated).abs().max() > 1e-3 * dense.abs().max()


def test_keeping_all_changes_nothing(case: Any) -> None:
    _, model, inputs, structure = case
    plan = hap.decide(structure, random_sensitivity(structure), hap.Budget(params=1.0))
    small = hap.apply(model, plan)
    with torch.no_grad():
        assert torch.equal(small(inputs), model(inputs))
    assert plan.small == plan.dense


def test_costs_are_exact(case: Any) -> None:
    """Parameters and MACs, before and after, against the models themselves and PyTorch's counter."""
    _, model, inputs, structure = case
    plan = hap.decide(structure, random_sensitivity(structure), hap.Budget(macs=0.7), implant_ratio=0.3)
    small = hap.apply(model, plan)
    assert plan.dense.params == sum(p.numel() for p in model.parameters())
    assert (plan.dense.macs, plan.small.macs) == (macs(model, inputs), macs(small, inputs))


def test_saved_and_loaded_is_the_same(case: Any, tmp_path: Path) -> None:
    _, model, inputs, structure = case
    plan = hap.decide(structure, random_sensitivity(structure, 3), hap.Budget(params=0.7), implant_ratio=0.2)
    small = hap.apply(model, plan)
    loaded, again = hap.load(hap.save(small, plan, tmp_path / "saved"), model)
    assert again == plan
    with torch.no_grad():
        assert torch.equal(loaded(inputs), small(inputs))


def test_fine_tunes_one_step(case: Any) -> None:
    """Training mode too: auxiliary heads that only training reads have shrunk with what they read."""
    name, model, inputs, structure = case
    if name == "inception_v3":
        pytest.skip("its auxiliary head needs inputs of 299 x 299, too slow here")
    plan = hap.decide(structure, random_sensitivity(structure, 4), hap.Budget(params=0.7), implant_ratio=0.2)
    small = hap.apply(model, plan).train()
    batch = torch.randn(3, *inputs.shape[1:], generator=torch.Generator().manual_seed(5))
    outputs = small(batch)
    logits = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    assert all(p.grad is not None for p in small.parameters()) or name == "googlenet"
