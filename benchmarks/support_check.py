"""Everything that the support matrix promises of one model, done once."""

from __future__ import annotations

import copy
import inspect
import re
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support_case import Case, Example
from support_lively import enliven
from torch import nn
from torch.nn import functional as F

import hap
from hap.batches import Batch, logits, tensors

BUDGET = 0.7  # of the parameters may stay
TOLERANCE = 1e-9  # relative error of the small model against the gated dense one, in float64
EXPORT_TOLERANCE = 1e-4  # of an exported graph, in float32

Row = dict[str, Any]


class WrongResult(Exception):
    """Something ran and gave another result than it must."""


@dataclass
class State:
    """What the steps hand on to the next ones."""

    example: Example
    structure: hap.Structure | None = None
    plan: hap.Plan | None = None
    small: nn.Module | None = None


def check(case: Case, say: Callable[[str], None] = lambda step: None) -> Row:
    """Builds, traces, prunes, verifies, trains, saves, loads, exports and measures one model.

    Args:
        case: the line of the matrix.
        say: is told each step before it is taken.

    Returns:
        What was found, ready for JSON. `status` is ``green``; ``refused`` where hap says that it cannot, before
        anything is changed; ``wrong`` where a result is not what it must be; ``failed`` for any other error. The last
        three come with the `step` and a `message`.
    """
    row: Row = {"group": case.group, "name": case.name, "status": "green"}
    step = "build"
    try:
        say(step)
        state = State(_built(case))
        for step, function in STEPS.items():
            say(step)
            row |= function(state)
    except WrongResult as error:
        return row | {"status": "wrong", "step": step, "message": str(error)}
    except hap.HapError as error:
        status = "refused" if step in ("trace", "plan", "apply") else "failed"
        return row | {"status": status, "step": step, "message": _said(error)}
    except Exception as error:  # the matrix is there to find out which
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {_first_line(error)} ({Path(where.filename).name}:{where.lineno})"
        return row | {"status": "failed", "step": step, "message": message}
    return row


def _said(error: hap.HapError) -> str:
    got = f": {error.got}" if error.got else ""
    return " ".join(f"{error.what}{got}".split())


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def _built(case: Case) -> Example:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        example = case.make()
        enliven(example)
        hap.trace(nn.Linear(1, 1), (torch.zeros(1, 1),))  # loads what torch.export loads when first called
    return example


def _trace(state: State) -> Row:
    model, args, kwargs = state.example.model, state.example.args, state.example.kwargs
    start = time.process_time()
    state.structure = structure = hap.trace(model, args, kwargs)
    seconds = time.process_time() - start
    exact = [f for f in structure.families if f.exact]
    return {
        "trace_seconds": round(seconds, 2),
        "parameters": sum(p.numel() for p in model.parameters()),
        "families": Counter(f.kind for f in exact),
        "units": Counter({k: sum(f.size for f in exact if f.kind == k) for k in {f.kind for f in exact}}),
        "inexact": Counter(f.kind for f in structure.families if not f.exact),
        "reachable": _reachable(structure, exact),
        "reachable_inexact": _reachable(structure, structure.families),
        "frozen": _frozen(structure),
    }


def _reachable(structure: hap.Structure, families: Iterable[Any]) -> float:
    """The share of the parameters that goes when every family keeps one unit."""
    cost = hap.CostModel(structure)
    lowest = cost({f.name: np.arange(f.size) > 0 for f in families}, {})
    return round(1 - lowest.params / cost.dense.params, 4)


def _frozen(structure: hap.Structure) -> dict[str, float]:
    """For each reason, the share of the parameters that lie on an axis which it holds, the largest first.

    What Python said on a size that was tried differs between layers; it is left out.
    """
    held: dict[str, dict[str, Counter[int]]] = {}
    for frozen in structure.frozen:
        if structure.tensors[frozen.parameter].is_parameter:
            reason = re.sub(r": \w*(Error|Exception)\b.*", "", frozen.reason, flags=re.DOTALL)
            axes = held.setdefault(reason, {}).setdefault(frozen.parameter, Counter())
            axes[frozen.axis] += len(frozen.indices)
    dense = hap.CostModel(structure).dense.params
    shares = {}
    for reason, places in held.items():
        count = 0
        for name, axes in places.items():
            shape = structure.tensors[name].shape
            count += int(np.prod(shape)) - int(np.prod([n - axes[a] for a, n in enumerate(shape)]))
        shares[reason] = round(count / dense, 4)
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _plan(state: State) -> Row:
    """Random scores, so that every family loses some units; the lowest budget where 0.7 is out of reach."""
    structure = state.structure
    assert structure is not None
    scores = hap.measure(state.example.model, None, None, structure, criterion="random")
    try:
        plan = hap.decide(structure, scores, hap.Budget(params=BUDGET))
    except hap.HapError as error:
        lowest = re.search(r"params kept >= ([\d.]+)", error.expected or "")
        if lowest is None:
            raise
        plan = hap.decide(structure, scores, hap.Budget(params=float(lowest[1])))
    state.plan = plan
    cut = sum(bool(d.prune) for d in plan.decisions.values())
    return {"kept": round(plan.small.params / plan.dense.params, 4), "cut_families": cut}


