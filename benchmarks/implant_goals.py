"""What was to be reached, and what was: from the raw results of the other tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean, mean, stdev

import implant_latency
from curvature_records import Row, read
from curvature_tables import NONE

OURS, PRUNED = "optimal, implants", "optimal, no implants"
STAGES = {"as_cut": "as cut", "refitted": "refitted", "refitted_tuned": "refitted and tuned"}
Line = tuple[str, str, bool]


def tables(results: Path) -> dict[str, str]:
    """The table of goals of `docs/implants.md`."""
    budgets = [row for row in read(results / "implant-budgets.jsonl") if row.get("steps") == 60]
    promises = [row for row in read(results / "implant-predicted.jsonl") if row["samples"] == 2048]
    networks = [row for row in read(results / implant_latency.FILE) if row["what"] == "network"]
    if not (budgets and promises and networks):
        return {"goals": NONE}
    lines = ["| goal | found | reached |", "|---|---|---|"]
    for goal, found, reached in (*_accuracy(budgets), *_implants(budgets), *_predicted(promises), *_time(networks)):
        lines.append(f"| {goal} | {found} | {'yes' if reached else 'no'} |")
    return {"goals": "\n".join(lines)}


def _accuracy(rows: Sequence[Row]) -> Iterator[Line]:
    """ResNet-56 at half of the parameters, in per cent."""
    half = [row for row in rows if (row["model"], row.get("of"), row.get("keep")) == ("resnet56", "params", 0.5)]
    dense = next(100 * row["accuracy"] for row in rows if (row["model"], row["contender"]) == ("resnet56", "dense"))
    peers = {row["contender"] for row in half if row["contender"].startswith("torch-pruning")}

    def ours(key: str) -> list[float]:
        return [100 * row[key] for row in half if row["contender"] == OURS]

    def best(key: str) -> list[float]:
        return max(([100 * row[key] for row in half if row["contender"] == peer] for peer in peers), key=mean)

    cut = mean(ours("as_cut"))
    yield (
        "before fine-tuning within 5 points of the dense network",
        f"{_said(ours('as_cut'))} of {dense:.1f}",
        (dense - cut <= 5),
    )
    yield (
        "40 points over torch-pruning's best as it comes",
        f"{_said(ours('as_cut'))} and {_said(best('as_cut'))}",
        (cut - mean(best("as_cut")) >= 40),
    )
    yield (
        "ahead where the peer gets our recalibration and refit",
        f"{_said(ours('refitted'))} and {_said(best('refitted'))}",
        mean(ours("refitted")) > mean(best("refitted")),
    )
    mine, theirs = ours("refitted_tuned"), best("refitted_tuned")
    ahead = mean(mine) - mean(theirs)
    yield (
        "after the same fine-tuning ahead by more than seeds differ",
        f"{_said(mine)} and {_said(theirs)}",
        ahead > max(stdev(mine), stdev(theirs)),
    )


def _implants(rows: Sequence[Row]) -> Iterator[Line]:
    """With implants and without, at every budget of both networks."""
    found: dict[tuple[str, str, float], dict[str, list[Row]]] = {}
    for row in rows:
        if row["contender"] in (OURS, PRUNED):
            place = found.setdefault((row["model"], row["of"], row["keep"]), {})
            place.setdefault(row["contender"], []).append(row)
    pairs = [place for place in found.values() if len(place) == 2]
    ahead = {
        stage: [mean(r[stage] for r in place[OURS]) - mean(r[stage] for r in place[PRUNED]) for place in pairs]
        for stage in STAGES
    }
    said = [f"{sum(gain > 0 for gain in ahead[key])} of {len(pairs)} {name}" for key, name in STAGES.items()]
    never_worse = all(gain >= 0 for gains in ahead.values() for gain in gains)
    yield (
        "with implants never worse than without at any budget, at some better",
        f"better at {', '.join(said)}",
        (never_worse and any(gain > 0 for gains in ahead.values() for gain in gains)),
    )


WAYS = {  # of deciding: with implants, how much pairs count
    "with implants": (True, 0.0),
    "pruned alone, units together": (False, 0.5),
    "pruned alone, one by one": (False, 0.0),
}


def _predicted(rows: Sequence[Row]) -> Iterator[Line]:
    """Measured by predicted, at 10, 20 and 30 % removal."""
    for model in ("resnet20", "resnet56"):
        for unseen in (False, True):
            for way, key in WAYS.items():
                mine = {
                    row["keep"]: row["calibration_rise"] / row["predicted"]
                    for row in rows
                    if (row["model"], bool(row.get("unseen"))) == (model, unseen)
                    and (row["implants"], row["pairs"]) == key
                }
                if mine:
                    goal = f"predicted rise within a factor of 2 at 10, 20, 30 % removal: {model}, {way}"
                    values = [mine[keep] for keep in sorted(mine, reverse=True)]
                    said = ", ".join(f"{value:.1f}x" for value in values)
                    yield goal + ", on unseen images" * unseen, said, all(0.5 <= v <= 2 for v in values)


def _time(rows: Sequence[Row]) -> Iterator[Line]:
    for network in sorted({row["network"] for row in rows}):
        shares = [row["time"]["dense"] * row["macs"]["pruned"] for row in rows if row["network"] == network]
        found = f"{_range(shares)}; {sum(share >= 0.8 for share in shares)} of {len(shares)}"
        yield f"pruned alone, 0.8 of the speed-up that MACs promise: {network}", found, min(shares) >= 0.8
    for name in ("implants, timed", "implants"):
        times = [row["time"][name] for row in rows if name in row["time"]]
        found = f"{_range(times)}; {sum(time <= 1.15 for time in times)} of {len(times)}"
        yield f"1.15 x the pruned network's time at equal MACs: {name}", found, max(times) <= 1.15


def _said(values: Sequence[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _range(values: Iterable[float]) -> str:
    found = list(values)
    return f"{min(found):.2f} to {max(found):.2f}, mean {geometric_mean(found):.2f}"
