"""The time of whole networks: pruned alone, and with implants, at equal MACs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from curvature_records import Records, Row
from curvature_setting import Clock, Setting, load
from curvature_tables import NONE
from implant_budgets import FIT, forms, measured
from implant_layers import FORMATS
from implant_turns import ratios
from torch import nn

import hap
from hap.batches import copied
from hap.implants import Option
from hap.pipeline import clock
from hap.planning import LatencyTable, Plan, time_layers, ways
from hap.types import Sensitivity, Structure

WIDTHS = "pruned, widths of 8"
SLOWER = 1.1  # than the pruned network: what the plan with timed implants may be
CONTENDERS = (WIDTHS, "implants", "implants, timed", "implants, merged where faster")
BATCHES = {"resnet20": (1, 64), "resnet56": (1, 64), "resnet50": (1, 8)}


@dataclass(frozen=True, eq=False)
class Known:
    """What all plans for one network are made from.

    Attributes:
        model, structure, sensitivity: of the network.
        images: calibration images, and as many as are timed.
        setting: the network's data; None for one of random weights, which gets no implants and has no accuracy.
        offered: the forms that each layer may be given.
        table: the layers' times by batch size.
    """

    model: nn.Module
    structure: Structure
    sensitivity: Sensitivity
    images: torch.Tensor
    setting: Setting | None = None
    offered: Mapping[str, Sequence[Option]] = field(default_factory=dict)
    table: Mapping[int, LatencyTable] = field(default_factory=dict)


def measure(
    records: Records, limit: Clock, data: Path, *, network: str, keep: Sequence[float], compiled: bool, seconds: float
) -> None:
    """A row for each budget, batch, format and with or without `torch.compile`."""
    known: Known | None = None
    for share in keep:
        for batch in BATCHES[network]:
            cases = [case for case in _cases(network, share, batch, compiled) if not records.has(**case)]
            if not cases or limit.over():
                continue
            known = known or (_random() if network == "resnet50" else _trained(data, network))
            models, facts = _models(known, share, batch)
            for case in cases:
                row = {**case, **facts, "time": _timed(models, case, known.images[:batch], seconds)}
                records.add(row, f"{case}: {row['time']}")


def _cases(network: str, share: float, batch: int, compiled: bool) -> Iterator[Row]:
    for layout in FORMATS:
        for how in (False, True) if compiled else (False,):
            yield {
                "what": "network",
                "network": network,
                "keep": share,
                "batch": batch,
                "format": layout,
                "compiled": how,
            }


def _trained(data: Path, network: str) -> Known:
    setting = load(data, model=network)
    model, structure, offered = setting.model, setting.structure, forms(setting)
    timed = ways(structure, offered, mode="optimal")
    table = {
        batch: time_layers(model, structure, (torch.zeros(batch, *setting.splits.input_shape),), implants=timed)
        for batch in BATCHES[network]
    }
    images = setting.calibration(FIT)[0][0]
    return Known(model, structure, measured(setting, 2048, "gate-fisher", 0), images, setting, offered, table)


def _random() -> Known:
    """torchvision's ResNet-50 for images of 224 x 224, by the magnitude of random weights: its time alone counts."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    model, images = resnet50(weights=None).eval(), torch.randn(8, 3, 224, 224)
    structure = hap.trace(model, (images[:2],))
    return Known(model, structure, hap.measure(model, None, None, structure, criterion="magnitude"), images)


