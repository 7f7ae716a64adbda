"""What finding and removing units costs, against torch-pruning, and how it grows with depth.

    pip install -r requirements-bench.txt
    python benchmarks/structure.py peers    # trace + apply, against torch-pruning's graph and pruning
    python benchmarks/structure.py depth    # the same network with 10 to 200 layers
    python benchmarks/structure.py tables   # into docs/structure.md, from the raw results

Every model is built anew for each turn; the two packages take turns. Both remove 30 % of every group of units that they
find, chosen by magnitude; where one of them fails, its error is the result.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from curvature_records import Records, read
from curvature_setting import RESULTS, ROOT, Results
from curvature_tables import NONE, filled
from torch import nn

import hap
from hap.errors import HapError

app = typer.Typer(help="What finding and removing units costs.", no_args_is_help=True)
SHARE = 0.3
Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Turns = Annotated[int, typer.Option(help="Runs of each package.")]


def torchvision(name: str) -> Callable[[], Example]:
    def build() -> Example:
        from torchvision import models

        return models.get_model(name, weights=None).eval(), (torch.randn(1, 3, 224, 224),), {}

    return build


def bert() -> Example:
    """BERT-base: 12 layers, 12 heads."""
    from transformers import BertConfig, BertForSequenceClassification

    tokens = torch.randint(5, 1000, (1, 64))
    return BertForSequenceClassification(BertConfig()).eval(), (), {"input_ids": tokens}


MODELS = {
    "resnet50": torchvision("resnet50"),
    "swin_t": torchvision("swin_t"),
    "vit_b_16": torchvision("vit_b_16"),
    "BERT-base": bert,
}


def ours(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[nn.Module, dict[str, float]]:
    """Trace, then remove the lowest share of every exact family; parameters and seconds."""
    start = time.perf_counter()
    structure = hap.trace(model, args, kwargs)
    traced = time.perf_counter()
    sensitivity = hap.measure(model, None, None, structure, criterion="magnitude")
    plan = by_share(structure, sensitivity)
    cut = time.perf_counter()
    small = hap.apply_(model, plan)
    end = time.perf_counter()
    return small, {"trace": traced - start, "remove": end - cut, "seconds": traced - start + end - cut}


def by_share(structure: hap.Structure, sensitivity: hap.Sensitivity) -> Any:
    """The plan that removes the lowest share of the units of every exact family."""
    import numpy as np

    from hap.planning import CostModel, Decision, Plan

    decisions, masks = {}, {}
    for family in structure.families:
        count = int(SHARE * family.size) if family.exact else 0
        gone = sorted(sensitivity.scores[family.name].argsort()[:count].tolist())
        decisions[family.name] = Decision(tuple(sorted({*range(family.size)} - {*gone})), tuple(gone))
        masks[family.name] = np.isin(np.arange(family.size), gone)
    cost = CostModel(structure)
    return Plan(structure, decisions, {}, hap.Budget(params=1.0), "magnitude", cost.dense, cost(masks, {}))


def theirs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[nn.Module, dict[str, float]]:
    """torch-pruning's dependency graph and magnitude pruner, as its documentation uses them; heads need to be named."""
    import torch_pruning as tp

    inputs: Any = args or kwargs
    start = time.perf_counter()
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    heads = {m.query: m.num_attention_heads for m in model.modules() if hasattr(m, "num_attention_heads")}
    for m in model.modules():
        if hasattr(m, "num_attention_heads"):
            heads |= {m.key: m.num_attention_heads, m.value: m.num_attention_heads}
    pruner = tp.pruner.MagnitudePruner(
        model, inputs, importance=tp.importance.GroupMagnitudeImportance(), pruning_ratio=SHARE,
        ignored_layers=[last], num_heads=heads, prune_num_heads=bool(heads), head_pruning_ratio=SHARE if heads else 0.0,
    )  # fmt: skip
    traced = time.perf_counter()
    pruner.step()
    end = time.perf_counter()
    return model, {"trace": traced - start, "remove": end - traced, "seconds": end - start}


PACKAGES = {"hap": ours, "torch-pruning": theirs}


