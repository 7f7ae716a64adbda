"""The truth that criteria estimate: the measured rise of the loss when each channel is removed alone."""

from __future__ import annotations

import copy
from typing import Annotated

import torch
import typer
from curvature_records import Records, say
from curvature_setting import DATA, MODEL, RESULTS, Clock, Data, Minutes, Network, Results, Setting, close_, file, load
from torch import nn
from torch.nn import functional as F

from hap import batches

CHUNK = 512


def truth(
    data: Data = DATA,
    results: Results = RESULTS,
    minutes: Minutes = 120.0,
    calibration: Annotated[int, typer.Option(help="Calibration images.")] = 512,
    unseen: Annotated[int, typer.Option(help="Test images.")] = 2000,
    model: Network = MODEL,
    limit: Annotated[int, typer.Option(help="At most so many units of each family; 0 for all.")] = 0,
) -> None:
    """The rise of the mean loss for every inner unit: one evaluation of the network a unit."""
    clock, setting = Clock(minutes), load(data, model=model)
    records = Records(file(results, "truth", model), calibration=calibration, unseen=unseen)
    images, labels = _images(setting, calibration, unseen)
    network = copy.deepcopy(setting.model).to(memory_format=torch.channels_last)
    for family in setting.inner:
        todo = [u for u in range(family.size)[: limit or None] if not records.has(family=family.name, unit=u)]
        if not todo or clock.over():
            continue
        before, after = _cut(network, family.name)
        with torch.inference_mode():
            reads = [before(chunk) for chunk in images.split(CHUNK)]
            dense = _losses(after, reads, labels)
        for unit in todo:
            if clock.over():
                break
            rise = _without(network, setting, family.name, unit, reads, labels) - dense
            parts = {"calibration_rise": rise[:calibration], "unseen_rise": rise[calibration:]}
            row = {key: float(values.mean()) for key, values in parts.items()}
            row |= {f"{key}_stderr": float(values.std() / len(values) ** 0.5) for key, values in parts.items()}
            place = setting.units.index((family.name, unit))
            records.add({"family": family.name, "unit": unit, "place": place, **row}, f"{family.name} {unit}: {row}")
    if clock.over():
        say("out of time: the same command goes on")


def _images(setting: Setting, calibration: int, unseen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first calibration images, then the first test images."""
    parts = setting.calibration(calibration)
    parts += list(batches.take(setting.splits.test, unseen, torch.device("cpu")))
    images = torch.cat([images for images, _ in parts]).contiguous(memory_format=torch.channels_last)
    return images, torch.cat([labels for _, labels in parts])


def _cut(model: nn.Module, family: str) -> tuple[nn.Sequential, nn.Sequential]:
    """The network before the block that holds the family, and from it on: only the latter is run for each unit."""
    blocks = [*model.layer1, *model.layer2, *model.layer3]
    number = blocks.index(model.get_submodule(family.rpartition(".")[0]))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.linear)
    stem = nn.Sequential(model.conv1, model.bn1, nn.ReLU())
    return nn.Sequential(stem, *blocks[:number]).eval(), nn.Sequential(*blocks[number:], head).eval()


def _without(
    model: nn.Module, setting: Setting, family: str, unit: int, reads: list[torch.Tensor], labels: torch.Tensor
) -> torch.Tensor:
    removed = copy.deepcopy(model)
    close_(removed, setting.inner, [(family, unit)])
    with torch.inference_mode():
        return _losses(_cut(removed, family)[1], reads, labels)


def _losses(after: nn.Module, reads: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Every image's loss, float64."""
    logits = torch.cat([after(chunk) for chunk in reads])
    return F.cross_entropy(logits.double(), labels, reduction="none")
