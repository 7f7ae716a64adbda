"""`run`: a whole experiment, from the dense classifier to the directory with its report."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from hap.batches import arguments, device_of, resized, to_device
from hap.checkpoint import fresh_directory, refuse_existing
from hap.errors import unknown
from hap.pipeline.record import BATCH, Round, Run, compare, write_run
from hap.pipeline.rounds import in_rounds
from hap.pipeline.stages import Result, prune, step
from hap.planning import Latency, measure_latency
from hap.surgery import refit_
from hap.training import evaluate, finetune, recalibrate_
from hap.types import Budget, Progress, silent
from hap.zoo import DataSplits

log = logging.getLogger(__name__)
Recover = Literal["recalibrate", "refit", "none"]


@dataclass(frozen=True)
class Training:
    """How to fine-tune; the fields are those of `hap.finetune`."""

    epochs: int = 1
    optimizer: str = "sgd"
    lr: float | None = None
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 0.0
    ema: float | None = None
    clip: float | None = None


def run(
    model: nn.Module,
    data: DataSplits,
    budget: Budget,
    out: str | Path,
    *,
    tokenizer: Any = None,
    iterations: int = 1,
    recover: Recover = "recalibrate",
    training: Training | None = None,
    overwrite: bool = False,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    progress: Progress = silent,
    **settings: Any,
) -> Run:
    """Prunes a classifier, recalibrates, fine-tunes, evaluates and writes the run directory.

    The directory is also a checkpoint for `hap.load`; with ``report.json`` and two plots. It
    appears whole at the end, or not at all.

    Args:
        model: the dense classifier; left as it is.
        data: calibration and training examples, validation for choices, test for the numbers reported.
        budget: what may remain.
        out: the run directory.
        tokenizer: of a model of texts; see `hap.save`.
        iterations: in how many rounds of measuring, pruning and fine-tuning. What remains shrinks by the same factor in
            each; implants come in the last. The plan that is stored is one for the dense model.
        recover: what follows a cut: ``recalibrate`` computes batch-norm statistics anew, ``refit``
            solves the weights that are left in closed form (`hap.refit_`), ``none`` does nothing.
        training: how to fine-tune in each round; None for `Training`'s defaults.
        overwrite: replace `out` if it exists.
        seed: of everything drawn at random.
        options: for the record in ``report.json``: how the model and the data were chosen.
        progress: shows how far the stages are.
        settings: passed on to `prune`.
    """
    out, training = Path(out), training or Training()
    if recover not in get_args(Recover):
        raise unknown("recovery", recover, get_args(Recover))
    refuse_existing(out, overwrite)
    seconds: dict[str, float] = {}

    def train_(small: nn.Module, dense: nn.Module, result: Result) -> Round:
        """Recovers and fine-tunes, and notes how it went."""
        with _timed(seconds, recover):
            cut = evaluate(small, data.validation, progress=progress)
            whole = evaluate(dense, data.validation, progress=progress)
            if recover == "refit":
                refit_(small, dense, result.plan, data.calibration, samples=512, progress=progress)
            elif recover == "recalibrate":
                recalibrate_(small, data.calibration, samples=2048, progress=progress)
            as_cut = evaluate(small, data.validation, progress=progress)
        with _timed(seconds, "finetune"):
            history = finetune(
                small,
                data.train,
                validation=data.validation,
                seed=seed,
                progress=progress,
                **dataclasses.asdict(training),
            )
        return Round(result.plan.small, result.plan.predicted, cut.loss - whole.loss, as_cut, history)

    def cut(dense: nn.Module, part: Budget, **more: Any) -> Result:
        with _timed(seconds, "prune"):
            return prune(dense, data.calibration, None, part, seed=seed, progress=progress, **{**settings, **more})

    result, rounds = in_rounds(model, budget, iterations, cut, train_, **settings)
    small = result.model
    with _timed(seconds, "evaluate"):
        before = evaluate(model, data.test, metrics=data.metrics, progress=progress)
        after = evaluate(small, data.test, metrics=data.metrics, progress=progress)
        latency = _latency(model, small, data, progress)
    comparison = compare(model, result, before, after, latency)
    done = Run(result, comparison, rounds, latency, out, seconds)
    with fresh_directory(out, overwrite=overwrite) as staging:
        write_run(
            done,
            model,
            staging,
            tokenizer,
            {**(options or {}), "seed": seed, "recover": recover, "training": dataclasses.asdict(training)},
        )
    return done


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    spent = time.perf_counter() - start
    seconds[stage] = seconds.get(stage, 0.0) + spent
    log.info("%s took %.1f s", stage, spent)


def _latency(model: nn.Module, small: nn.Module, data: DataSplits, progress: Progress) -> dict[int, dict[str, Latency]]:
    """One example, as in deployment, and a batch, where the work outweighs the calls."""
    batch = to_device(next(iter(data.validation)), device_of(model))
    models = {"dense": model, "small": small}

    def time_both() -> dict[int, dict[str, Latency]]:
        return {count: measure_latency(models, *arguments(resized(batch, count))) for count in (1, BATCH)}

    return step(progress, "timing", time_both)
