"""Criteria under one budget: the same model, data, seeds and fine-tuning for every contender.

    python benchmarks/criteria.py --weights resnet20.safetensors --data cifar10:DIR

appends each result to a JSON-lines file as it comes, goes on where it was stopped, and prints the
table of `docs/results.md`. Choices are made on calibration and validation images; the test images
give the reported numbers only.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import hap
from hap import zoo
from hap.cli.screen import Bars
from hap.cli.sources import device as find_device

CONTENDERS = (
    ("magnitude", 0.0),
    ("taylor", 0.0),
    ("hessian-trace", 0.0),
    ("gate-fisher", 0.0),
    ("hessian-trace", 0.1),
    ("gate-fisher", 0.1),
)


def main(
    weights: Annotated[Path, typer.Option(help="The dense model's safetensors file.")],
    data: Annotated[str, typer.Option(help="As for `hap prune`.")],
    model: Annotated[str, typer.Option(help="A network of the zoo.")] = "resnet20",
    keep_params: Annotated[float, typer.Option(help="Fraction of parameters that may remain.")] = 0.5,
    epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning.")] = 1,
    seeds: Annotated[int, typer.Option(help="Runs of each contender.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    results: Annotated[Path, typer.Option(help="The JSON-lines file.")] = Path("benchmarks/results/criteria.jsonl"),
) -> None:
    """Runs what is not in the results yet, then prints the table."""
    splits, target = zoo.load_data(data), find_device(device)
    dense = zoo.build(model, weights=weights, classes=len(splits.classes)).to(target)
    setting = {"model": model, "data": splits.name, "keep_params": keep_params, "epochs": epochs}
    known = _read(results, setting)
    with Bars() as bars:
        if ("dense", 0.0, 0) not in known:
            found = hap.evaluate(dense, splits.test, progress=bars)
            row = {
                "contender": "dense",
                "implant_ratio": 0.0,
                "seed": 0,
                "tuned": found.accuracy,
                "params": 1.0,
                "macs": 1.0,
            }
            _append(results, setting, row)
        for seed in range(seeds):
            for criterion, ratio in CONTENDERS:
                if (criterion, ratio, seed) not in known:
                    splits = zoo.load_data(data, seed=seed)  # anew, so that every contender sees the same epochs
                    row = _contend(dense, splits, criterion, ratio, keep_params, epochs, seed, bars)
                    _append(results, setting, row)
    print(_table(_read(results, setting)))


def _contend(
    dense: torch.nn.Module,
    splits: zoo.DataSplits,
    criterion: str,
    ratio: float,
    keep: float,
    epochs: int,
    seed: int,
    bars: Bars,
) -> dict[str, Any]:
    start = time.perf_counter()
    result = hap.prune(
        dense,
        splits.calibration,
        None,
        hap.Budget(params=keep),
        criterion=criterion,
        mode="paper",
        samples=512,
        implant_ratio=ratio,
        seed=seed,
        progress=bars,
    )
    measuring = time.perf_counter() - start
    small = result.model
    as_cut = hap.evaluate(small, splits.test, progress=bars).accuracy
    hap.recalibrate_(small, splits.calibration, samples=2048, progress=bars)
    recalibrated = hap.evaluate(small, splits.test, progress=bars).accuracy
    hap.finetune(small, splits.train, epochs=epochs, validation=splits.validation, seed=seed, progress=bars)
    plan = result.plan
    return {
        "contender": criterion,
        "implant_ratio": ratio,
        "seed": seed,
        "params": plan.small.params / plan.dense.params,
        "macs": plan.small.macs / plan.dense.macs,
        "implanted": sum(len(i.indices) for i in plan.implants.values()),
        "pruned": sum(len(d.prune) for d in plan.decisions.values()),
        "as_cut": as_cut,
        "recalibrated": recalibrated,
        "tuned": hap.evaluate(small, splits.test, progress=bars).accuracy,
        "prune_seconds": measuring,
    }


def _append(path: Path, setting: dict[str, Any], row: dict[str, Any]) -> None:
    environment = {"torch": str(torch.__version__), "threads": torch.get_num_threads()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({**setting, **row, **environment}) + "\n")
    print(f"{row['contender']} {row['implant_ratio']}: {100 * row['tuned']:.2f} %", file=sys.stderr, flush=True)


def _read(path: Path, setting: dict[str, Any]) -> dict[tuple[str, float, int], dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    mine = [row for row in rows if all(row[k] == v for k, v in setting.items())]
    return {(row["contender"], row["implant_ratio"], row["seed"]): row for row in mine}


def _table(rows: dict[tuple[str, float, int], dict[str, Any]]) -> str:
    lines = [
        "| criterion | implant ratio | parameters | MACs | implanted filters | as cut | recalibrated | fine-tuned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, ratio in dict.fromkeys((name, ratio) for name, ratio, _ in rows):
        runs = [row for (n, r, _), row in rows.items() if (n, r) == (name, ratio)]
        cells = [_percent(runs, key) for key in ("params", "macs")]
        implanted = "" if name == "dense" else str(runs[0]["implanted"])
        accuracies = [_percent(runs, key) for key in ("as_cut", "recalibrated", "tuned")]
        lines.append(f"| {' | '.join([name, f'{ratio:g}', *cells, implanted, *accuracies])} |")
    return "\n".join(lines)


def _percent(runs: list[dict[str, Any]], key: str) -> str:
    """Mean, and the standard deviation where there are several runs."""
    values = torch.tensor([row[key] for row in runs if key in row], dtype=torch.float64) * 100
    if not len(values):
        return ""
    spread = f" ± {values.std():.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread}"


if __name__ == "__main__":
    typer.run(main)
