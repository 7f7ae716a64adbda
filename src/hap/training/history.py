"""What happened in a fine-tuning run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hap.types import Evaluation


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of training.

    Attributes:
        epoch: counted from 1.
        train_loss: mean loss over the epoch's examples, while the weights moved.
        lr: learning rate of the epoch's first step.
        seconds: wall time of the training part, without validation.
        samples: training examples seen.
        validation: evaluation after the epoch, of the averaged weights if there are; None without validation data.
    """

    epoch: int
    train_loss: float
    lr: float
    seconds: float
    samples: int
    validation: Evaluation | None


@dataclass(frozen=True)
class History:
    """A fine-tuning run.

    Attributes:
        start: evaluation before the first step; None without validation data.
        epochs: a record for each epoch.
        chosen: the epoch whose weights the model has now; 0 for the weights that it came with.
    """

    start: Evaluation | None
    epochs: tuple[EpochRecord, ...]
    chosen: int

    @property
    def validation(self) -> Evaluation | None:
        """The evaluation of the weights that were chosen."""
        return self.epochs[self.chosen - 1].validation if self.chosen else self.start

    def to_dict(self) -> dict[str, Any]:
        """The history as plain dicts, lists and numbers, ready for JSON."""
        data = dataclasses.asdict(self)
        return {**data, "epochs": list(data["epochs"])}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> History:
        """The history that `to_dict` gave."""
        records = [{**record, "validation": _evaluation(record["validation"])} for record in data["epochs"]]
        return History(_evaluation(data["start"]), tuple(EpochRecord(**record) for record in records), data["chosen"])


def _evaluation(data: Mapping[str, Any] | None) -> Evaluation | None:
    return None if data is None else Evaluation(**data)
