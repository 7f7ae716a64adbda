"""What implants are worth.

    python benchmarks/implants.py forms      # what each form leaves undone for its price, and what it starts from
    python benchmarks/implants.py budgets    # our plans and torch-pruning's for the same budgets
    python benchmarks/implants.py predicted  # what the planner promises, and what it costs
    python benchmarks/implants.py latency    # the time of layers and networks with implants
    python benchmarks/implants.py tables     # into docs/implants.md, from the raw results

Data is found through HAP_DATA or --data. Each command appends what it finds to JSON-lines files under
`benchmarks/results` and goes on where it was stopped, then prints its tables.
"""

from __future__ import annotations

from pathlib import Path

import implant_budgets
import implant_forms
import implant_goals
import implant_latency
import implant_predicted
import typer
from curvature_setting import RESULTS, ROOT, Results
from curvature_tables import filled
from implant_budgets import budgets
from implant_forms import forms
from implant_latency import latency
from implant_predicted import predicted

app = typer.Typer(help="What implants are worth.", no_args_is_help=True)
app.command()(forms)
app.command()(budgets)
app.command()(predicted)
app.command()(latency)


@app.command()
def tables(results: Results = RESULTS, page: Path = ROOT / "docs/implants.md") -> None:
    """Fills the page's tables from the raw results."""
    parts = (implant_forms, implant_budgets, implant_predicted, implant_latency, implant_goals)
    page.write_text(filled(page.read_text(), {name: t for part in parts for name, t in part.tables(results).items()}))


if __name__ == "__main__":
    app()
