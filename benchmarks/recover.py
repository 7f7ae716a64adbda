"""Collects run directories of `hap prune` and prints the table of `docs/results.md` on what follows the cut.

python benchmarks/recover.py RUN [RUN ...]     # appends the runs to the results, then prints
python benchmarks/recover.py                   # prints
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).parent / "results" / "recover.jsonl"


def main(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run directories.")] = None,
    results: Annotated[Path, typer.Option(help="The JSON-lines file.")] = RESULTS,
) -> None:
    """Adds the runs and prints the table."""
    with results.open("a") as file:
        for run in runs or []:
            file.write(json.dumps(row(json.loads((run / "report.json").read_text()))) + "\n")
    print(table(results))


def row(report: dict[str, Any]) -> dict[str, Any]:
    """What the table needs of a report, and how it was made."""
    options = report["options"]
    return {
        "recover": options["recover"],
        "implant_ratio": options["implant_ratio"],
        "epochs": options["training"]["epochs"],
        **{key: report[key] for key in ("as_cut", "comparison", "latency", "versions", "threads")},
    }


def table(results: Path) -> str:
    """Accuracy on the test images in per cent; latencies as ratios, small to dense."""
    lines = [
        "| recover | implant ratio | epochs | accuracy | MACs | latency, 1 image | latency, 32 images |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in results.read_text().splitlines():
        found = json.loads(line)
        ratios = {name: value["ratio"] for name, value in found["comparison"].items()}
        cells = [found["recover"], f"{found['implant_ratio']:g}", str(found["epochs"])]
        cells += [f"{100 * found['comparison']['accuracy']['small']:.1f}", f"{ratios['macs']:.2f}"]
        cells += [f"{ratios[name]:.2f}" for name in ("latency_ms", "batch_latency_ms")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
