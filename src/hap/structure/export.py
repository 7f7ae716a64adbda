"""A model as a graph of ATen operators."""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from hap.batches import tensors
from hap.errors import HapError

_INSIDE = "model"  # the name that the user's model has inside of what is exported
_OURS = (Path(torch.__file__).parent, Path(__file__).parents[1])  # where a user's code is not


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
        HapError: `torch.export` cannot capture the model; says at which line, and its own words.
    """
    try:
        # Where it fails, it prints the graph so far.
        with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return torch.export.export(_Tensors(model), args, dict(kwargs), strict=False)
    except Exception as error:  # torch.export raises many types, and users' code any
        if not model.training:  # in training mode a real pass would move statistics
            _check_runs(model, args, kwargs)
        raise _refusal(model, error) from error


def _refusal(model: nn.Module, error: Exception) -> HapError:
    """What to say of a model that runs and cannot be exported."""
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    got, place = f"{type(error).__name__}: {first}", _place(error)
    if isinstance(error, GuardOnDataDependentSymNode):
        return HapError(
            f"{type(model).__name__} branches, loops or takes a size by the values of tensors{place}",
            expected="a forward pass that does the same whatever the values are",
            got=got,
            remedy="write it with torch.where or masks, or trace the part of the model that does without, such as its "
            "backbone",
        )
    return HapError(
        f"torch.export could not trace {type(model).__name__}{place}",
        expected="a forward pass of PyTorch's operators, on inputs that the model accepts",
        got=got,
        remedy="change that line, or trace the part of the model that does without it; "
        "torch.export.export(..., strict=False) shows the whole error",
    )


def _place(error: Exception) -> str:
    """The line of the user's code that was running."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and not any(path.is_relative_to(own) for own in _OURS):
            roots = [root for root in sys.path if root and path.is_relative_to(root)]
            shown = path.relative_to(max(roots, key=len)) if roots else path
            return f", at {shown}:{frame.lineno} in {frame.name}: {(frame.line or '').strip()}"
    return ""


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


def depends_on_data(value: Any) -> bool:
    """Whether a node's value is a number that depends on data, or has a size that does."""
    return any(
        isinstance(size, torch.SymInt)
        for leaf in pytree.tree_leaves(value)
        for size in (leaf.shape if isinstance(leaf, torch.Tensor) else [leaf])
    )


def shapes(value: Any) -> Any:
    """The shape of a node's value: a tuple of ints, a list of them, or None if it is no tensor of known sizes."""
    if isinstance(value, torch.Tensor):
        return None if depends_on_data(value) else tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return [shapes(v) for v in value]
    return None
