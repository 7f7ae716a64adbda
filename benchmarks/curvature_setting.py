"""What every curvature benchmark works on: a CIFAR ResNet, CIFAR-10, and the channels inside its blocks."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

import hap
from hap import batches, zoo
from hap.types import Family, Structure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MODEL = "resnet20"

Data = Annotated[Path, typer.Option(help="Holds the weights and CIFAR-10.", envvar="HAP_DATA")]
Network = Annotated[str, typer.Option(help="resnet20 or resnet56.")]
Results = Annotated[Path, typer.Option(help="Folder of the JSON-lines files.")]
Minutes = Annotated[float, typer.Option(help="Start nothing new after this time; go on later with the same command.")]

DATA = Path(os.path.relpath(ROOT.parent / "shared" / "data"))


@dataclass(frozen=True, eq=False)
class Setting:
    """The dense network in evaluation mode, its data, and its inner families.

    Attributes:
        model: with its trained weights.
        splits: CIFAR-10.
        structure: all that can leave, as a user's `hap.trace` gives it.
        inner: the families that a single layer produces: the channels between a block's two convolutions.
    """

    model: nn.Module
    splits: zoo.DataSplits
    structure: Structure
    inner: tuple[Family, ...]

    @property
    def units(self) -> list[tuple[str, int]]:
        """Every inner unit, in the order of all flat vectors of these benchmarks."""
        return [(family.name, unit) for family in self.inner for unit in range(family.size)]

    def calibration(self, samples: int) -> list[batches.Batch]:
        """The first calibration images: the same for every contender."""
        return list(batches.take(self.splits.calibration, samples, torch.device("cpu")))

    def held_out(self, after: int, samples: int) -> list[batches.Batch]:
        """Test images behind the first `after`, which give the reported numbers: as unseen as those, and disjoint."""
        taken = list(batches.take(self.splits.test, after + samples, torch.device("cpu")))
        images, labels = (torch.cat(parts)[after:].split(128) for parts in zip(*taken, strict=True))
        return list(zip(images, labels, strict=True))

    def flat(self, scores: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The inner units' values, in the order of `units`."""
        return torch.cat([scores[family.name] for family in self.inner])


def load(data: Path, *, model: str = MODEL, batch_size: int = 128) -> Setting:
    """The setting, from a folder of data."""
    splits = zoo.load_data(f"cifar10:{data}", batch_size=batch_size)
    network = zoo.build(model, weights=data / f"{model}.safetensors", classes=len(splits.classes)).eval()
    structure = hap.trace(network, (torch.zeros(2, *splits.input_shape),))
    inner = tuple(family for family in structure.families if len(family.roles("producer")) == 1)
    return Setting(network, splits, structure, inner)


def file(results: Path, kind: str, model: str) -> Path:
    """The raw results of a network: ``curvature-truth.jsonl``, ``curvature-truth-resnet56.jsonl``."""
    return results / (f"curvature-{kind}.jsonl" if model == MODEL else f"curvature-{kind}-{model}.jsonl")


def close_(model: nn.Module, inner: Sequence[Family], removed: Sequence[tuple[str, int]]) -> None:
    """Zeroes what the consumers of these units read them with: by the law of the package, this is removal."""
    families = {family.name: family for family in inner}
    with torch.no_grad():
        for name, unit in removed:
            for member in families[name].roles("consumer"):
                index = torch.tensor(member.indices[unit])
                model.get_parameter(member.parameter).index_fill_(member.axis, index, 0.0)


class Clock:
    """Says when the time given by ``--minutes`` is over."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def over(self) -> bool:
        """Whether nothing new may start."""
        return time.monotonic() > self._end
