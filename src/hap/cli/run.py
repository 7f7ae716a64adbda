"""`hap run`: a recipe, from the dense model to the report."""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hap import recipes
from hap.checkpoint import refuse_existing
from hap.cli import launch, sources
from hap.cli.jobs import Job, open_job
from hap.cli.panels import OUTPUT, RECIPE
from hap.cli.screen import console, progress, show, warn
from hap.errors import HapError
from hap.pipeline.origin import untrained
from hap.pipeline.together import by_the_first, is_first
from hap.types import silent
from hap.zoo.splits import ENVIRONMENT

CONFIGS = Path("configs")


def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, such as configs/paper/cifar10-resnet56.yaml.")],
    *,
    data: Annotated[Path | None, RECIPE(help=f"Where the data is; default: ${ENVIRONMENT}.")] = None,
    settings: Annotated[
        list[str] | None,
        RECIPE("--set", help="section.key=value: in place of the recipe's; may be given again."),
    ] = None,
    limit: Annotated[
        int | None,
        RECIPE(help="Scale down: at most so many examples, samples and draws, and one epoch of each training."),
    ] = None,
    seed: Annotated[int | None, RECIPE(help="Of everything drawn at random; default: the recipe's.")] = None,
    device: Annotated[str, RECIPE(help="auto, cpu, cuda or cuda:N.")] = "auto",
    against: Annotated[Path | None, RECIPE(help="Another run directory: the rival in a target of kind gain.")] = None,
    out: Annotated[
        Path | None, OUTPUT(help="The run directory, also a checkpoint for hap.load; default: runs/RECIPE.")
    ] = None,
    overwrite: Annotated[bool, OUTPUT("--overwrite", help="Replace the run directory if it exists.")] = False,
    restart: Annotated[
        bool,
        OUTPUT(
            "--restart",
            help="Delete the rounds that OUT.work keeps of a killed run, and do them again; with them the trained "
            "dense model, where the model, data, dense, seed or the version of hap or PyTorch has changed.",
        ),
    ] = False,
    log: Annotated[
        str | None, OUTPUT("--log-to", help="Where losses and times go as well: tensorboard, wandb or mlflow.")
    ] = None,
) -> None:
    """Run a recipe: train or load the dense model, measure, plan, prune, fine-tune, evaluate, report.

    What is done is kept in OUT.work: started again after a kill, it goes on from there, with the same result.
    On several devices: `torchrun --nproc-per-node N -m hap run ...`, or `accelerate launch -m hap run ...`.
    """
    given = {"data.directory": data, "seed": seed}
    more = [f"{key}={json.dumps(str(v) if isinstance(v, Path) else v)}" for key, v in given.items() if v is not None]
    _need_file(recipe)
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
    job = _open(what, where)
    trained = what.dense.train is not None
    if first and not trained and (note := untrained(what.model, what.dense.weights, len(job.data.classes))):
        warn(note)
    with launch.tracking(log, place, {"recipe": str(recipe)}) as numbers, progress() as bars:
        done = recipes.execute(
            what,
            job.model.to(where),
            job.data,
            place,
            tokenizer=job.tokenizer,
            rival=rival,
            overwrite=overwrite,
            restart=restart,
            accelerator=accelerator,
            log=numbers,
            progress=bars if first else silent,
        )
    if first:
        console.print(what.title)
        show(done)


def _need_file(recipe: Path) -> None:
    """Raises a HapError where there is no such recipe, with the nearest that there is."""
    if recipe.exists():
        return
    found = [*recipe.parent.glob("*.y*ml"), *CONFIGS.rglob("*.y*ml")]
    names = {file.stem: file for file in found}
    near = difflib.get_close_matches(recipe.stem, names, n=3, cutoff=0.5)
    raise HapError(
        f"there is no recipe {recipe}",
        expected="a YAML file; those that come with hap are in configs/",
        remedy=f"did you mean {' or '.join(str(names[name]) for name in near)}?" if near else "",
    )


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
        directory = None if data.directory is None else str(data.directory)
        return open_job(recipe.model, directory, task=data.name, **options)
    spec = data.name if data.directory is None else f"{data.name}:{data.directory}"
    weights = Path(recipe.dense.weights).expanduser() if recipe.dense.weights else None
    return open_job(recipe.model, spec, weights=weights, device=device, **options)


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
