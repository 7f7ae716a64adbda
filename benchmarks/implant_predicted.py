"""What the planner promises and what it costs: by calibration images, and by how much pairs of units count."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

import typer
from curvature_records import Records, Row, read
from curvature_setting import DATA, MODEL, RESULTS, Clock, Data, Minutes, Network, Results, Setting, load
from curvature_tables import NONE
from implant_budgets import BATCH, FIT, forms, measured

import hap
from hap.batches import Batch
from hap.types import Sensitivity

KEEP = (0.9, 0.8, 0.7)
ON = 1024  # calibration images on which the rise is measured; as many held-out ones
TEST = 2000  # test images that the other tables of the page are from


def predicted(
    data: Data = DATA,
    results: Results = RESULTS,
    minutes: Minutes = 60.0,
    model: Network = MODEL,
    samples: Annotated[str, typer.Option(help="Calibration images.")] = "512,2048,8192",
    pairs: Annotated[str, typer.Option(help="How much pairs of units count.")] = "0,0.5,1",
    unseen: Annotated[bool, typer.Option(help="Measure on images that the network was not trained on.")] = False,
) -> None:
    """Predicted and measured rise of the loss, as cut."""
    clock, setting = Clock(minutes), load(data, model=model, batch_size=BATCH)
    records = Records(results / "implant-predicted.jsonl", model=model, unseen=unseen or None)
    if not unseen and not records.has(samples=0):
        found = hap.evaluate(setting.model, setting.held_out(TEST, ON))
        records.add({"samples": 0, "held_out_accuracy": found.accuracy}, f"dense {found.accuracy}")
    for count in map(int, samples.split(",")):
        for implants in (False, True):
            for keep in KEEP:
                for weight in map(float, pairs.split(",")):
                    key = {"samples": count, "implants": implants, "keep": keep, "pairs": weight}
                    if clock.over() or records.has(**key):
                        continue
                    sensitivity = _on_unseen(setting, count) if unseen else measured(setting, count, "gate-fisher", 0)
                    images = _unseen(setting, ON) if unseen else setting.calibration(ON)
                    row = _row(setting, sensitivity, images, implants, keep, weight)
                    records.add({**key, **row}, f"{key}: {row}")


def _unseen(setting: Setting, count: int) -> list[Batch]:
    """Test images that no accuracy of the page is from."""
    return setting.held_out(TEST + ON, count)


@cache
def _on_unseen(setting: Setting, count: int) -> Sensitivity:
    return hap.measure(
        setting.model, _unseen(setting, count), None, setting.structure, samples=count, gram=True, seed=0
    )


def _row(
    setting: Setting, sensitivity: Sensitivity, images: Sequence[Batch], implants: bool, keep: float, pairs: float
) -> Row:
    """One plan; its rise on images that were measured on, and on others."""
    offered, ratio = (forms(setting), 0.1) if implants else (None, 0.0)
    plan = hap.decide(
        setting.structure, sensitivity, hap.Budget(params=keep),
        mode="optimal", implant_ratio=ratio, options=offered, pairs=pairs, joint=pairs > 0,
    )  # fmt: skip
    small = hap.apply(setting.model, plan, setting.calibration(FIT))
    row: Row = {"predicted": plan.predicted}
    for name, on in (("calibration", images), ("held_out", setting.held_out(TEST, ON))):
        dense, found = hap.evaluate(setting.model, on), hap.evaluate(small, on)
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
    for key in dict.fromkeys(map(_setting_of, rows)):
        implants, count, pairs, unseen = key
        mine = {row["keep"]: row for row in rows if _setting_of(row) == key}
        cells = ["yes" if implants else "no", f"{count}, unseen" if unseen else str(count), f"{pairs:g}"]
        cells += [_cell(mine[keep]) if keep in mine else "" for keep in KEEP]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _setting_of(row: Row) -> tuple[bool, int, float, bool]:
    return row["implants"], row["samples"], row["pairs"], bool(row.get("unseen"))


def _cell(row: Row) -> str:
    promised, found = row["predicted"], row["calibration_rise"]
    return f"{promised:.3f}, {found:.3f}: {found / promised:.1f}x; {100 * row['held_out_accuracy']:.1f} %"


def tables(results: Any) -> dict[str, str]:
    """Every table of `docs/implants.md` that comes from these results."""
    rows = read(results / "implant-predicted.jsonl")
    return {"predicted": table(rows, "resnet20"), "predicted-resnet56": table(rows, "resnet56")}
