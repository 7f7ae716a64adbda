"""The tables of `docs/transformers.md`, from the raw results alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

from curvature_records import Row, read

NONE = "*not measured yet*"
METRICS = {"glue/mrpc": ("accuracy", "f1"), "glue/sst2": ("accuracy",)}
AGAINST = (
    "gate-ggn, joint",
    "gate-ggn, joint + implants",
    "gate-fisher, joint + implants",
    "gate-fisher",
    "hessian-trace",
)
RIVAL = "head-gradient"


def tables(results: Path) -> dict[str, str]:
    """Every table by its name in the page."""
    rows = [row for row in read(results / "glue.jsonl") if "limit" not in row]
    found = {}
    for task, metrics in METRICS.items():
        for metric in metrics:
            found[f"{task.removeprefix('glue/')} {metric}"] = outcomes(rows, task, metric)
    return {**found, "goals": goals(rows), "speed": speeds(read(results / "glue-speed.jsonl"))}


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown; says so where nothing has been measured."""
    made = [f"| {' | '.join(cells)} |" for cells in (header, *lines)]
    made.insert(1, "|" + "---|" * len(header))
    return "\n".join(made) if len(made) > 2 else NONE


def outcomes(rows: list[Row], task: str, metric: str) -> str:
    """Each contender at each level, before → after fine-tuning, in per cent: mean ± standard deviation over seeds."""
    mine = [row for row in rows if row["task"] == task]
    levels = sorted({row["keep"] for row in mine if "keep" in row}, reverse=True)
    dense = list({row["seed"]: _value(row["test"], metric) for row in mine if row["contender"] == "dense"}.values())
    lines = [["dense", *[spread(dense)] * len(levels), ""]] if dense and levels else []
    for name in dict.fromkeys(row["contender"] for row in mine if "keep" in row):
        cells, seeds = [], set()
        for level in levels:
            found = [_by_seed(mine, task, name, when, level, metric) for when in ("before", "after")]
            seeds.add(len(found[0]))
            cells.append(" → ".join(spread(list(each.values())) for each in found if each))
        lines.append([name, *cells, "-".join(str(n) for n in sorted({min(seeds), max(seeds)}))])
    return table(["", *(f"{100 * level:.0f} % kept" for level in levels), "seeds"], lines)


def _value(evaluation: Row, metric: str) -> float:
    return 100 * (evaluation["accuracy"] if metric == "accuracy" else evaluation["metrics"][metric])


def spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation where there are several values.

    >>> spread([70.0, 72.0]), spread([70.0])
    ('71.0 ± 1.4', '70.0')
    """
    middle = f"{mean(values):.1f}" if values else ""
    return middle + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def goals(rows: list[Row]) -> str:
    """Second-order choices less head-gradient at 40 % kept, seed by seed: both start from the same dense model."""
    lines = []
    for task in METRICS:
        for name in AGAINST:
            cells = []
            for when in ("before", "after"):
                ours, theirs = (_by_seed(rows, task, who, when) for who in (name, RIVAL))
                both = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
                cells.append(spread(both))
            if any(cells):
                lines.append([task, f"{name} − {RIVAL}", *cells])
    return table(["task", "accuracy, points", "before fine-tuning (goal 5)", "after (goal 0.8)"], lines)


def _by_seed(
    rows: list[Row], task: str, contender: str, when: str, keep: float = 0.4, metric: str = "accuracy"
) -> dict[int, float]:
    key = {"task": task, "contender": contender, "keep": keep}
    at = [row for row in rows if when in row and all(row.get(name) == value for name, value in key.items())]
    return {row["seed"]: _value(row[when], metric) for row in at}


def speeds(rows: list[Row]) -> str:
    """Medians of paired ratios, and the share of what the MACs promise."""
    lines = [
        [
            f"{row['contender']}, {100 * row['keep']:.0f} % kept",
            f"{row['texts']} × {row['tokens']}",
            row["device"],
            f"{row['promised']:.2f}×",
            f"{row['speedup']:.2f}×",
            f"{row['speedup'] / row['promised']:.2f}",
        ]
        for row in rows
        if "limit" not in row
    ]
    return table(["", "texts × tokens", "device", "promised by MACs", "measured", "share"], lines)