def _apply(state: State) -> Row:
    assert state.plan is not None
    state.small = hap.apply(state.example.model, state.plan)
    return {}


def _verify(state: State) -> Row:
    assert state.plan is not None and state.small is not None
    example = state.example
    with torch.no_grad():
        outputs = example.model.eval()(*example.args, **example.kwargs)
    if not _floats(outputs):
        raise WrongResult("the outputs hold no tensor that could be compared")
    found = hap.verify(example.model, state.small, state.plan, example.args, example.kwargs, tolerance=TOLERANCE)
    if found.params != found.promised_params:
        raise WrongResult(f"{found.params:,} parameters where the plan promised {found.promised_params:,}")
    if not found.max_relative_error <= TOLERANCE:
        raise WrongResult(f"relative error {found.max_relative_error:.1e} against the gated dense model")
    return {"error": float(f"{found.max_relative_error:.1e}")}


def _train(state: State) -> Row:
    """One step of gradient descent on the mean square of all outputs."""
    model = copy.deepcopy(state.small).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(2):
        outputs = [t for t in _floats(model(*state.example.args, **state.example.kwargs)) if t.requires_grad]
        loss = sum((t.square().mean() for t in outputs), torch.zeros(()))
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not gradients or not all(bool(g.isfinite().all()) for g in gradients):
            raise WrongResult("a gradient is missing or not finite")
        optimizer.step()
    return {}


def _save(state: State) -> Row:
    assert state.plan is not None and state.small is not None
    with tempfile.TemporaryDirectory() as folder:
        hap.save(state.small, state.plan, Path(folder) / "model")
        loaded, _ = hap.load(Path(folder) / "model", state.example.model)
    if _difference(state.example, state.small, loaded) != 0:
        raise WrongResult("the loaded model gives other outputs than the saved one")
    return {}


def _export(state: State) -> Row:
    assert state.small is not None
    small = state.small.eval()
    with torch.no_grad():
        program = torch.export.export(_Tensors(small), state.example.args, dict(state.example.kwargs), strict=False)
    error = _difference(state.example, small, program.module())
    if not error <= EXPORT_TOLERANCE:
        raise WrongResult(f"the exported small model gives other outputs: relative error {error:.1e}")
    return {}


def _measure(state: State) -> Row:
    """The default criterion, on the two examples: with the model's own loss, cross-entropy, or the squared error."""
    assert state.structure is not None
    model, example = state.example.model.eval(), state.example
    try:
        with torch.no_grad():
            scores = logits(model(*example.args, **example.kwargs))
        labels = torch.zeros(scores.shape[: scores.ndim - 1], dtype=torch.int64)  # for each text, or each token
        if not example.kwargs:
            is_classifier = scores.ndim == 2
            batch, loss = (example.args, labels if is_classifier else scores + 1), None if is_classifier else _squared
        elif "labels" in inspect.signature(model.forward).parameters:
            batch, loss = {**example.kwargs, "labels": labels}, None
        else:
            return {"fisher": "the model takes keywords, but no labels"}
        start = time.process_time()
        found = hap.measure(model, [batch], loss, state.structure, samples=2)
    except hap.HapError as error:
        return {"fisher": _said(error)}
    missing = len(state.structure.families) - len(found.scores)
    fisher = f"{missing} of {len(state.structure.families)} families without a score" if missing else "ok"
    return {"fisher": fisher, "fisher_seconds": round(time.process_time() - start, 2)}


def _squared(outputs: Any, batch: Batch) -> torch.Tensor:
    return F.mse_loss(logits(outputs), batch[1])


class _Tensors(nn.Module):
    """A model that gives out tensors alone: `torch.export` takes no dataclass that it does not know, and no cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        return tensors(self.model(*args, **kwargs))


def _floats(outputs: Any) -> list[torch.Tensor]:
    return [t for t in tensors(outputs) if t.is_floating_point()]


def _difference(example: Example, one: nn.Module, other: nn.Module) -> float:
    """max |a - b| / max |a| over the outputs of two models."""
    with torch.no_grad():
        left, right = (_floats(m(*example.args, **example.kwargs)) for m in (one.eval(), other))
    if not left or [t.shape for t in left] != [t.shape for t in right]:
        return float("inf")
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in zip(left, right, strict=True))


STEPS: dict[str, Callable[[State], Row]] = {
    "trace": _trace,
    "plan": _plan,
    "apply": _apply,
    "verify": _verify,
    "train": _train,
    "save": _save,
    "export": _export,
    "measure": _measure,
}
