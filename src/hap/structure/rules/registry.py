"""The table from operators to rules, and what a rule is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from hap.structure.units import Ids, Units
from hap.structure.value import Value


@dataclass
class Multiplication:
    """A weight that multiplies activations, as the graph shows it."""

    weight: str
    bias: str | None
    filters: int
    output_axis: int
    kernel: tuple[int, ...]
    groups: int
    transposed: bool
    multiplications: int


@dataclass(frozen=True, eq=False)
class Written:
    """A place where the code may have sizes of units written down, as numbers or as a module's attributes.

    Attributes:
        caller: name of the module whose forward it is.
        ids: the units concerned.
        sizes: the sizes of the axes involved, such as heads and head width.
    """

    caller: str
    ids: Ids
    sizes: tuple[int, ...]


@dataclass
class Context:
    """What every rule works on: the units, the names of the parameters, the layers found so far.

    Attributes:
        units: the relations between units.
        layers: every multiplication by a weight, in graph order; one entry for each call.
        modules: every module of the model, under all its names.
        written: every place where the code may have sizes of units written down.
        where: the operator at hand, for messages.
        path: name of the module whose forward calls it.
        arg_names: for each of its arguments (of a list, for each item), the name of the parameter or buffer that it is,
            if it is one.
    """

    units: Units
    modules: Mapping[str, nn.Module]
    layers: list[Multiplication] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)
    where: str = ""
    path: str = ""
    arg_names: list[str | None] = field(default_factory=list)

    @property
    def caller(self) -> nn.Module | None:
        """The module whose forward calls the operator."""
        return self.modules.get(self.path)

    def write(self, ids: Ids, sizes: tuple[int, ...]) -> None:
        """Says that the operator at hand may have these sizes of these units written down."""
        self.written.append(Written(self.path, np.unique(ids), sizes))

    def tensor(self, position: int) -> str | None:
        """Name of the parameter passed at this argument position, if it is one."""
        return self.arg_names[position] if position < len(self.arg_names) else None


Shapes = Any  # the shape of the output, or a list of them
Rule = Callable[..., Any]  # (context, output shape(s), *args, **kwargs) -> Value or list of Values

RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Registers a rule for operators by name, such as ``"conv2d"`` (overload and ``_`` left out)."""

    def register(function: Rule) -> Rule:
        for operator in operators:
            RULES[operator] = function
        return function

    return register


def freeze_all(context: Context, values: list[Value], reason: str) -> None:
    """Freezes every unit that these values carry."""
    for value in values:
        for ids in value.all_ids():
            context.units.freeze(ids, reason)
