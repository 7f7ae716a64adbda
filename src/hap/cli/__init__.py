"""The command line: one thin file for each verb."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import typer

from hap.cli import demo, finetune, inspect, prune
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
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except HapError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as interrupt:
            typer.echo("interrupted: nothing was written", err=True)
            raise typer.Exit(130) from interrupt

    return run


for _verb in (prune.prune, finetune.finetune, inspect.inspect, demo.demo):
    app.command()(_reporting(_verb))


def main() -> None:
    """Runs the command line."""
    app()
