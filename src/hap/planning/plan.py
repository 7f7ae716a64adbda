"""The plan: what happens to every unit and filter, as data that can be stored and replayed."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from typing import Any

import torch

from hap.errors import HapError
from hap.implants import FORMS, NARROW, Heads, heads_of
from hap.planning.budget import fractions
from hap.types import Attribute, Budget, Cost, Family, Frozen, Layer, Member, Structure, TensorSpec

SCHEMA = 2


@dataclass(frozen=True)
class Decision:
    """What happens to a family's units: kept, or pruned. Together they are all units, in order."""

    keep: tuple[int, ...]
    prune: tuple[int, ...]


@dataclass(frozen=True)
class Implant:
    """The filters of one layer, or the heads of one attention module, that get a smaller replacement.

    Attributes:
        indices: positions among the *dense* layer's filters, or the module's heads, ascending; none of them is pruned.
        form: name of the replacement, see `hap.implants`; ``head`` for narrow heads, ``value-head``
            for heads of narrow values.
        rank: rank of the replacement, for forms that have one.
    """

    indices: tuple[int, ...]
    form: str
    rank: int | None = None


@dataclass(frozen=True)
class Plan:
    """Decisions for a traced model; complete enough to be replayed on the dense model alone.

    Attributes:
        structure: the structure of the dense model that the plan was made for.
        decisions: for every family, its `Decision`.
        implants: for the layers and attention modules (by name) that get them, their `Implant`.
        budget: what was asked for.
        criterion: the sensitivity's criterion.
        dense, small: cost before, and the promised cost after.
        predicted: the rise of the loss that the sensitivity predicts, in its unit (nats for the second-order
            criteria); None where nothing says what the implants leave undone.
        options: the settings and versions that the plan was made with, for the record.
    """

    structure: Structure
    decisions: Mapping[str, Decision]
    implants: Mapping[str, Implant]
    budget: Budget
    criterion: str
    dense: Cost
    small: Cost
    predicted: float | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        gone = sum(len(decision.prune) for decision in self.decisions.values())
        units = gone + sum(len(decision.keep) for decision in self.decisions.values())
        implanted = sum(len(implant.indices) for implant in self.implants.values())
        parts = fractions(self.small, self.dense)
        if "latency_measured" in self.options:  # the table's word is for the planner alone
            parts["latency"] = self.options["latency_measured"]
        kept = ", ".join(f"{'MACs' if name == 'macs' else name} {part:.2f}x" for name, part in parts.items())
        return f"Plan(prunes {gone:,} of {units:,} units, implants {implanted:,}, {kept})"

    @cached_property
    def filters(self) -> Mapping[str, Implant]:
        """The implants of layers."""
        return {name: implant for name, implant in self.implants.items() if implant.form not in NARROW}

    @cached_property
    def narrowed(self) -> Mapping[str, tuple[Heads, Implant]]:
        """The attention modules some of whose heads become narrow."""
        sites = heads_of(self.structure) if len(self.filters) < len(self.implants) else {}
        return {name: (sites[name], implant) for name, implant in self.implants.items() if implant.form in NARROW}

    def to_json(self) -> str:
        """The plan as JSON text, readable and stable."""
        data = {"schema": SCHEMA, **dataclasses.asdict(self)}
        for family in data["structure"]["families"]:
            for member in family["members"]:
                member["indices"] = _pack(member["indices"])
        for frozen in data["structure"]["frozen"]:
            frozen["indices"] = _pack([[i] for i in frozen["indices"]])
        data["structure"]["fingerprint"] = self.structure.fingerprint
        return json.dumps(data, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            HapError: the text is not a plan, or one of another schema version, or names an implant form that nobody
                has registered.
        """
        try:
            data = json.loads(text)
            schema = data["schema"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise HapError(
                "this is not a plan",
                expected=f"JSON with a schema version, as Plan.to_json writes it (version {SCHEMA})",
                got=repr(text[:40]),
                remedy="the file may be damaged; make the plan again",
            ) from error
        if schema != SCHEMA:
            raise HapError(
                "this plan has another schema version",
                expected=str(SCHEMA),
                got=repr(schema),
                remedy="read it with the version of hap that wrote it",
            )
        try:
            plan = _plan(data)
            _check(plan)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise HapError(
                "this plan is damaged",
                expected="every field of hap.Plan",
                got=f"{type(error).__name__}: {error}",
                remedy="make the plan again, or fetch the file again",
            ) from error
        return plan


def _plan(data: dict[str, Any]) -> Plan:
    raw = data["structure"]
    structure = Structure(
        families=tuple(
            Family(f["name"], f["kind"], f["size"], f["exact"], tuple(_member(m) for m in f["members"]))
            for f in raw["families"]
        ),
        frozen=tuple(
            Frozen(f["parameter"], f["axis"], tuple(i for (i,) in _unpack(f["indices"])), f["reason"])
            for f in raw["frozen"]
        ),
        layers=tuple(Layer(**{**f, "kernel": tuple(f["kernel"])}) for f in raw["layers"]),
        tensors={
            name: TensorSpec(tuple(t["shape"]), t["dtype"], t["is_parameter"]) for name, t in raw["tensors"].items()
        },
        modules=raw["modules"],
        attributes=tuple(Attribute(**a) for a in raw["attributes"]),
    )
    if raw["fingerprint"] != structure.fingerprint:
        raise ValueError("the structure does not match its fingerprint")
    return Plan(
        structure=structure,
        decisions={n: Decision(tuple(d["keep"]), tuple(d["prune"])) for n, d in data["decisions"].items()},
        implants={n: Implant(tuple(i["indices"]), i["form"], i["rank"]) for n, i in data["implants"].items()},
        budget=Budget(**data["budget"]),
        criterion=data["criterion"],
        dense=Cost(**data["dense"]),
        small=Cost(**data["small"]),
        predicted=data["predicted"],
        options=data["options"],
    )


def _check(plan: Plan) -> None:
    """Raises an error if the plan could not be replayed on its own structure."""
    structure, lost = plan.structure, set()
    for module, implant in plan.implants.items():
        if list(implant.indices) != sorted(set(implant.indices)):
            raise ValueError(f"the implants of {module!r} are not in ascending order, each once")
    for family in structure.families:
        decision = plan.decisions[family.name]
        if sorted((*decision.keep, *decision.prune)) != list(range(family.size)):
            raise ValueError(f"the decision on {family.name!r} does not name each of its units once")
        for member in family.members:
            length = structure.tensors[member.parameter].shape[member.axis]
            if not {i for unit in member.indices for i in unit} <= set(range(length)):
                raise ValueError(f"{family.name!r} lies outside of {member.parameter!r}")
            lost |= {(member.parameter, member.axis, i) for u in decision.prune for i in member.indices[u]}
    for module, (heads, implant) in plan.narrowed.items():
        if implant.rank not in heads.ranks() or implant.form not in heads.forms():
            raise ValueError(f"{module!r} has narrow heads of a rank or form that it cannot have")
        if not set(implant.indices) <= set(plan.decisions[heads.family.name].keep):
            raise ValueError(f"{module!r} has narrow heads in place of pruned ones")
    for module, implant in plan.filters.items():
        layer = structure.layer(module)
        if implant.form not in FORMS:
            raise HapError(
                f"{module!r} has an implant of form {implant.form!r}, which is not known here",
                expected=f"one of: {', '.join(sorted(FORMS))}",
                remedy="import the module that registers it with hap.implants.register first; hap has no such form",
            )
        left = {i for i in range(layer.filters) if (layer.weight, layer.output_axis, i) not in lost}
        if not left.issuperset(implant.indices):
            raise ValueError(f"{module!r} has implants for filters that are pruned or that it has not")


def _member(data: dict[str, Any]) -> Member:
    return Member(data["parameter"], data["axis"], tuple(map(tuple, _unpack(data["indices"]))), data["role"])


def _pack(indices: Any) -> Any:
    """Writes consecutive equal blocks, the usual case, as ``[start, block, units]``; else as they are."""
    rows = [list(row) for row in indices]
    if rows and rows[0]:
        start, block = rows[0][0], len(rows[0])
        if rows == _unpack({"start": start, "block": block, "units": len(rows)}):
            return {"start": start, "block": block, "units": len(rows)}
    return rows


def _unpack(packed: Any) -> list[list[int]]:
    if isinstance(packed, dict):
        start, block = packed["start"], packed["block"]
        return [list(range(start + u * block, start + (u + 1) * block)) for u in range(packed["units"])]
    return packed


def versions() -> dict[str, str]:
    """The versions of what made a result."""
    try:
        own = metadata.version("torch-hap")
    except metadata.PackageNotFoundError:  # used from a source tree that was not installed
        own = "unknown"
    return {"hap": own, "torch": str(torch.__version__), "python": platform.python_version()}
