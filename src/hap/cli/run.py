"""`hap run`: a recipe, from the dense model to the report."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hap import recipes
from hap.checkpoint import refuse_existing
from hap.cli import launch, sources
from hap.cli.jobs import Job, open_job
from hap.cli.screen import Bars, console, show
from hap.errors import HapError
from hap.pipeline.together import by_the_first, is_first
from hap.types import silent
from hap.zoo.data import ENVIRONMENT


def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, such as configs/paper/cifar10-resnet56.yaml.")],
    out: Annotated[
        Path | None, typer.Option(help="The run directory, also a checkpoint for hap.load; default: runs/RECIPE.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help=f"Where the data is; default: ${ENVIRONMENT}.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value: in place of the recipe's; may be given again."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Scale down: at most so many examples, samples and draws, and one epoch of each training."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything drawn at random; default: the recipe's.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another run directory: the rival in a target of kind gain.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    log: Annotated[
        str | None, typer.Option("--log-to", help="Where losses and times go as well: tensorboard, wandb or mlflow.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run directory if it exists.")] = False,
) -> None:
    """Run a recipe: train or load the dense model, measure, plan, prune, fine-tune, evaluate, report.

    What is done is kept in OUT.work: started again after a kill, it goes on from there, with the same result.
    On several devices: `torchrun --nproc-per-node N -m hap run ...`, or `accelerate launch -m hap run ...`.
    """
    given = {"data.directory": data, "seed": seed}
    more = [f"{key}={json.dumps(str(v) if isinstance(v, Path) else v)}" for key, v in given.items() if v is not None]
    what = recipes.read(recipe, [*(settings or ()), *more], limit=limit)
    rival = _accuracy(against, what) if against is not None else None
    place = out or Path("runs") / recipe.stem
    accelerator = launch.accelerator(sources.device(device))
    if by_the_first(lambda: recipes.finished(what, place)):
        if is_first():
            console.print(f"{place} is whole; what a kill had left beside it is removed", soft_wrap=True)
        return
    refuse_existing(place, overwrite)
    where = sources.device(device) if accelerator is None else accelerator.device
    first = is_first()
    with launch.tracking(log, place, {"recipe": str(recipe)}) as numbers, Bars() as bars:
        job = _open(what, where)
        done = recipes.execute(
            what,
            job.model.to(where),
            job.data,
            place,
            tokenizer=job.tokenizer,
            rival=rival,
            overwrite=overwrite,
            accelerator=accelerator,
            log=numbers,
            progress=bars if first else silent,
        )
    if first:
        console.print(what.title)
        show(done)


def _open(recipe: recipes.Recipe, device: torch.device) -> Job:
    data = recipe.data
    options: dict[str, Any] = {
        "batch_size": data.batch_size,
        "seed": recipe.seed,
        "limit": data.limit,
        "validation": data.validation,
        "image_size": data.image_size,
        "workers": data.workers,
        "max_length": data.max_length,
    }
    if data.is_text:
        return open_job(recipe.model, str(_texts(data)), task=data.name, **options)
    spec = data.name if data.directory is None else f"{data.name}:{data.directory}"
    weights = Path(recipe.dense.weights).expanduser() if recipe.dense.weights else None
    return open_job(recipe.model, spec, weights=weights, device=device, **options)


def _texts(data: recipes.Data) -> Path:
    """The directory of a task: what is given, or the environment's, or ``glue`` in that."""
    if data.directory is not None:
        return data.directory
    if not os.environ.get(ENVIRONMENT):
        raise HapError(
            f"where is {data.name}?",
            expected=f"--data, data.directory in the recipe, or the environment variable {ENVIRONMENT}",
            got=f"none of them, and {ENVIRONMENT} is not set",
        )
    root = Path(os.environ[ENVIRONMENT]).expanduser()
    inside = root / data.name.partition("/")[0]
    return inside if inside.is_dir() else root


def _accuracy(directory: Path, recipe: recipes.Recipe) -> float:
    """The small model's, in the report of another run on the same data, to the same budget."""
    path = directory / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        found, options = float(report["comparison"]["accuracy"]["small"]), dict(report["options"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HapError(
            f"{path} gives no accuracy", expected="the report.json of a run", got=f"{type(error).__name__}: {error}"
        ) from error
    data = options["recipe"]["data"]["name"] if "recipe" in options else options.get("task") or options.get("data")
    here = {"data": recipe.data.name, "budget": dataclasses.asdict(recipe.budget)}
    there = {"data": str(data).partition(":")[0], "budget": options.get("budget")}
    for name, value in here.items():
        if there[name] != value:
            raise HapError(
                f"{directory} is no rival", expected=f"a run with {name} {value}", got=f"{name} {there[name]}"
            )
    return found
