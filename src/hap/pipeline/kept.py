"""What an interrupted run goes on from: the sensitivity, the plan and the recovered model."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from hap.errors import HapError, need_same
from hap.files import write_json, write_tensors
from hap.pipeline.together import by_the_first, is_first
from hap.planning import Plan
from hap.types import Evaluation, Sensitivity

log = logging.getLogger(__name__)
SENSITIVITY, PLAN, RECOVERED = "sensitivity.safetensors", "plan.json", "recovered.safetensors"
DIGESTS = ("data", "weights")
TENSORS = ("scores", "stderr", "filters", "filters_stderr")

Chosen = tuple[Sensitivity, Plan]


def once(folder: Path, run: Mapping[str, str], choose: Callable[[], Chosen]) -> Chosen:
    """What `choose` gives, from the folder if it has been there already.

    The files are replaced at once, the sensitivity's first: a plan is never there without its sensitivity. Of several
    processes the first one writes. The sensitivity comes without its Gram matrix, which nothing but the plan needs.

    Args:
        folder: exists.
        run: what makes the choice what it is.
        choose: measures and decides.

    Raises:
        HapError: the files in the folder are damaged, or of another `run`.
    """
    if by_the_first((folder / PLAN).exists):  # of all: one alone would leave the others waiting for it
        found = _read(folder, run)
        log.info("going on with the plan in %s", folder)
        return found
    sensitivity, plan = choose()
    if is_first():
        _write(folder, run, sensitivity, plan)
    return sensitivity, plan


def recovered_(
    folder: Path, run: Mapping[str, str], small: nn.Module, recover: Callable[[], Sequence[Evaluation]]
) -> list[Evaluation]:
    """What `recover` does to a model and gives, from the folder if it has been there already.

    The weights come from the file, also those that were solved for just now, and in every process: on another machine,
    or with another number of threads, the same sums have other last bits, and the state of a training is of one model.

    Args:
        folder: exists.
        run: what makes the recovery what it is.
        small: the model that is recovered in place.
        recover: what does that, and says how good the model was before and after.

    Raises:
        HapError: the file in the folder is damaged, or of another `run`.
    """
    path = folder / RECOVERED
    if not by_the_first(path.exists):
        evaluations = json.dumps([dataclasses.asdict(evaluation) for evaluation in recover()])
        header = {"run": json.dumps(dict(run)), "evaluations": evaluations}
        by_the_first(lambda: write_tensors(path, _tensors(small), header))
    try:
        tensors, header = _open(path)
        there = dict(json.loads(header["run"]))
        found = [Evaluation(**evaluation) for evaluation in json.loads(header["evaluations"])]
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise _refused(folder, f"{RECOVERED} as a run left it", str(error)) from error
    need_same(there, run, partial(_refused, folder))
    with torch.no_grad():
        for name, tensor in _tensors(small).items():
            if name in tensors and tensors[name].shape == tensor.shape:  # else a cache that a forward pass has grown
                tensor.copy_(tensors[name])
    log.info("going on with the model in %s", path)
    return found


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _open(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (not a mapping)


def _write(folder: Path, run: Mapping[str, str], sensitivity: Sensitivity, plan: Plan) -> None:
    tensors = {f"{kind}/{name}": tensor for kind in TENSORS for name, tensor in getattr(sensitivity, kind).items()}
    about = {name: getattr(sensitivity, name) for name in ("criterion", "samples", "draws")}
    about["skipped"] = dict(sensitivity.skipped)
    write_tensors(folder / SENSITIVITY, tensors, {"about": json.dumps(about)})
    write_json(folder / PLAN, {"run": dict(run), "plan": plan.to_json()})


def _read(folder: Path, run: Mapping[str, str]) -> Chosen:
    try:
        stored = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        there, text = dict(stored["run"]), str(stored["plan"])
        tensors, header = _open(folder / SENSITIVITY)
        about = json.loads(header["about"])
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise _refused(folder, f"{PLAN} and {SENSITIVITY} as prune left them", str(error)) from error
    need_same(there, run, partial(_refused, folder), last=DIGESTS)  # a setting says more than a hash
    parts: dict[str, Any] = {kind: {} for kind in TENSORS}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        parts[kind][name] = tensor
    return Sensitivity(**about, **parts), Plan.from_json(text)


def _refused(folder: Path, expected: str, got: str) -> HapError:
    return HapError(
        f"what is kept in {folder} does not fit this run",
        expected=expected,
        got=got,
        remedy="go on with the settings it was begun with, delete the folder, or name another",
    )