def _models(known: Known, share: float, batch: int) -> tuple[dict[str, nn.Module], Row]:
    """The contenders, the pruned network first, and what is to be said of them."""
    setting, structure, sensitivity = known.setting, known.structure, known.sensitivity
    table = known.table.get(batch)

    def plan(budget: hap.Budget, *, implants: bool, **settings: Any) -> Plan:
        offered, ratio = (known.offered, 0.1) if implants else (None, 0.0)
        return hap.decide(
            structure, sensitivity, budget,
            mode="optimal", implant_ratio=ratio, options=offered, latency=table, **settings,
        )  # fmt: skip

    macs = hap.Budget(macs=share)
    pruned = plan(macs, implants=False)
    plans = {"pruned": pruned, WIDTHS: plan(macs, implants=False, round_to=8)}
    if table is not None:
        timed = clock.clock(known.model, (known.images[:batch],), {})
        limits = hap.Budget(macs=share, latency=min(1.0, SLOWER * timed(pruned)))
        plans["implants"] = plan(macs, implants=True)
        plans["implants, timed"] = clock.by_the_clock(lambda within: plan(within, implants=True), limits, timed)
    calibration = None if setting is None else setting.calibration(FIT)
    models = {name: hap.apply(known.model, found, calibration) for name, found in plans.items()}
    facts: Row = {"macs": {name: found.small.macs / found.dense.macs for name, found in plans.items()}}
    facts["implanted"] = {name: sum(len(i.indices) for i in p.implants.values()) for name, p in plans.items()}
    if setting is not None:
        test = setting.splits.test
        facts["accuracy"] = {name: hap.evaluate(m, test, samples=2000).accuracy for name, m in models.items()}
        merged = hap.merge(models["implants"], faster_on=(known.images[:batch],))
        models["implants, merged where faster"] = merged
    return {**models, "dense": known.model}, facts


def _timed(models: Mapping[str, nn.Module], case: Row, images: torch.Tensor, seconds: float) -> dict[str, float]:
    """Time / the pruned network's, all on the same images."""
    layout = FORMATS[case["format"]]
    x = images.contiguous(memory_format=layout)
    copies = {name: copied(model).eval().to(memory_format=layout) for name, model in models.items()}
    if case["compiled"]:
        torch._dynamo.reset()
        copies = {name: torch.compile(model, dynamic=False) for name, model in copies.items()}
    return ratios(copies, x, seconds=seconds)


def table(rows: Sequence[Row]) -> str:
    """By budget and batch: the speed-up of the pruned network, and how much slower the others are than it."""
    rows = [row for row in rows if row["what"] == "network"]
    header = ["network", "MACs kept", "batch", "format", "compiled", "pruned: speed-up", "of the ideal"]
    lines = [f"| {' | '.join([*header, *(f'{name} / pruned' for name in CONTENDERS)])} |"]
    lines.append("|" + "---|" * (len(header) + len(CONTENDERS)))
    for row in sorted(rows, key=lambda r: (r["network"], -r["keep"], r["batch"], r["format"], r["compiled"])):
        time, macs = row["time"], row["macs"]["pruned"]
        cells = [row["network"], f"{macs:.2f}", str(row["batch"]), row["format"], "yes" if row["compiled"] else "no"]
        cells += [f"{time['dense']:.2f}", f"{time['dense'] * macs:.2f}"]
        cells += [f"{time[name]:.2f}" if name in time else "" for name in CONTENDERS]
        lines.append(f"| {' | '.join(cells)} |")
    if rows:
        ideal = geometric_mean(row["time"]["dense"] * row["macs"]["pruned"] for row in rows)
        every = {name: [row["time"][name] for row in rows if name in row["time"]] for name in CONTENDERS}
        means = [f"{geometric_mean(found):.2f}" if found else "" for found in every.values()]
        lines.append(f"| geometric mean | | | | | | {ideal:.2f} | {' | '.join(means)} |")
    return "\n".join(lines) if rows else NONE


def accuracies(rows: Sequence[Row]) -> str:
    """By budget: filters that are implanted, and the accuracy of the plan as cut, in per cent."""
    found = {(r["network"], r["keep"], r["batch"]): r for r in rows if "accuracy" in r}
    lines = [
        "| network | MACs kept | plan for batch | plan | implants | accuracy as cut |",
        "|---|---|---|---|---|---|",
    ]
    for (network, share, batch), row in sorted(found.items(), key=lambda item: (item[0][0], -item[0][1], item[0][2])):
        for name, accuracy in row["accuracy"].items():
            cells = [network, f"{share:.0%}", str(batch), name, str(row["implanted"][name]), f"{100 * accuracy:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if found else NONE
