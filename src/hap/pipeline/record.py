"""What an experiment leaves: its record, and the files of the run directory."""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hap.batches import device_of
from hap.checkpoint import Origin, write
from hap.curvature import CRITERIA
from hap.files import stored_bytes, write_json
from hap.pipeline.stages import Result
from hap.planning import Latency, Plan, versions
from hap.report import Comparison, Measured, Reached, has_plots, sensitivity_plot, table, width_plot
from hap.training import History
from hap.types import Cost, Evaluation

logger = logging.getLogger(__name__)
BATCH = 32  # examples in the larger input that is timed


@dataclass(frozen=True)
class Round:
    """One round of measuring, pruning and fine-tuning.

    Attributes:
        cost: what was left.
        predicted: the rise of the loss that the plan predicted; None where it could not.
        rise: the rise that was measured right after the cut, on the validation examples.
        as_cut: validation before fine-tuning, after what `recover` does.
        history: of the fine-tuning.
    """

    cost: Cost
    predicted: float | None
    rise: float
    as_cut: Evaluation
    history: History


@dataclass(frozen=True)
class Run:
    """A whole experiment: its result and its evidence.

    Attributes:
        result: of `prune`; its model is fine-tuned. Of several rounds: one plan for the dense model, and the dense
            model's structure and sensitivity.
        comparison: the before/after table. Accuracy and loss are of the test set, read once.
        rounds: what happened, round by round; a single one unless more were asked for.
        latency: by number of examples in the input, of the dense and the small model.
        seconds: time of each stage.
        directory: where everything was written.
        targets: what it was held against, and how far it is from it.
        tested: the test examples that accuracy and loss are of.
        notes: what a reader must know of the numbers.
    """

    result: Result
    comparison: Comparison
    rounds: tuple[Round, ...]
    latency: dict[int, dict[str, Latency]]
    directory: Path
    seconds: dict[str, float] = field(default_factory=dict)
    targets: tuple[Reached, ...] = ()
    tested: int = 0
    notes: tuple[str, ...] = ()

    @property
    def as_cut(self) -> Evaluation:
        """Of the last round."""
        return self.rounds[-1].as_cut

    @property
    def history(self) -> History:
        """Of the last round."""
        return self.rounds[-1].history

    @property
    def predicts_loss(self) -> bool:
        """Whether what the plan predicted is a rise of the loss, to hold against the measured one."""
        known = CRITERIA.get(self.result.sensitivity.criterion)
        return known is not None and known.predicts_loss


def compare(
    model: nn.Module,
    result: Result,
    before: Evaluation,
    after: Evaluation,
    latency: dict[int, dict[str, Latency]],
) -> Comparison:
    """The before/after table: what the plan promised, what was timed, stored and evaluated."""
    plan, one, many = result.plan, latency[1], latency[BATCH]
    metrics: dict[Any, tuple[float, float]] = {
        name: (value, after.metrics[name]) for name, value in before.metrics.items()
    }
    return table(
        {
            "params": (plan.dense.params, plan.small.params),
            "macs": (plan.dense.macs, plan.small.macs),
            **_heads(plan),
            "latency_ms": (_measured(one["dense"]), _measured(one["small"])),
            "batch_latency_ms": (_measured(many["dense"]), _measured(many["small"])),
            "bytes": (stored_bytes(model), stored_bytes(result.model)),
            "accuracy": (before.accuracy, after.accuracy),
            **metrics,
            "loss": (before.loss, after.loss),
        },
        ratios={"latency_ms": one["small"].ratio, "batch_latency_ms": many["small"].ratio},
    )


def _heads(plan: Plan) -> dict[Any, tuple[int, int]]:
    """The number of attention heads and of their weights, where they have become fewer."""
    decisions = [plan.decisions[family.name] for family in plan.structure.families if family.kind == "head"]
    kept, gone = sum(len(d.keep) for d in decisions), sum(len(d.prune) for d in decisions)
    heads = {"heads": (kept + gone, kept)} if gone else {}
    return heads | ({"head_params": (plan.dense.heads, plan.small.heads)} if plan.narrowed else {})


def _measured(latency: Latency) -> Measured:
    """The median and half the distance of the quartiles."""
    return Measured(latency.median, (latency.high - latency.low) / 2)


def write_run(
    done: Run, model: nn.Module, directory: Path, tokenizer: Any, options: dict[str, Any], origin: Origin
) -> None:
    """Writes the checkpoint, the two plots and ``report.json`` into a directory that exists."""
    result = done.result
    cost_rows = {"params", "macs"}  # the model card has these from the plan
    results = {row.label: row.cells()[1:3] for row in done.comparison.rows if row.quantity not in cost_rows}
    write(result.model, result.plan, directory, results=results, origin=origin, tokenizer=tokenizer)
    if has_plots():
        sensitivity_plot(result.sensitivity, result.plan, directory / "sensitivity.png")
        width_plot(result.plan, directory / "widths.png")
    else:  # nothing of a long run is lost for want of a picture
        logger.warning("no plots, for want of matplotlib: pip install 'torch-hap[report]'")
    write_json(directory / "report.json", _report(done, model, options))


def _report(done: Run, model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    result = done.result
    sensitivity = result.sensitivity
    return {
        "model": type(model).__name__,
        "device": str(device_of(model)),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "options": {**options, **result.plan.options, "budget": dataclasses.asdict(result.plan.budget)},
        "criterion": sensitivity.criterion,
        "notes": list(done.notes),
        "test_examples": done.tested,
        "comparison": {
            row.quantity: {
                "dense": row.dense.value,
                "small": row.small.value,
                "ratio": None if math.isnan(row.ratio) else row.ratio,
            }
            for row in done.comparison.rows
        },
        "targets": [
            {
                **dataclasses.asdict(found.target),
                "reached": found.value,
                "difference": found.difference,
                "met": found.met,
            }
            for found in done.targets
        ],
        "units": sum(len(d.keep) + len(d.prune) for d in result.plan.decisions.values()),
        "pruned_units": sum(len(d.prune) for d in result.plan.decisions.values()),
        "implanted_filters": sum(len(i.indices) for i in result.plan.filters.values()),
        "narrow_heads": sum(len(i.indices) for _, i in result.plan.narrowed.values()),
        "verification": dataclasses.asdict(result.verification),
        "as_cut": dataclasses.asdict(done.as_cut),
        "history": done.history.to_dict(),
        "rounds": [_round(found) for found in done.rounds],
        "predicted": result.plan.predicted,
        "latency": {
            count: {name: dataclasses.asdict(found) for name, found in models.items()}
            for count, models in done.latency.items()
        },
        "seconds": done.seconds,
        "sensitivity": {
            name: {"scores": score.tolist(), "stderr": _finite(sensitivity.stderr[name])}
            for name, score in sensitivity.scores.items()
        },
    }


def _finite(values: torch.Tensor) -> list[float | None]:
    """None for what is not known: the standard errors of a single batch."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _round(found: Round) -> dict[str, Any]:
    return {
        "cost": dataclasses.asdict(found.cost),
        "predicted": found.predicted,
        "rise": found.rise,
        "as_cut": dataclasses.asdict(found.as_cut),
        "history": found.history.to_dict(),
    }