@app.command()
def peers(results: Results = RESULTS, turns: Turns = 5) -> None:
    """Trace + apply against torch-pruning, on four networks at their real size."""
    records = Records(results / "structure-peers.jsonl")
    for name, build in MODELS.items():
        for turn in range(turns):
            for package, prune in PACKAGES.items():
                if not records.has(model=name, turn=turn, package=package):
                    row = {"model": name, "turn": turn, "package": package, **_one(build, prune)}
                    records.add(row, f"{name}, {package}: {row.get('seconds', row.get('error'))}")


def _one(build: Callable[[], Example], prune: Callable[..., tuple[nn.Module, dict[str, float]]]) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, args, kwargs = build()
    before = sum(p.numel() for p in model.parameters())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small, found = prune(model, args, kwargs)
        with torch.no_grad():
            small(*args, **kwargs)
    except (HapError, Exception) as error:  # noqa: BLE001 - what a peer raises is its result
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"}
    return {**found, "kept": sum(p.numel() for p in small.parameters()) / before}


def chain(depth: int) -> Example:
    """Residual blocks of two convolutions each."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.norm = nn.BatchNorm2d(16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.b(self.norm(self.a(x)).relu())

    body = [Block() for _ in range(depth // 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return nn.Sequential(nn.Conv2d(3, 16, 3), *body, *head).eval(), (torch.randn(1, 3, 16, 16),), {}


@app.command()
def depth(results: Results = RESULTS, turns: Turns = 3) -> None:
    """Trace + apply for 10 to 200 layers."""
    records = Records(results / "structure-depth.jsonl")
    for turn in range(turns):
        for layers in (10, 25, 50, 100, 200):
            if not records.has(layers=layers, turn=turn):
                row = {"layers": layers, "turn": turn, **_one(lambda layers=layers: chain(layers), ours)}
                records.add(row, f"{layers} layers: {row}")


@app.command()
def tables(results: Results = RESULTS, page: Path = ROOT / "docs/structure.md") -> None:
    """Fills the page's tables and draws its plot, from the raw results."""
    page.write_text(filled(page.read_text(), made(results)))
    _plot(read(results / "structure-depth.jsonl"), page.with_name("structure-depth.png"))


def made(results: Path) -> dict[str, str]:
    """Every table of the page by its name."""
    return {
        "peers": _peers(read(results / "structure-peers.jsonl")),
        "depth": _depth(read(results / "structure-depth.jsonl")),
    }


def _peers(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | hap, of torch-pruning's time | of it, the trace | kept by hap | kept by torch-pruning |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        mine, peer = ([r for r in rows if r["model"] == name and r["package"] == p] for p in PACKAGES)
        share = f"{median(r['trace'] / r['seconds'] for r in mine):.0%}"
        if not mine or not peer:
            continue
        if "error" in peer[0]:
            lines.append(f"| {name} | it fails: {peer[0]['error']} | {share} | {mine[0]['kept']:.1%} | |")
            continue
        ratio = median(a["seconds"] / b["seconds"] for a, b in zip(mine, peer, strict=False))
        lines.append(f"| {name} | {ratio:.2f} | {share} | {mine[0]['kept']:.1%} | {peer[0]['kept']:.1%} |")
    return "\n".join(lines) if rows else NONE


def _depth(rows: list[dict[str, Any]]) -> str:
    """Time relative to that of the shallowest network, taken in the same turn."""
    lines = ["| layers | trace + apply, relative | relative to depth |", "|---|---|---|"]
    for layers in sorted({row["layers"] for row in rows}):
        ratio = _relative(rows, layers)
        lines.append(f"| {layers} | {ratio:.1f} | {ratio / (layers / min(r['layers'] for r in rows)):.2f} |")
    return "\n".join(lines) if rows else NONE


def _relative(rows: list[dict[str, Any]], layers: int) -> float:
    first = {row["turn"]: row["seconds"] for row in rows if row["layers"] == min(r["layers"] for r in rows)}
    return median(row["seconds"] / first[row["turn"]] for row in rows if row["layers"] == layers)


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    from hap.report.figures import new_figure, save_png

    if not rows:
        return
    figure = new_figure(5, 3.4)
    axes = figure.subplots()
    layers = sorted({row["layers"] for row in rows})
    axes.plot(layers, [_relative(rows, n) for n in layers], "o-", label="trace + apply")
    axes.plot(layers, [n / layers[0] for n in layers], "--", color="grey", label="in proportion")
    axes.set(xlabel="layers", ylabel=f"time, that of {layers[0]} layers = 1")
    axes.legend()
    save_png(figure, path)


if __name__ == "__main__":
    app()
