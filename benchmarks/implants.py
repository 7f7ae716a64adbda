"""What implants are worth.

    python benchmarks/implants.py forms    # what each form leaves undone for its price, and what it starts from

Data is found through HAP_DATA or --data. Each command appends what it finds to JSON-lines files under
`benchmarks/results` and goes on where it was stopped, then prints its tables.
"""

from __future__ import annotations

import typer
from implant_forms import forms

app = typer.Typer(help="What implants are worth.", no_args_is_help=True)
app.command()(forms)


@app.callback()
def _main() -> None:
    """Keeps the commands' names, also while there is one only."""


if __name__ == "__main__":
    app()
