"""How the time and memory of gate-fisher grow with samples, width, depth and size."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
import typer
from curvature_cost import Work, timed
from curvature_memory import in_fresh_process
from curvature_records import Records, say
from curvature_setting import DATA, RESULTS, Clock, Data, Minutes, Results
from torch import nn
from torch.nn import functional as F

import hap
from hap import zoo
from hap.zoo.resnet import BasicBlock, CifarResNet

Shape = tuple[int, ...]


def wide_resnet(width: int) -> nn.Module:
    """ResNet-20 with `width` times the channels."""
    model = CifarResNet(blocks=3, classes=10)
    a, b, c = 16 * width, 32 * width, 64 * width
    model.conv1, model.bn1 = nn.Conv2d(3, a, 3, padding=1, bias=False), nn.BatchNorm2d(a)
    for name, inputs, outputs, stride in (("layer1", a, a, 1), ("layer2", a, b, 2), ("layer3", b, c, 2)):
        rest = [BasicBlock(outputs, outputs) for _ in range(2)]
        setattr(model, name, nn.Sequential(BasicBlock(inputs, outputs, stride=stride), *rest))
    model.linear = nn.Linear(c, 10)
    return model


class Block(nn.Module):
    """A pre-norm transformer block of linear layers; its attention is left alone, its MLP's neurons can leave."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A vision transformer on patches (N, tokens, 768); 14 blocks of width 768 have 100 million parameters."""

    def __init__(self, width: int = 768, depth: int = 14, heads: int = 12) -> None:
        super().__init__()
        self.patches = nn.Linear(768, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.patches(x))).mean(1))


def _torchvision(name: str) -> nn.Module:
    from torchvision import models

    return models.get_model(name, weights=None)


MODELS: Mapping[str, tuple[Callable[[], nn.Module], Shape]] = {
    **{f"ResNet-20, width x {k}": ((lambda k=k: wide_resnet(k)), (3, 32, 32)) for k in (1, 2, 4)},
    "ResNet-56": (lambda: zoo.build("resnet56"), (3, 32, 32)),
    "ResNet-110": (lambda: zoo.build("resnet110"), (3, 32, 32)),
    "ResNet-50, 224 x 224": (lambda: _torchvision("resnet50"), (3, 224, 224)),
    "transformer, 14 x 768, 196 tokens": (Transformer, (196, 768)),
}

# (model, batch, samples)
POINTS = (
    *(("ResNet-20, width x 1", 128, samples) for samples in (128, 256, 512, 1024, 2048)),
    ("ResNet-20, width x 2", 128, 128),
    ("ResNet-20, width x 4", 128, 128),
    ("ResNet-56", 128, 128),
    ("ResNet-110", 128, 128),
    ("ResNet-50, 224 x 224", 8, 8),
    ("transformer, 14 x 768, 196 tokens", 8, 8),
)


def scaling(
    data: Data = DATA,
    results: Results = RESULTS,
    minutes: Minutes = 30.0,
    limit: Annotated[int, typer.Option(help="Batch and samples at most; 0 for no limit.")] = 0,
    rounds: Annotated[int, typer.Option(help="Timings of each point; the median counts.")] = 3,
    only: Annotated[str, typer.Option(help="Models whose name holds this; all if empty.")] = "",
) -> None:
    """Time and peak memory of gate-fisher for networks with random weights, each in a fresh process."""
    clock = Clock(minutes)
    records = Records(results / "curvature-scaling.jsonl", rounds=rounds)
    for model, batch, samples in POINTS:
        size = {"batch": min(batch, limit or batch), "samples": min(samples, limit or samples)}
        if clock.over() or only not in model or records.has(model=model, **size):
            continue
        found = in_fresh_process("scaling", model, {**size, "rounds": rounds})
        records.add({"model": model, **size, **found}, f"{model}, {size}: {json.dumps(found)}")
    if clock.over():
        say("out of time: the same command goes on")


def scaling_point(name: str, options: Mapping[str, Any]) -> tuple[Work, Callable[[], dict[str, Any]]]:
    """What the fresh process does: the work whose memory counts, then its timings, in turn with training steps."""
    build, shape = MODELS[name]
    generator = torch.Generator().manual_seed(0)
    batch, samples = options["batch"], options["samples"]
    model = build().eval()
    images = torch.randn(batch, *shape, generator=generator)
    labels = torch.randint(10, (batch,), generator=generator)
    structure = hap.trace(model, (images[:2],))
    data = [(images, labels)] * (samples // batch)

    def step() -> None:
        model.train()
        F.cross_entropy(model(images), labels).backward()
        model.zero_grad()

    def work() -> None:
        hap.measure(model, data, None, structure, criterion="gate-fisher", samples=samples)

    def facts() -> dict[str, Any]:
        step()
        times = [(timed(step), timed(work)) for _ in range(options["rounds"])]
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "units": sum(family.size for family in structure.families),
            "unit_seconds": [unit for unit, _ in times],
            "seconds": [seconds for _, seconds in times],
        }

    return work, facts
