"""`hap finetune`: the dense starting point, or a pruned model trained on; on one device or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors.torch import save_model

import hap
from hap.checkpoint import fresh_directory, refuse_existing, write
from hap.cli import launch, sources
from hap.cli.jobs import Job, open_job
from hap.cli.screen import Bars, console
from hap.errors import HapError
from hap.pipeline.together import is_first
from hap.pretrained import is_pretrained, save_dense
from hap.report import write_json
from hap.types import silent


def finetune(
    model: Annotated[str, typer.Option(help=f"{sources.SPECS}; or hap:DIR, to train a pruned model on.")],
    data: Annotated[str, typer.Option(help="The directory of the task's files; without --task as in hap prune.")],
    out: Annotated[Path, typer.Option(help="Where to; hf:OUT (hap:OUT of a pruned model) opens it.")],
    task: Annotated[str | None, typer.Option(help="For models of texts: glue/mrpc, glue/sst2, ...")] = None,
    weights: Annotated[Path | None, typer.Option(help="The weights to start from: a safetensors file.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 2,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-5,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
    schedule: Annotated[str, typer.Option(help="cosine, step or constant.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Fraction of all steps in which the learning rate rises.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.01,
    clip: Annotated[float, typer.Option(help="Largest norm of the whole gradient.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Examples in a batch of each process.")] = 32,
    max_length: Annotated[int | None, typer.Option(help="The most tokens of a text; default: 128.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many examples of each split.")] = None,
    label_smoothing: Annotated[float, typer.Option(help="Share of each label that is spread over all classes.")] = 0.0,
    distill: Annotated[float, typer.Option(help="Weight of the teacher's outputs in the loss, from 0 to 1.")] = 0.0,
    temperature: Annotated[float, typer.Option(help="That softens them.")] = 2.0,
    teacher: Annotated[str | None, typer.Option(help="With --distill: a model of the task, named as --model.")] = None,
    teacher_weights: Annotated[Path | None, typer.Option(help="Its safetensors file, where it needs one.")] = None,
    accumulate: Annotated[int, typer.Option(help="Batches that make one step.")] = 1,
    compile: Annotated[bool, typer.Option("--compile", help="Train through torch.compile.")] = False,
    log: Annotated[
        str | None, typer.Option("--log-to", help="Where losses go as well: tensorboard, wandb or mlflow.")
    ] = None,
    precision: Annotated[str, typer.Option(help="Of the forward pass: no (the weights' own), bf16 or fp16.")] = "no",
    checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time (hf: and hap: only).")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
) -> None:
    """Train a model on its task, keep the weights that are best in validation, and evaluate them once.

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
        "max_length": max_length,
        "device": target,
    }
    if bool(distill) != (teacher is not None):
        raise typer.BadParameter("give --distill and --teacher, or neither", param_hint="--distill")
    job = open_job(model, data, weights=weights, **opening)
    trained = job.model.to(target)
    taught = None
    if teacher is not None:
        known = open_job(teacher, data, weights=teacher_weights, **opening).model.to(target)
        taught = hap.Distillation(known, distill, temperature)
    if checkpointing:
        _checkpoint_gradients(trained)
    first = is_first()
    options: dict[str, Any] = {
        "epochs": epochs,
        "lr": lr,
        "optimizer": optimizer,
        "schedule": schedule,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "clip": clip,
        "label_smoothing": label_smoothing,
        "accumulate": accumulate,
        "precision": precision,
        "compile": compile,
        "seed": seed,
    }
    with launch.tracking(log, out, {"model": model, "data": data, **options}) as told, Bars() as bars:
        progress = bars if first else silent
        history = hap.finetune(
            trained,
            job.data.train,
            validation=job.data.validation,
            distill=taught,
            accelerator=accelerator,
            log=told,
            progress=progress,
            **options,
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
        "distill": {"teacher": teacher, "weight": distill, "temperature": temperature} if teacher else None,
        **options,
    }
    record = {"options": settings, "history": history.to_dict(), "test": vars(test)}
    with fresh_directory(out, overwrite=overwrite) as staging:
        _write(job, staging)
        write_json(staging / "finetune.json", record)
    console.print(f"kept: epoch {history.chosen} of {epochs}")
    numbers = {"accuracy": test.accuracy, **test.metrics}
    shown = ", ".join(f"{name} {100 * value:.2f} %" for name, value in numbers.items() if value is not None)
    console.print(f"test, {test.samples} examples: {shown}, loss {test.loss:.4f}")
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


def _write(job: Job, directory: Path) -> None:
    """A directory that from_pretrained opens, that hap.load opens, or a safetensors file for --weights."""
    model: Any = job.model
    if job.plan is not None:
        write(model, job.plan, directory, tokenizer=job.tokenizer)
    elif is_pretrained(model):
        save_dense(model, directory, job.tokenizer)
    else:
        save_model(model, str(directory / "model.safetensors"))
