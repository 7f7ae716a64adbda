"""Collects run directories of `hap run` and prints the tables of `docs/results.md` on recipes.

python benchmarks/recipes.py RUN [RUN ...]     # appends the runs to the results, then prints
python benchmarks/recipes.py                   # prints
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).parent / "results" / "recipes.jsonl"
LONG = ("sensitivity", "verification", "notes")  # what a report has and a record of it does not need
HEADER = (
    "| run | epochs | kept | parameters | MACs | implants | dense | small | latency, 1 image | latency, 32 images "
    "| seconds |"
)
Rows = list[dict[str, Any]]


def main(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run directories.")] = None,
    results: Annotated[Path, typer.Option(help="The JSON-lines file.")] = RESULTS,
) -> None:
    """Adds the runs and prints the tables."""
    for run in runs or []:
        with results.open("a") as file:
            file.write(json.dumps(row(json.loads((run / "report.json").read_text()))) + "\n")
    print("\n\n".join(tables(read(results))))


def read(results: Path) -> Rows:
    """The records."""
    return [json.loads(line) for line in results.read_text().splitlines()]


def row(report: dict[str, Any]) -> dict[str, Any]:
    """A report without its scores, and without the place of the weights, which is the machine's."""
    recipe = report["options"]["recipe"]
    dense = {**recipe["dense"], "weights": recipe["dense"]["weights"] and Path(recipe["dense"]["weights"]).name}
    return {
        **{name: value for name, value in report.items() if name not in (*LONG, "options")},
        "recipe": {**recipe, "dense": dense, "data": {**recipe["data"], "directory": None}},
    }


def tables(rows: Rows) -> tuple[str, str]:
    """What each run came to, on the test images; and its epochs, in validation. Accuracies are in per cent."""
    lines = [HEADER, f"|{'---|' * (HEADER.count('|') - 1)}"]
    epochs = ["| run | after | training loss | accuracy in validation |", "|---|---|---|---|"]
    for number, found in enumerate(rows, start=1):
        comparison, history, finetune = found["comparison"], found["history"], found["recipe"]["finetune"]
        chosen = found["criterion"] if comparison["params"]["ratio"] < 1 else "nothing pruned"
        cells = [f"{number}: {found['recipe']['model'].partition(':')[2]}, {chosen}", str(finetune["epochs"])]
        cells.append(f"epoch {history['chosen']}, the {finetune.get('select', 'best')}")
        cells += [f"{comparison[name]['ratio']:.2f}" for name in ("params", "macs")]
        cells.append(f"{found['implanted_filters']:,}")
        cells += [f"{100 * comparison['accuracy'][name]:.2f}" for name in ("dense", "small")]
        cells += [f"{comparison[name]['ratio']:.2f}" for name in ("latency_ms", "batch_latency_ms")]
        lines.append(_line([*cells, ", ".join(f"{stage} {spent:,.0f}" for stage, spent in found["seconds"].items())]))
        recovery = "the cut" if found["recipe"]["recover"] == "none" else f"the {found['recipe']['recover']}"
        epochs.append(_line([str(number), recovery, "", f"{100 * found['as_cut']['accuracy']:.1f}"]))
        for epoch in history["epochs"]:
            accuracy = f"{100 * epoch['validation']['accuracy']:.1f}"
            epochs.append(_line([str(number), f"epoch {epoch['epoch']}", f"{epoch['train_loss']:.3f}", accuracy]))
    return "\n".join(lines), "\n".join(epochs)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    typer.run(main)
