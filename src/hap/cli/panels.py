"""The panels that `--help` groups options in."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from hap.zoo.splits import ENVIRONMENT

MODEL = partial(typer.Option, rich_help_panel="Model and data")
LEAVES = partial(typer.Option, rich_help_panel="What may leave")
BUDGET = partial(typer.Option, rich_help_panel="Budget: the fraction that may remain")
METHOD = partial(typer.Option, rich_help_panel="Method")
TUNING = partial(typer.Option, rich_help_panel="Fine-tuning")
TEACHER = partial(typer.Option, rich_help_panel="A teacher")
RECIPE = partial(typer.Option, rich_help_panel="Recipe and data")
OUTPUT = partial(typer.Option, rich_help_panel="Output")

Data = Annotated[
    str | None,
    MODEL(help=f"digits, cifar10:DIR or imagefolder:DIR; with --task its directory. Without one: ${ENVIRONMENT}."),
]
