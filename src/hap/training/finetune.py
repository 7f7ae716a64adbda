"""Fine-tuning, with a choice of the best weights, and nothing lost on errors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from hap.batches import Batch, Loss, digest, evaluating
from hap.training.checks import check_names, check_numbers, check_reads, check_trainable
from hap.training.course import Course, Select
from hap.training.devices import devices_of
from hap.training.evaluate import evaluated
from hap.training.history import History
from hap.training.layout import CHOICES, ChannelsLast, channels_last_, wants_channels_last
from hap.training.loop import LEARNING_RATES, Loop, Optimizer, make_optimizer, rounds
from hap.training.meter import length
from hap.training.objective import Distillation, Objective
from hap.training.precision import Precision
from hap.training.randomness import seeded
from hap.training.saved import Saved
from hap.training.schedule import Schedule, factor
from hap.training.sharded import reshard_
from hap.training.weights import Average
from hap.types import Evaluation, Log, Progress, silent


def finetune(
    model: nn.Module,
    train_batches: Iterable[Batch],
    loss: Loss | None = None,
    *,
    epochs: int = 1,
    validation: Iterable[Batch] | None = None,
    select: Select = "best",
    optimizer: Optimizer = "sgd",
    lr: float | None = None,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    schedule: Schedule = "cosine",
    warmup: float = 0.0,
    ema: float | None = None,
    clip: float | None = None,
    accumulate: int = 1,
    label_smoothing: float = 0.0,
    distill: Distillation | None = None,
    precision: Precision = "no",
    channels_last: ChannelsLast = "auto",
    compile: bool = False,
    accelerator: Any = None,
    seed: int = 0,
    state: str | Path | None = None,
    save_every: float = 60.0,
    log: Log | None = None,
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
        select: ``best`` by validation accuracy, by lower loss where equal or no accuracy; or ``last``.
        optimizer: ``sgd`` or ``adamw``.
        lr: learning rate at its highest; None: 0.02 for SGD (the paper's), 0.0005 for AdamW.
        momentum: SGD's momentum, or AdamW's first beta.
        weight_decay: for matrices and kernels only. Parameters with one axis or none (biases, norms) do not decay,
            as is common practice (He et al. 2019, arXiv 1812.01187, section 3.1).
        schedule: ``cosine``, ``step`` (a tenth after 1/2 and again after 3/4 of the run, as in HAP), ``constant``.
        warmup: fraction of the run in which the learning rate rises to `lr`.
        ema: decay, per step, of a moving average of the weights; the average is then what is validated and kept.
        clip: largest norm of the whole gradient; None does not clip.
        accumulate: batches whose mean gradient makes one step.
        label_smoothing: share of each label's weight that is spread over all classes, in training alone.
        distill: a teacher, from which training learns as well (see `Distillation`).
        precision: ``bf16`` or ``fp16`` computes the forward pass under autocast; the weights stay in their own type.
        channels_last: the order of convolution weights in memory meanwhile; "auto": where they are on a GPU.
        compile: train through `torch.compile`, which pays in runs of many minutes.
        accelerator: an `accelerate.Accelerator`, to train on several devices (``accelerate launch`` or ``torchrun``);
            the model is moved to its device. Every process calls this with the same arguments; each step takes a batch
            for each process, and all end with the same weights. Under FSDP2 a copy of the model is cut into shards, and
            the weights are gathered into the model at the end.
        seed: for all random numbers.
        state: a file to save the run in, from which a run that was killed goes on when it is started again with the
            same arguments, to the same bits where the device's kernels are deterministic. It is kept at the end: a run
            that is complete is not repeated. Each of several processes has a file of its own, with its rank in the
            name; where they are more than two, sums may be in another order after a kill.
        save_every: seconds between two saves.
        log: called with numbers by name and the step, every 50 steps and after each epoch; for example
            ``Accelerator.log``. Of several processes the first calls it. A run that goes on says with no numbers at
            which step.
        progress: shows how far it is.

    Raises:
        HapError: an option is out of range, nothing is trainable, there is no data or it cannot be read again, the
            state is another run's, or loss or weights are not finite. On a GPU losses are looked at every 50 steps and
            at the end of each epoch.
    """
    check_names(
        ("optimizer", optimizer, get_args(Optimizer)),
        ("schedule", schedule, get_args(Schedule)),
        ("selection", select, get_args(Select)),
        ("precision", precision, get_args(Precision)),
        ("order in memory channels_last", str(channels_last), CHOICES),
    )
    lr = LEARNING_RATES[optimizer] if lr is None else lr
    numbers: dict[str, float | None]
    numbers = {"epochs": epochs, "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "warmup": warmup}
    numbers |= {"ema": ema, "clip": clip, "accumulate": accumulate, "label_smoothing": label_smoothing}
    check_numbers(**numbers)
    check_reads("train_batches", train_batches, epochs)
    check_reads("validation", validation, epochs + 1)
    check_trainable(model)
    devices = devices_of(accelerator, precision)
    objective = Objective(loss, label_smoothing, distill, devices.precision)
    devices.check()
    objective.check(model, devices.device(model))
    saved = None
    if state is not None:
        names = {"optimizer": optimizer, "schedule": schedule, "select": select, "precision": precision}
        lengths = {"train_batches": length(train_batches), "validation": _length(validation)}
        run = _identity(model, objective, **numbers, **names, **lengths, seed=seed, processes=devices.world)
        saved = Saved(Path(state), run, every=save_every, devices=devices)

    placed = devices.place(model)
    steps = rounds(train_batches, devices)
    ticks = max(1, epochs * (1 if steps is None else -(-steps // accumulate)))
    ordered = wants_channels_last(placed, channels_last, devices.device(placed), sharded=placed is not model)
    with channels_last_(placed, on=ordered):
        rates = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        optimizing = make_optimizer(optimizer, placed, **rates, sharded=placed is not model)
        trained, stepped = devices.prepare(placed, optimizing)
        loop = Loop(
            model=torch.compile(trained) if compile else trained,  # type: ignore[arg-type]  # a module like the other
            batches=train_batches,
            loss=objective,
            optimizer=stepped,
            scheduler=torch.optim.lr_scheduler.LambdaLR(optimizing, lambda tick: factor(tick, ticks, schedule, warmup)),
            average=Average(placed, ema) if ema is not None else None,
            clip=clip,
            accumulate=accumulate,
            devices=devices,
            progress=progress,
        )

        def validate() -> Evaluation | None:
            if validation is None:
                return None
            with seeded(seed, placed):  # what a shuffled validation set draws must not shift what training draws
                found = evaluated(placed, validation, loss, devices, metrics={}, progress=progress)
            reshard_(placed)
            return found

        # `evaluating` puts each module back into its own mode at the end.
        try:
            with seeded(seed, placed), evaluating(placed):
                return Course(placed, loop, epochs, validate, select, saved, log).run()
        finally:
            devices.restore(placed, model)


def _identity(model: nn.Module, objective: Objective, **options: object) -> dict[str, str]:
    """What makes a run what it is: the weights' bytes, the loss, and options, each as a short text."""
    teacher = objective.distill
    taught = teacher and f"{teacher.weight} {teacher.temperature} {_weights(teacher.teacher)}"
    loss = getattr(objective.loss, "__qualname__", type(objective.loss).__qualname__)
    options |= {"weights": _weights(model), "loss": loss, "distill": taught}
    return {name: str(value) for name, value in options.items()}


def _length(batches: Iterable[Batch] | None) -> int | str | None:
    """None for no data at all."""
    found = length(batches)
    return "unknown" if found is None and batches is not None else found


def _weights(model: nn.Module) -> str:
    return digest([*model.parameters(), *model.buffers()])
