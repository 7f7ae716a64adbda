"""Composes the stages: `prune` for a model in memory, `run` for a whole experiment with its report."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from hap.batches import Batch, Loss, arguments, device_of, take, to_device
from hap.checkpoint import fresh_directory, refuse_existing, stored_bytes, write
from hap.curvature import Criterion, measure
from hap.errors import HapError, unknown
from hap.planning import Latency, Plan, decide, measure_latency, versions
from hap.report import Comparison, Measured, sensitivity_plot, table, width_plot, write_json
from hap.structure import trace
from hap.surgery import apply, refit_, verify
from hap.training import History, evaluate, finetune, recalibrate_
from hap.types import Budget, Evaluation, Progress, Sensitivity, Structure, Verification, silent
from hap.zoo import DataSplits

log = logging.getLogger(__name__)
T = TypeVar("T")
Recover = Literal["recalibrate", "refit", "none"]
BATCH = 32  # images in the larger input that is timed
CAP = 8192  # calibration examples, at most, where their number is not given
FIT = 512  # of these, the examples that implants are fitted on


@dataclass(frozen=True)
class Result:
    """What `prune` made, with everything that led to it."""

    model: nn.Module
    structure: Structure
    sensitivity: Sensitivity
    plan: Plan
    verification: Verification


def prune(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss | None,
    budget: Budget,
    *,
    criterion: str | Criterion = "gate-fisher",
    implant_ratio: float = 0.1,
    samples: int | Literal["auto"] = 512,
    draws: int | None = None,
    seed: int = 0,
    floor: int = 1,
    round_to: int = 1,
    inexact: bool = False,
    ignore: Iterable[str] = (),
    progress: Progress = silent,
) -> Result:
    """Traces, measures, decides, applies and verifies; the model itself is left as it is.

    Args:
        model: the trained model.
        batches: calibration data, from the training set; read once, up to `samples` examples, 8192 for "auto".
        loss: ``loss(outputs, batch)``; None for cross-entropy of the logits or the model's own loss.
        budget: what may remain.
        criterion, draws: see `hap.measure`.
        implant_ratio, floor, round_to, inexact: see `hap.decide`.
        samples: calibration examples, for measuring and for fitting the implants. "auto" measures until the ranking
            is settled where the budget's fraction of the units stays (see `hap.measure`), and fits on 512.
        seed: of everything drawn at random.
        ignore: see `hap.trace`.
        progress: shows how far the stages are.

    Raises:
        HapError: as the stages do; or the pruned model does not compute what the plan promised.
    """
    data = list(take(batches, CAP if isinstance(samples, str) else samples, device_of(model)))
    args, kwargs = arguments(data[0])
    structure = _step(progress, "tracing", lambda: trace(model, args, kwargs, ignore=ignore))
    sensitivity = measure(
        model,
        data,
        loss,
        structure,
        criterion=criterion,
        samples=samples,
        keep=_fraction(budget) if samples == "auto" else None,
        cap=CAP,
        draws=draws,
        seed=seed,
        progress=progress,
    )
    plan = decide(
        structure, sensitivity, budget, implant_ratio=implant_ratio, floor=floor, round_to=round_to, inexact=inexact
    )
    plan = dataclasses.replace(plan, options={**plan.options, "seed": seed})
    small = apply(model, plan, data, samples=FIT if isinstance(samples, str) else samples, progress=progress)
    verification = _step(progress, "verifying", lambda: verify(model, small, plan, args, kwargs))
    if not verification.ok:
        raise HapError(
            "the pruned model does not compute what the plan promised",
            expected=f"a relative error of at most 1e-9 and {verification.promised_params:,} parameters",
            got=f"{verification.max_relative_error:.1e} and {verification.params:,}",
            remedy="a rule of hap.structure is wrong for this model: please report it; ignore= leaves modules alone",
        )
    return Result(small, structure, sensitivity, plan, verification)


def _fraction(budget: Budget) -> float:
    """The tightest fraction that may remain: near enough to the fraction of units for a look at the ranking."""
    return min(fraction for fraction in (budget.params, budget.macs) if fraction is not None)


def _step(progress: Progress, description: str, work: Callable[[], T]) -> T:
    """Shows a stage that has no parts to count."""
    return [work() for _ in progress([None], description, 1)][0]


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


@dataclass(frozen=True)
class Run:
    """A whole experiment: its result and its evidence.

    Attributes:
        result: of `prune`; its model is fine-tuned.
        comparison: the before/after table. Accuracy and loss are of the test set, read once.
        history: of the fine-tuning.
        as_cut: validation before fine-tuning, after what `recover` does.
        latency: by number of images in the input, of the dense and the small model.
        seconds: time of each stage.
        directory: where everything was written.
    """

    result: Result
    comparison: Comparison
    history: History
    as_cut: Evaluation
    latency: dict[int, dict[str, Latency]]
    directory: Path
    seconds: dict[str, float] = field(default_factory=dict)


def run(
    model: nn.Module,
    data: DataSplits,
    budget: Budget,
    out: str | Path,
    *,
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
        data: calibration and training images, validation for choices, test for the numbers reported.
        budget: what may remain.
        out: the run directory.
        recover: what follows the cut: ``recalibrate`` computes batch-norm statistics anew, ``refit``
            solves the weights that are left in closed form (`hap.refit_`), ``none`` does nothing.
        training: how to fine-tune; None for `Training`'s defaults.
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
    with _timed(seconds, "prune"):
        result = prune(model, data.calibration, None, budget, seed=seed, progress=progress, **settings)
    small = result.model
    with _timed(seconds, recover):
        if recover == "refit":
            refit_(small, model, result.plan, data.calibration, samples=512, progress=progress)
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
    with _timed(seconds, "evaluate"):
        before = evaluate(model, data.test, progress=progress)
        after = evaluate(small, data.test, progress=progress)
        latency = _latency(model, small, data, progress)
    comparison = _compare(model, result, before, after, latency)
    done = Run(result, comparison, history, as_cut, latency, out, seconds)
    with fresh_directory(out, overwrite=overwrite) as staging:
        _write(
            done,
            model,
            staging,
            {**(options or {}), "seed": seed, "recover": recover, "training": dataclasses.asdict(training)},
        )
    return done


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
    log.info("%s took %.1f s", stage, seconds[stage])


def _latency(model: nn.Module, small: nn.Module, data: DataSplits, progress: Progress) -> dict[int, dict[str, Latency]]:
    """One image, as in deployment, and a batch, where the work outweighs the calls."""
    images = next(iter(data.validation))[0]
    inputs = to_device(images.repeat(-(-BATCH // len(images)), 1, 1, 1)[:BATCH], device_of(model))
    models = {"dense": model, "small": small}

    def time_both() -> dict[int, dict[str, Latency]]:
        return {count: measure_latency(models, (inputs[:count],)) for count in (1, BATCH)}

    return _step(progress, "timing", time_both)


def _compare(
    model: nn.Module,
    result: Result,
    before: Evaluation,
    after: Evaluation,
    latency: dict[int, dict[str, Latency]],
) -> Comparison:
    plan, one, many = result.plan, latency[1], latency[BATCH]
    return table(
        {
            "params": (plan.dense.params, plan.small.params),
            "macs": (plan.dense.macs, plan.small.macs),
            "latency_ms": (_measured(one["dense"]), _measured(one["small"])),
            "batch_latency_ms": (_measured(many["dense"]), _measured(many["small"])),
            "bytes": (stored_bytes(model), stored_bytes(result.model)),
            "accuracy": (before.accuracy, after.accuracy),
            "loss": (before.loss, after.loss),
        },
        ratios={"latency_ms": one["small"].ratio, "batch_latency_ms": many["small"].ratio},
    )


def _measured(latency: Latency) -> Measured:
    """The median and half the distance of the quartiles."""
    return Measured(latency.median, (latency.high - latency.low) / 2)


def _write(done: Run, model: nn.Module, directory: Path, options: dict[str, Any]) -> None:
    result = done.result
    cost_rows = {"params", "macs"}  # the model card has these from the plan
    results = {row.label: row.cells()[1:3] for row in done.comparison.rows if row.quantity not in cost_rows}
    write(result.model, result.plan, directory, results=results)
    sensitivity_plot(result.sensitivity, result.plan, directory / "sensitivity.png")
    width_plot(result.plan, directory / "widths.png")
    write_json(directory / "report.json", _report(done, model, options))


def _report(done: Run, model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    result = done.result
    sensitivity = result.sensitivity
    return {
        "model": type(model).__name__,
        "device": str(device_of(model)),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "options": {**options, **result.plan.options, "budget": dataclasses.asdict(result.plan.budget)},
        "criterion": sensitivity.criterion,
        "comparison": {
            row.quantity: {"dense": row.dense.value, "small": row.small.value, "ratio": row.ratio}
            for row in done.comparison.rows
        },
        "units": sum(len(d.keep) + len(d.prune) for d in result.plan.decisions.values()),
        "pruned_units": sum(len(d.prune) for d in result.plan.decisions.values()),
        "implanted_filters": sum(len(i.indices) for i in result.plan.implants.values()),
        "verification": dataclasses.asdict(result.verification),
        "as_cut": dataclasses.asdict(done.as_cut),
        "history": done.history.to_dict(),
        "latency": {
            count: {name: dataclasses.asdict(found) for name, found in models.items()}
            for count, models in done.latency.items()
        },
        "seconds": done.seconds,
        "sensitivity": {
            name: {"scores": score.tolist(), "stderr": sensitivity.stderr[name].tolist()}
            for name, score in sensitivity.scores.items()
        },
    }
