"""The command line: one thin file for each verb."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import typer

from hap.cli import demo, finetune, inspect, prune, run
from hap.cli.words import in_options
from hap.errors import HapError

app = typer.Typer(
    name="hap",
    help="Makes trained PyTorch networks smaller and faster: second-order structured pruning with neural implants.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _reporting(verb: Callable[..., None]) -> Callable[..., None]:
    """Ends with exit code 2 on bad input and 130 when interrupted, each with a message and no traceback."""

    @functools.wraps(verb)
    def reporting(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except HapError as error:
            said = error if verb is run.run else in_options(error, verb)  # a recipe has words of its own
            typer.echo(f"error: {said}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as interrupt:
            kept = "started again, it goes on from there" if verb is run.run else "nothing was written"
            typer.echo(f"interrupted: {kept}", err=True)
            raise typer.Exit(130) from interrupt

    return reporting


for _verb in (prune.prune, run.run, finetune.finetune, inspect.inspect, demo.demo):
    app.command()(_reporting(_verb))


def main() -> None:
    """Runs the command line."""
    app()
