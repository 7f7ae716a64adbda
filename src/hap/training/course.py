"""A run, epoch after epoch: what it has reached, which weights are the best, and how it goes on after a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Literal

import torch
from torch import nn

from hap.batches import Batch, digest
from hap.errors import HapError
from hap.training.history import EpochRecord, History
from hap.training.loop import Loop
from hap.training.meter import Meter
from hap.training.randomness import Randomness
from hap.training.saved import Saved, refused
from hap.training.sharded import local
from hap.training.state import Progressed, packed, unpack_, unpacked_best
from hap.training.weights import Snapshot, trainable
from hap.types import Evaluation, Log

Select = Literal["best", "last"]

logger = logging.getLogger(__name__)


@dataclass
class Course:
    """A run of a `Loop`.

    Attributes:
        model: what is trained, not wrapped.
        loop: one epoch.
        epochs: how many.
        validate: evaluates the model as it is.
        select: ``best`` or ``last``.
        saved: where the state is kept; None keeps none.
        log: takes numbers on the way; None for nobody.
        kept: the best weights so far.
    """

    model: nn.Module
    loop: Loop
    epochs: int
    validate: Callable[[], Evaluation | None]
    select: Select
    saved: Saved | None
    log: Log | None
    kept: Snapshot = field(init=False)

    def run(self) -> History:
        """Trains, and leaves the chosen weights in the model, after an error or Ctrl-C too."""
        self.kept = Snapshot(self.model)
        try:
            at, now = self._begin()
            for number in range(len(at.history.epochs) + 1, self.epochs + 1):
                self._train(at, now, number)
                self._judge(at, number)
                now = None
            if self.saved is not None:
                self._save(at)
        finally:
            self.kept.restore()
            self.loop.optimizer.zero_grad()  # gradients would double the memory that the model holds
        return at.history

    def _begin(self) -> tuple[Progressed, Randomness | None]:
        """From the saved state, with its random states; or from the start."""
        found = self.saved.read() if self.saved is not None else None
        if found is None:
            start = self.validate()
            self._report(start, 0)
            began = Randomness.now(self.model, self.loop.batches)
            return Progressed(History(start, (), 0), began, Meter("")), None
        tensors, about = found
        at, now = unpack_(tensors, about, self.model, self.loop)
        self.kept = unpacked_best(tensors, self.model)
        self._tell({}, at.steps)  # whoever counts the steps of several runs has to know
        return at, now

    def _train(self, at: Progressed, now: Randomness | None, number: int) -> None:
        """The epoch, or what a saved state leaves of it."""
        name = f"epoch {number}/{self.epochs}"
        if now is not None:  # what has been read is read again as it was
            at.began.set(self.model, self.loop.batches)
        if not at.batches:
            # Processes draw unlike numbers (dropout of unlike batches); what is shuffled must be the same for all.
            torch.set_rng_state(self.loop.devices.gather(torch.get_rng_state())[0])
            at.lr, at.began = self.loop.lr, Randomness.now(self.model, self.loop.batches)
        at.meter.where = f"{name} with lr={at.lr:g}"
        stream = self.loop.stream(name)
        if self.saved is not None:
            stream = self._looked_at(stream, at, self.saved)
        if now is not None and at.batches:
            now.set(self.model, self.loop.batches)
        start = time.perf_counter() - at.seconds
        for count in self.loop.run(stream, at.meter):
            at.batches, at.steps = at.batches + count, at.steps + 1
            at.seconds = time.perf_counter() - start
            if self.log is not None and at.steps % Meter.interval == 0:
                self._tell({"train/loss": at.meter.recent(), "train/lr": self.loop.lr}, at.steps)
            if self.saved is not None and self.saved.due(at.steps):
                self._save(at)

    def _looked_at(self, stream: Iterator[Batch], at: Progressed, saved: Saved) -> Iterator[Batch]:
        """The stream after the batches that were taken already; it must be the one they were taken from."""
        first = next(stream)
        found = digest(first)
        if at.first not in ("", found):
            raise refused(saved.path, "the same batches in the same order", "another first batch of the epoch")
        at.first = found
        if not at.batches:
            # Saved here, not when the epoch before ended, so that this epoch's first batch is known after a kill.
            if at.history.epochs and saved.due(at.steps):
                self._save(at)
            return chain([first], stream)
        deque(islice(stream, at.batches - 1), maxlen=0)
        return stream

    def _judge(self, at: Progressed, number: int) -> None:
        """Evaluates what the epoch has reached, and keeps it if it is the best."""
        began = time.perf_counter()
        loss, samples = self.loop.devices.mean(at.meter)  # waits for the device, so that its time counts
        seconds = at.seconds + time.perf_counter() - began
        average, devices, history = self.loop.average, self.loop.devices, at.history
        with average.applied() if average is not None else contextlib.nullcontext():
            devices.align(self.model)
            _check_weights(self.model, number, at.lr)
            result = self.validate()
            if devices.agree(self.select == "last" or _better(result, history.validation)):
                self.kept, history = Snapshot(self.model), dataclasses.replace(history, chosen=number)
        record = EpochRecord(number, loss, at.lr, seconds, samples, result)
        logger.info("%s", record)
        self._tell({"train/epoch_loss": loss, "train/seconds": seconds, "train/lr": self.loop.lr}, at.steps)
        self._report(result, at.steps)
        at.history = dataclasses.replace(history, epochs=(*history.epochs, record))
        at.began, at.meter = Randomness.now(self.model, self.loop.batches), Meter("")
        at.batches, at.seconds, at.first = 0, 0.0, ""

    def _save(self, at: Progressed) -> None:
        assert self.saved is not None
        self.saved.write((at.steps, len(at.history.epochs)), *packed(at, self.model, self.loop, self.kept))

    def _report(self, found: Evaluation | None, step: int) -> None:
        if found is not None:
            accuracy = {} if found.accuracy is None else {"validation/accuracy": found.accuracy}
            self._tell({"validation/loss": found.loss, **accuracy}, step)

    def _tell(self, values: dict[str, float], step: int) -> None:
        if self.log is not None and self.loop.devices.rank == 0:
            self.log(values, step)


def _better(result: Evaluation | None, best: Evaluation | None) -> bool:
    if result is None or best is None:  # without validation, the later is the better
        return True
    return (result.accuracy or 0.0, -result.loss) > (best.accuracy or 0.0, -best.loss)


def _check_weights(model: nn.Module, epoch: int, lr: float) -> None:
    """The last step of an epoch can break the weights without any loss having shown it."""
    if not all(bool(torch.isfinite(local(parameter)).all()) for parameter in trainable(model)):
        raise HapError(
            f"the weights are not finite after epoch {epoch} with lr={lr:g}",
            expected="finite weights",
            got="NaN or infinity",
            remedy="lower lr, or clip the gradient, for example clip=1.0",
        )
