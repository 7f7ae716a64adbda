"""What an interrupted `prune` goes on from: the sensitivity and the plan that were made already."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file

from hap.errors import HapError, need_same, unwritable
from hap.pipeline.together import by_the_first, is_first
from hap.planning import Plan
from hap.types import Sensitivity

log = logging.getLogger(__name__)
SENSITIVITY, PLAN = "sensitivity.safetensors", "plan.json"
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


def _write(folder: Path, run: Mapping[str, str], sensitivity: Sensitivity, plan: Plan) -> None:
    tensors = {
        f"{kind}/{name}": tensor.contiguous().clone()  # the format holds no two tensors that share memory
        for kind in TENSORS
        for name, tensor in getattr(sensitivity, kind).items()
    }
    about = {name: getattr(sensitivity, name) for name in ("criterion", "samples", "draws")}
    about["skipped"] = dict(sensitivity.skipped)
    text = json.dumps({"run": dict(run), "plan": plan.to_json()})
    try:
        beside = folder / f"{SENSITIVITY}.tmp"
        save_file(tensors, beside, metadata={"about": json.dumps(about)})
        os.replace(beside, folder / SENSITIVITY)
        beside = folder / f"{PLAN}.tmp"
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, folder / PLAN)
    except (OSError, safetensors.SafetensorError) as error:
        raise unwritable(folder, error) from error


def _read(folder: Path, run: Mapping[str, str]) -> Chosen:
    try:
        stored = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        there, text = dict(stored["run"]), str(stored["plan"])
        with safetensors.safe_open(folder / SENSITIVITY, "pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
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
