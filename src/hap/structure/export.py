"""A model as a graph of ATen operators."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from hap.batches import tensors
from hap.errors import HapError

_INSIDE = "model"  # the name that the user's model has inside of what is exported


class _Tensors(nn.Module):
    """A model that gives out the tensors in its outputs alone: caches and dataclasses cannot be exported."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.add_module(_INSIDE, model)
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        return tensors(getattr(self, _INSIDE)(*args, **kwargs))


def export(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExportedProgram:
    """The model's graph in its present mode, with the shapes of these inputs.

    Raises:
        HapError: `torch.export` cannot capture the model; its own words follow.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(_Tensors(model), args, dict(kwargs), strict=False)
    except Exception as error:  # torch.export raises many types, and users' code any
        if not model.training:  # in training mode a real pass would move statistics
            _check_runs(model, args, kwargs)
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise HapError(
            f"torch.export could not trace {type(model).__name__}",
            expected="a forward pass without data-dependent Python control flow, on inputs that the model accepts",
            got=f"{type(error).__name__}: {first}",
            remedy="try model(*args, **kwargs) first; torch.export.export(..., strict=False) shows the whole error",
        ) from error


def _check_runs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Tells a model that does not accept these inputs from one that cannot be exported."""
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        first = next(iter(str(error).splitlines()), repr(error))
        raise HapError(
            f"{type(model).__name__} cannot run on these inputs: {first}",
            expected="inputs of the shape and dtype that the model was made for",
            got=", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors) or "no tensor",
            remedy="check the data set, its transform and the model's input size",
        ) from error


def parameter_names(program: ExportedProgram) -> dict[str, str]:
    """From placeholder node to the parameter or persistent buffer that it stands for."""
    kinds = (InputKind.PARAMETER, InputKind.BUFFER)
    return {
        spec.arg.name: spec.target.removeprefix(f"{_INSIDE}.")
        for spec in program.graph_signature.input_specs
        if spec.kind in kinds and spec.target is not None
    }


def operator_name(node: fx.Node) -> str:
    """``conv2d`` for ``aten.conv2d.default``; in-place variants count as their plain operator."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[1]
        return name.rstrip("_") if not name.startswith("_") else "_" + name.strip("_")
    return getattr(target, "__name__", str(target))


def is_pointwise(node: fx.Node) -> bool:
    """Whether PyTorch itself tags the operator as pointwise."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def caller(node: fx.Node) -> str:
    """Name of the module whose forward runs the operator; torch.export adds ``@n`` to a second call's."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0].partition("@")[0].removeprefix(_INSIDE).removeprefix(".") if stack else ""


def shapes(value: Any) -> Any:
    """The shape of a node's value: a tuple of ints, a list of them, or None if it is no tensor."""
    if isinstance(value, torch.Tensor):
        return tuple(int(n) for n in value.shape)
    if isinstance(value, (tuple, list)):
        return [shapes(v) for v in value]
    return None
