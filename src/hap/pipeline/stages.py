"""`prune`: the stages, one after the other, on a model in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from hap.batches import Batch, Loss, arguments, device_of, digest, evaluating, forward, resized, take
from hap.curvature import CRITERIA, Criterion, measure
from hap.errors import HapError
from hap.implants import Option, head_options, options
from hap.pipeline.clock import by_the_clock, clock
from hap.pipeline.kept import once
from hap.pipeline.rescaled import rescaled, since
from hap.pipeline.stopwatch import Timed, untimed
from hap.pipeline.together import by_the_first
from hap.planning import CostModel, Joint, Mode, Plan, Widths, checked, decide, inside, time_layers, ways
from hap.planning.budget import Unreachable, check_measured, unreachable
from hap.structure import trace
from hap.surgery import apply, verify
from hap.types import Budget, Progress, Sensitivity, Structure, Verification, silent

T = TypeVar("T")
PAIRS = 8192  # units of which the matrix of all pairs, 8 bytes each, is measured unasked: half a gigabyte
CAP = 8192  # calibration examples, at most, for samples="auto"
MANY = 2048  # examples for criteria that know pairs of units: cheap ones, and a matrix takes more than single scores do
FIT = 512  # for other criteria; and those that implants are fitted on


@dataclass(frozen=True)
class Result:
    """What `prune` made, with everything that led to it."""

    model: nn.Module
    structure: Structure
    sensitivity: Sensitivity
    plan: Plan
    verification: Verification

    def __repr__(self) -> str:
        found = self.verification
        proof = f"verified to {found.max_relative_error:.1e}" if found.exact else "runs, inexact"
        return f"Result({type(self.model).__name__}, {self.plan}, {proof})"


def prune(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss | None,
    budget: Budget,
    *,
    criterion: str | Criterion = "gate-fisher",
    implant_ratio: float = 0.1,
    samples: int | Literal["auto"] | None = None,
    draws: int | None = None,
    seed: int = 0,
    mode: Mode = "optimal",
    joint: Joint = "auto",
    floor: int = 1,
    minimum: Widths | None = None,
    maximum: Widths | None = None,
    round_to: int = 1,
    protect: Iterable[str] = (),
    units: Iterable[str] | None = None,
    inexact: bool = False,
    ignore: Iterable[str] = (),
    latency_batch: int = 1,
    latency_cache: str | Path | None = None,
    after: Plan | None = None,
    state: str | Path | None = None,
    progress: Progress = silent,
    timed: Timed = untimed,
) -> Result:
    """Traces, measures, decides, applies and verifies; the model itself is left as it is.

    Args:
        model: the trained model.
        batches: calibration data, from the training set; read once, up to `samples` examples, 8192 for "auto".
        loss: ``loss(outputs, batch)``; None for cross-entropy of the logits or the model's own loss.
        budget: what may remain.
        criterion, draws: see `hap.measure`.
        mode, implant_ratio, floor, minimum, maximum, round_to, protect, units, inexact: see `hap.decide`. In mode
            ``optimal`` implants of every form are measured on the data, unless `implant_ratio` is 0.
        joint: see `hap.decide`; "auto" measures the Gram matrix in mode ``optimal`` where the criterion has one, the
            units are no more than 8192, and nothing may be implanted or heads alone leave: plans with
            implants of channels are better without it (docs/implants.md).
        samples: calibration examples, for measuring and for fitting the implants. None measures on 2048 in mode
            ``optimal`` with a criterion that has a Gram matrix and on 512 else, "auto" until the ranking is settled
            where the budget's fraction of the units stays (see `hap.measure`); both fit on 512.
        seed: of everything drawn at random.
        ignore: see `hap.trace`.
        latency_batch: a budget of latency counts the time of so many examples. Without one nothing is timed, and
            implants may make the model slower: with ``Budget(params=0.5, latency=1.0)`` they do not.
        latency_cache: a file that keeps the layers' times for the next run; see `hap.planning.time_layers`.
        after: the plan that made this model from another one, which the budget is then a fraction of.
        state: a folder that exists, to keep what was measured and decided, so that a run that was killed goes on from
            there when it is started again with the same arguments, with the same result.
        progress: shows how far the stages are.
        timed: a context for each stage to run in, by its name: trace, measure, fit (every implant, to all layers), time
            (the layers), decide, apply, verify.

    Raises:
        HapError: as the stages do; the state is another run's; or the pruned model does not compute what the plan
            promised.
    """
    ignore, protect, units = tuple(ignore), tuple(protect), None if units is None else tuple(units)
    most = examples(samples=samples, criterion=criterion, mode=mode)
    fit = fitted_on(samples)
    data = list(take(batches, most, device_of(model)))
    args, kwargs = arguments(data[0])
    with timed("trace"):
        structure = step(progress, "tracing", lambda: trace(model, args, kwargs, ignore=ignore))
    choice: dict[str, Any] = {
        "mode": mode,
        "implant_ratio": implant_ratio,
        "joint": joint,
        "floor": floor,
        "minimum": minimum,
        "maximum": maximum,
        "round_to": round_to,
        "protect": protect,
        "units": units,
        "inexact": inexact,
    }

    batch = _at_least_one(latency_batch)
    checked(structure, **choice)  # before anything is measured
    counted = {name: limit for name, limit in budget.limits.items() if name != "latency"}
    if after is None and counted:
        check_measured(Budget(**counted), CostModel(structure).dense)

    def together() -> bool:
        """Whether the matrix of all pairs helps: it leads plans with implants of channels astray, and not of heads."""
        few = sum(family.size for family in structure.families) <= PAIRS
        heads = units == ("head",) or [*budget.limits] == ["heads"]
        return _knows_pairs(criterion) and few and (heads or not implant_ratio)

    def choose() -> tuple[Sensitivity, Plan]:
        dense, table = CostModel(structure).dense, None
        limits = budget if after is None else rescaled(budget, after, dense)
        with timed("measure"):
            sensitivity = measure(
                model,
                data,
                loss,
                structure,
                criterion=criterion,
                samples="auto" if samples == "auto" else most,
                # near enough to the fraction of units
                keep=min(1.0, *limits.limits.values()) if samples == "auto" else None,
                cap=CAP,
                draws=draws,
                seed=seed,
                gram=mode == "optimal" and (together() if joint == "auto" else joint),
                state=Path(state, "measure.safetensors") if state and _resumable(criterion) else None,
                progress=progress,
            )
        forms: Mapping[str, tuple[Option, ...]] = {}
        if implant_ratio:
            with timed("fit"):
                forms = _forms(model, structure, data, fit, choice, ignore, progress)
        inputs = arguments(resized(data[0], batch))
        if budget.latency is not None:
            known = ways(structure, forms, mode=mode) if implant_ratio else {}
            with timed("time"):
                table = by_the_first(
                    lambda: time_layers(
                        model, structure, *inputs, implants=known, cache=latency_cache, progress=progress
                    )
                )

        def decided(within: Budget) -> Plan:
            try:
                return decide(structure, sensitivity, within, options=forms, latency=table, **choice)
            except Unreachable as error:
                if after is None:
                    raise
                least = since(after, error.least, CostModel(structure, table).dense)
                raise unreachable(least, after.dense, budget, implants=error.implants) from None

        def timed_plan() -> Plan:
            return by_the_clock(decided, limits, clock(model, *inputs))

        with timed("decide"):
            plan = decided(limits) if table is None else by_the_first(timed_plan)
        counted = {} if table is None else {"latency_batch": batch}
        return sensitivity, dataclasses.replace(plan, options={**plan.options, **counted, "seed": seed})

    if state is None:
        sensitivity, plan = choose()
    else:
        measured = {"samples": samples, "draws": draws, "seed": seed, "ignore": ignore, "latency_batch": latency_batch}
        settings = {**choice, **measured, "budget": budget, "after": after and after.small}
        run = _identity(model, data, loss, criterion, settings)
        sensitivity, plan = once(Path(state), run, choose)
    plan = by_the_first(lambda: plan)
    with timed("apply"):
        small = apply(model, plan, data, samples=fit, progress=progress)
    with timed("verify"):
        verification = step(progress, "verifying", lambda: verify(model, small, plan, args, kwargs))
    _need(verification)
    return Result(small, structure, sensitivity, plan, verification)


def _identity(
    model: nn.Module, data: list[Batch], loss: Loss | None, criterion: str | Criterion, settings: Mapping[str, Any]
) -> dict[str, str]:
    """What makes a choice what it is: another one is not to go on from it."""
    known = criterion if isinstance(criterion, str) else f"{criterion.label} {vars(criterion)}"
    said = None if loss is None else _said(model, loss, data[0])
    return {
        "weights": digest([*model.parameters(), *model.buffers()]),
        "data": digest(dict(enumerate(data))),
        **{name: str(value) for name, value in {**settings, "criterion": known, "loss": said}.items()},
    }


def _need(verification: Verification) -> None:
    """Raises a HapError if the small model is not what the plan promised."""
    if verification.ok:
        return
    wanted = "a relative error of at most 1e-9" if verification.exact else "finite outputs of the dense shapes"
    raise HapError(
        "the pruned model does not compute what the plan promised",
        expected=f"{wanted} and {verification.promised_params:,} parameters",
        got=f"an error of {verification.max_relative_error:.1e} and {verification.params:,}",
        remedy="a rule of hap.structure is wrong for this model: please report it; ignore= leaves modules alone",
    )


def _forms(
    model: nn.Module,
    structure: Structure,
    data: list[Batch],
    samples: int,
    choice: dict[str, Any],
    ignore: tuple[str, ...],
    progress: Progress,
) -> dict[str, tuple[Option, ...]]:
    """What implants each layer and each attention module may have, and what they leave undone."""
    left = {layer.module for layer in structure.layers if not any(inside(layer.module, part) for part in ignore)}
    found: dict[str, tuple[Option, ...]] = {}
    if choice["mode"] == "optimal":
        found |= options(model, structure, data, samples=samples, layers=left, progress=progress)
    if choice["units"] is None or "head" in choice["units"]:
        found |= head_options(model, structure, data, samples=samples, layers=left, progress=progress)
    return found


def examples(
    *,
    samples: int | Literal["auto"] | None = None,
    criterion: str | Criterion = "gate-fisher",
    mode: Mode = "optimal",
    **_: object,
) -> int:
    """How many calibration examples `prune` reads at most, with these settings."""
    if samples is None:
        return MANY if mode == "optimal" and _knows_pairs(criterion) else FIT
    return CAP if samples == "auto" else samples


def fitted_on(samples: int | Literal["auto"] | None = None) -> int:
    """How many of them implants are fitted on."""
    return samples if isinstance(samples, int) else FIT


def _knows_pairs(criterion: str | Criterion) -> bool:
    known = CRITERIA.get(criterion) if isinstance(criterion, str) else criterion
    return known is not None and known.has_gram


def _resumable(criterion: str | Criterion) -> bool:
    """Whether `hap.measure` takes a state."""
    known = CRITERIA.get(criterion) if isinstance(criterion, str) else criterion
    return known is not None and known.resumable


def _said(model: nn.Module, loss: Loss, batch: Batch) -> str:
    """What tells a loss from another: its name, and what it says of a batch, but for what devices differ in."""
    with evaluating(model), torch.no_grad():
        value = float(loss(forward(model, batch), batch))
    return f"{getattr(loss, '__qualname__', type(loss).__qualname__)}, {value:.3g} of the first batch"


def _at_least_one(count: int) -> int:
    if count < 1:
        raise HapError("latency_batch is out of range", expected="an integer of at least 1", got=repr(count))
    return count


def step(progress: Progress, description: str, work: Callable[[], T]) -> T:
    """Shows a stage that has no parts to count."""
    return [work() for _ in progress([None], description, 1)][0]
