"""`run`: a whole experiment, from the dense classifier to the directory with its report."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from hap.batches import arguments, device_of, resized, to_device
from hap.checkpoint import Origin, fresh_directory, refuse_existing
from hap.errors import unknown
from hap.pipeline.kept import recovered_
from hap.pipeline.origin import origin
from hap.pipeline.record import BATCH, Round, Run, compare, write_run
from hap.pipeline.rounds import in_rounds, repeatable
from hap.pipeline.stages import Result, prune, step
from hap.pipeline.steps import Steps
from hap.pipeline.stopwatch import Stopwatch
from hap.pipeline.together import by_the_first, is_first
from hap.pipeline.training import Training
from hap.planning import Latency, measure_latency
from hap.planning.budget import fractions
from hap.report import Quantity, Target, reached
from hap.surgery import refit_
from hap.training import evaluate, finetune, recalibrate_
from hap.types import Budget, Evaluation, Log, Progress, silent
from hap.zoo import DataSplits, Split

logger = logging.getLogger(__name__)
Recover = Literal["refit", "recalibrate", "none"]


def run(
    model: nn.Module,
    data: DataSplits,
    budget: Budget,
    out: str | Path,
    *,
    tokenizer: Any = None,
    iterations: int = 1,
    recover: Recover = "refit",
    training: Training | None = None,
    targets: Sequence[Target] = (),
    rival: float | None = None,
    accelerator: Any = None,
    overwrite: bool = False,
    seed: int = 0,
    work: Path | None = None,
    save_every: float = 60.0,
    parts: Mapping[str, Path] | None = None,
    spent: Mapping[str, float] | None = None,
    options: dict[str, Any] | None = None,
    log: Log | None = None,
    progress: Progress = silent,
    **settings: Any,
) -> Run:
    """Prunes a classifier, recovers, fine-tunes, evaluates and writes the run directory.

    The directory is also a checkpoint for `hap.load`; with ``report.json`` and two plots. It
    appears whole at the end, or not at all.

    Under ``torchrun`` or ``accelerate launch`` every process calls this with the same arguments and an `accelerator`.
    They share measuring, training and evaluation; the plan and the times are the first one's, and it alone writes.

    Args:
        model: the dense classifier; left as it is.
        data: calibration and training examples, validation for choices, test for the numbers reported.
        budget: what may remain.
        out: the run directory.
        tokenizer: of a model of texts; see `hap.save`.
        iterations: in how many rounds of measuring, pruning and fine-tuning. What remains shrinks by the same factor in
            each; implants come in the last. The plan that is stored is one for the dense model.
        recover: what follows a cut: ``refit`` solves the weights that are left in closed form (`hap.refit_`),
            ``recalibrate`` computes batch-norm statistics anew, ``none`` does nothing.
        training: how to fine-tune in each round; None for `Training`'s defaults.
        targets: published numbers to hold the result against.
        rival: the accuracy of another small model, for targets of a gain over it.
        accelerator: an `accelerate.Accelerator`; the model is on its device.
        overwrite: replace `out` if it exists.
        seed: of everything drawn at random.
        work: a folder that exists, for what a run that is killed goes on from when it is started again with the same
            arguments, with the same result; the caller removes it. None keeps nothing.
        save_every: seconds between two saves of the fine-tuning's state there.
        parts: directories that are copied into the run directory, by the name that they have there.
        spent: seconds of stages that came before, for the record.
        options: for the record and the model card, how the model and the data were chosen: ``model``, ``weights``,
            ``task``, ``data`` and ``limit``, as `hap prune` has them, and whatever else is to be kept.
        log: takes losses and learning rates while training, see `hap.finetune`; at the end the seconds of each stage
            and the test results.
        progress: shows how far the stages are.
        settings: passed on to `prune`.
    """
    out, training = Path(out), training or Training()
    if recover not in get_args(Recover):
        raise unknown("recovery", recover, get_args(Recover))
    refuse_existing(out, overwrite)
    for name in data.metrics:
        if name not in get_args(Quantity):
            raise unknown("metric", name, get_args(Quantity))
    settings = repeatable(settings)
    evaluate(model, [next(iter(data.validation))])  # labels or outputs that do not fit are seen before all the work
    about = origin(options or {}, data, model)
    steps = None if log is None else Steps(log)
    rounds_done = itertools.count(1)

    def folder(number: int) -> Path:
        assert work is not None
        found = work / f"round{number}"
        found.mkdir(exist_ok=True)
        return found

    timed = Stopwatch(None if work is None else folder)

    def assessed(found: nn.Module, split: Split, **more: Any) -> Evaluation:
        return evaluate(found, split, accelerator=accelerator, progress=progress, **more)

    def train_(small: nn.Module, dense: nn.Module, result: Result) -> Round:
        """Recovers and fine-tunes, and notes how it went."""
        number = next(rounds_done)

        def recovered() -> list[Evaluation]:
            with timed("evaluate", number):
                cut, whole = assessed(small, data.validation), assessed(dense, data.validation)
            if recover == "none":
                return [cut, whole, cut]
            with timed(recover, number):
                if recover == "refit":
                    refit_(small, dense, result.plan, data.calibration, samples=512, progress=progress)
                else:
                    recalibrate_(small, data.calibration, samples=2048, progress=progress)
            with timed("evaluate", number):
                return [cut, whole, assessed(small, data.validation)]

        cut, whole, as_cut = (
            recovered() if work is None else recovered_(folder(number), {"recover": recover}, small, recovered)
        )
        with timed("finetune", number):
            history = finetune(
                small,
                _from_epoch(data.train, (number - 1) * training.epochs),
                validation=data.validation,
                accelerator=accelerator,
                seed=seed,
                state=None if work is None else folder(number) / "finetune.safetensors",
                save_every=save_every,
                log=None if steps is None else steps.stage("" if iterations == 1 else f"round{number}/"),
                progress=progress,
                **training.options(model),
            )
        timed.at_least("finetune", number, sum(epoch.seconds for epoch in history.epochs))
        return Round(result.plan.small, result.plan.predicted, cut.loss - whole.loss, as_cut, history)

    cuts_done = itertools.count(1)

    def cut(dense: nn.Module, part: Budget, **more: Any) -> Result:
        number = next(cuts_done)
        kept = {} if work is None else {"state": folder(number)}
        run = {**settings, **kept, **more, "timed": lambda stage: timed(stage, number)}
        return prune(dense, data.calibration, None, part, seed=seed, progress=progress, **run)

    result, rounds = in_rounds(model, budget, iterations, cut, train_, **settings)
    small = result.model
    with timed("evaluate"):
        before = assessed(model, data.test, metrics=data.metrics)
        after = assessed(small, data.test, metrics=data.metrics)
        latency = by_the_first(lambda: _latency(model, small, data, progress))
    seconds = timed.seconds(spent or {})
    comparison = compare(model, result, before, after, latency)
    found = reached(
        targets, (before.accuracy, after.accuracy), fractions(result.plan.small, result.plan.dense), rival=rival
    )
    done = Run(result, comparison, rounds, latency, out, seconds, found, after.samples, tuple(about.notes))
    record = {**(options or {}), "seed": seed, "recover": recover, "training": dataclasses.asdict(training)}
    by_the_first(lambda: _write(done, model, tokenizer, record, about, parts or {}, overwrite))
    if steps is not None and is_first():
        steps.stage()(_summary(done, after), 0)
    return done


def _write(
    done: Run,
    model: nn.Module,
    tokenizer: Any,
    record: dict[str, Any],
    about: Origin,
    parts: Mapping[str, Path],
    overwrite: bool,
) -> None:
    with fresh_directory(done.directory, overwrite=overwrite) as staging:
        write_run(done, model, staging, tokenizer, record, about)
        for name, source in parts.items():
            shutil.copytree(source, staging / name)


def _from_epoch(train: Split, epochs: int) -> Split:
    """The training examples as they are after so many epochs, whoever has read them before."""
    found = copy.copy(train)
    found.load_state_dict({"epochs": epochs})
    return found


def _summary(done: Run, after: Evaluation) -> dict[str, float]:
    """The seconds of each stage, and the test results of the small model."""
    numbers = {"loss": after.loss, "accuracy": after.accuracy, **after.metrics}
    times = {f"seconds/{stage}": spent for stage, spent in done.seconds.items()}
    return times | {f"test/{name}": value for name, value in numbers.items() if value is not None}


def _latency(model: nn.Module, small: nn.Module, data: DataSplits, progress: Progress) -> dict[int, dict[str, Latency]]:
    """One example, as in deployment, and a batch, where the work outweighs the calls."""
    batch = to_device(next(iter(data.validation)), device_of(model))
    models = {"dense": model, "small": small}

    def time_both() -> dict[int, dict[str, Latency]]:
        return {count: measure_latency(models, *arguments(resized(batch, count))) for count in (1, BATCH)}

    return step(progress, "timing", time_both)
