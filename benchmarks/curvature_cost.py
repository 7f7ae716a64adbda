"""What curvature costs: time and memory of one batch, and the time to reach a given standard error."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from curvature_memory import in_fresh_process
from curvature_records import Records, rounded, say
from curvature_setting import DATA, RESULTS, Clock, Data, Minutes, Results, Setting, load
from torch import nn
from torch.nn import functional as F

import hap
from hap import batches

UNIT = "training step"
ERROR_SAMPLES = 512


@dataclass(frozen=True, eq=False)
class Bench:
    """One batch, and how many random vectors the stochastic contenders draw for it."""

    setting: Setting
    batch: batches.Batch
    draws: int

    def model(self) -> nn.Module:
        """A copy of its own for each contender: some leave gradients or hooks behind."""
        return copy.deepcopy(self.setting.model)


Work = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """A way to compute curvature.

    Attributes:
        prepare: imports and copies what it needs, and returns the work that is timed.
        per: what one unit of its work is called.
        count: how many of them its work does, from the number of draws.
        gives: what comes out.
    """

    prepare: Callable[[Bench], Work]
    per: str
    count: Callable[[int], int]
    gives: str


def training_step(bench: Bench) -> Work:
    """The unit of time: one forward and backward pass for all parameters, in training mode."""
    model = bench.model().train()
    images, labels = bench.batch

    def work() -> None:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()

    return work


def _measure(criterion: str, draws: int | None = None, *, many: bool = False) -> Callable[[Bench], Work]:
    def prepare(bench: Bench) -> Work:
        model, data, structure = bench.model(), [bench.batch], bench.setting.structure
        chosen = bench.draws if many else draws
        count = batches.size(bench.batch)
        return lambda: hap.measure(model, data, None, structure, criterion=criterion, samples=count, draws=chosen)

    return prepare


def _pyhessian(bench: Bench) -> Work:
    from pyhessian import hessian

    model = bench.model()

    def work() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # backward(create_graph=True) warns of the cycle that zero_grad breaks
            # A tolerance of 0 never stops early.
            hessian(model, nn.CrossEntropyLoss(), data=bench.batch, cuda=False).trace(maxIter=bench.draws, tol=0)
        model.zero_grad()

    return work


def _curvlinops(bench: Bench) -> Work:
    from curvlinops import HessianLinearOperator, hutchinson_trace

    model = bench.model()
    parameters, loss = list(model.parameters()), nn.CrossEntropyLoss()

    def work() -> None:
        operator = HessianLinearOperator(model, loss, parameters, [bench.batch], check_deterministic=False)
        hutchinson_trace(operator, num_matvecs=bench.draws)

    return work


def _torch_pruning(bench: Bench) -> Work:
    from torch_pruning.pruner.importance import GroupHessianImportance

    model = bench.model()
    images, labels = bench.batch

    def work() -> None:  # the loop of its documentation: one backward pass for each sample
        scorer = GroupHessianImportance()
        scorer.zero_grad()
        for loss in F.cross_entropy(model(images), labels, reduction="none"):
            model.zero_grad()
            loss.backward(retain_graph=True)
            scorer.accumulate_grad(model)
        model.zero_grad()

    return work


def _one(draws: int) -> int:
    return 1


def _all(draws: int) -> int:
    return draws


CONTENDERS: Mapping[str, Contender] = {
    UNIT: Contender(training_step, "batch", _one, "gradients"),
    "hap gate-fisher": Contender(_measure("gate-fisher", 1), "draw", _one, "every unit and filter"),
    "hap gate-fisher, many draws": Contender(_measure("gate-fisher", many=True), "draw", _all, "every unit and filter"),
    "hap gate-ggn": Contender(_measure("gate-ggn"), "batch (10 classes)", _one, "every unit and filter, exactly"),
    "hap hessian-trace": Contender(_measure("hessian-trace", many=True), "probe", _all, "every unit and filter"),
    "PyHessian trace": Contender(_pyhessian, "probe", _all, "one number for the network"),
    "curvlinops hutchinson_trace": Contender(_curvlinops, "probe", _all, "one number for the network"),
    "torch-pruning GroupHessianImportance": Contender(
        _torch_pruning, "batch (a backward pass for each sample)", _one, "squared gradients of every weight"
    ),
}


def cost(
    data: Data = DATA,
    results: Results = RESULTS,
    minutes: Minutes = 60.0,
    batch: Annotated[int, typer.Option(help="Images in the batch.")] = 128,
    draws: Annotated[int, typer.Option(help="Probes, or sampled labels, of a stochastic contender.")] = 8,
    rounds: Annotated[int, typer.Option(help="Timings of each contender; medians are reported.")] = 5,
    seeds: Annotated[int, typer.Option(help="Repetitions of the standard-error runs; 0 leaves them out.")] = 5,
    samples: Annotated[int, typer.Option(help="Calibration images of the standard-error runs.")] = ERROR_SAMPLES,
) -> None:
    """Time, memory, and the time to a given standard error."""
    clock, setting = Clock(minutes), load(data, batch_size=batch)
    _time(Bench(setting, setting.calibration(batch)[0], draws), results, rounds, clock)
    _memory(data, results, batch, draws, clock)
    _error(setting, results, samples, draws, seeds, batch, clock)


def _time(bench: Bench, results: Results, rounds: int, clock: Clock) -> None:
    """Each contender right after a training step, in turn, so that the machine's mood cancels in the ratio."""
    records = Records(results / "curvature-cost.jsonl", batch=batches.size(bench.batch), draws=bench.draws, what="time")
    step = training_step(bench)
    step()
    for number in range(rounds):
        for name, contender in CONTENDERS.items():
            if clock.over() or records.has(contender=name, round=number):
                continue
            work = contender.prepare(bench)
            unit, seconds = timed(step), timed(work)
            count = contender.count(bench.draws)
            row = {"contender": name, "round": number, "seconds": seconds, "unit_seconds": unit}
            row |= {"count": count, "per": contender.per, "gives": contender.gives}
            records.add(row, f"{name}: {seconds / count / unit:.2f} training steps a {contender.per}")


