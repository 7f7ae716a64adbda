"""Fine-tuning, with a choice of the best weights, and nothing lost on errors."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import nn

from hap.batches import Batch, Loss, default_loss, evaluating
from hap.errors import HapError
from hap.training.checks import check_names, check_numbers, check_reads, check_trainable
from hap.training.devices import Accelerated, Alone
from hap.training.evaluate import evaluate
from hap.training.history import EpochRecord, History
from hap.training.loop import LEARNING_RATES, Loop, Optimizer, make_optimizer, rounds
from hap.training.schedule import Schedule, factor
from hap.training.weights import Average, Snapshot, trainable
from hap.types import Evaluation, Progress, silent

Select = Literal["best", "last"]

logger = logging.getLogger(__name__)


def finetune(
    model: nn.Module,
    train_batches: Iterable[Batch],
    loss: Loss | None = None,
    *,
    epochs: int = 1,
    validation: Iterable[Batch] | None = None,
    optimizer: Optimizer = "sgd",
    lr: float | None = None,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    schedule: Schedule = "cosine",
    warmup: float = 0.0,
    ema: float | None = None,
    clip: float | None = None,
    seed: int = 0,
    select: Select = "best",
    accelerator: Any = None,
    progress: Progress = silent,
) -> History:
    """Trains the model in place, and leaves the chosen weights in it.

    With `validation`, the choice is among the weights that came and those after each epoch, so training can never
    make a model worse on it; without, the last. Whatever ends training early, an error or Ctrl-C, the model is left as
    if it had ended with the last complete epoch, so at worst as it came. Modules end in the mode they were in.

    Random numbers (dropout, and shuffling by a loader that has no generator of its own) depend on `seed` alone, and the
    caller's generators are as before. Python's and NumPy's are not touched.

    Args:
        model: the model; its trainable parameters and its buffers change.
        train_batches: batches, read once an epoch. Without a ``len()``, the learning rate changes between epochs only.
        loss: ``loss(outputs, batch)``, the mean over a batch; None means cross-entropy, or the model's own loss.
        epochs: passes over the training data; 0 only evaluates.
        validation: batches to choose by, and to evaluate before training and after each epoch. Not the test set.
        optimizer: ``sgd`` or ``adamw``.
        lr: learning rate at its highest; None: 0.02 for SGD (the paper's), 0.0005 for AdamW.
        momentum: SGD's momentum, or AdamW's first beta.
        weight_decay: for matrices and kernels only. Parameters with one axis or none (biases, norms) do not decay,
            as is common practice (He et al. 2019, arXiv 1812.01187, section 3.1).
        schedule: ``cosine``, ``step`` (a tenth after 1/2 and again after 3/4 of the run, as in HAP), ``constant``.
        warmup: fraction of the run in which the learning rate rises to `lr`.
        ema: decay, per step, of a moving average of the weights; the average is then what is validated and kept.
        clip: largest norm of the whole gradient; None does not clip.
        seed: for all random numbers.
        select: ``best`` by validation accuracy, by lower loss where equal or no accuracy; or ``last``.
        accelerator: an `accelerate.Accelerator`, to train on several devices (``accelerate launch``) or in mixed
            precision; the model is moved to its device. Every process calls this with the same arguments; each step
            takes a batch for each process, and all end with the same weights.
        progress: shows how far it is.

    Raises:
        HapError: an option is out of range, nothing is trainable, there is no data or it cannot be read again, or loss
            or weights are not finite. On a GPU losses are looked at every 50 steps and at the end of each epoch.
    """
    check_names(
        ("optimizer", optimizer, get_args(Optimizer)),
        ("schedule", schedule, get_args(Schedule)),
        ("selection", select, get_args(Select)),
    )
    lr = LEARNING_RATES[optimizer] if lr is None else lr
    check_numbers(epochs=epochs, lr=lr, momentum=momentum, weight_decay=weight_decay, warmup=warmup, ema=ema, clip=clip)
    check_reads("train_batches", train_batches, epochs)
    check_reads("validation", validation, epochs + 1)
    check_trainable(model)

    devices = Alone() if accelerator is None else Accelerated(accelerator)
    steps = rounds(train_batches, devices)
    ticks = max(1, epochs * (1 if steps is None else steps))
    optimizing = make_optimizer(optimizer, model, lr=lr, momentum=momentum, weight_decay=weight_decay)
    trained, stepped = devices.prepare(model, optimizing)
    loop = Loop(
        model=trained,
        batches=train_batches,
        loss=loss or default_loss,
        optimizer=stepped,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizing, lambda tick: factor(tick, ticks, schedule, warmup)),
        average=Average(model, ema) if ema is not None else None,
        clip=clip,
        devices=devices,
        progress=progress,
    )

    def validate() -> Evaluation | None:
        if validation is None:
            return None
        with seeded(seed, model):  # what a shuffled validation set draws must not shift what training draws
            return evaluate(model, validation, loss, progress=progress)

    # `evaluating` puts each module back into its own mode at the end.
    try:
        with seeded(seed, model), evaluating(model):
            return _run(model, loop, epochs, validate, select)
    finally:
        devices.restore(model)


def _run(
    model: nn.Module, loop: Loop, epochs: int, validate: Callable[[], Evaluation | None], select: Select
) -> History:
    kept, chosen = Snapshot(model), 0
    records: list[EpochRecord] = []
    try:
        start = best = validate()
        for epoch in range(1, epochs + 1):
            lr, began = loop.lr, time.perf_counter()
            meter = loop.run(f"epoch {epoch}/{epochs}")
            train_loss, samples = loop.devices.mean(meter)  # waits for the device, so the time below is the true one
            seconds = time.perf_counter() - began
            with loop.average.applied() if loop.average is not None else contextlib.nullcontext():
                loop.devices.align(model)
                _check_weights(model, epoch, lr)
                result = validate()
                if loop.devices.agree(select == "last" or _better(result, best)):
                    kept, chosen, best = Snapshot(model), epoch, result
            records.append(EpochRecord(epoch, train_loss, lr, seconds, samples, result))
            logger.info("%s", records[-1])
    finally:
        kept.restore()
        loop.optimizer.zero_grad()  # gradients would double the memory that the model holds
    return History(start, tuple(records), chosen)


def _better(result: Evaluation | None, best: Evaluation | None) -> bool:
    if result is None or best is None:  # without validation, the later is the better
        return True
    return (result.accuracy or 0.0, -result.loss) > (best.accuracy or 0.0, -best.loss)


def _check_weights(model: nn.Module, epoch: int, lr: float) -> None:
    """The last step of an epoch can break the weights without any loss having shown it."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in trainable(model)):
        raise HapError(
            f"the weights are not finite after epoch {epoch} with lr={lr:g}",
            expected="finite weights",
            got="NaN or infinity",
            remedy="lower lr, or clip the gradient, for example clip=1.0",
        )


@contextlib.contextmanager
def seeded(seed: int, model: nn.Module) -> Iterator[None]:
    """Seeds torch's generators for the CPU and the model's GPUs, and gives them back their own states afterwards."""
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices, device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield
