"""`hap prune`: the whole job on a model and a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from hap import zoo
from hap.cli import sources
from hap.cli.screen import Bars, show
from hap.pipeline import Training, run
from hap.types import Budget

Name = Annotated[str, typer.Option(help="zoo:NAME, torchvision:NAME, or FILE.py:FUNCTION.")]
Data = Annotated[str, typer.Option(help="digits, cifar10:DIR or imagefolder:DIR.")]


def prune(
    model: Name,
    data: Data,
    out: Annotated[Path, typer.Option(help="The run directory; also a checkpoint for hap.load.")],
    weights: Annotated[Path | None, typer.Option(help="The trained model's safetensors file.")] = None,
    keep_params: Annotated[float | None, typer.Option(help="Fraction of parameters that may remain.")] = None,
    keep_macs: Annotated[float | None, typer.Option(help="Fraction of multiply-accumulates that may remain.")] = None,
    criterion: Annotated[
        str, typer.Option(help="gate-fisher, hessian-trace (the paper's), or another of docs/criteria.md.")
    ] = "gate-fisher",
    implant_ratio: Annotated[
        float, typer.Option(help="Of the filters to prune, the most sensitive share that gets implants; 0: none.")
    ] = 0.1,
    samples: Annotated[
        str, typer.Option(help="Calibration images; auto: until the ranking is settled, 8192 at most.")
    ] = "512",
    draws: Annotated[
        int | None, typer.Option(help="Probes per batch, or labels per image; default by criterion.")
    ] = None,
    floor: Annotated[int, typer.Option(help="Units that every family keeps at least.")] = 1,
    round_to: Annotated[int, typer.Option(help="Keep a multiple of this many units in each family.")] = 1,
    inexact: Annotated[bool, typer.Option("--inexact", help="Also prune channels that a normalisation mixes.")] = False,
    ignore: Annotated[list[str] | None, typer.Option(help="A module to leave alone; may be given again.")] = None,
    recover: Annotated[
        str, typer.Option(help="After the cut: recalibrate (batch-norm statistics), refit (closed form) or none.")
    ] = "recalibrate",
    epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning; 0 skips it.")] = 1,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate; default 0.02 for sgd, 0.0005 for adamw.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="sgd or adamw.")] = "sgd",
    schedule: Annotated[str, typer.Option(help="cosine, step or constant.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Fraction of all steps in which the learning rate rises.")] = 0.0,
    ema: Annotated[float | None, typer.Option(help="Decay of the weights' moving average; default: none.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = 128,
    limit: Annotated[int | None, typer.Option(help="At most so many images of each split, for quick runs.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that read images (imagefolder).")] = 0,
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run directory if it exists.")] = False,
) -> None:
    """Measure, plan, prune with implants, fine-tune, evaluate, save and report.

    Give --keep-params, --keep-macs, or both.
    """
    budget = Budget(params=keep_params, macs=keep_macs)
    target = sources.device(device)
    with Bars() as bars:
        splits = zoo.load_data(data, batch_size=batch_size, seed=seed, limit=limit, workers=workers)
        dense = sources.load_model(model, weights, len(splits.classes)).to(target)
        done = run(
            dense,
            splits,
            budget,
            out,
            training=Training(epochs=epochs, optimizer=optimizer, lr=lr, schedule=schedule, warmup=warmup, ema=ema),
            recover=recover,  # type: ignore[arg-type]  # checked by run
            overwrite=overwrite,
            seed=seed,
            options={"model": model, "weights": str(weights) if weights else None, "data": data, "limit": limit},
            progress=bars,
            criterion=criterion,
            implant_ratio=implant_ratio,
            samples=_count(samples),
            draws=draws,
            floor=floor,
            round_to=round_to,
            inexact=inexact,
            ignore=ignore or (),
        )
    show(done)


def _count(samples: str) -> int | Literal["auto"]:
    if samples == "auto":
        return "auto"
    try:
        return int(samples)
    except ValueError:
        raise typer.BadParameter("give a number or auto", param_hint="--samples") from None
