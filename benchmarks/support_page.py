"""`docs/support.md`, from the raw results alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]

STATUSES = ("green", "refused", "wrong", "failed")
SHOWN = 0.01  # reasons that hold less than this share of the parameters are left out

_INTRODUCTION = """\
# What works: the support matrix

This page is made by `make support`; nothing in it is written by hand. Every model is built small, with random weights
and no download, and goes through the whole of `hap` in a process of its own: trace, decide, apply, verify, train, save,
load, export. Raw results: `benchmarks/results/support.jsonl`; the models: `benchmarks/support_*.py`.

- **green**: a plan that keeps 70 % of the parameters (the fewest possible, where that is out of reach) was applied. In
  float64 the small model computes what the dense one computes with the pruned units' gates closed, to a relative error
  below 1e-9, and has the promised number of parameters. It trains (two steps, finite gradients), a saved copy loads to
  the same bits, and `torch.export` takes the small model again.
- **refused**: `hap` says that it cannot, before anything is changed; its words are below the table.
- **wrong**: a result is not what it must be. **failed**: any other error.

Which units go is random here, so that every family loses some. "Reachable" is the share of the parameters that would go
if every family kept one unit; "with inexact" counts the families behind a normalisation too, which are left alone
unless asked for. "Trace" is the CPU time in seconds that `hap.trace` takes, on one thread. "Fisher" says whether
`hap.measure` runs with its default criterion on this model as it is; "partly" where families are left without a
score."""

_REASONS = """\
The share of the parameters that lie on an axis which cannot shrink, by reason; such a parameter can still be reached
along its other axis, and one parameter can be held for several reasons. Shares below 1 % are left out."""


def page(rows: Sequence[Row]) -> str:
    """The whole page.

    Raises:
        ValueError: the results were made by different versions of the source, or of the packages.
    """
    made = {(row["code"], tuple(row["versions"].items())) for row in rows}
    if len(made) != 1:
        raise ValueError(f"results of {len(made)} different sources or environments: run `make support` again")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    sections = [_INTRODUCTION, _totals(groups), _environment(rows[0])]
    for name, found in groups.items():
        sections += [f"## {name}", _models(found), *_messages(found), *_held(found)]
    return "\n\n".join(sections) + "\n"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown; the first column is text, the others are numbers."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, marks, *lines))


def _totals(groups: dict[str, list[Row]]) -> str:
    lines = [_total(name, rows) for name, rows in groups.items()]
    return table(
        ["", "models", *STATUSES, "% green"],
        [*lines, _total("**all**", [row for rows in groups.values() for row in rows])],
    )


def _total(name: str, rows: list[Row]) -> list[str]:
    count = Counter(row["status"] for row in rows)
    return [name, str(len(rows)), *(str(count[s]) for s in STATUSES), f"{100 * count['green'] / len(rows):.1f}"]


def _environment(row: Row) -> str:
    named = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return f"Made with {named}; source of `hap`: `{row['code']}`."


def _models(rows: list[Row]) -> str:
    """One line for each model; a column for every kind of unit that occurs."""
    kinds = [k for k in ("channel", "neuron", "head") if any(k in row.get("units", {}) for row in rows)]
    kinds += sorted({k for row in rows for k in row.get("units", {})} - set(kinds))
    columns = ["reachable", "with inexact", "kept", "error", "trace", "Fisher"]
    header = ["model", "", *(f"{kind}s" for kind in kinds), *columns]
    return table(header, [[row["name"], row["status"], *_units(row, kinds), *_facts(row)] for row in rows])


def _units(row: Row, kinds: Sequence[str]) -> list[str]:
    units, families = row.get("units", {}), row.get("families", {})
    return [f"{units[k]:,} in {families[k]}" if k in units else "" for k in kinds]


def _facts(row: Row) -> list[str]:
    error, seconds, fisher = row.get("error"), row.get("trace_seconds"), row.get("fisher")
    return [
        *(_percent(row.get(key)) for key in ("reachable", "reachable_inexact", "kept")),
        "" if error is None else f"{error:.0e}",
        "" if seconds is None else f"{seconds:.1f}",
        "" if fisher is None else "yes" if fisher == "ok" else "partly" if "fisher_seconds" in row else "no",
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _messages(rows: list[Row]) -> list[str]:
    """What was said of models that are not green, and of those that the default criterion does not fit."""
    lines = [
        f"- **{row['name']}**, {row['status']} ({row['step']}): {_short(row['message'])}"
        for row in rows
        if "step" in row
    ]
    lines += [
        f"- {row['name']}, default criterion: {_short(row['fisher'])}"
        for row in rows
        if row.get("fisher", "ok") != "ok"
    ]
    return ["\n".join(lines)] if lines else []


def _held(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        held = [f"{_short(why)} ({_percent(share)})" for why, share in row.get("frozen", {}).items() if share >= SHOWN]
        if held:
            lines.append(f"- {row['name']}: {'; '.join(held)}")
    return ["### What stays, and why", _REASONS, "\n".join(lines)] if lines else []


def _short(text: str, most: int = 240) -> str:
    """One line that breaks no Markdown."""
    line = " ".join(text.split()).replace("|", "/").replace("<", "").replace(">", "")
    return line if len(line) <= most else line[: most - 3] + "..."
