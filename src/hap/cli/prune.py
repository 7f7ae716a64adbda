"""`hap prune`: the whole job on a model and a data set."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hap.checkpoint import refuse_existing
from hap.cli import launch, sources
from hap.cli.jobs import need_dense, open_job
from hap.cli.panels import (
    BUDGET,
    LEAVES,
    METHOD,
    MODEL,
    OUTPUT,
    TUNING,
    Accumulate,
    Average,
    Clip,
    Compile,
    Data,
    Decay,
    ImageSize,
    Optimizer,
    Rate,
    Schedule,
    Warmup,
)
from hap.cli.screen import progress, show, warn
from hap.pipeline import Training, run
from hap.pipeline.origin import untrained
from hap.pipeline.together import is_first
from hap.types import Budget, silent


def _latencies() -> Path | None:
    """The file in the user's home directory, if there is one."""
    try:
        return Path.home() / ".cache" / "hap" / "latency.json"
    except RuntimeError:
        return None


def prune(
    *,
    model: Annotated[str, MODEL(help=f"{sources.SPECS}.")],
    weights: Annotated[Path | None, MODEL(help="The trained model's safetensors file.")] = None,
    data: Data = None,
    task: Annotated[
        str | None, MODEL(help="For texts, with hf:PATH: glue/mrpc, glue/sst2, glue/qnli, glue/cola, glue/rte.")
    ] = None,
    max_length: Annotated[int | None, MODEL(help="The most tokens of a text; default 128.")] = None,
    batch_size: Annotated[int | None, MODEL(help="Examples in a batch; default 128, of texts 32.")] = None,
    image_size: ImageSize = None,
    limit: Annotated[int | None, MODEL(help="At most so many examples of each split, for quick runs.")] = None,
    workers: Annotated[int, MODEL(help="Processes that read images (imagefolder).")] = 0,
    seed: Annotated[int, MODEL(help="Of everything drawn at random.")] = 0,
    device: Annotated[str, MODEL(help="auto, cpu, cuda or cuda:N.")] = "auto",
    keep_params: Annotated[float | None, BUDGET(help="Of the parameters.")] = None,
    keep_macs: Annotated[
        float | None, BUDGET(help="Of the multiply-accumulates of convolution and linear layers.")
    ] = None,
    keep_heads: Annotated[float | None, BUDGET(help="Of the attention heads (of their parameters).")] = None,
    keep_latency: Annotated[
        float | None,
        BUDGET(
            help="Of the latency, as measured here, and may be over 1; default: 1 for images where mode optimal may "
            "implant, so that no implant makes the model slower than it was."
        ),
    ] = None,
    any_latency: Annotated[
        bool, BUDGET("--any-latency", help="Time nothing: implants may make the model slower than it was.")
    ] = False,
    latency_batch: Annotated[int, BUDGET(help="Examples whose latency counts for --keep-latency.")] = 1,
    latency_cache: Annotated[
        Path | None,
        BUDGET(help="Where measured layer times are kept for the next run.", show_default="~/.cache/hap/latency.json"),
    ] = None,
    units: Annotated[
        str | None, LEAVES(help="Kinds, with commas: heads, neurons, channels; default: all; heads for --keep-heads.")
    ] = None,
    floor: Annotated[int, LEAVES(help="Units that every family keeps at least.")] = 1,
    min_width: Annotated[
        list[str] | None,
        LEAVES(help="FAMILY=N: it keeps at least N units (8) or this share (0.5); patterns too: 'layer3.*=0.5'."),
    ] = None,
    max_width: Annotated[list[str] | None, LEAVES(help="FAMILY=N: it keeps at most so many.")] = None,
    round_to: Annotated[int, LEAVES(help="Keep a multiple of this many units in each family.")] = 1,
    protect: Annotated[
        list[str] | None, LEAVES(help="A module, or pattern, whose own channels all stay; may be given again.")
    ] = None,
    ignore: Annotated[list[str] | None, LEAVES(help="A module to leave alone; may be given again.")] = None,
    inexact: Annotated[bool, LEAVES("--inexact", help="Also prune channels that a normalisation mixes.")] = False,
    criterion: Annotated[
        str, METHOD(help="gate-fisher, hessian-trace (the paper's), or another of docs/criteria.md.")
    ] = "gate-fisher",
    samples: Annotated[
        str | None,
        METHOD(
            help="Calibration examples; auto: until the ranking is settled, 8192 at most; default: 2048 for "
            "criteria that can choose units together (mode optimal), else 512."
        ),
    ] = None,
    draws: Annotated[int | None, METHOD(help="Probes per batch, or labels per example; default by criterion.")] = None,
    mode: Annotated[
        str, METHOD(help="paper: one global ranking; optimal: the least predicted loss for exact costs.")
    ] = "optimal",
    joint: Annotated[
        bool | None,
        METHOD(
            "--joint/--no-joint",
            help="optimal: choose units together, or one by one; default: together where the criterion can and "
            "there are no implants, or heads alone leave.",
        ),
    ] = None,
    implant_ratio: Annotated[
        float,
        METHOD(
            help="paper: of the filters and heads to prune, the most sensitive share that gets implants; 0: none. "
            "optimal: any other value lets the planner implant what pays."
        ),
    ] = 0.1,
    iterations: Annotated[
        int, METHOD(help="Rounds of measuring, pruning a little and fine-tuning; implants come in the last.")
    ] = 1,
    recover: Annotated[
        str,
        METHOD(
            help="After the cut: refit (what is left is solved anew in closed form), recalibrate (batch-norm "
            "statistics) or none."
        ),
    ] = "refit",
    epochs: Annotated[int, TUNING(help="Epochs, in each round; 0 skips fine-tuning.")] = 1,
    lr: Rate = None,
    optimizer: Optimizer = None,
    schedule: Schedule = "cosine",
    warmup: Warmup = 0.0,
    weight_decay: Decay = None,
    clip: Clip = None,
    ema: Average = None,
    label_smoothing: Annotated[
        float, TUNING(help="Share of each label that is spread over all classes in training.")
    ] = 0.0,
    select: Annotated[
        str, TUNING(help="last: the last weights; best: those of the epoch that is best in validation.")
    ] = "last",
    distill: Annotated[
        float, TUNING(help="Weight of the dense model's outputs in the training loss, from 0 to 1.")
    ] = 0.0,
    temperature: Annotated[float, TUNING(help="That softens them.")] = 2.0,
    accumulate: Accumulate = 1,
    precision: Annotated[str, TUNING(help="Of the forward pass in training: no, bf16 or fp16.")] = "no",
    compile: Compile = False,
    out: Annotated[Path, OUTPUT(help="The run directory; also a checkpoint for hap.load.")],
    overwrite: Annotated[bool, OUTPUT("--overwrite", help="Replace the run directory if it exists.")] = False,
    log: Annotated[
        str | None, OUTPUT("--log-to", help="Where losses and times go as well: tensorboard, wandb or mlflow.")
    ] = None,
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
    refuse_existing(out, overwrite)
    accelerator = launch.accelerator(sources.device(device))
    target = sources.device(device) if accelerator is None else accelerator.device
    first = is_first()
    training = Training.usual(
        texts=task is not None,
        epochs=epochs,
        optimizer=optimizer,
        lr=lr,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        ema=ema,
        label_smoothing=label_smoothing,
        distill=distill,
        temperature=temperature,
        accumulate=accumulate,
        precision=precision,
        compile=compile,
        select=select,
    )
    job = open_job(
        model,
        data,
        weights=weights,
        task=task,
        batch_size=batch_size,
        seed=seed,
        limit=limit,
        workers=workers,
        image_size=image_size,
        max_length=max_length,
        device=target,
    )
    need_dense(job.plan, model)
    if first and (note := untrained(model, weights, len(job.data.classes))):
        warn(note)
    with launch.tracking(log, out, {"model": model, "data": data, "task": task}) as numbers, progress() as bars:
        done = run(
            job.model.to(target),
            job.data,
            budget,
            out,
            tokenizer=job.tokenizer,
            training=training,
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
            latency_cache=latency_cache or _latencies(),
        )
    if first:
        show(done)


def _kinds(units: str | None) -> list[str] | None:
    """``heads,neurons`` as the kinds of the library."""
    return None if units is None else [name.strip().removesuffix("s") for name in units.split(",")]


def _count(samples: str | None) -> int | Literal["auto"] | None:
    if samples is None:
        return None
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
            name = ""
        if not name:
            raise typer.BadParameter("give FAMILY=8 or FAMILY=0.5", param_hint=option)
    return found
