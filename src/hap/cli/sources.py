"""What the words behind --model, --weights and --device stand for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from torch import nn

from hap import zoo
from hap.errors import HapError, unknown
from hap.zoo.weights import load_weights_


def load_model(spec: str, weights: Path | None, classes: int) -> nn.Module:
    """A model from ``zoo:NAME``, ``torchvision:NAME`` or ``FILE.py:FUNCTION``, with its weights.

    A FUNCTION takes no arguments and returns the model; `weights` may be None if it loads its own.

    Raises:
        HapError: the spec is malformed, the name unknown, or the weights do not fit.
    """
    source, _, name = spec.rpartition(":")
    if source == "zoo":
        return zoo.build(name, weights=weights, classes=classes)
    if source == "torchvision":
        model = _torchvision(name, classes)
    elif source.endswith(".py"):
        model = _from_file(Path(source), name)
    else:
        raise HapError(
            f"{spec!r} names no model",
            expected="zoo:NAME, torchvision:NAME, or FILE.py:FUNCTION",
            got=spec,
            remedy=f"for example zoo:resnet20; the zoo has {', '.join(zoo.MODELS)}",
        )
    if weights is not None:
        load_weights_(model, weights)
    return model


def _torchvision(name: str, classes: int) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise HapError("torchvision is not installed", remedy="pip install 'torch-hap[vision]'") from error
    if name not in models.list_models():
        raise unknown("torchvision model", name, models.list_models())
    return models.get_model(name, weights=None, num_classes=classes)


def _from_file(path: Path, function: str) -> nn.Module:
    if not path.is_file():
        raise HapError(f"there is no file {path}", expected="a Python file that defines the model")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.absolute()))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    build = getattr(module, function, None)
    if not callable(build):
        raise HapError(f"{path} has no function {function!r}", expected="a function that returns the model")
    model = build()
    if not isinstance(model, nn.Module):
        raise HapError(f"{function} in {path} returned no model", expected="nn.Module", got=type(model).__name__)
    return model


def device(name: str) -> torch.device:
    """``auto`` is the first GPU, or the CPU without one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise HapError(
            f"there is no device {name!r}",
            expected="auto, cpu, cuda or cuda:N",
            got=str(error).splitlines()[0],
            remedy="--device cpu always works",
        ) from error
    return found
