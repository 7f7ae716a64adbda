"""Writes files whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from hap.errors import HapError, unwritable

_HEADER = {"format": "pt"}  # which transformers asks for


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Writes `data` as JSON text. An older file at `path` stays as it is until the new one is complete.

    Missing folders are made. Numbers must be finite, since JSON has no NaN or infinity.

    Raises:
        HapError: `data` is not JSON, or the file cannot be written.
    """
    try:
        text = json.dumps(data, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise HapError(
            "this data cannot be written as JSON",
            expected="dicts, lists, strings, finite numbers, booleans and None",
            got=str(error),
            remedy="turn tensors into lists, and values that are not finite into None",
        ) from error
    write_bytes(path, f"{text}\n".encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` to a file beside `path`, then puts that in its place in one step.

    Raises:
        HapError: the file cannot be written; whatever was at `path` is still there.
    """
    path = Path(path)
    # Not `tempfile`: its files are readable by their owner alone, whatever the umask says.
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # without it, a power cut can leave the new name on an empty file
            os.replace(beside, path)
        except BaseException:  # a keyboard interrupt too leaves nothing behind
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise unwritable(path, error) from error


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> None:
    """Writes tensors in the safetensors format, with texts in its header.

    A kill leaves the old file or the new one, and perhaps half of one beside, ``path.tmp``.

    Raises:
        HapError: the file cannot be written; whatever was at `path` is still there.
    """
    beside = path.with_name(f"{path.name}.tmp")
    # Copied, because the format holds no two tensors that share memory.
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, beside, metadata=dict(header))
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error


def write_model(path: Path, model: nn.Module) -> None:
    """Writes the tensors of a model; one that has several names goes by its first.

    Also views of larger tensors, such as recurrent weights on a GPU, which `safetensors.torch.save_model` refuses.

    Raises:
        HapError: as `write_tensors`.
    """
    write_tensors(path, _stored(model), _HEADER)


def stored_bytes(model: nn.Module) -> int:
    """The size of the file that `write_model` writes, without writing it."""
    header: dict[str, Any] = {"__metadata__": _HEADER}
    end = 0
    widest_first = sorted(_stored(model).items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in widest_first:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"))
    return 8 + -(-len(text) // 8) * 8 + end  # a length, the header, filled up to whole words, and the values


def _stored(model: nn.Module) -> dict[str, torch.Tensor]:
    first = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if first[id(t)] == name}
