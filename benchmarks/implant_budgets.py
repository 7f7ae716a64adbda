"""Every way to meet a budget, ours and torch-pruning's, under the same cut, recovery and fine-tuning."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from statistics import mean, stdev
from typing import Annotated, Any

import numpy as np
import typer
from curvature_records import Records, Row, read
from curvature_setting import DATA, MODEL, RESULTS, Clock, Data, Minutes, Network, Results, Setting, load
from curvature_tables import NONE
from torch import nn

import hap
from hap.batches import Batch
from hap.curvature import CRITERIA
from hap.implants import Option, options
from hap.planning import CostModel, Decision, Plan
from hap.types import Sensitivity, Structure

BATCH = 128
FIT = 512  # calibration images for implants, batch-norm statistics and refits


@dataclass(frozen=True, eq=False)
class Task:
    """What every contender is given.

    Attributes:
        setting: the network and its data.
        budget: what may remain.
        samples: the training images that a contender may read before fine-tuning.
        seed: of what it draws.
    """

    setting: Setting
    budget: hap.Budget
    samples: int
    seed: int

    @property
    def calibration(self) -> list[Batch]:
        """These images."""
        return self.setting.calibration(self.samples)


Contender = Callable[[Task], Plan]


def ours(*, criterion: str = "gate-fisher", implants: bool, joint: bool = False, mode: str = "optimal") -> Contender:
    """A plan by this library."""

    def find(task: Task) -> Plan:
        structure, ratio = task.setting.structure, 0.1 if implants else 0.0
        sensitivity = measured(task.setting, task.samples, criterion, task.seed)
        offered = forms(task.setting) if implants and mode == "optimal" else None
        return hap.decide(
            structure, sensitivity, task.budget, mode=mode, implant_ratio=ratio, options=offered, joint=joint
        )

    return find


@cache
def measured(setting: Setting, samples: int, criterion: str, seed: int) -> Sensitivity:
    """What a criterion says, once for all budgets."""
    pairs, draws = CRITERIA[criterion].has_gram, {"hessian-trace": 8}.get(criterion)
    return hap.measure(
        setting.model, setting.calibration(samples), None, setting.structure,
        criterion=criterion, samples=samples, draws=draws, seed=seed, gram=pairs,
    )  # fmt: skip


@cache
def forms(setting: Setting) -> dict[str, tuple[Option, ...]]:
    """The implants to choose from, once for all budgets."""
    return options(setting.model, setting.structure, setting.calibration(FIT), samples=256)


def peer(importance: str) -> Contender:
    """A plan that removes what torch-pruning removes, at the global ratio that meets the budget."""

    def find(task: Task) -> Plan:
        low, high = 0.0, 0.95
        best = None
        for _ in range(9):
            middle = (low + high) / 2
            plan = _theirs(task, importance, middle)
            share = plan.small.params / plan.dense.params if task.budget.params else plan.small.macs / plan.dense.macs
            if share <= (task.budget.params or task.budget.macs or 1):
                high, best = middle, plan
            else:
                low = middle
        assert best is not None
        return best

    return find


def _theirs(task: Task, importance: str, ratio: float) -> Plan:
    import torch_pruning as tp

    model, structure = copy.deepcopy(task.setting.model), task.setting.structure
    calibration = task.calibration
    images, labels = calibration[0]
    made = {
        "group norm": lambda: tp.importance.GroupMagnitudeImportance(p=2, normalizer="mean"),
        "L2": lambda: tp.importance.MagnitudeImportance(p=2, normalizer=None, group_reduction="first"),
        "Taylor": lambda: tp.importance.TaylorImportance(),
    }[importance]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        last = [m for m in model.modules() if isinstance(m, nn.Linear)]
        pruner = tp.pruner.MagnitudePruner(
            model, images[:1], importance=made, pruning_ratio=ratio, global_pruning=True, ignored_layers=last,
            max_pruning_ratio=0.9,
        )  # fmt: skip
        if importance == "Taylor":
            for x, y in calibration:
                nn.functional.cross_entropy(model(x), y).backward()
        pruner.step()
    lost = {name: set(indices) for name, out, indices in pruner.pruning_history() if out}
    return _plan(structure, lost, task.budget, f"torch-pruning {importance}")


def _plan(structure: Structure, lost: dict[str, set[int]], budget: hap.Budget, name: str) -> Plan:
    """The plan that prunes each unit all of whose producers' filters are lost."""
    decisions, masks = {}, {}
    for family in structure.families:
        producer = family.roles("producer")[0]
        gone_rows = lost.get(producer.parameter.rpartition(".")[0], set())
        gone = tuple(u for u, rows in enumerate(producer.indices) if gone_rows.issuperset(rows))
        decisions[family.name] = Decision(tuple(u for u in range(family.size) if u not in gone), gone)
        masks[family.name] = np.isin(np.arange(family.size), gone)
    cost = CostModel(structure)
    return Plan(structure, decisions, {}, budget, name, cost.dense, cost(masks, {}))


CONTENDERS: dict[str, Contender] = {
    "optimal, no implants": ours(implants=False),
    "optimal, implants": ours(implants=True),
    "optimal and joint, no implants": ours(implants=False, joint=True),
    "optimal and joint, implants": ours(implants=True, joint=True),
    "torch-pruning, group norm": peer("group norm"),
    "torch-pruning, L2": peer("L2"),
    "torch-pruning, Taylor": peer("Taylor"),
    "paper's rule by gate-fisher, no implants": ours(implants=False, mode="paper"),
    "paper's rule by gate-fisher, implants": ours(implants=True, mode="paper"),
    "paper (Hessian trace), no implants": ours(criterion="hessian-trace", implants=False, mode="paper"),
    "paper (Hessian trace), implants": ours(criterion="hessian-trace", implants=True, mode="paper"),
}


