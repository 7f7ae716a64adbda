"""The table from operators to rules, and what a rule is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hap.structure.units import Units
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


@dataclass
class Context:
    """What every rule works on: the units, the names of the parameters, the layers found so far.

    Attributes:
        units: the relations between units.
        layers: every multiplication by a weight, in graph order; one entry for each call.
        modules: every module of the model, under all its names.
        where: the operator at hand, for messages.
        caller: the module whose forward calls it.
        arg_names: for each of its arguments, the name of the parameter or buffer that it is, if it is one.
    """

    units: Units
    modules: Mapping[str, nn.Module]
    layers: list[Multiplication] = field(default_factory=list)
    where: str = ""
    caller: nn.Module | None = None
    arg_names: list[str | None] = field(default_factory=list)

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
