"""`decide`: a structure, its sensitivity and a budget -> a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from hap.errors import HapError, unknown
from hap.implants import Option
from hap.planning import optimal, paper
from hap.planning.budget import check_measured
from hap.planning.choice import Choice
from hap.planning.constraints import Constraints, Widths, constraints
from hap.planning.cost import CostModel
from hap.planning.latency_table import LatencyTable
from hap.planning.plan import Plan, versions
from hap.planning.problem import problem
from hap.types import Budget, Sensitivity, Structure

Mode = Literal["paper", "optimal"]
Joint = bool | Literal["auto"]


def decide(
    structure: Structure,
    sensitivity: Sensitivity,
    budget: Budget,
    *,
    mode: Mode = "paper",
    implant_ratio: float = 0.1,
    options: Mapping[str, Sequence[Option]] | None = None,
    joint: Joint = "auto",
    pairs: float = 0.5,
    floor: int = 1,
    minimum: Widths | None = None,
    maximum: Widths | None = None,
    round_to: int = 1,
    protect: Iterable[str] = (),
    units: Iterable[str] | None = None,
    inexact: bool = False,
    latency: LatencyTable | None = None,
) -> Plan:
    """Chooses what to keep, implant and prune; every part of the budget is met.

    Mode ``paper`` is one global ranking (Yu et al. 2022, section 3): of the least sensitive candidates the most
    sensitive share `implant_ratio` gets pointwise implants, heads half of their width, and the others leave. Mode
    ``optimal`` minimises the predicted rise of the loss: the sensitivity of what leaves, plus for each implanted filter
    and head its sensitivity times what the implant leaves undone, for exact costs; see `hap.planning.optimal`.

    Args:
        structure: from `hap.trace`.
        sensitivity: from `hap.measure`.
        budget: what may remain; a plan lands at most 0.5 % under it where single units are as fine as that.
        mode: how to choose.
        implant_ratio: in [0, 1]; 0 makes a plan without implants. In mode ``optimal`` no ratio is kept: any other
            value lets the planner implant as many filters as pays.
        options: for each layer and attention module (by name) the forms to choose from, with what they leave undone, as
            `hap.implants.options` and `head_options` measure them. Without any, mode ``optimal`` makes a plan without
            implants, and mode ``paper`` one without narrow heads.
        joint: mode ``optimal``: whether units are chosen together by the sensitivity's Gram matrix; "auto" where it
            has one.
        pairs: how much of what the Gram matrix says of pairs of units counts, in [0, 1]. The search finds sets whose
            units seem to make up for each other; in truth they do less than the matrix says, the more so the more
            units leave.
        floor: the number of units that every family keeps at least.
        minimum, maximum: for families (by name or pattern, as in ``layer3.*``) how many units stay at least or at
            most: an int counts units, a float is a fraction of them.
        round_to: keep a multiple of this many units in each family, or all (rounded up).
        protect: module names or patterns; the units that these modules write stay, and they get no implants. What
            they read may shrink: `hap.trace(ignore=)` leaves modules alone altogether.
        units: the kinds of units that may leave: ``head``, ``neuron``, ``channel``; None for all, or for heads
            where the budget limits nothing else but latency. Layers that write no such units get no implants either.
        inexact: also prune families behind a normalisation that mixes units.
        latency: the layers' times, for a budget of latency; also puts the plan's latency on record. It has to know the
            times of all implants that may be chosen.

    Raises:
        HapError: an option is out of range or names nothing, no family can be pruned, or the budget cannot be reached
            (says how low it can go).
    """
    protect, units = tuple(protect), None if units is None else tuple(units)
    if units is None and set(budget.limits) - {"latency"} == {"heads"}:
        units = ("head",)
    bounds = checked(
        structure,
        mode=mode,
        implant_ratio=implant_ratio,
        joint=joint,
        pairs=pairs,
        floor=floor,
        minimum=minimum,
        maximum=maximum,
        round_to=round_to,
        protect=protect,
        units=units,
        inexact=inexact,
        skipped=sensitivity.skipped,
    )
    together = mode == "optimal" and (sensitivity.gram is not None if joint == "auto" else joint)
    together = together and bool(structure.families)  # implants alone need no pairs
    if not (mode == "optimal" and implant_ratio and options):  # implants alone may meet the budget
        _check_prunable(structure, sensitivity, inexact)
    cost = CostModel(structure, latency)
    check_measured(budget, cost.dense)
    if mode == "paper":
        choice = paper.choose(
            structure, sensitivity, budget, cost, bounds, implant_ratio=implant_ratio, options=options
        )
    else:
        offered = options or {} if implant_ratio else {}
        choice = optimal.choose(
            problem(structure, sensitivity, bounds, offered, pairs=pairs if together else 0.0), cost, budget
        )
    return Plan(
        structure=structure,
        decisions=choice.decisions(structure),
        implants=choice.implants,
        budget=budget,
        criterion=sensitivity.criterion,
        dense=cost.dense,
        small=choice.cost(cost),
        predicted=_predicted(choice, sensitivity),
        options={
            "mode": mode,
            "implant_ratio": implant_ratio,
            "joint": together,
            "pairs": pairs if together else 0.0,
            "floor": floor,
            "minimum": dict(minimum or {}),
            "maximum": dict(maximum or {}),
            "round_to": round_to,
            "protect": list(protect),
            "units": None if units is None else list(units),
            "inexact": inexact,
            "samples": sensitivity.samples,
            "draws": sensitivity.draws,
            **({} if latency is None else {"latency_device": latency.device}),
            "versions": versions(),
        },
    )


def checked(
    structure: Structure, *, mode: Mode, implant_ratio: float, joint: Joint, pairs: float = 0.5, **widths: Any
) -> Constraints:
    """The constraints of a plan, once every option of `decide` that needs no sensitivity has been found sound.

    Raises:
        HapError: an option is out of range, names nothing, or does not go with another.
    """
    if mode not in get_args(Mode):
        raise unknown("mode", mode, get_args(Mode))
    for name, value in (("implant_ratio", implant_ratio), ("pairs", pairs)):
        if not 0 <= value <= 1:
            raise HapError(f"{name} is out of range", expected="a share in [0, 1]", got=repr(value))
    if joint is True and mode == "paper":
        raise HapError(
            "the paper's rule ranks units one by one",
            expected="joint=True with mode='optimal'",
            got="mode='paper'",
            remedy="leave joint out, or choose mode='optimal'",
        )
    return constraints(structure, **widths)


def _predicted(choice: Choice, sensitivity: Sensitivity) -> float | None:
    """The paper's rule predicts nothing: without implants it is the sum of the scores of what leaves."""
    if choice.predicted is not None or choice.implants:
        return choice.predicted
    return float(sum(float(sensitivity.scores[name][mask].sum()) for name, mask in choice.pruned.items()))


def _check_prunable(structure: Structure, sensitivity: Sensitivity, inexact: bool) -> None:
    if not any((f.exact or inexact) and f.name not in sensitivity.skipped for f in structure.families):
        reasons = sorted({f"{f.parameter} axis {f.axis}: {f.reason}" for f in structure.frozen})
        reasons += [f"{name}: {reason}" for name, reason in sensitivity.skipped.items()]
        reasons += [f"{f.name}: a normalisation mixes its units" for f in structure.families if not f.exact]
        shown = "; ".join(reasons[:8]) + (f"; and {len(reasons) - 8} more" if len(reasons) > 8 else "")
        raise HapError(
            "this model has no prunable family",
            expected="at least one axis that can shrink",
            got=shown or "no layer at all",
            remedy="see Structure.frozen; inexact=True also offers families behind a normalisation",
        )
