"""`hap prune`: the whole job on a model and a data set."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hap.cli import launch, sources
from hap.cli.jobs import open_job
from hap.cli.screen import Bars, show
from hap.errors import HapError
from hap.pipeline import Training, run
from hap.pipeline.together import is_first
from hap.types import Budget, silent

Name = Annotated[str, typer.Option(help=f"{sources.SPECS}.")]
Data = Annotated[str, typer.Option(help="digits, cifar10:DIR or imagefolder:DIR; with --task its directory.")]

LATENCIES = Path.home() / ".cache" / "hap" / "latency.json"


def prune(
    model: Name,
    data: Data,
    out: Annotated[Path, typer.Option(help="The run directory; also a checkpoint for hap.load.")],
    task: Annotated[
        str | None, typer.Option(help="For texts, with hf:PATH: glue/mrpc, glue/sst2, glue/qnli, glue/cola, glue/rte.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="The trained model's safetensors file.")] = None,
    units: Annotated[
        str | None, typer.Option(help="What may leave: heads, neurons, channels, with commas; default: all.")
    ] = None,
    keep_heads: Annotated[
        float | None, typer.Option(help="Fraction of the attention heads (of their parameters) that may remain.")
    ] = None,
    keep_params: Annotated[float | None, typer.Option(help="Fraction of parameters that may remain.")] = None,
    keep_macs: Annotated[float | None, typer.Option(help="Fraction of multiply-accumulates that may remain.")] = None,
    keep_latency: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the latency that may remain, as measured here; default: 1 for images where mode "
            "optimal may implant, so that no implant makes the model slower than it was."
        ),
    ] = None,
    any_latency: Annotated[
        bool, typer.Option("--any-latency", help="Time nothing: implants may make the model slower than it was.")
    ] = False,
    latency_batch: Annotated[int, typer.Option(help="Examples whose latency counts for --keep-latency.")] = 1,
    latency_cache: Annotated[
        Path, typer.Option(help="Where measured layer times are kept for the next run.")
    ] = LATENCIES,
    criterion: Annotated[
        str, typer.Option(help="gate-fisher, hessian-trace (the paper's), or another of docs/criteria.md.")
    ] = "gate-fisher",
    mode: Annotated[
        str, typer.Option(help="paper: one global ranking; optimal: the least predicted loss for exact costs.")
    ] = "optimal",
    joint: Annotated[
        bool | None,
        typer.Option(
            "--joint/--no-joint",
            help="optimal: choose units together, or one by one; default: together where the criterion can.",
        ),
    ] = None,
    implant_ratio: Annotated[
        float,
        typer.Option(
            help="paper: of the filters and heads to prune, the most sensitive share that gets implants; 0: none. "
            "optimal: any other value lets the planner implant what pays."
        ),
    ] = 0.1,
    samples: Annotated[
        str, typer.Option(help="Calibration examples; auto: until the ranking is settled, 8192 at most.")
    ] = "512",
    draws: Annotated[
        int | None, typer.Option(help="Probes per batch, or labels per example; default by criterion.")
    ] = None,
    floor: Annotated[int, typer.Option(help="Units that every family keeps at least.")] = 1,
    min_width: Annotated[
        list[str] | None,
        typer.Option(help="FAMILY=N: it keeps at least N units (8) or this share (0.5); patterns too: 'layer3.*=0.5'."),
    ] = None,
    max_width: Annotated[list[str] | None, typer.Option(help="FAMILY=N: it keeps at most so many.")] = None,
    protect: Annotated[
        list[str] | None, typer.Option(help="A module, or pattern, whose own channels all stay; may be given again.")
    ] = None,
    round_to: Annotated[int, typer.Option(help="Keep a multiple of this many units in each family.")] = 1,
    inexact: Annotated[bool, typer.Option("--inexact", help="Also prune channels that a normalisation mixes.")] = False,
    ignore: Annotated[list[str] | None, typer.Option(help="A module to leave alone; may be given again.")] = None,
    iterations: Annotated[
        int, typer.Option(help="Rounds of measuring, pruning a little and fine-tuning; implants come in the last.")
    ] = 1,
    recover: Annotated[
        str,
        typer.Option(
            help="After the cut: refit (what is left is solved anew in closed form), recalibrate (batch-norm "
            "statistics) or none."
        ),
    ] = "refit",
    epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning, in each round; 0 skips it.")] = 1,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate; default 0.02 for sgd, 0.0005 for adamw, 0.00005 for texts."),
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd or adamw; default sgd, for texts adamw.")] = None,
    schedule: Annotated[str, typer.Option(help="cosine, step or constant.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Fraction of all steps in which the learning rate rises.")] = 0.0,
    clip: Annotated[
        float | None, typer.Option(help="Largest norm of the whole gradient; default none, 1 for texts.")
    ] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of the weights' moving average; default: none.")] = None,
    label_smoothing: Annotated[
        float, typer.Option(help="Share of each label that is spread over all classes in training.")
    ] = 0.0,
    distill: Annotated[
        float, typer.Option(help="Weight of the dense model's outputs in the training loss, from 0 to 1.")
    ] = 0.0,
    temperature: Annotated[float, typer.Option(help="That softens them.")] = 2.0,
    accumulate: Annotated[int, typer.Option(help="Batches that make one step.")] = 1,
    precision: Annotated[str, typer.Option(help="Of the forward pass in training: no, bf16 or fp16.")] = "no",
    compile: Annotated[bool, typer.Option("--compile", help="Train through torch.compile.")] = False,
    log: Annotated[
        str | None, typer.Option("--log-to", help="Where losses and times go as well: tensorboard, wandb or mlflow.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a batch; default 128, of texts 32.")] = None,
    max_length: Annotated[int | None, typer.Option(help="The most tokens of a text; default 128.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many examples of each split, for quick runs.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that read images (imagefolder).")] = 0,
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run directory if it exists.")] = False,
) -> None:
    """Measure, plan, prune with implants, fine-tune, evaluate, save and report.

    Give --keep-params, --keep-macs, --keep-latency, --keep-heads, or several of them.
    On several devices: `torchrun --nproc-per-node N -m hap prune ...`, or `accelerate launch -m hap prune ...`.
    """
    budget = Budget(params=keep_params, macs=keep_macs, latency=keep_latency, heads=keep_heads)
    if keep_latency is not None and any_latency:
        raise typer.BadParameter("give --keep-latency or --any-latency", param_hint="--any-latency")
    images = task is None  # the implants of texts, narrow heads and thin matrices, take off time as they take off MACs
    if keep_latency is None and not any_latency and images and mode == "optimal" and implant_ratio > 0:
        budget = dataclasses.replace(budget, latency=1.0)
    kinds = _kinds(units)
    widths: dict[str, Any] = {
        "minimum": _widths(min_width, "--min-width"),
        "maximum": _widths(max_width, "--max-width"),
    }
    accelerator = launch.accelerator(sources.device(device))
    target = sources.device(device) if accelerator is None else accelerator.device
    first = is_first()
    with launch.tracking(log, out, {"model": model, "data": data, "task": task}) as numbers, Bars() as bars:
        job = open_job(
            model,
            data,
            weights=weights,
            task=task,
            batch_size=batch_size or (128 if task is None else 32),
            seed=seed,
            limit=limit,
            workers=workers,
            max_length=max_length,
            device=target,
        )
        if job.plan is not None:
            raise HapError(
                f"{model} is pruned already",
                expected="the dense model",
                remedy="prune the dense model to the whole budget",
            )
        given = {"epochs": epochs, "schedule": schedule, "warmup": warmup, "ema": ema}
        given |= {"label_smoothing": label_smoothing, "distill": distill, "temperature": temperature}
        given |= {"accumulate": accumulate, "precision": precision, "compile": compile}
        chosen = {"optimizer": optimizer, "lr": lr, "clip": clip}
        done = run(
            job.model.to(target),
            job.data,
            budget,
            out,
            tokenizer=job.tokenizer,
            training=_training(given, chosen, texts=task is not None),
            iterations=iterations,
            recover=recover,  # type: ignore[arg-type]  # checked by run
            overwrite=overwrite,
            seed=seed,
            options={
                "model": model,
                "weights": str(weights) if weights else None,
                "task": task,
                "data": data,
                "limit": limit,
            },
            accelerator=accelerator,
            log=numbers,
            progress=bars if first else silent,
            criterion=criterion,
            mode=mode,
            joint="auto" if joint is None else joint,
            implant_ratio=implant_ratio,
            samples=_count(samples),
            draws=draws,
            floor=floor,
            **widths,
            protect=protect or (),
            units=kinds,
            round_to=round_to,
            inexact=inexact,
            ignore=ignore or (),
            latency_batch=latency_batch,
            latency_cache=latency_cache,
        )
    if first:
        show(done)


TEXTS = {"optimizer": "adamw", "lr": 5e-5, "clip": 1.0, "weight_decay": 0.01}  # as BERT is fine-tuned


def _training(given: dict[str, Any], chosen: dict[str, Any], *, texts: bool) -> Training:
    """The options for training; what was not chosen is as usual for images or texts."""
    return Training(**given, **{**(TEXTS if texts else {}), **{k: v for k, v in chosen.items() if v is not None}})


def _kinds(units: str | None) -> list[str] | None:
    """``heads,neurons`` as the kinds of the library."""
    return None if units is None else [name.strip().removesuffix("s") for name in units.split(",")]


def _count(samples: str) -> int | Literal["auto"]:
    if samples == "auto":
        return "auto"
    try:
        return int(samples)
    except ValueError:
        raise typer.BadParameter("give a number or auto", param_hint="--samples") from None


def _widths(given: list[str] | None, option: str) -> dict[str, float]:
    """``FAMILY=8`` counts units, ``FAMILY=0.5`` is a share of them."""
    found: dict[str, float] = {}
    for item in given or ():
        name, _, value = item.rpartition("=")
        try:
            found[name] = float(value) if "." in value else int(value)
        except ValueError:
            raise typer.BadParameter("give FAMILY=8 or FAMILY=0.5", param_hint=option) from None
    return found