def timed(work: Work) -> float:
    """Wall-clock seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _memory(data: Data, results: Results, batch: int, draws: int, clock: Clock) -> None:
    records = Records(results / "curvature-cost.jsonl", batch=batch, draws=draws, what="memory")
    for name in CONTENDERS:
        if clock.over() or records.has(contender=name):
            continue
        found = in_fresh_process("cost", name, {"data": str(data.resolve()), "batch": batch, "draws": draws})
        records.add({"contender": name, **found}, f"{name}: {found['extra_mib']:.0f} MiB more than before")


def memory_point(name: str, options: Mapping[str, Any]) -> tuple[Work, Callable[[], dict[str, Any]]]:
    """What the fresh process measures for a contender; its kernels are loaded by a tiny batch first."""
    data, batch, draws = Path(options["data"]), options["batch"], options["draws"]
    setting = load(data, batch_size=batch)
    images, labels = setting.calibration(batch)[0]
    training_step(Bench(setting, (images[:2], labels[:2]), draws))()
    return CONTENDERS[name].prepare(Bench(setting, (images, labels), draws)), dict


def _error(setting: Setting, results: Results, samples: int, draws: int, seeds: int, batch: int, clock: Clock) -> None:
    """Scores and standard errors of whole measurements, for several seeds on the same images."""
    data = setting.calibration(samples)
    settings = {"batch": batch, "samples": samples, "what": "error"}
    records = Records(results / "curvature-cost.jsonl", **settings)
    step = training_step(Bench(setting, data[0], draws))
    step()
    for seed in range(seeds):
        for name, count in (("gate-fisher", 1), ("gate-fisher", 4), ("hessian-trace", draws)):
            if clock.over() or records.has(contender=name, draws=count, seed=seed):
                continue
            unit = timed(step)
            start = time.perf_counter()
            found = hap.measure(
                setting.model, data, None, setting.structure, criterion=name, samples=samples, draws=count, seed=seed
            )
            row = {
                "contender": name,
                "draws": count,
                "seed": seed,
                "seconds": time.perf_counter() - start,
                "unit_seconds": unit,
                "scores": rounded(setting.flat(found.scores)),
                "stderr": rounded(setting.flat(found.stderr)),
            }
            records.add(row, f"{name}, {count} draws, seed {seed}: {row['seconds']:.1f} s")
    if clock.over():
        say("out of time: the same command goes on")
