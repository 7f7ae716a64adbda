"""What products with the Hessian and the Gauss-Newton matrix of the weights cost, and how noisy their estimates are.

    python benchmarks/products.py DATA

DATA holds resnet20.safetensors and CIFAR-10. Writes benchmarks/results/products.json, which docs/criteria.md quotes.
Processor time on one core, medians of paired ratios to one forward and backward pass.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.func import functional_call, grad, jvp
from torch.nn import functional as F

import hap
from hap import zoo
from hap.curvature.hutchinson import random_signs
from hap.curvature.quadratic import _patterns, _probe
from hap.curvature.reduce import groups_of

RESULTS = Path(__file__).parent / "results" / "products.json"


def costs(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """Time of each step over that of a forward and backward pass."""
    every = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    values = {name: p.detach() for name, p in weights.items()}
    leaves = [p.requires_grad_() for p in weights.values()]
    vector = random_signs(values, torch.Generator().manual_seed(0))

    def logits(changed: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(model, {**every, **changed}, (x,))

    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), leaves, create_graph=True)
    outputs = model(x)
    seed = torch.zeros_like(outputs, requires_grad=True)
    transposed = torch.autograd.grad(outputs, leaves, seed, create_graph=True)

    def back(direction: torch.Tensor) -> None:
        torch.autograd.grad(outputs, leaves, direction, retain_graph=True)

    def anew() -> None:
        fresh = torch.autograd.grad(F.cross_entropy(model(x), y), leaves, create_graph=True)
        torch.autograd.grad(fresh, leaves, list(vector.values()))

    steps: dict[str, Callable[[], object]] = {
        "forward and backward": lambda: torch.autograd.grad(F.cross_entropy(model(x), y), leaves),
        "hessian, graph kept": lambda: torch.autograd.grad(gradients, leaves, list(vector.values()), retain_graph=True),
        "hessian, graph anew": anew,
        "hessian, forward over reverse": lambda: jvp(
            grad(lambda w: F.cross_entropy(logits(w), y)), (values,), (vector,)
        ),
        "ggn, double backward": lambda: back(
            torch.autograd.grad(transposed, seed, list(vector.values()), retain_graph=True)[0]
        ),
        "ggn, jvp": lambda: back(jvp(logits, (values,), (vector,))[1]),
        "ggn, signs of the outputs": lambda: back(torch.ones_like(outputs)),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(6):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    base = times["forward and backward"][1:]  # the first round warms up
    return {n: statistics.median(a / b for a, b in zip(t[1:], base, strict=True)) for n, t in times.items()}


def noise(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, draws: int = 12) -> dict[str, float]:
    """Median over inner channels of one draw's standard deviation over the mean."""
    structure = hap.trace(model, (x[:2],))
    inner = [f.name for f in structure.families if len(f.roles("producer")) == 1]
    found = {}
    for name in ("hessian-trace", "ggn-trace", "hessian-quadratic", "ggn-quadratic"):
        result = hap.measure(model, [(x, y)], None, structure, criterion=name, draws=draws, samples=len(x))
        ratios = [result.stderr[n] * draws**0.5 / result.scores[n].abs() for n in inner]
        found[name] = float(torch.cat(ratios).nanmedian())

    groups = groups_of(model, structure)
    weights = groups.only_require_grad(model)
    outputs = model(x)
    p = outputs.softmax(1).detach()
    seed = torch.zeros_like(outputs, requires_grad=True)
    transposed = torch.autograd.grad(outputs, list(weights.values()), seed, create_graph=True)

    def product(vector: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        forward = torch.autograd.grad(transposed, seed, list(vector.values()), retain_graph=True)[0]
        middle = (p * forward - p * (p * forward).sum(1, keepdim=True)) / len(x)
        back = torch.autograd.grad(outputs, list(weights.values()), middle, retain_graph=True)
        return dict(zip(weights, back, strict=True))

    traces, quadratics = [], []
    for draw in range(draws):
        vector = random_signs(groups.weights, torch.Generator().manual_seed(draw))
        products = product(vector)
        traces.append(groups.sums({name: vector[name] * products[name] for name in vector}))
        quadratics.append(_probe(groups, _patterns(groups)[-1], product, torch.Generator().manual_seed(draw)))
    for name, rows in (
        ("ggn-trace, signs of the weights", traces),
        ("ggn-quadratic, signs of the weights", quadratics),
    ):
        units, _ = groups.layout.split(torch.stack(rows).std(0) / torch.stack(rows).mean(0).abs())
        found[f"{name}, signs of the weights"] = float(torch.cat([units[n] for n in inner]).nanmedian())
    return found


def main(folder: str) -> None:
    torch.set_num_threads(1)
    model = zoo.build("resnet20", weights=f"{folder}/resnet20.safetensors").eval()
    pairs = []
    for x, y in zoo.load_data(f"cifar10:{folder}").calibration:
        pairs.append((x, y))
        if sum(len(x) for x, _ in pairs) >= 128:
            break
    images, labels = (torch.cat(parts)[:128] for parts in zip(*pairs, strict=True))
    results = {"torch": torch.__version__, "cost": costs(model, images[:64], labels[:64])}
    results["noise"] = noise(model, images, labels)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