def budgets(
    data: Data = DATA,
    results: Results = RESULTS,
    minutes: Minutes = 120.0,
    model: Network = MODEL,
    keep: Annotated[str, typer.Option(help="Fractions that may remain.")] = "0.7,0.5,0.3",
    of: Annotated[str, typer.Option(help="params or macs.")] = "params",
    samples: Annotated[int, typer.Option(help="Calibration images.")] = 2048,
    test: Annotated[int, typer.Option(help="Test images.")] = 2000,
    steps: Annotated[int, typer.Option(help="Of fine-tuning, 128 images each; 0 for none.")] = 60,
    seeds: Annotated[int, typer.Option(help="Runs.")] = 1,
    only: Annotated[str, typer.Option(help="Contenders whose name holds this; all if empty.")] = "",
) -> None:
    """Accuracy as cut, recalibrated, refitted, and refitted and fine-tuned, for every contender and budget."""
    clock, setting = Clock(minutes), load(data, model=model, batch_size=BATCH)
    records = Records(results / "implant-budgets.jsonl", model=model, samples=samples, test=test, steps=steps)
    if not records.has(contender="dense"):
        found = hap.evaluate(setting.model, setting.splits.test, samples=test)
        records.add({"contender": "dense", "accuracy": found.accuracy, "loss": found.loss}, f"dense {found.accuracy}")
    for seed in range(seeds):
        for share in (float(part) for part in keep.split(",")):
            for name, find in CONTENDERS.items():
                key = {"contender": name, "of": of, "keep": share, "seed": seed}
                if clock.over() or only not in name or records.has(**key):
                    continue
                task = Task(setting, hap.Budget(**{of: share}), samples, seed)
                row = {**key, **_row(task, find, test, steps)}
                records.add(row, f"{key}: {row}")


def _row(task: Task, find: Contender, test: int, steps: int) -> Row:
    setting, fit = task.setting, task.setting.calibration(FIT)
    plan = find(task)
    row: Row = {"predicted": plan.predicted}
    row |= {"params": plan.small.params / plan.dense.params, "macs": plan.small.macs / plan.dense.macs}
    row["implanted"] = sum(len(implant.indices) for implant in plan.implants.values())
    row["forms"] = sorted({f"{implant.form} {implant.rank or ''}".strip() for implant in plan.implants.values()})
    small = hap.apply(setting.model, plan, fit)
    row["calibration_loss"] = hap.evaluate(small, task.calibration).loss
    row["dense_calibration_loss"] = hap.evaluate(setting.model, task.calibration).loss

    def scored(model: nn.Module, key: str) -> None:
        row[key] = hap.evaluate(model, setting.splits.test, samples=test).accuracy

    scored(small, "as_cut")
    refitted = copy.deepcopy(small)
    hap.recalibrate_(small, fit)
    scored(small, "recalibrated")
    hap.refit_(refitted, setting.model, plan, fit)
    scored(refitted, "refitted")
    if steps:
        for key, start_from in (("tuned", small), ("refitted_tuned", refitted)):
            tune_(start_from, setting, steps, task.seed)
            scored(start_from, key)
    return row


def tune_(model: nn.Module, setting: Setting, steps: int, seed: int = 0) -> None:
    """Trains on so many batches, the same for every contender."""
    hap.finetune(model, list(islice(setting.splits.train.epoch(seed), steps)), epochs=1, lr=0.01, seed=seed)


COLUMNS = ("as_cut", "recalibrated", "refitted", "tuned", "refitted_tuned")


def table(rows: Sequence[Row], model: str) -> str:
    """What is kept, and accuracies, in per cent, by budget and contender."""
    rows = [row for row in rows if row["model"] == model]
    if not rows:
        return NONE
    dense = next(row["accuracy"] for row in rows if row["contender"] == "dense")
    lines = [
        "| budget | contender | implants | params | MACs | as cut | recalibrated | refitted | recalibrated, tuned "
        "| refitted, tuned |",
        "|---|---|---|---|---|---|---|---|---|---|",
        f"| | dense | | 100 | 100 | {100 * dense:.1f} | | | | |",
    ]
    keys = dict.fromkeys((row["of"], row["keep"], row["contender"]) for row in rows if "keep" in row)
    for of, share, name in sorted(keys, key=lambda k: (k[0] != "params", -k[1])):
        found = [r for r in rows if (r.get("of"), r.get("keep"), r["contender"]) == (of, share, name)]
        mine = list({r["seed"]: r for r in sorted(found, key=lambda r: r["steps"])}.values())  # the most steps of each
        cells = [f"{share:.0%} of {of}", name, f"{mean(r['implanted'] for r in mine):.0f}"]
        cells += [f"{100 * mean(r[cost] for r in mine):.1f}" for cost in ("params", "macs")]
        cells += [_cell([100 * r[c] for r in mine if c in r]) for c in COLUMNS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def tables(results: Any) -> dict[str, str]:
    """Every table of `docs/implants.md` that comes from these results."""
    rows = read(results / "implant-budgets.jsonl")
    return {name: table(rows, name) for name in ("resnet20", "resnet56")}
