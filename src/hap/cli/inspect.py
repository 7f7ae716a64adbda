"""`hap inspect`: what can leave a model, what cannot, and why."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.table import Table

import hap
from hap.cli import sources
from hap.cli.screen import console
from hap.errors import HapError

Shape = Annotated[str, typer.Option(help="Shape of one input, for example 3,32,32.")]


def inspect(
    model: Annotated[str, typer.Option(help=f"{sources.SPECS}.")],
    input_shape: Shape = "3,32,32",
    classes: Annotated[int, typer.Option(help="Number of outputs.")] = 10,
    frozen: Annotated[bool, typer.Option("--frozen", help="List every frozen axis with its reason.")] = False,
) -> None:
    """List a model's prunable families, its costs and its frozen axes."""
    try:
        shape = tuple(int(n) for n in input_shape.split(","))
    except ValueError as error:
        raise HapError("not a shape", expected="numbers with commas, such as 3,32,32", got=input_shape) from error
    structure = hap.trace(sources.load_model(model, None, classes), (torch.zeros(2, *shape),))
    families = Table("family", "kind", "units", "exact", "written by", "read by")
    for family in structure.families:
        writers, readers = len(family.roles("producer")), len(family.roles("consumer"))
        families.add_row(
            family.name, family.kind, str(family.size), "yes" if family.exact else "no", str(writers), str(readers)
        )
    console.print(families)
    cost = hap.CostModel(structure).dense
    console.print(f"{cost.params:,} parameters, {cost.macs:,} MACs per sample, {len(structure.frozen)} frozen axes")
    if frozen:
        reasons = Table("tensor", "axis", "positions", "reason")
        for item in structure.frozen:
            reasons.add_row(item.parameter, str(item.axis), str(len(item.indices)), item.reason)
        console.print(reasons)
