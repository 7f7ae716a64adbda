"""What each form of implant leaves undone for its price, and what its start is worth, on ResNet-20."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from curvature_records import Records, Row, read, rounded
from curvature_setting import DATA, RESULTS, Data, Results, Setting, load
from implant_budgets import tune_

import hap
from hap import batches
from hap.implants import FORMS, Init, Option, options
from hap.planning import CostModel, Decision, Implant
from hap.types import Layer

HALF = 0.5  # of the filters of each second convolution are replaced where starts are compared


def forms(
    data: Data = DATA,
    results: Results = RESULTS,
    samples: Annotated[int, typer.Option(help="Calibration images.")] = 256,
    test: Annotated[int, typer.Option(help="Test images of the accuracies.")] = 2000,
    steps: Annotated[int, typer.Option(help="Of fine-tuning, 128 images each; 0 for none.")] = 60,
) -> None:
    """Undone variance by layer, form and rank; accuracy by form and start, also after fine-tuning."""
    setting = load(data)
    records = Records(results / "implant-forms.jsonl", samples=samples, test=test)
    calibration = setting.calibration(samples)
    found = options(setting.model, setting.structure, calibration, forms=list(FORMS))
    for name, choices in found.items():
        layer = setting.structure.layer(name)
        for option in choices if layer.kernel else ():
            if not records.has(kind="undone", layer=name, form=option.form, rank=option.rank):
                row = _undone(setting, layer, option)
                records.add(row, f"{name} {option.form} {option.rank}: {row['undone']:.2f} for {row['price']:.2f}")
    for form, rank in sorted({(o.form, _part(setting, name, o)) for name in _second(setting) for o in found[name]}):
        for init in get_args(Init):
            if not records.has(kind="start", form=form, part=rank, init=init):
                row = _start(setting, found, form, rank, init, calibration, test)
                records.add(row, f"{form} {rank} from {init}: {row['cut']:.3f}, recalibrated {row['recalibrated']:.3f}")
            if steps and not records.has(kind="tuned", form=form, part=rank, init=init, steps=steps):
                small = hap.apply(setting.model, _halved(setting, found, form, rank), calibration, init=init)
                tune_(small, setting, steps)
                accuracy = hap.evaluate(small, setting.splits.test, samples=test).accuracy
                row = {"kind": "tuned", "form": form, "part": rank, "init": init, "steps": steps, "tuned": accuracy}
                records.add(row, f"{form} {rank} from {init}, tuned: {accuracy:.3f}")
    print(_undone_table(records.rows), _start_table(records.rows), sep="\n\n")


def tables(results: Path) -> dict[str, str]:
    """The tables of `docs/implants.md` that come from these results."""
    rows = read(results / "implant-forms.jsonl")
    return {"forms": _undone_table(rows), "starts": _start_table(rows)}


def _undone(setting: Setting, layer: Layer, option: Option) -> Row:
    shape = setting.structure.tensors[layer.weight].shape
    weights = FORMS[option.form].weights(layer, layer.filters, shape[1], option.rank)
    low, median, high = statistics.quantiles(option.undone.tolist(), n=4)
    return {
        "kind": "undone",
        "layer": layer.module,
        "form": option.form,
        "rank": option.rank,
        "part": _part(setting, layer.module, option),
        "price": weights / torch.Size(shape).numel(),
        "undone": float(option.undone.mean()),
        "quartiles": rounded([low, median, high]),
    }


def _part(setting: Setting, name: str, option: Option) -> str:
    """The rank as it is comparable between layers: a share of the filters, or kernels for each channel."""
    if option.form != "depthwise" and option.rank:
        return f"1/{round(setting.structure.layer(name).filters / option.rank)}"
    return str(option.rank or "")


def _second(setting: Setting) -> list[str]:
    """The second convolutions of the blocks, whose channels the residual stream couples."""
    return [layer.module for layer in setting.structure.layers if layer.module.endswith("conv2")]


def _start(
    setting: Setting,
    found: Mapping[str, tuple[Option, ...]],
    form: str,
    part: str,
    init: Init,
    calibration: list[batches.Batch],
    test: int,
) -> Row:
    """Accuracies with implants in half of the filters of every second convolution, see `_halved`."""
    plan = _halved(setting, found, form, part)
    small = hap.apply(setting.model, plan, calibration, init=init)
    again = copy.deepcopy(small)
    hap.recalibrate_(again, calibration)
    accuracies = {
        key: hap.evaluate(model, setting.splits.test, samples=test).accuracy
        for key, model in {"cut": small, "recalibrated": again}.items()
    }
    params = plan.small.params / plan.dense.params
    return {"kind": "start", "form": form, "part": part, "init": init, "params": params, **accuracies}


def _halved(setting: Setting, found: Mapping[str, tuple[Option, ...]], form: str, part: str) -> hap.Plan:
    """Half of the filters of every second convolution get implants: those that 1 x 1 ones would serve best."""
    implants = {}
    for name in _second(setting):
        best = next(o for o in found[name] if o.form == "pointwise").undone.argsort()
        rows = sorted(best[: round(HALF * len(best))].tolist())
        rank = next(o.rank for o in found[name] if (o.form, _part(setting, name, o)) == (form, part))
        if rank is not None and form != "depthwise":
            rank = max(1, round(HALF * rank))
        implants[name] = Implant(tuple(rows), form, rank)
    return _plan(setting, implants)


def _plan(setting: Setting, implants: Mapping[str, Implant]) -> hap.Plan:
    structure, cost = setting.structure, CostModel(setting.structure)
    keep = {family.name: Decision(tuple(range(family.size)), ()) for family in structure.families}
    plan = hap.Plan(structure, keep, implants, hap.Budget(params=1.0), "none", cost.dense, cost.dense)
    return dataclasses.replace(plan, small=cost({}, implants))


def _undone_table(rows: Iterable[Row]) -> str:
    """Means over the layers with 3 x 3 kernels, the stem left out."""
    by_form: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["kind"] == "undone" and "." in row["layer"]:
            by_form.setdefault((row["form"], row["part"]), []).append(row)
    lines = [
        "| form | rank | weights, share of the dense | undone, mean | lowest and highest layer |",
        "|---|---|---|---|---|",
    ]
    for (form, part), found in sorted(by_form.items(), key=lambda item: _mean(item[1], "price")):
        undone = [row["undone"] for row in found]
        lines.append(
            f"| {form} | {part} | {_mean(found, 'price'):.2f} | {_mean(found, 'undone'):.2f} "
            f"| {min(undone):.2f}, {max(undone):.2f} |"
        )
    return "\n".join(lines)


def _start_table(rows: Iterable[Row]) -> str:
    """Accuracies in per cent."""
    rows = list(rows)
    tuned = {(row["form"], row["part"], row["init"]): row["tuned"] for row in rows if row["kind"] == "tuned"}
    lines = ["| form | rank | start | params | as cut | recalibrated | tuned |", "|---|---|---|---|---|---|---|"]
    for row in (row for row in rows if row["kind"] == "start"):
        cells: list[Any] = [row["form"], row["part"], row["init"], f"{row['params']:.2f}"]
        after = tuned.get((row["form"], row["part"], row["init"]))
        cells += ["" if value is None else f"{100 * value:.1f}" for value in (row["cut"], row["recalibrated"], after)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(rows: list[Row], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)
