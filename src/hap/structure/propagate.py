"""Runs unit ids through an exported graph."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from hap.structure.export import caller, depends_on_data, is_pointwise, operator_name, parameter_names, shapes
from hap.structure.rules import RULES, Context, freeze_all
from hap.structure.rules.elementwise import elementwise
from hap.structure.units import Units
from hap.structure.value import Value, along

# Operators that return sizes or check them; they carry no units.
_IGNORED = {"sym_size", "_assert_tensor_metadata", "_assert_scalar", "sym_numel", "_assert_async"}

# Operators that make a tensor out of nothing, whose sizes may be those of units.
_CONSTANTS = {"zeros", "ones", "full"}

# Regions under torch.autocast or torch.set_grad_enabled: a graph in the graph, called with its inputs.
_REGIONS = {"wrap_with_autocast", "wrap_with_set_grad_enabled"}

Names = dict[fx.Node, str]  # from a node to the parameter or buffer that it stands for


def propagate(program: ExportedProgram, units: Units, model: nn.Module) -> Context:
    """States every relation between units that the graph implies; the result holds the layers found.

    An operator without a rule freezes the units of everything that it reads, and gives out a value
    without units: never a guess.
    """
    every = dict(_tensors_of(model))
    context = Context(units, dict(model.named_modules(remove_duplicate=False)))
    aliases, parameters = _aliases(every), parameter_names(program)
    names: Names = {}
    inputs: list[Any] = []
    for node in program.graph.find_nodes(op="placeholder"):
        shape = shapes(node.meta.get("val"))
        if node.name in parameters and node.users:
            names[node] = aliases.get(parameters[node.name], parameters[node.name])
            units.read(names[node])
            inputs.append(_tensor(units, names[node], shape))
        else:
            inputs.append(_plain(shape))
    outputs = _run(context, program.graph_module, inputs, names)
    kinds = [spec.kind.name for spec in program.graph_signature.output_specs]
    shown = [value for value, kind in zip(outputs, kinds, strict=True) if kind == "USER_OUTPUT"]
    freeze_all(context, _tensors(shown), "the model's output")
    return context


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer under each of its names, parameters first."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _aliases(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """From every name of a tied parameter or buffer to the first one."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}


def _tensor(units: Units, name: str, shape: tuple[int, ...]) -> Value:
    factors = [along(units.own(name, a, n), a, len(shape)) for a, n in enumerate(shape) if n > 1]
    return Value(shape, tuple(factors))


def _run(context: Context, module: fx.GraphModule, inputs: list[Any], names: Names) -> list[Any]:
    """The values that a graph gives out for these inputs."""
    values: dict[fx.Node, Any] = {}
    left = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(left)
        elif node.op == "get_attr":
            values[node] = getattr(module, str(node.target), None)
        elif node.op == "call_function":
            values[node] = _call(context, node, values, names)
        elif node.op == "output":
            return list(fx.map_arg(tuple(node.args[0]), lambda n: values[n]))
    return []


def _call(context: Context, node: fx.Node, values: dict[fx.Node, Any], names: Names) -> Any:
    if node.target is operator.getitem:
        source, index = node.args
        assert isinstance(source, fx.Node)
        return values[source][index] if values[source] is not None else None
    args = fx.map_arg(node.args, lambda n: values[n])
    kwargs = fx.map_arg(node.kwargs, lambda n: values[n])
    name = operator_name(node)
    if name in _REGIONS:
        return _region(context, node, args, names)
    shape = shapes(node.meta.get("val"))
    if name in _IGNORED:
        return None
    tensors = _tensors([args, kwargs])
    if any(depends_on_data(n.meta.get("val")) for n in (node, *node.all_input_nodes)):
        freeze_all(context, tensors, f"{node.target} has to do with a size that depends on data")
        return _plain(shape)
    if not any(v.factors for v in tensors) and name not in _CONSTANTS:
        return _plain(shape)
    context.where = name
    context.path = caller(node)
    context.arg_names = [names.get(a) if isinstance(a, fx.Node) else None for a in pytree.tree_leaves(node.args)]
    rule = RULES.get(name) or (elementwise if is_pointwise(node) else None)
    if rule is None or shape is None:
        freeze_all(context, tensors, f"no rule for operator {node.target}")
        return _plain(shape)
    try:
        return rule(context, shape, *args, **kwargs)
    except (TypeError, ValueError, IndexError) as error:
        # An overload with other arguments than the rule knows is an operator without a rule.
        freeze_all(context, tensors, f"no rule for operator {node.target} with these arguments ({error})")
        return _plain(shape)


def _region(context: Context, node: fx.Node, args: tuple[Any, ...], names: Names) -> list[Any]:
    """Runs the graph in the graph on the arguments that come after it."""
    position = next(i for i, a in enumerate(args) if isinstance(a, fx.GraphModule))
    inner = args[position]
    given = zip(inner.graph.find_nodes(op="placeholder"), node.args[position + 1 :], strict=True)
    inherited = {there: names[here] for there, here in given if isinstance(here, fx.Node) and here in names}
    return _run(context, inner, list(args[position + 1 :]), inherited)


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
