"""Removes units for a trial, to find out what sizes a model's code has written down.

A graph shows that a view splits 12 heads off, and not whether the code computes the 12 or has it as a
number, or in which attribute. So it is tried: with one unit of each family gone and the attributes
changed, does the forward pass still run, give outputs of the same shapes, and keep the width of heads?
Values do not matter: the shrunk tensors are expanded zeros.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hap.batches import device_of, settled_, tensors
from hap.structure.attributes import mirrors
from hap.structure.rules.registry import Written
from hap.structure.units import Units
from hap.types import Attribute, Family, describe

# What attributes are called that count heads, and that hold the width of all heads together.
_COUNT = re.compile(r"^(?!.*(dim|size|width)).*head|^n?h$|^n_h$")
_WIDTH = re.compile(r"^(all_head|inner|attn|attention|qkv?|kv|proj|split)(_inner|_proj)?_(size|dim|width)$")
_HEAD = re.compile(r"(^|attention_|attn_)head_(size|dim|width)$|^dim_head$|^d_(k|v|kv|head)$")  # of one head alone

_SPLITS = (torch.ops.aten.split, torch.ops.aten.split_with_sizes)

# The products, which are most of the work: the argument and its axis that the result has too.
_PRODUCTS = {
    torch.ops.aten.convolution.default: (0, 0),
    torch.ops.aten.mm.default: (0, 0),
    torch.ops.aten.addmm.default: (1, 0),
    torch.ops.aten.bmm.default: (0, 1),
}


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
        self.brief = True
        try:
            self.shapes = self._run()
        except Exception:  # code that looks at values or strides raises any type
            self.brief = False
            self.shapes = self._run()
        self._known: dict[tuple[tuple[str, ...], tuple[Attribute, ...]], str | None] = {}

    def settle(self) -> tuple[tuple[Attribute, ...], dict[str, str]]:
        """The attributes that must follow, and for each family that the code does not let go the reason."""
        found: list[Attribute] = []
        refused: dict[str, str] = {}
        every = [family for family in self.families if family.size > 1]
        attributes = self._attributes(every, 0)
        if self._problem(every, attributes) is None and self._apart(every, attributes):
            return attributes, {}
        for group in self._groups(every):
            for attempt in self._attempts(group):
                accepted, problem = self._attempt(attempt)
                found += accepted
                refused |= {} if problem is None else {family.name: problem for family in attempt}
        left = [family for family in every if family.name not in refused]
        problem = self._problem(left, found)
        if problem is not None or not self._apart(left, found):  # what works alone does not work together
            problem = problem or "shares a number that is written in the code with other families"
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
            if failure is None and not self._apart(families, attributes):
                failure = "shares a number that is written in the code with other families"
            if failure is None:
                return attributes, None
            problem = problem or failure
        return (), problem

    def _apart(self, families: Sequence[Family], attributes: Iterable[Attribute]) -> bool:
        """Whether those families whose sizes are written in the same module as an attribute can leave one by one."""
        for found in attributes:
            users = [f for f in families if any(place.caller == found.module for place in self.places[f.name])]
            if len(users) > 1 and any(self._problem([f], attributes) is not None for f in users):
                return False
        return True

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
        return None if shapes == self.shapes else "changes a size inside, or the shape of the outputs"

    def _run(self) -> Any:
        """Shapes of the outputs, and what must stay inside; inputs, buffers and generators are left as they are."""
        settled_(self.model)  # caches are as wide as the model was
        args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (self.args, dict(self.kwargs)))
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            with (
                torch.no_grad(),
                torch.random.fork_rng(_devices(self.model)),
                _Inside(self.model, self.brief) as inside,
            ):
                outputs = self.model(*args, **kwargs)
        finally:
            settled_(self.model)
            for buffer, old in buffers:
                if buffer.shape == old.shape and not torch.equal(buffer, old):
                    buffer.data.copy_(old)
        return [tuple(tensor.shape) for tensor in tensors(outputs)], inside.found


class _Inside(TorchDispatchMode):
    """Notes what must stay: whether the pieces of a split are alike, and what two activations are summed over.

    If `brief`, the products give zeros of the right shape.
    """

    def __init__(self, model: nn.Module, brief: bool) -> None:
        super().__init__()
        self.brief = brief
        self.found: list[int] = []
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._made: list[torch.Tensor] = []  # weights in another layout, kept so that nothing else takes their place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        brief = self.brief and func in _PRODUCTS and not kwargs
        result = _briefly(func, *args) if brief else func(*args, **(kwargs or {}))
        if func.overloadpacket in _SPLITS:
            self.found.append(len({piece.shape for piece in result}) < 2)
        product = func.overloadpacket is torch.ops.aten.bmm or "scaled_dot_product" in func.__name__
        if product and not any(self._is_weight(factor) for factor in args[:2]):
            self.found.append(args[0].shape[-1])
        if func.overloadpacket is torch.ops.aten.clone and self._is_weight(args[0]):
            self._made.append(result)
            self._weights.add(result.untyped_storage().data_ptr())
        return result

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._weights


def _briefly(product: Any, *args: Any) -> torch.Tensor:
    """The product for no rows, which checks all other sizes, filled up with rows of zeros."""
    place, axis = _PRODUCTS[product]
    rows = args[place]
    none = product(*args[:place], rows.narrow(axis, 0, 0), *args[place + 1 :])
    return none.new_zeros((*rows.shape[: axis + 1], *none.shape[axis + 1 :]))


def _devices(model: nn.Module) -> list[torch.device]:
    """The accelerator whose generator the model may use, if it is on one."""
    device = device_of(model)
    return [] if device.type == "cpu" else [device]


def _places(families: Sequence[Family], written: Iterable[Written], units: Units) -> dict[str, list[Written]]:
    """For each family, where its sizes may be written down."""
    family_of: dict[int, str] = {}
    for family in families:
        first = family.members[0]
        ids = units.owners[first.parameter, first.axis]
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
