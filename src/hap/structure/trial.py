"""Removes units for a trial, to find out what sizes a model's code has written down.

A graph shows that a view splits 12 heads off, and not whether the code computes the 12 or has it as a
number, or in which attribute. So it is tried: with one unit of each family gone and the attributes
changed, does the forward pass still run, and give outputs of the same shapes? Nothing is computed
with: the shrunk tensors are expanded zeros.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hap.batches import tensors
from hap.structure.attributes import mirrors
from hap.structure.rules.registry import Written
from hap.structure.units import Units
from hap.types import Attribute, Family, describe

# What attributes are called that count heads, and that hold the width of all heads together.
_COUNT = re.compile(r"^(?!.*(dim|size|width)).*head|^n?h$|^n_h$")
_WIDTH = re.compile(r"^(all_head|inner|attn|attention|qkv?|kv|proj|split)(_inner|_proj)?_(size|dim|width)$")
_HEAD = re.compile(r"(^|attention_|attn_)head_(size|dim|width)$|^dim_head$|^d_(k|v|kv|head)$")  # of one head alone


class Trial:
    """A model on example inputs, and what its code may have written down."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        families: Sequence[Family],
        written: Iterable[Written],
        units: Units,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.families = families
        self.tensors = describe(model)[0]
        self.places = _places(families, written, units)
        self.shapes = self._run()
        self._known: dict[tuple[tuple[str, ...], tuple[Attribute, ...]], str | None] = {}

    def settle(self) -> tuple[tuple[Attribute, ...], dict[str, str]]:
        """The attributes that must follow, and for each family that the code does not let go the reason."""
        found: list[Attribute] = []
        refused: dict[str, str] = {}
        every = [family for family in self.families if family.size > 1]
        attributes = self._attributes(every, 0)
        if self._problem(every, attributes) is None:
            return attributes, {}
        for group in self._groups(every):
            for attempt in self._attempts(group):
                accepted, problem = self._attempt(attempt)
                found += accepted
                refused |= {} if problem is None else {family.name: problem for family in attempt}
        left = [family for family in every if family.name not in refused]
        problem = self._problem(left, found)
        if problem is not None:  # what works alone does not work together
            refused |= {family.name: problem for family in left if self.places[family.name]}
            found = []
        return tuple(found), refused

    def _attempts(self, group: list[Family]) -> list[list[Family]]:
        """The group as a whole if all of it works, or if neither its first nor its last works; else one by one."""
        ends = ([group[0]], [group[-1]])
        if self._attempt(group)[1] is None or all(self._attempt(end)[1] is not None for end in ends):
            return [group]
        return [[family] for family in group]

    def _attempt(self, families: Sequence[Family]) -> tuple[tuple[Attribute, ...], str | None]:
        """The attributes with which the families can leave, or why they cannot."""
        problem: str | None = None
        for attributes in dict.fromkeys(self._attributes(families, level) for level in range(3)):
            failure = self._problem(families, attributes)
            if failure is None:
                return attributes, None
            problem = problem or failure
        return (), problem

    def _groups(self, families: Sequence[Family]) -> list[list[Family]]:
        """Families of a kind whose sizes are written in the same types of modules: what holds for one holds for all."""
        groups: dict[tuple[str, bool, frozenset[str]], list[Family]] = {}
        for family in families:
            callers = frozenset(type(self.model.get_submodule(p.caller)).__name__ for p in self.places[family.name])
            groups.setdefault((family.kind, family.exact, callers), []).append(family)
        return list(groups.values())

    def _attributes(self, families: Sequence[Family], level: int) -> tuple[Attribute, ...]:
        """What must follow the families: by name and value (0), counts of heads only (1), any width as well (2)."""
        found = {}
        for family in families:
            producer = family.roles("producer")[0]
            for place in self.places[family.name]:
                widths = {math.prod(place.sizes[i:]) for i in range(max(1, len(place.sizes) - 1))}  # no head's own
                for name, value in vars(self.model.get_submodule(place.caller)).items():
                    if type(value) is not int:
                        continue
                    count = _COUNT.match(name) and value in place.sizes
                    named = level == 2 and not _HEAD.search(name) or level == 0 and _WIDTH.match(name)
                    width = value in widths and named
                    if count or width:
                        found[place.caller, name] = Attribute(place.caller, name, producer.parameter, producer.axis)
        return tuple(found.values())

    def _problem(self, families: Sequence[Family], attributes: Iterable[Attribute]) -> str | None:
        """Why the model does not run without the last unit of each of these families; None if it does."""
        key = (tuple(family.name for family in families), tuple(attributes))
        if key not in self._known:
            self._known[key] = self._try(*key)
        return self._known[key]

    def _try(self, names: Sequence[str], attributes: Iterable[Attribute]) -> str | None:
        lost: dict[tuple[str, int], set[int]] = {}
        for family in self.families:
            for member in family.members if family.name in names else ():
                lost.setdefault((member.parameter, member.axis), set()).update(member.indices[-1])
        kept = {
            key: [i for i in range(self.tensors[key[0]].shape[key[1]]) if i not in gone] for key, gone in lost.items()
        }
        try:
            with _shrunk(self.model, kept):
                followed = [(m, name, value) for m, name, value in mirrors(self.model, kept, self.tensors, attributes)]
                with _with(followed):
                    shapes = self._run()
        except Exception as error:  # users' code raises any type on a size that it does not expect
            return (
                f"has its size written in the code: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            )
        return None if shapes == self.shapes else "changes the shape of the model's outputs"

    def _run(self) -> Any:
        with torch.no_grad(), torch.random.fork_rng():
            outputs = self.model(*self.args, **self.kwargs)
        return [tuple(tensor.shape) for tensor in tensors(outputs)]


def _places(families: Sequence[Family], written: Iterable[Written], units: Units) -> dict[str, list[Written]]:
    """For each family, where its sizes may be written down."""
    family_of: dict[int, str] = {}
    for family in families:
        first = family.members[0]
        ids = units.owners[first.parameter, first.axis].ids
        roots = units.roots(ids[[unit[0] for unit in first.indices]]).tolist()
        family_of |= dict.fromkeys(roots, family.name)
    places: dict[str, list[Written]] = {family.name: [] for family in families}
    for place in written:
        for name in {family_of.get(root) for root in units.roots(place.ids).tolist()} - {None}:
            places[str(name)].append(place)
    return places


@contextmanager
def _shrunk(model: nn.Module, kept: Mapping[tuple[str, int], Sequence[int]]) -> Iterator[None]:
    """Zeros of the new shapes in the place of the tensors; they take no memory."""
    current = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: list(current[name].shape) for name, _ in kept}
    for (name, axis), left in kept.items():
        shapes[name][axis] = len(left)
    old = {name: current[name].data for name in shapes}
    try:
        for name, shape in shapes.items():
            current[name].data = old[name].new_zeros(()).expand(shape)
        yield
    finally:
        for name, data in old.items():
            current[name].data = data


@contextmanager
def _with(values: Iterable[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """These attributes set, and put back afterwards."""
    old = []
    try:
        for module, name, value in values:
            old.append((module, name, getattr(module, name)))
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in reversed(old):
            setattr(module, name, value)
