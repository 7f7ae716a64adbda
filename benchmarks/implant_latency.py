"""What implants cost in time: single layers of real sizes, and whole networks at equal MACs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import implant_layers
import implant_networks
import torch
import typer
from curvature_records import Records, read
from curvature_setting import DATA, RESULTS, Clock, Data, Minutes, Results

FILE = "implant-latency.jsonl"


def latency(
    data: Data = DATA,
    results: Results = RESULTS,
    minutes: Minutes = 120.0,
    what: Annotated[str, typer.Option(help="layers, networks, or both with a comma.")] = "layers,networks",
    networks: Annotated[str, typer.Option(help="resnet20, resnet56, resnet50.")] = "resnet20,resnet56,resnet50",
    keep: Annotated[str, typer.Option(help="Fractions of the MACs that may remain.")] = "0.7,0.5,0.3",
    seconds: Annotated[float, typer.Option(help="Of each comparison, at most.")] = 6.0,
    compiled: Annotated[bool, typer.Option(help="With torch.compile too.")] = True,
) -> None:
    """Time of layers and of networks with implants, as paired ratios."""
    torch.set_num_threads(1)  # see `implant_turns`
    records, clock = Records(results / FILE), Clock(minutes)
    if "layers" in what:
        implant_layers.measure(records, clock, seconds=seconds, compiled=compiled)
    for network in networks.split(",") if "networks" in what else ():
        shares = [float(part) for part in keep.split(",")]
        implant_networks.measure(records, clock, data, network=network, keep=shares, compiled=compiled, seconds=seconds)
    print(*tables(results).values(), sep="\n\n")


def tables(results: Path) -> dict[str, str]:
    """The tables of `docs/implants.md` that come from these results."""
    rows = read(results / FILE)
    return {
        "layers-cifar": implant_layers.table(rows, network="CIFAR ResNet"),
        "layers-resnet50": implant_layers.table(rows, network="ResNet-50"),
        "layers-compiled": implant_layers.table(rows, compiled=True),
        "networks": implant_networks.table(rows),
        "networks-accuracy": implant_networks.accuracies(rows),
    }
