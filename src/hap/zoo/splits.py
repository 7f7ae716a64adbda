"""What a data set is: splits that can be read again and again, and how they are cut.

The rule of evidence: calibration and training read the training images, choices are made on a validation split
cut from them, and the test images are read for the reported number only.
"""

from __future__ import annotations

import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch

from hap.batches import Batch
from hap.errors import HapError
from hap.types import Metric

ENVIRONMENT = "HAP_DATA"  # the variable that names the folder of data sets
ImageBatch = tuple[torch.Tensor, torch.Tensor]


def root_of(name: str, directory: str | Path | None, *, expected: str, got: str, remedy: str = "") -> Path:
    """The directory of a data set: the one given, or what the environment variable HAP_DATA says.

    Args:
        expected, got, remedy: how the caller says that there is neither.

    Raises:
        HapError: there is neither.
    """
    found = directory or os.environ.get(ENVIRONMENT, "")
    if not found:
        raise HapError(
            f"where is {name}?",
            expected=f"{expected}, or the environment variable {ENVIRONMENT}",
            got=f"{got}{ENVIRONMENT} is not set",
            remedy=remedy,
        )
    return Path(found).expanduser()


@dataclass(frozen=True)
class Options:
    """How to load a data set; see `hap.zoo.load_data`."""

    batch_size: int
    seed: int
    validation: int | None
    limit: int | None
    image_size: int | None
    workers: int
    device: torch.device = torch.device("cpu")
    normalisation: Normalisation | None = None

    def __post_init__(self) -> None:
        for name, lowest in {"batch_size": 1, "validation": 1, "limit": 1, "image_size": 1, "workers": 0}.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise HapError(f"{name} is too small", expected=f"at least {lowest}", got=str(value))


class Split(ABC):
    """Batches: ``(images, labels)``, float32 (N, C, H, W), normalised, and int64 (N,); or dicts of texts' tokens.

    Iterating again gives the same batches; of a shuffled split it gives the next epoch. ``epoch(e)`` gives epoch
    `e`, the same at every call, in every process and on every device. ``len()`` is the number of batches.

    Attributes:
        indices: positions of this split's examples in their source, in unshuffled order.
        batch_size: examples in a batch; the last may be smaller.
    """

    def __init__(self, indices: torch.Tensor, *, batch_size: int, seed: int, shuffle: bool = False) -> None:
        self.indices = indices
        self.batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._epochs = 0

    @property
    def samples(self) -> int:
        """The number of examples."""
        return len(self.indices)

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.shard(0, 1)

    def shard(self, rank: int, world: int) -> Iterator[Batch]:
        """The next epoch's batches of one of `world` processes: every `world`-th, and no other is prepared.

        All have the same number: the epoch's first batches fill up the last round.
        """
        self._epochs += 1
        return self.epoch(self._epochs - 1, rank=rank, world=world)

    def epoch(self, number: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The batches of epoch `number`, counted from 0; or one process's `shard` of them."""
        generator = stream(self._seed, f"epoch {number}")
        order = torch.randperm(self.samples, generator=generator) if self._shuffle else torch.arange(self.samples)
        mine = [turn % len(self) for turn in range(rank, -(-len(self) // world) * world, world)]
        return self._batches(self.indices[order], generator, mine)

    def state_dict(self) -> dict[str, int]:
        """How many epochs have been begun; what `hap.finetune` keeps in its state."""
        return {"epochs": self._epochs}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on after so many epochs."""
        self._epochs = state["epochs"]

    @abstractmethod
    def _batches(self, order: torch.Tensor, generator: torch.Generator, mine: Sequence[int]) -> Iterator[Batch]:
        """The batches numbered `mine`, in this order, of the examples at `order`.

        Every random choice comes from `generator`, and is the same whichever batches are asked for.
        """


@dataclass(frozen=True)
class DataSplits:
    """A data set.

    Attributes:
        name: for tables and titles.
        classes: names of the classes, by label.
        input_shape: channels, height, width; of texts, the most tokens.
        train: augmented, another order each epoch.
        calibration: the examples of `train`, not augmented, in one fixed random order; what `hap.measure` reads.
        validation: cut from the training set, for choices.
        test: for the reported number only.
        metrics: what is reported beside loss and accuracy, for `hap.evaluate`.
    """

    name: str
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    train: Split
    calibration: Split
    validation: Split
    test: Split
    metrics: Mapping[str, Metric] = field(default_factory=dict)


@dataclass(frozen=True)
class Normalisation:
    """``(pixel / scale - mean) / std`` for each channel."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (N, C, H, W) to float32.

        >>> Normalisation(255, (0.5,), (0.25,))(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).flatten().tolist()
        [-2.0, 2.0]
        """
        mean, std = _constants(self, pixels.device)
        return pixels.float().sub_(mean).div_(std)


@lru_cache
def _constants(normalisation: Normalisation, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of scaled pixels, made once for each device: a copy at each batch would stop it."""
    scaled = [
        torch.tensor(values).mul_(normalisation.scale).view(-1, 1, 1)
        for values in (normalisation.mean, normalisation.std)
    ]
    return scaled[0].to(device), scaled[1].to(device)


# The usual constants for natural images; also what the zoo's CIFAR weights were trained with.
IMAGENET = Normalisation(255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def stream(seed: int, purpose: str) -> torch.Generator:
    """A generator of its own for each seed and purpose, so that no two draws of a run are correlated."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {purpose}").getrandbits(32))


def divide(count: int, held_out: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions 0..count-1 cut at random in two: the rest, and `held_out` of them; each in random order.

    Raises:
        HapError: one of the two would be empty.

    >>> rest, held_out = divide(10, 3, seed=0)
    >>> len(rest), len(held_out), sorted(rest.tolist() + held_out.tolist()) == list(range(10))
    (7, 3, True)
    """
    if not 0 < held_out < count:
        raise HapError(
            "the training set cannot be divided",
            expected=f"validation between 1 and {count - 1} examples" if count > 1 else "at least 2 training examples",
            got=f"{held_out} of {count}",
            remedy="give validation=, or more training examples",
        )
    order = torch.randperm(count, generator=stream(seed, "split"))
    return order[held_out:], order[:held_out]


def cut_validation(count: int, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation positions among `count` training examples; a tenth is held out unless told."""
    held_out = max(1, count // 10) if options.validation is None else options.validation
    train, validation = divide(count, held_out, options.seed)
    return train[: options.limit], validation[: options.limit]


def shuffled(count: int, options: Options) -> torch.Tensor:
    """All positions, or `options.limit` of them, in one random order."""
    return torch.randperm(count, generator=stream(options.seed, "split"))[: options.limit]


def in_order(count: int, limit: int | None) -> torch.Tensor:
    """All positions, or a random `limit` of them (sources are often sorted by class), ascending; never the seed's."""
    return torch.randperm(count, generator=stream(0, "limit"))[:limit].sort().values
