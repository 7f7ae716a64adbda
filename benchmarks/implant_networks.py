"""The time of whole networks: pruned alone, and with implants, at equal MACs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

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
from hap.planning import LatencyTable, Plan, time_layers, ways

BATCHES = (1, 64)
SLOWER = 1.1  # than the pruned network, by the table: what the plan with timed implants may be
CONTENDERS = ("implants", "implants, timed", "implants, merged where faster")


@dataclass(frozen=True, eq=False)
class Known:
    """What all plans for one network are made from.

    Attributes:
        setting: the network and its data.
        sensitivity: of its units and filters.
        offered: the forms that each layer may be given.
        table: the layers' times by batch size.
    """

    setting: Setting
    sensitivity: hap.Sensitivity
    offered: Mapping[str, Sequence[hap.implants.Option]]
    table: Mapping[int, LatencyTable]


def measure(
    records: Records, clock: Clock, data: Path, *, network: str, keep: Sequence[float], compiled: bool, seconds: float
) -> None:
    """A row for each budget, batch, format and with or without `torch.compile`."""
    known: Known | None = None
    for share in keep:
        for batch in BATCHES:
            cases = [case for case in _cases(network, share, batch, compiled) if not records.has(**case)]
            if not cases or clock.over():
                continue
            known = known or _known(data, network)
            models, facts = _models(known, share, batch)
            for case in cases:
                row = {**case, **facts, "time": _timed(models, case, seconds)}
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


def _known(data: Path, network: str) -> Known:
    setting = load(data, model=network)
    model, structure = setting.model, setting.structure
    sensitivity = measured(setting, 2048, "gate-fisher", 0)
    offered = forms(setting)
    timed = ways(structure, offered, mode="optimal")
    table = {
        batch: time_layers(model, structure, (torch.zeros(batch, *setting.splits.input_shape),), implants=timed)
        for batch in BATCHES
    }
    return Known(setting, sensitivity, offered, table)


def _models(known: Known, share: float, batch: int) -> tuple[dict[str, nn.Module], Row]:
    """The contenders, the pruned network first, and what is to be said of them."""
    setting, table = known.setting, known.table[batch]
    calibration = setting.calibration(FIT)

    def plan(budget: hap.Budget, *, implants: bool) -> Plan:
        return hap.decide(
            setting.structure,
            known.sensitivity,
            budget,
            mode="optimal",
            implant_ratio=0.1 if implants else 0.0,
            options=known.offered if implants else None,
            latency=table,
        )

    pruned = plan(hap.Budget(macs=share), implants=False)
    assert pruned.small.latency is not None and pruned.dense.latency is not None
    limit = min(1.0, SLOWER * pruned.small.latency / pruned.dense.latency)
    plans = {
        "pruned": pruned,
        "implants": plan(hap.Budget(macs=share), implants=True),
        "implants, timed": plan(hap.Budget(macs=share, latency=limit), implants=True),
    }
    models = {name: hap.apply(setting.model, found, calibration) for name, found in plans.items()}
    images = calibration[0][0][:batch]
    merged = hap.merge(models["implants"], faster_on=(images,))
    facts = {
        "macs": {name: found.small.macs / found.dense.macs for name, found in plans.items()},
        "implanted": {name: sum(len(i.indices) for i in found.implants.values()) for name, found in plans.items()},
        "accuracy": {name: hap.evaluate(m, setting.splits.test, samples=2000).accuracy for name, m in models.items()},
    }
    return {**models, "implants, merged where faster": merged, "dense": setting.model}, facts


def _timed(models: Mapping[str, nn.Module], case: Row, seconds: float) -> dict[str, float]:
    """Time / the pruned network's, all on the same images."""
    layout = FORMATS[case["format"]]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case["batch"], 3, 32, 32, generator=generator).contiguous(memory_format=layout)
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
        cells += [f"{time[name]:.2f}" for name in CONTENDERS]
        lines.append(f"| {' | '.join(cells)} |")
    if rows:
        ideal = geometric_mean(row["time"]["dense"] * row["macs"]["pruned"] for row in rows)
        means = [f"{geometric_mean(row['time'][name] for row in rows):.2f}" for name in CONTENDERS]
        lines.append(f"| geometric mean | | | | | | {ideal:.2f} | {' | '.join(means)} |")
    return "\n".join(lines) if rows else NONE


def accuracies(rows: Sequence[Row]) -> str:
    """By budget: filters that are implanted, and the accuracy of the plan as cut, in per cent."""
    found = {(r["network"], r["keep"], r["batch"]): r for r in rows if r["what"] == "network"}
    lines = [
        "| network | MACs kept | plan for batch | plan | implants | accuracy as cut |",
        "|---|---|---|---|---|---|",
    ]
    for (network, share, batch), row in sorted(found.items(), key=lambda item: (item[0][0], -item[0][1], item[0][2])):
        for name, accuracy in row["accuracy"].items():
            cells = [network, f"{share:.0%}", str(batch), name, str(row["implanted"][name]), f"{100 * accuracy:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if found else NONE
