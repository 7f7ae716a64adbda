"""A recipe: a whole experiment as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hap.curvature import CRITERIA
from hap.errors import HapError, unknown
from hap.pipeline import Recover, Training
from hap.planning import Joint, Mode
from hap.report import Target
from hap.types import Budget, Kind
from hap.zoo import DATASETS, MODELS, TASKS


def _at_least(name: str, value: int | None, lowest: int) -> None:
    if value is not None and value < lowest:
        raise HapError(f"{name} is out of range", expected=f"a whole number, {lowest} or more", got=repr(value))


@dataclass(frozen=True)
class Data:
    """What is trained and measured on.

    Attributes:
        name: ``cifar10``, ``imagefolder`` or ``digits``; of texts a task, such as ``glue/mrpc``.
        directory: where its files are; None: what HAP_DATA says.
        batch_size: examples in a batch.
        validation: examples cut from the training set for choices; None: a tenth of it.
        limit: at most so many examples of each split.
        image_size: of ``imagefolder``; None: 224.
        workers: processes that read images for ``imagefolder``.
        max_length: the most tokens of a text; None: 128.
    """

    name: str
    directory: Path | None = None
    batch_size: int = 128
    validation: int | None = None
    limit: int | None = None
    image_size: int | None = None
    workers: int = 0
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.name not in (*DATASETS, *TASKS):
            raise unknown("data set", self.name, (*DATASETS, *TASKS))
        for name in ("batch_size", "validation", "limit", "image_size", "max_length"):
            _at_least(name, getattr(self, name), 1)
        _at_least("workers", self.workers, 0)

    @property
    def is_text(self) -> bool:
        """Whether it is a task of texts."""
        return self.name in TASKS


@dataclass(frozen=True)
class Dense:
    """Where the dense model's weights are from.

    Attributes:
        weights: a safetensors file, or ``torchvision:NAME``; None: what the model comes with, or random ones.
        train: how to train it from there; None: not at all.
        batch_size: examples in a batch of this training; None: as `Data`.
    """

    weights: str | None = None
    train: Training | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        _at_least("batch_size", self.batch_size, 1)
        if self.train is not None:
            self.train.options()  # which says that there is no teacher, if there is to be distillation


@dataclass(frozen=True)
class Measure:
    """What is measured; see `hap.prune`."""

    criterion: str = "gate-fisher"
    samples: int | Literal["auto"] | None = None
    draws: int | None = None

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise unknown("criterion", self.criterion, CRITERIA)
        if isinstance(self.samples, int):
            _at_least("samples", self.samples, 1)
        _at_least("draws", self.draws, 1)
        if self.draws is not None and not CRITERIA[self.criterion].default_draws:
            raise HapError(
                f"{self.criterion} makes no random draws",
                expected="draws: null",
                got=str(self.draws),
                remedy="--set measure.draws=null, or choose another criterion",
            )


@dataclass(frozen=True)
class Planning:
    """How the budget is reached; see `hap.decide` and `hap.pipeline.run`."""

    mode: Mode = "optimal"
    joint: Joint = "auto"
    floor: int = 1
    minimum: dict[str, int | float] = field(default_factory=dict)
    maximum: dict[str, int | float] = field(default_factory=dict)
    round_to: int = 1
    protect: tuple[str, ...] = ()
    units: tuple[Kind, ...] | None = None
    inexact: bool = False
    ignore: tuple[str, ...] = ()
    iterations: int = 1
    latency_batch: int = 1

    def __post_init__(self) -> None:
        for name in ("floor", "round_to", "iterations", "latency_batch"):
            _at_least(name, getattr(self, name), 1)


@dataclass(frozen=True)
class Implants:
    """`ratio`: see `hap.decide`, ``implant_ratio``; 0 for none."""

    ratio: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise HapError("ratio is out of range", expected="a fraction in [0, 1]", got=repr(self.ratio))


@dataclass(frozen=True)
class Recipe:
    """A whole experiment: train or load, measure, plan, prune with implants, fine-tune, evaluate, report.

    Attributes:
        title: one line about it.
        model: ``zoo:NAME``, ``hf:PATH`` or another source of `hap prune`.
        data: what is trained and measured on.
        budget: what may remain.
        dense: where the dense model's weights are from.
        measure, plan, implants: how it is pruned.
        recover: what follows the cut; see `hap.pipeline.run`.
        finetune: the training after it, in each round.
        seed: of everything drawn at random.
        targets: what the result is held against.
        notes: what is known of the settings and where they are from.

    Raises:
        HapError: a value is out of range, or model and data do not go together.
    """

    title: str
    model: str
    data: Data
    budget: Budget
    dense: Dense = Dense()
    measure: Measure = Measure()
    plan: Planning = Planning()
    implants: Implants = Implants()
    recover: Recover = "refit"
    finetune: Training = Training()
    seed: int = 0
    targets: tuple[Target, ...] = ()
    notes: str = ""

    def __post_init__(self) -> None:
        source, _, name = self.model.partition(":")
        if source == "zoo" and name not in MODELS:
            raise unknown("model", name, MODELS)
        if source == "hap":
            raise HapError(
                f"{self.model} is pruned already",
                expected="the dense model",
                remedy="prune the dense model to the whole budget",
            )
        if self.plan.joint is True and (self.plan.mode == "paper" or not CRITERIA[self.measure.criterion].has_gram):
            raise HapError(
                "units cannot be chosen together",
                expected="plan.joint: auto or false",
                got=f"true with mode {self.plan.mode} and criterion {self.measure.criterion}",
            )
        if self.data.is_text and source != "hf":
            raise HapError(f"{self.data.name} needs a model of texts", expected="model: hf:PATH", got=self.model)
        if self.dense.weights is not None and source == "hf":
            raise HapError(
                "the weights are in the model's own directory", expected="no dense.weights", got=self.dense.weights
            )
