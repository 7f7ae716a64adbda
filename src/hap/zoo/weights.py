"""Loading a model's weights from a safetensors file: all of them, or none."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from hap.errors import HapError


def load_weights_(model: nn.Module, path: str | PathLike[str]) -> None:
    """Loads every parameter and buffer of `model` from a safetensors file.

    Raises:
        HapError: there is no such file, it is damaged, or its names or shapes are not the model's. All is
            checked first: the model is then as it was.
    """
    fill_(model, _read(Path(path)), source=f"in {path}")


def fill_(model: nn.Module, stored: dict[str, torch.Tensor], *, source: str) -> None:
    """As `load_weights_`, from tensors; `source` says for the error where they are from."""
    own = model.state_dict()
    stored = stored | _twins(own, stored)
    problems = _differences(own, stored)
    if problems:
        raise HapError(
            f"the weights {source} do not fit {type(model).__name__}; nothing was loaded",
            expected="exactly the names and shapes of model.state_dict()",
            got="; ".join(problems),
            remedy="check the model's name and classes=, or that the file holds this architecture",
        )
    model.load_state_dict(stored)


def _twins(own: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a tensor that has several names a file may hold one only."""
    places = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in own.items() if tensor.data_ptr()}
    there = {place: stored[name] for name, place in places.items() if name in stored}
    return {name: there[place] for name, place in places.items() if name not in stored and place in there}


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise HapError(
            f"there are no weights at {path}; nothing was loaded",
            expected="a safetensors file",
            got="a directory" if path.is_dir() else "no such file",
            remedy="check the path",
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise HapError(
            f"the weights in {path} cannot be read; nothing was loaded",
            expected="a safetensors file",
            got=str(error),
            remedy="fetch the file again, or convert a .pt/.pth file with safetensors.torch.save_file",
        ) from error


def _differences(own: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> list[str]:
    shapes = [
        f"{name} {tuple(stored[name].shape)} for {tuple(own[name].shape)}"
        for name in own.keys() & stored.keys()
        if stored[name].shape != own[name].shape
    ]
    found = {
        "missing": own.keys() - stored.keys(),
        "unexpected": stored.keys() - own.keys(),
        "of another shape": shapes,
    }
    return [f"{len(names)} {kind}: {_some(names)}" for kind, names in found.items() if names]


def _some(names: Iterable[str], most: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
