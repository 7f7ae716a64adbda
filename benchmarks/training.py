"""The throughput of `hap.finetune` against a training loop written by hand: same model, data and options, taking turns.

python benchmarks/training.py run --data cifar10:DIR    # appends pairs of timings to the results
python benchmarks/training.py page                      # fills in the table of docs/training.md
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from curvature_tables import filled
from torch import nn
from torch.nn import functional as F

import hap
from hap import zoo

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "training.md"
LR, MOMENTUM, DECAY = 0.02, 0.9, 5e-4

app = typer.Typer(help=__doc__)


def by_hand(model: nn.Module, batches: Any, device: torch.device) -> None:
    """One epoch as a tutorial writes it: SGD with momentum, a cosine over all steps, no decay of biases and norms."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    model.train()
    for images, labels in batches:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        scheduler.step()


def with_hap(model: nn.Module, batches: Any, device: torch.device) -> None:
    """The same through the library, with its checks and its copies of the weights."""
    hap.finetune(model, batches, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, channels_last=False)


def seconds(loop: Any, model: nn.Module, batches: Any, device: torch.device) -> float:
    """The time of one epoch, from a model of its own: on a GPU by the clock, else of the CPU, which may be shared."""
    own = copy.deepcopy(model)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    settled(device)
    start = clock()
    loop(own, batches, device)
    settled(device)
    return clock() - start


def settled(device: torch.device) -> None:
    """Waits for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@app.command()
def run(
    data: Annotated[str, typer.Option(help="As in hap prune.")] = "cifar10",
    model: Annotated[str, typer.Option(help="A network of the zoo.")] = "resnet20",
    images: Annotated[int, typer.Option(help="Images in an epoch.")] = 1280,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = 128,
    pairs: Annotated[int, typer.Option(help="Epochs by each of the two.")] = 9,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    results: Annotated[Path, typer.Option(help="The JSON-lines file.")] = RESULTS / "training.jsonl",
) -> None:
    """Times pairs of epochs, the first of a pair by turns one and the other; one pair before that is thrown away."""
    place = torch.device(device)
    splits = zoo.load_data(data, batch_size=batch_size, limit=images, device=place)
    network = zoo.build(model, classes=len(splits.classes)).to(place)
    setting = {"model": model, "data": splits.name, "images": splits.train.samples, "batch_size": batch_size}
    where = torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU"
    setting |= {"device": where, "threads": torch.get_num_threads(), "torch": torch.__version__}
    loops = {"hand": by_hand, "hap": with_hap}
    for turn in range(pairs + 1):
        names = list(loops) if turn % 2 else list(reversed(loops))
        found = {name: seconds(loops[name], network, splits.train, place) for name in names}
        if turn:
            with results.open("a") as file:
                file.write(json.dumps({**setting, **found}) + "\n")
    typer.echo(tables(results.parent)["throughput"])


@app.command()
def page(path: Annotated[Path, typer.Option(help="The page to fill in.")] = PAGE) -> None:
    """Fills in the table."""
    path.write_text(filled(path.read_text(), tables(RESULTS)))


def tables(results: Path) -> dict[str, str]:
    """The table of `docs/training.md`: throughput of the library as a fraction of the loop's, pair by pair."""
    ratios: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for line in (results / "training.jsonl").read_text().splitlines():
        row = json.loads(line)
        key = tuple(row[name] for name in ("model", "data", "device", "threads", "images", "batch_size"))
        ratios[key].append(row["hand"] / row["hap"])
    lines = [
        "| network | data | device | threads | images | batch | pairs | throughput, hap / by hand | quartiles |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, found in ratios.items():
        low, middle, high = statistics.quantiles(found, n=4)
        cells = [*map(str, key), str(len(found)), f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return {"throughput": "\n".join(lines)}


if __name__ == "__main__":
    app()
