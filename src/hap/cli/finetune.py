"""`hap finetune`: the dense starting point, or a pruned model trained on; on one device or several."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

import hap
from hap.checkpoint import Origin, fresh_directory, refuse_existing, write
from hap.cli import launch, sources
from hap.cli.jobs import Job, open_job, same_inputs
from hap.cli.panels import (
    MODEL,
    OUTPUT,
    TEACHER,
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
from hap.cli.screen import console, progress, warn
from hap.errors import HapError
from hap.files import write_json, write_model
from hap.pipeline import Training
from hap.pipeline.origin import origin, untrained
from hap.pipeline.together import is_first
from hap.pretrained import is_pretrained, save_dense
from hap.types import silent

WEIGHTS = "model.safetensors"


def finetune(
    *,
    model: Annotated[str, MODEL(help=f"{sources.SPECS}; or hap:DIR, to train a pruned model on.")],
    weights: Annotated[Path | None, MODEL(help="The weights to start from: a safetensors file.")] = None,
    data: Data = None,
    task: Annotated[str | None, MODEL(help="For models of texts: glue/mrpc, glue/sst2, ...")] = None,
    max_length: Annotated[int | None, MODEL(help="The most tokens of a text; default: 128.")] = None,
    batch_size: Annotated[
        int | None, MODEL(help="Examples in a batch of each process; default 128, of texts 32.")
    ] = None,
    image_size: ImageSize = None,
    limit: Annotated[int | None, MODEL(help="At most so many examples of each split.")] = None,
    workers: Annotated[int, MODEL(help="Processes that read the images of folders; 0: none.")] = 0,
    seed: Annotated[int, MODEL(help="Of everything drawn at random.")] = 0,
    device: Annotated[str, MODEL(help="auto, cpu, cuda or cuda:N.")] = "auto",
    epochs: Annotated[int, TUNING(help="Passes over the training data.")] = 2,
    lr: Rate = None,
    optimizer: Optimizer = None,
    schedule: Schedule = "cosine",
    warmup: Warmup = 0.1,
    weight_decay: Decay = None,
    clip: Clip = None,
    ema: Average = None,
    label_smoothing: Annotated[float, TUNING(help="Share of each label that is spread over all classes.")] = 0.0,
    select: Annotated[str, TUNING(help="best: the epoch that is best in validation; last: the last weights.")] = "best",
    accumulate: Accumulate = 1,
    precision: Annotated[str, TUNING(help="Of the forward pass: no (the weights' own), bf16 or fp16.")] = "no",
    checkpointing: Annotated[
        bool, TUNING("--gradient-checkpointing", help="Less memory, a third more time (hf: and hap: only).")
    ] = False,
    compile: Compile = False,
    distill: Annotated[float, TEACHER(help="Weight of the teacher's outputs in the loss, from 0 to 1.")] = 0.0,
    temperature: Annotated[float, TEACHER(help="That softens them.")] = 2.0,
    teacher: Annotated[str | None, TEACHER(help="With --distill: a model of the task, named as --model.")] = None,
    teacher_weights: Annotated[Path | None, TEACHER(help="Its safetensors file, where it needs one.")] = None,
    out: Annotated[Path, OUTPUT(help="Where to; hf:OUT (hap:OUT of a pruned model) opens it.")],
    overwrite: Annotated[bool, OUTPUT("--overwrite", help="Replace OUT if it exists.")] = False,
    log: Annotated[
        str | None, OUTPUT("--log-to", help="Where losses go as well: tensorboard, wandb or mlflow.")
    ] = None,
) -> None:
    """Train a model on its task, keep the weights that are best in validation (or the last), and evaluate them once.

    On several devices: `torchrun --nproc-per-node N -m hap finetune ...`, or `accelerate launch -m hap finetune ...`.
    """
    refuse_existing(out, overwrite)
    target = sources.device(device)
    accelerator = launch.accelerator(target)
    target = target if accelerator is None else accelerator.device
    opening: dict[str, Any] = {
        "task": task,
        "batch_size": batch_size,
        "seed": seed,
        "limit": limit,
        "workers": workers,
        "image_size": image_size,
        "max_length": max_length,
        "device": target,
    }
    if bool(distill) != (teacher is not None):
        raise typer.BadParameter("give --distill and --teacher, or neither", param_hint="--distill")
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
    first = is_first()
    job = open_job(model, data, weights=weights, **opening)
    trained = job.model.to(target)
    known = None
    if teacher is not None:
        if first and untrained(teacher, teacher_weights, len(job.data.classes)):
            warn(f"--teacher {teacher} has random weights: give --teacher-weights, or a model that is trained")
        other = open_job(teacher, data, weights=teacher_weights, **opening)
        same_inputs(job, other)
        known = other.model.to(target)
    if checkpointing:
        _checkpoint_gradients(trained)
    options = {**dataclasses.asdict(training), "seed": seed}
    with launch.tracking(log, out, {"model": model, "data": data, **options}) as told, progress() as bars:
        history = hap.finetune(
            trained,
            job.data.train,
            validation=job.data.validation,
            seed=seed,
            accelerator=accelerator,
            log=told,
            progress=bars if first else silent,
            **training.options(known),
        )
        if not first:
            return
        test = hap.evaluate(trained, job.data.test, metrics=job.data.metrics, progress=bars)
    settings = {
        "model": model,
        "dense": job.dense,
        "task": task,
        "data": data,
        "limit": limit,
        "teacher": teacher,
        **options,
    }
    record = {"options": settings, "history": history.to_dict(), "test": vars(test)}
    source = {"model": job.dense, "task": task, "data": data, "limit": limit}
    about = origin({**source, "dense_training": record["history"]}, job.data)
    with fresh_directory(out, overwrite=overwrite) as staging:
        _write(job, staging, about)
        write_json(staging / "finetune.json", record)
    console.print(f"kept: epoch {history.chosen} of {epochs}")
    numbers = {"accuracy": test.accuracy, **test.metrics}
    shown = ", ".join(f"{name} {100 * value:.2f} %" for name, value in numbers.items() if value is not None)
    console.print(f"test, {test.samples} examples: {shown}, loss {test.loss:.4f}")
    for note in about.notes:
        console.print(f"note: {note}", highlight=False)
    console.print(f"written to {out}", soft_wrap=True)


def _checkpoint_gradients(model: Any) -> None:
    if not is_pretrained(model) or not model.supports_gradient_checkpointing:
        raise HapError(
            f"{type(model).__name__} has no gradient checkpointing",
            expected="a model of transformers that has it",
            remedy="leave --gradient-checkpointing out, or take smaller batches",
        )
    new = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5
    (new or model.gradient_checkpointing_enable)()


def _write(job: Job, directory: Path, about: Origin) -> None:
    """A directory that from_pretrained opens, that hap.load opens, or a safetensors file for --weights."""
    model: Any = job.model
    if job.plan is not None:
        write(model, job.plan, directory, origin=about, tokenizer=job.tokenizer)
    elif is_pretrained(model):
        save_dense(model, directory, job.tokenizer)
    else:
        write_model(directory / WEIGHTS, model)
