"""What finding and removing units costs, against torch-pruning, and how it grows with depth.

    pip install -r requirements-bench.txt
    python benchmarks/structure.py peers    # trace + apply, against torch-pruning's graph and pruning
    python benchmarks/structure.py depth    # the same network with 10 to 200 layers
    python benchmarks/structure.py tables   # into docs/structure.md, from the raw results

Time is that of the processor. The packages take turns, each in a process of its own that has pruned a small network
before. Both remove 30 % of every group of units that they find, chosen by magnitude; where one fails, or does not come
back in time, that is its result.
"""

from __future__ import annotations

import multiprocessing
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

app = typer.Typer(help="What finding and removing units costs.", no_args_is_help=True)
SHARE = 0.3
Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Turns = Annotated[int, typer.Option(help="Runs of each package.")]
Seconds = Annotated[float, typer.Option(help="Time limit for one turn, with what it takes to import and build.")]


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
    """Trace, then remove the lowest share of every exact family; with processor seconds."""
    start = time.process_time()
    structure = hap.trace(model, args, kwargs)
    traced = time.process_time()
    sensitivity = hap.measure(model, None, None, structure, criterion="magnitude")
    plan = by_share(structure, sensitivity)
    cut = time.process_time()
    small = hap.apply_(model, plan)
    end = time.process_time()
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
    """torch-pruning's dependency graph and magnitude pruner, as its examples use them; heads need to be named."""
    import torch_pruning as tp

    inputs: Any = args or kwargs
    start = time.process_time()
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    heads = {m.query: m.num_attention_heads for m in model.modules() if hasattr(m, "num_attention_heads")}
    for m in model.modules():
        if hasattr(m, "num_attention_heads"):
            heads |= {m.key: m.num_attention_heads, m.value: m.num_attention_heads}
    transformer = hasattr(model, "hidden_dim")  # torchvision's
    pruner = tp.pruner.MagnitudePruner(
        model, inputs, importance=tp.importance.GroupMagnitudeImportance(), pruning_ratio=SHARE,
        ignored_layers=[last], num_heads=heads, prune_num_heads=bool(heads), prune_head_dims=False,
        head_pruning_ratio=SHARE if heads else 0.0,
        round_to=model.encoder.layers[0].num_heads if transformer else None,
    )  # fmt: skip
    traced = time.process_time()
    pruner.step()
    if transformer:
        model.hidden_dim = model.conv_proj.out_channels
    for m in model.modules():
        if hasattr(m, "num_attention_heads"):
            m.num_attention_heads, m.all_head_size = pruner.num_heads[m.query], m.query.out_features
            m.attention_head_size = m.all_head_size // m.num_attention_heads
    end = time.process_time()
    return model, {"trace": traced - start, "remove": end - traced, "seconds": end - start}


PACKAGES = {"hap": ours, "torch-pruning": theirs}


@app.command()
def peers(results: Results = RESULTS, turns: Turns = 5, seconds: Seconds = 180.0) -> None:
    """Trace + apply against torch-pruning, on four networks at their real size."""
    torch.set_num_threads(1)
    records = Records(results / "structure-peers.jsonl")
    for name in MODELS:
        for turn in range(turns):
            for package in PACKAGES:
                key = {"model": name, "package": package}
                late = records.has(**key, limit=seconds)  # and would be again
                if not late and not records.has(**key, turn=turn):
                    row = {**key, "turn": turn, **_alone(name, package, seconds)}
                    records.add(row, f"{name}, {package}: {row.get('seconds', row.get('error'))}")


def _alone(name: str, package: str, seconds: float) -> dict[str, Any]:
    """One turn in a process of its own, which is ended after its time."""
    context = multiprocessing.get_context("spawn")
    ours_end, theirs_end = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs_end, name, package))
    process.start()
    theirs_end.close()
    try:
        if not ours_end.poll(seconds):
            return {"error": f"did not come back in {seconds:g} s", "limit": seconds}
        return ours_end.recv()
    except EOFError:
        return {"error": "the process died"}
    finally:
        process.kill()
        process.join()


def _answer(answer: Any, name: str, package: str) -> None:
    torch.set_num_threads(1)
    _one(lambda: chain(4), PACKAGES[package])  # what a first call imports and compiles
    answer.send(_one(MODELS[name], PACKAGES[package]))


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
    except Exception as error:  # what a peer raises is its result
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
    torch.set_num_threads(1)
    records = Records(results / "structure-depth.jsonl")
    _one(lambda: chain(4), ours)  # what a first call imports and compiles
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
        "| network | hap, times torch-pruning's | of it, the trace | kept by hap | kept by torch-pruning |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        mine, peer = ([r for r in rows if r["model"] == name and r["package"] == p] for p in PACKAGES)
        share = f"{median(r['trace'] / r['seconds'] for r in mine):.0%}"
        if "error" in peer[0]:
            lines.append(f"| {name} | torch-pruning: {peer[0]['error']} | {share} | {mine[0]['kept']:.1%} | |")
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
