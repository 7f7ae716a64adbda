"""What the planner promises and what it costs: by calibration images, and by how much pairs of units count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from curvature_records import Records, Row, read
from curvature_setting import DATA, MODEL, RESULTS, Clock, Data, Minutes, Network, Results, Setting, load
from curvature_tables import NONE
from implant_budgets import BATCH, FIT, forms, measured

import hap
from hap.types import Sensitivity

KEEP = (0.9, 0.8, 0.7)
PAIRS = (0.0, 0.5, 1.0)
ON = 1024  # calibration images on which the rise is measured; as many held-out ones


def predicted(
    data: Data = DATA,
    results: Results = RESULTS,
    minutes: Minutes = 60.0,
    model: Network = MODEL,
    samples: Annotated[str, typer.Option(help="Calibration images.")] = "512,2048,8192",
) -> None:
    """Predicted and measured rise of the loss, as cut."""
    clock, setting = Clock(minutes), load(data, model=model, batch_size=BATCH)
    records = Records(results / "implant-predicted.jsonl", model=model)
    if not records.has(samples=0):
        found = hap.evaluate(setting.model, setting.held_out(2000, ON))
        records.add({"samples": 0, "held_out_accuracy": found.accuracy}, f"dense {found.accuracy}")
    for count in map(int, samples.split(",")):
        for implants in (False, True):
            for keep in KEEP:
                for pairs in PAIRS:
                    key = {"samples": count, "implants": implants, "keep": keep, "pairs": pairs}
                    if clock.over() or records.has(**key):
                        continue
                    row = _row(setting, measured(setting, count, "gate-fisher", 0), implants, keep, pairs)
                    records.add({**key, **row}, f"{key}: {row}")


def _row(setting: Setting, sensitivity: Sensitivity, implants: bool, keep: float, pairs: float) -> Row:
    """One plan; its rise on images that were measured on, and on others."""
    offered, ratio = (forms(setting), 0.1) if implants else (None, 0.0)
    plan = hap.decide(
        setting.structure, sensitivity, hap.Budget(params=keep),
        mode="optimal", implant_ratio=ratio, options=offered, pairs=pairs, joint=pairs > 0,
    )  # fmt: skip
    small = hap.apply(setting.model, plan, setting.calibration(FIT))
    row: Row = {"predicted": plan.predicted}
    for name, images in (("calibration", setting.calibration(ON)), ("held_out", setting.held_out(2000, ON))):
        dense, found = hap.evaluate(setting.model, images), hap.evaluate(small, images)
        row |= {f"{name}_rise": found.loss - dense.loss, f"{name}_accuracy": found.accuracy}
    return row


def table(rows: Sequence[Row], model: str) -> str:
    """Predicted and measured rises, and their ratio, by images and by the weight of pairs."""
    rows = [row for row in rows if row["model"] == model]
    if not rows:
        return NONE
    lines = [
        "| implants | images | pairs count | "
        + " | ".join(f"{k:.0%} of params: predicted, measured" for k in KEEP)
        + " |",
        "|---|---|---|" + "---|" * len(KEEP),
    ]
    dense = [f"{100 * row['held_out_accuracy']:.1f} %" for row in rows if not row["samples"]]
    lines += [f"| dense |  |  | {value} |" + " |" * (len(KEEP) - 1) for value in dense]
    rows = [row for row in rows if row["samples"]]
    for implants, count, pairs in dict.fromkeys((r["implants"], r["samples"], r["pairs"]) for r in rows):
        mine = {r["keep"]: r for r in rows if (r["implants"], r["samples"], r["pairs"]) == (implants, count, pairs)}
        cells = ["yes" if implants else "no", str(count), f"{pairs:g}"]
        cells += [_cell(mine[keep]) if keep in mine else "" for keep in KEEP]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    promised, found = row["predicted"], row["calibration_rise"]
    return f"{promised:.3f}, {found:.3f}: {found / promised:.1f}x; {100 * row['held_out_accuracy']:.1f} %"


def tables(results: Any) -> dict[str, str]:
    """Every table of `docs/implants.md` that comes from these results."""
    rows = read(results / "implant-predicted.jsonl")
    return {"predicted": table(rows, "resnet20"), "predicted-resnet56": table(rows, "resnet56")}
