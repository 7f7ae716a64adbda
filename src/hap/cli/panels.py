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
ImageSize = Annotated[
    int | None, MODEL(help="Height and width of imagefolder's images; default: the model's own, or 224.")
]

# Of training, in `hap prune` and `hap finetune` alike.
Rate = Annotated[
    float | None, TUNING(help="Peak learning rate; default 0.02 for sgd, 0.0005 for adamw, 0.00005 for texts.")
]
Optimizer = Annotated[str | None, TUNING(help="sgd or adamw; default sgd, for texts adamw.")]
Schedule = Annotated[str, TUNING(help="cosine, step or constant.")]
Warmup = Annotated[float, TUNING(help="Fraction of all steps in which the learning rate rises.")]
Decay = Annotated[float | None, TUNING(help="Of matrices; default 0.0005, of texts 0.01.")]
Clip = Annotated[float | None, TUNING(help="Largest norm of the whole gradient; default none, 1 for texts.")]
Average = Annotated[float | None, TUNING(help="Decay of the weights' moving average; default: none.")]
Accumulate = Annotated[int, TUNING(help="Batches that make one step.")]
Compile = Annotated[bool, TUNING("--compile", help="Train through torch.compile.")]
