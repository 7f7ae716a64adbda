"""What curvature costs and what it is worth; every table of `docs/curvature.md` is made here.

    pip install -r requirements-bench.txt
    python benchmarks/curvature.py cost      # time, memory, time to a given standard error
    python benchmarks/curvature.py truth     # the loss without each channel: what criteria estimate
    python benchmarks/curvature.py quality   # all criteria and torch-pruning's against it
    python benchmarks/curvature.py scaling   # samples, width, depth, 100 million parameters
    python benchmarks/curvature.py tables    # into docs/curvature.md, from the raw results

Data is found through HAP_DATA or --data. Each command appends what it finds to JSON-lines files under
`benchmarks/results` and goes on where it was stopped. Calibration reads training images; the test images give the
reported numbers only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import curvature_tables
import typer
from curvature_cost import cost, memory_point
from curvature_memory import MARK, peak
from curvature_quality import quality
from curvature_scaling import scaling, scaling_point
from curvature_setting import RESULTS, ROOT, Results
from curvature_truth import truth

app = typer.Typer(help="What curvature costs and what it is worth.", no_args_is_help=True)
for command in (cost, truth, quality, scaling):
    app.command()(command)


@app.command()
def tables(
    results: Results = RESULTS,
    page: Annotated[Path, typer.Option(help="The page whose marked places are filled.")] = ROOT / "docs/curvature.md",
) -> None:
    """Fills the page's tables and draws its plot, from the raw results."""
    found = curvature_tables.tables(results)
    page.write_text(curvature_tables.filled(page.read_text(), found))
    curvature_tables.plot(results, page.with_name("curvature-scaling.png"))
    for name, table in found.items():
        print(f"{name}\n\n{table}\n")


@app.command(hidden=True)
def point(kind: str, name: str, options: str) -> None:
    """One piece of work in this process alone; prints what it took."""
    make = {"cost": memory_point, "scaling": scaling_point}[kind]
    work, facts = make(name, json.loads(options))
    found = peak(work)
    print(MARK + json.dumps({**found, **facts()}))


if __name__ == "__main__":
    app()
