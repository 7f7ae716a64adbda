"""`hap inspect`: what can leave a model, what cannot, and why."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Annotated, Any

import torch
import typer
from rich.table import Column, Table

import hap
from hap import zoo
from hap.batches import Batch, arguments
from hap.cli import sources
from hap.cli.jobs import longest, need_dense, text_model
from hap.cli.screen import console
from hap.errors import HapError
from hap.zoo.texts import Padding, tokenised

TOKENS = 128  # where neither the user nor the model says another number


def inspect(
    *,
    model: Annotated[str, typer.Option(help=f"{sources.SPECS}.")],
    task: Annotated[str | None, typer.Option(help="For texts, with hf:PATH: glue/mrpc, glue/sst2, ...")] = None,
    max_length: Annotated[int | None, typer.Option(help=f"Tokens of a text; default {TOKENS}.")] = None,
    input_shape: Annotated[
        str | None, typer.Option(help="Shape of one image, such as 3,32,32; default: the model's own, or 3,224,224.")
    ] = None,
    classes: Annotated[int, typer.Option(help="Number of classes of images.")] = 10,
    frozen: Annotated[bool, typer.Option("--frozen", help="List what cannot be pruned, by reason.")] = False,
) -> None:
    """List a model's prunable families, its costs and what is frozen."""
    if task is not None and input_shape is not None:
        raise typer.BadParameter("is for images; of texts --max-length", param_hint="--input-shape")
    if task is None and max_length is not None:
        raise typer.BadParameter("is for texts, with --task", param_hint="--max-length")
    if task is None:
        opened: Any = sources.load_model(model, None, classes)
        shape = _shape(input_shape) if input_shape is not None else _own_shape(model, opened)
        batch: Batch = (torch.zeros(2, *shape), torch.zeros(2))
        sample = f"sample of {' x '.join(map(str, shape))}"
    else:
        opened, tokenizer, plan = text_model(model, None, zoo.task_of(task).labels, 0)
        need_dense(plan, model)
        tokens = longest(opened, tokenizer, max_length) or min(TOKENS, tokenizer.model_max_length)
        batch, sample = _texts(tokenizer, len(zoo.task_of(task).columns), tokens), f"sample of {tokens} tokens"
    structure = hap.trace(opened, *arguments(batch))
    console.print(_families(structure))
    cost = hap.CostModel(structure).dense
    console.print(f"{cost.params:,} parameters, {cost.macs:,} MACs per {sample}, {len(structure.frozen)} frozen axes")
    console.print("(MACs of convolution and linear layers)", highlight=False)
    if frozen:
        console.print(_frozen(structure))


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in text.split(","))
    except ValueError as error:
        raise HapError("not a shape", expected="numbers with commas, such as 3,32,32", got=text) from error


def _own_shape(spec: str, model: Any) -> tuple[int, ...]:
    """Of the images that the model was made for, as far as it says."""
    source, _, name = spec.partition(":")
    if source == "zoo":
        return zoo.MODELS[name].input_shape
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None) or sources.image_size(spec) or 224
    return (getattr(config, "num_channels", 3), *(size if isinstance(size, (list, tuple)) else (size, size)))


def _texts(tokenizer: Any, columns: int, tokens: int) -> Batch:
    """Two texts, or pairs, of so many tokens, as the task's batches are."""
    texts = [["a " * tokens] * 2] * columns
    read = tokenised(tokenizer, texts, torch.zeros(2, dtype=torch.int64), tokens)
    batch = Padding.of(tokenizer)(read, torch.arange(2))
    return {name: column for name, column in batch.items() if name != "labels"}  # which would only add the loss


def _families(structure: hap.Structure) -> Table:
    made = Table(_names("family"), "kind", "units", "exact", "written by", "read by")
    for family in structure.families:
        writers, readers = len(family.roles("producer")), len(family.roles("consumer"))
        exact = "yes" if family.exact else "no"
        made.add_row(family.name, family.kind, str(family.size), exact, str(writers), str(readers))
    return made


def _frozen(structure: hap.Structure) -> Table:
    """A part for each reason, where tensors that only the number of their block tells apart share a row."""
    where: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for item in structure.frozen:
        name = f"{item.parameter}, axis {item.axis}"
        where[item.reason][re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)].append(name)
    made = Table("reason", "axes", _names("where"))
    for reason, places in where.items():
        for number, (place, names) in enumerate(places.items()):
            made.add_row("" if number else reason, str(len(names)), names[0] if len(names) == 1 else place)
        made.add_section()
    return made


def _names(header: str) -> Column:
    """For names, which must be whole."""
    return Column(header, overflow="fold")
