"""`Training`: how an experiment fine-tunes, as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from hap.errors import HapError
from hap.training import ChannelsLast, Distillation, Optimizer, Precision, Schedule, Select
from hap.training.checks import check_names, check_numbers
from hap.training.layout import CHOICES


def usual_of_texts(optimizer: str | None = None) -> dict[str, Any]:
    """The options that models of texts are fine-tuned with, as BERT is; the learning rate is AdamW's alone."""
    rate = {"lr": 5e-5} if optimizer in (None, "adamw") else {}
    return {"optimizer": "adamw", "clip": 1.0, "weight_decay": 0.01, **rate}


@dataclass(frozen=True)
class Training:
    """How to fine-tune; the fields are those of `hap.finetune`, and two more.

    Attributes:
        select: the last weights, or the best in validation. Validation examples are often cut from those that the dense
            model was trained on: to it, and to what is nearest to it, they look easier than they are, and the best
            are then the weights that the training began with.
        distill: the weight of the dense model's outputs in the loss, in [0, 1]; 0 learns from the labels alone.
        temperature: of the distillation.

    Raises:
        HapError: an option is unknown or out of range.
    """

    epochs: int = 1
    optimizer: Optimizer = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.0
    ema: float | None = None
    clip: float | None = None
    accumulate: int = 1
    label_smoothing: float = 0.0
    distill: float = 0.0
    temperature: float = 2.0
    select: Select = "last"
    precision: Precision = "no"
    channels_last: ChannelsLast = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        check_names(
            ("optimizer", self.optimizer, get_args(Optimizer)),
            ("schedule", self.schedule, get_args(Schedule)),
            ("selection", self.select, get_args(Select)),
            ("precision", self.precision, get_args(Precision)),
            ("order in memory channels_last", str(self.channels_last), CHOICES),
        )
        numbers = "epochs", "momentum", "weight_decay", "warmup", "ema", "clip", "accumulate", "label_smoothing"
        given = {name: getattr(self, name) for name in (*numbers, "distill", "temperature")}
        check_numbers(**given, **({} if self.lr is None else {"lr": self.lr}))

    @classmethod
    def usual(cls, *, texts: bool, **given: Any) -> Training:
        """What is None in `given` is as usual for images, or for texts.

        >>> Training.usual(texts=True, lr=None, epochs=3).lr
        5e-05
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        return cls(**{**(usual_of_texts(chosen.get("optimizer")) if texts else {}), **chosen})

    def options(self, teacher: nn.Module | None = None) -> dict[str, Any]:
        """The keyword arguments of `hap.finetune`.

        Raises:
            HapError: there is to be distillation, but from no teacher.
        """
        given = dataclasses.asdict(self)
        weight, temperature = given.pop("distill"), given.pop("temperature")
        if not weight:
            return given
        if teacher is None:
            raise HapError(
                "there is no teacher to distil from",
                expected="distill=0 where the dense model itself is trained",
                got=f"distill={weight}",
            )
        return {**given, "distill": Distillation(teacher, weight, temperature)}
