"""`save` and `load`: a directory of safetensors and JSON, and no pickle."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from hap import pretrained
from hap.batches import copied
from hap.checkpoint.card import Opens, Origin, card
from hap.checkpoint.directory import fresh_directory
from hap.errors import HapError
from hap.files import write_model
from hap.planning import Plan, versions
from hap.surgery import apply_, dense_config

MODEL, PLAN, CARD = "model.safetensors", "plan.json", "README.md"


def save(
    small: nn.Module,
    plan: Plan,
    directory: str | Path,
    *,
    results: Mapping[str, tuple[Any, Any]] | None = None,
    origin: Origin | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Path:
    """Writes the pruned model as ``model.safetensors``, ``plan.json`` and a model card.

    The directory appears whole or not at all. That of a model of `transformers` opens alone: its configuration, with
    the names of the labels, is written too, and the tokenizer's files. Nothing is sent anywhere.

    Args:
        small: the pruned model, trained or not.
        plan: the plan that made it.
        directory: where to; must be new or empty unless `overwrite`.
        results: more rows for the model card: name -> (dense, pruned).
        origin: for the model card: where the model is from, and Python that makes the dense one.
        tokenizer: of a model of `transformers`; None for the one where the model was opened, if there is one.
        overwrite: replace a directory that exists.

    Returns:
        The directory.

    Raises:
        HapError: the directory exists, the disk is full, or the model does not fit the plan.
    """
    directory = Path(directory)
    params = sum(p.numel() for p in small.parameters())
    if params != plan.small.params:
        raise HapError(
            "this model is not what the plan made",
            expected=f"{plan.small.params:,} parameters",
            got=f"{params:,}",
            remedy="pass the model that hap.apply returned for this plan",
        )
    with fresh_directory(directory, overwrite=overwrite) as staging:
        write(small, plan, staging, results=results, origin=origin, tokenizer=tokenizer)
    return directory


def write(
    small: nn.Module,
    plan: Plan,
    directory: Path,
    *,
    results: Mapping[str, tuple[Any, Any]] | None = None,
    origin: Origin | None = None,
    tokenizer: Any = None,
) -> None:
    """Writes the files of `save` into a directory that exists.

    Raises:
        HapError: the tensors cannot be written.
        OSError: the other files cannot be written; `fresh_directory` makes a HapError of it.
    """
    write_model(directory / MODEL, small)
    (directory / PLAN).write_text(plan.to_json(), encoding="utf-8")
    opens: Opens = "code"
    if pretrained.is_pretrained(small):
        tokenizer = tokenizer or pretrained.tokenizer_of(small)
        opens = "alone" if tokenizer is None else "text"
        with dense_config(small, plan):  # which `load` builds the dense model from
            pretrained.write(small, directory, tokenizer)
    text = card(plan, versions(), results or {}, origin=origin, opens=opens)
    (directory / CARD).write_text(text, encoding="utf-8")
    shutil.copymode(directory / PLAN, directory / MODEL)  # safetensors lets only the owner read


def load(directory: str | Path, model: nn.Module | None = None) -> tuple[nn.Module, Plan]:
    """Rebuilds the pruned model from a directory that `save` wrote, and the dense one.

    Args:
        directory: what `save` wrote.
        model: the dense model (its weights do not matter, and may be on the meta device); left as it is. None for a
            model of `transformers`: it is built from the configuration in the directory, on the CPU, in evaluation
            mode.

    Returns:
        The pruned model, in the dense model's mode and on its device (for meta: the CPU), and its plan.

    Raises:
        HapError: files are missing, damaged or foreign, or `model` is not the dense model of the plan, or missing; or
            one of its buffers is on the meta device that is in no file.
    """
    directory = Path(directory)
    plan = read_plan(directory)
    dense = pretrained.rebuild(directory) if model is None else copied(model)
    _allocate_(dense)
    small = apply_(dense, plan, init="zeros")
    path = directory / MODEL
    try:
        missing, unexpected = _load(small, path)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise HapError(
            f"{path} cannot be read",
            expected="the tensors of the pruned model, as hap.save writes them",
            got=" ".join(str(error).split())[:200],
            remedy="the file is damaged, cut short or of another model; fetch or save it again",
        ) from error
    if missing or unexpected:
        raise HapError(
            f"{path} does not fit its plan",
            expected="exactly the tensors of the pruned model",
            got=f"missing {sorted(missing)[:4]}, unexpected {sorted(unexpected)[:4]}",
            remedy=f"{MODEL} and {PLAN} must come from the same run",
        )
    return small, plan


def _allocate_(model: nn.Module) -> None:
    """Gives tensors on the meta device memory on the CPU, zeros until they are loaded; ties stay.

    Raises:
        HapError: a buffer that is not in the state of the model is among them.
    """
    new: dict[int, torch.Tensor] = {}
    for name, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if key in module._non_persistent_buffers_set:
                    raise HapError(
                        f"{'.'.join(filter(None, [name, key]))!r} has no values",
                        expected="values in the dense model, since no checkpoint stores this buffer",
                        got="a tensor on the meta device",
                        remedy="build the dense model on the CPU",
                    )
                if id(tensor) not in new:
                    zeros = torch.zeros_like(tensor, device="cpu")
                    new[id(tensor)] = (
                        nn.Parameter(zeros, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zeros
                    )
                tensors[key] = new[id(tensor)]


def _load(model: nn.Module, path: Path) -> tuple[list[str], list[str]]:
    """Loads the tensors; returns the names that are missing in the file, and those that the model has not.

    Through a state of the model's own, which knows the versions that some modules ask for.
    """
    stored, state = load_file(path), model.state_dict()
    names: dict[int, list[str]] = {}  # of one tensor, several where it is tied
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    missing = []
    for tied in names.values():
        known = next((name for name in tied if name in stored), None)
        if known is None:
            missing.append(tied[0])
        else:
            state.update(dict.fromkeys(tied, stored[known]))
    model.load_state_dict(state)
    return missing, [name for name in stored if name not in state]


def read_plan(directory: Path) -> Plan:
    """The plan in a checkpoint directory."""
    for name in (PLAN, MODEL):
        if not (directory / name).is_file():
            raise HapError(
                f"{directory} is not a hap checkpoint",
                expected=f"{PLAN} and {MODEL}",
                got=f"no {name}" if directory.is_dir() else "no such directory",
                remedy="pass a directory that hap.save or `hap prune --out` wrote",
            )
    try:
        text = (directory / PLAN).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HapError(
            f"{directory / PLAN} cannot be read",
            expected="UTF-8 JSON",
            got=str(error),
            remedy="check its permissions, or fetch or save it again",
        ) from error
    return Plan.from_json(text)
