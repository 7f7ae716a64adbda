"""`hap finetune`: the dense starting point, or a pruned model trained on; on one device or several."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from safetensors.torch import save_model

import hap
from hap.checkpoint import fresh_directory, refuse_existing, write
from hap.cli import sources
from hap.cli.jobs import Job, open_job
from hap.cli.screen import Bars, console
from hap.errors import HapError, missing
from hap.pretrained import is_pretrained, save_dense
from hap.report import write_json
from hap.types import silent

Precision = Literal["no", "bf16", "fp16"]


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
    precision: Annotated[Precision, typer.Option(help="Mixed precision; needs the package accelerate.")] = "no",
    checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time (hf: and hap: only).")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
) -> None:
    """Train a model on its task, keep the weights that are best in validation, and evaluate them once.

    Under `accelerate launch -m hap finetune ...` on several devices.
    """
    refuse_existing(out, overwrite)
    accelerator = _accelerator(precision, device)
    job = open_job(
        model,
        data,
        weights=weights,
        task=task,
        batch_size=batch_size,
        seed=seed,
        limit=limit,
        max_length=max_length,
    )
    trained = job.model.to(accelerator.device if accelerator is not None else sources.device(device))
    if checkpointing:
        _checkpoint_gradients(trained)
    first = accelerator is None or accelerator.is_main_process
    options: dict[str, Any] = {
        "epochs": epochs,
        "lr": lr,
        "optimizer": optimizer,
        "schedule": schedule,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "clip": clip,
        "seed": seed,
    }
    with Bars() as bars:
        progress = bars if first else silent
        history = hap.finetune(
            trained,
            job.data.train,
            validation=job.data.validation,
            accelerator=accelerator,
            progress=progress,
            **options,
        )
        if not first:
            return
        test = hap.evaluate(trained, job.data.test, metrics=job.data.metrics, progress=bars)
    settings = {"model": model, "task": task, "data": data, "limit": limit, "precision": precision, **options}
    record = {"options": settings, "history": history.to_dict(), "test": vars(test)}
    with fresh_directory(out, overwrite=overwrite) as staging:
        _write(job, staging)
        write_json(staging / "finetune.json", record)
    console.print(f"kept: epoch {history.chosen} of {epochs}")
    numbers = {"accuracy": test.accuracy, **test.metrics}
    shown = ", ".join(f"{name} {100 * value:.2f} %" for name, value in numbers.items() if value is not None)
    console.print(f"test, {test.samples} examples: {shown}, loss {test.loss:.4f}")
    console.print(f"written to {out}", soft_wrap=True)


def _accelerator(precision: Precision, device: str) -> Any:
    """Accelerate's, where there are several processes or mixed precision is asked for; else None."""
    if precision == "no" and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise missing("several processes and mixed precision need", "accelerate", "text", error) from error
    return Accelerator(mixed_precision=precision, cpu=device == "cpu")


def _checkpoint_gradients(model: Any) -> None:
    if not is_pretrained(model) or not model.supports_gradient_checkpointing:
        raise HapError(
            f"{type(model).__name__} has no gradient checkpointing",
            expected="a model of transformers that has it",
            remedy="leave --gradient-checkpointing out, or take smaller batches",
        )
    model.activation_checkpointing_enable()


def _write(job: Job, directory: Path) -> None:
    """A directory that from_pretrained opens, that hap.load opens, or a safetensors file for --weights."""
    model: Any = job.model
    if job.plan is not None:
        write(model, job.plan, directory, tokenizer=job.tokenizer)
    elif is_pretrained(model):
        save_dense(model, directory, job.tokenizer)
    else:
        save_model(model, str(directory / "model.safetensors"))
