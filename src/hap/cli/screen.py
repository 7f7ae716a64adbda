"""What the command line shows: progress bars and tables."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Sized
from functools import partial
from typing import TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from hap.cli.lines import Lines
from hap.pipeline import Run
from hap.pipeline.clock import missed
from hap.report import Comparison

T = TypeVar("T")
console = Console()
if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = 160  # a file or a pipe has no width: tables need not be squeezed


class _Rate(ProgressColumn):
    """Steps a second, or seconds a step for slow ones."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="cyan")


class Bars:
    """The command line's `hap.types.Progress`: a bar for each loop under way, on standard error.

    All bars go when the block ends, also those of loops that were left early.
    """

    def __init__(self, screen: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=screen,
            transient=True,
        )

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
        if total is None and isinstance(items, Sized):
            total = len(items)
        task = self._progress.add_task(description, total=total)
        try:
            for item in items:
                yield item
                self._progress.advance(task)
        finally:
            self._progress.remove_task(task)


def progress() -> Bars | Lines:
    """Bars where someone watches; plain lines where standard error is a file or a pipe."""
    screen = Console(file=sys.stderr)
    return Bars(screen) if screen.is_interactive else Lines(partial(typer.echo, err=True))


def warn(text: str) -> None:
    """Says what the user should know before it starts."""
    typer.echo(f"warning: {text}", err=True)


def show(run: Run) -> None:
    """Prints what was done, the before/after table and where everything lies."""
    plan = run.result.plan
    gone, there = Counter[str](), Counter[str]()
    for family in plan.structure.families:
        gone[family.kind] += len(plan.decisions[family.name].prune)
        there[family.kind] += family.size
    pruned = ", ".join(f"{gone[kind]} of {there[kind]} {kind}s" for kind in there)
    implanted = sum(len(i.indices) for i in plan.filters.values())
    narrow = sum(len(i.indices) for _, i in plan.narrowed.values())
    proof = run.result.verification
    smaller = {"filters implanted": implanted, "heads made narrow": narrow}
    replaced = ", ".join(f"{count} {what}" for what, count in smaller.items() if count) or "nothing implanted"
    console.print(f"pruned: {pruned}; {replaced} ({plan.criterion})")
    console.print(
        f"verified: the small model is the gated dense model to {proof.max_relative_error:.1e} (float64)"
        if proof.exact
        else "not verified beyond sizes: a normalisation mixes units that left with others (inexact)"
    )
    for number, found in enumerate(run.rounds, start=1):
        which = f"round {number}: " if len(run.rounds) > 1 else ""
        known = run.predicts_loss and found.predicted is not None
        predicted = f"predicted {found.predicted:.3g}, " if known else ""
        console.print(f"{which}rise of the loss by the cut: {predicted}measured {found.rise:.3g}, before any recovery")
    if run.as_cut.accuracy is not None:
        chosen = run.history.chosen
        kept = f"epoch {chosen} of {len(run.history.epochs)}" if run.history.epochs else "no fine-tuning"
        console.print(f"validation accuracy before fine-tuning: {100 * run.as_cut.accuracy:.2f} %; kept: {kept}")
    console.print(rich_table(run.comparison))
    console.print("latency small vs dense: the median of paired runs, which other work on the machine disturbs less")
    console.print(f"accuracy and loss: of {run.tested:,} test examples")
    spent = ", ".join(f"{stage} {seconds:,.0f}" for stage, seconds in run.seconds.items() if seconds >= 0.5)
    console.print(f"seconds: {spent or 'under one'}")
    for note in run.notes:
        console.print(f"note: {note}", highlight=False)
    if missed(plan):
        console.print(
            f"the goal of {plan.budget.latency:.2f} of the latency was missed: give a smaller --keep-latency, or make "
            "implants dense again where that is faster: hap.merge(small, faster_on=inputs)"
        )
    if run.targets:
        made = Table("target", "", "reached", "difference", "source")
        for target in run.targets:
            made.add_row(*target.cells())
        console.print(made)
    console.print(f"run directory: {run.directory}", soft_wrap=True)


def rich_table(comparison: Comparison) -> Table:
    """The comparison as a table for the terminal."""
    made = Table("", "dense", "small", "small vs dense")
    for column in made.columns[1:]:
        column.justify = "right"
    for row in comparison.rows:
        made.add_row(*row.cells())
    return made
