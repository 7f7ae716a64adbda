"""Runs unit ids through an exported graph."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from hap.structure.export import is_pointwise, operator_name, parameter_names, shapes
from hap.structure.rules import RULES, Context, freeze_all
from hap.structure.rules.elementwise import elementwise
from hap.structure.units import Units
from hap.structure.value import Value, along

# Operators that return sizes or check them; they carry no units.
_IGNORED = {"sym_size", "_assert_tensor_metadata", "_assert_scalar", "sym_numel", "_assert_async"}


def propagate(program: ExportedProgram, units: Units, aliases: Mapping[str, str]) -> Context:
    """States every relation between units that the graph implies; the result holds the layers found.

    `aliases` gives tied tensors, which have several names, one.

    An operator without a rule freezes the units of everything that it reads, and gives out a value
    without units: never a guess.
    """
    names = {node: aliases.get(name, name) for node, name in parameter_names(program).items()}
    context = Context(units, names=names)
    outputs = {s.arg.name for s in program.graph_signature.output_specs if s.kind.name == "USER_OUTPUT"}
    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = _placeholder(context, node)
        elif node.op == "call_function":
            values[node] = _call(context, node, values)
        elif node.op == "output":
            reached = [values[n] for n in node.all_input_nodes if n.name in outputs]
            freeze_all(context, _tensors(reached), "the model's output")
    return context


def _placeholder(context: Context, node: fx.Node) -> Any:
    shape = shapes(node.meta.get("val"))
    if not isinstance(shape, tuple):
        return None
    name = context.names.get(node.name)
    if name is None:
        return Value(shape)
    factors = [along(context.units.own(name, a, n), a, len(shape)) for a, n in enumerate(shape) if n > 1]
    return Value(shape, tuple(factors))


def _call(context: Context, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node.target is operator.getitem:
        source, index = node.args
        assert isinstance(source, fx.Node)
        return values[source][index] if values[source] is not None else None
    args = fx.map_arg(node.args, lambda n: values[n])
    kwargs = fx.map_arg(node.kwargs, lambda n: values[n])
    shape = shapes(node.meta.get("val"))
    name = operator_name(node)
    context.where = name
    context.arg_names = [a.name if isinstance(a, fx.Node) else None for a in node.args]
    if name in _IGNORED:
        return None
    tensors = _tensors([args, kwargs])
    if not any(v.factors for v in tensors):
        return _plain(shape)
    rule = RULES.get(name) or (elementwise if is_pointwise(node) else None)
    if rule is None or shape is None:
        freeze_all(context, tensors, f"no rule for operator {node.target}")
        return _plain(shape)
    try:
        return rule(context, shape, *args, **kwargs)
    except TypeError as error:
        # An overload with other arguments than the rule knows is an operator without a rule.
        freeze_all(context, tensors, f"no rule for operator {node.target} with these arguments ({error})")
        return _plain(shape)


def _plain(shape: Any) -> Any:
    """A value without units, in the form of the operator's output."""
    if isinstance(shape, tuple):
        return Value(shape)
    return [_plain(s) for s in shape] if isinstance(shape, list) else None


def _tensors(tree: Any) -> list[Value]:
    if isinstance(tree, Value):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (tuple, list)):
        return [v for item in tree for v in _tensors(item)]
    return []
