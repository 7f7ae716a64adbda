"""`execute`: a recipe, from the dense model to the run directory."""

from __future__ import annotations

import copy
import json
import logging
import time
from pathlib import Path
from typing import Any

from torch import nn

from hap import pretrained
from hap.checkpoint import fresh_directory, refuse_existing
from hap.files import write_json, write_model
from hap.pipeline import Run, run
from hap.pipeline.steps import Steps
from hap.pipeline.together import is_first
from hap.recipes.beforehand import check
from hap.recipes.recipe import Recipe
from hap.recipes.work import DENSE, Work, as_data
from hap.training import finetune
from hap.types import Log, Progress, silent
from hap.zoo import DataSplits
from hap.zoo.weights import load_weights_

logger = logging.getLogger(__name__)
WEIGHTS, HISTORY = "model.safetensors", "training.json"


def execute(
    recipe: Recipe,
    model: nn.Module,
    data: DataSplits,
    out: str | Path,
    *,
    tokenizer: Any = None,
    rival: float | None = None,
    overwrite: bool = False,
    restart: bool = False,
    accelerator: Any = None,
    save_every: float = 60.0,
    log: Log | None = None,
    progress: Progress = silent,
) -> Run:
    """Trains the dense model where the recipe says so, and runs the pipeline.

    What is done is kept in a folder beside `out`, ``OUT.work``: a run that was killed goes on from there when it is
    started again with the same arguments, with the same result. At the end the folder is removed, and a dense
    model that was trained lies in ``OUT/dense``.

    Args:
        recipe: what to do.
        model: the recipe's model with its weights, on the device to work on; it is trained in place.
        data: the recipe's data.
        out: the run directory.
        tokenizer: of a model of texts.
        rival: the accuracy of another small model, for a target of kind ``gain``.
        overwrite: replace `out` if it exists.
        restart: delete the rounds that a killed run has done; and its dense model with the training, where the model,
            `data`, `dense`, `seed` or the version of hap or PyTorch is another one now.
        accelerator: see `hap.finetune`; where there are several processes, each calls this with the same arguments.
        save_every: seconds between two saves of a training's state.
        log: takes losses and learning rates while training; see `hap.pipeline.run`.
        progress: shows how far it is.

    Raises:
        HapError: `out` exists, the folder beside it is of another recipe, the recipe does not fit the model, or a stage
            fails.
    """
    out = Path(out).absolute()
    refuse_existing(out, overwrite)
    work = Work.beside(out, recipe, first=is_first(), restart=restart)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    steps = None if log is None else Steps(log)
    dense = _train_(recipe, model, data, work, tokenizer, accelerator, save_every, steps, progress)
    done = run(
        model,
        data,
        recipe.budget,
        out,
        tokenizer=tokenizer,
        recover=recipe.recover,
        training=recipe.finetune,
        overwrite=overwrite,
        seed=recipe.seed,
        work=work.folder,
        save_every=save_every,
        parts={} if dense is None else {DENSE: work.dense},
        spent={} if dense is None else {"dense": dense["seconds"]},
        targets=recipe.targets,
        rival=rival,
        accelerator=accelerator,
        options={
            "model": recipe.model,
            "weights": recipe.dense.weights,
            "task": recipe.data.name if recipe.data.is_text else None,
            "data": str(recipe.data.directory or "") if recipe.data.is_text else recipe.data.name,
            "limit": recipe.data.limit,
            "recipe": as_data(recipe),
            "dense_training": dense,
            "begun": work.begun,
        },
        log=None if steps is None else steps.stage(),
        progress=progress,
        **vars(recipe.plan),
        **vars(recipe.measure),
        implant_ratio=recipe.implants.ratio,
    )
    if accelerator is not None:
        accelerator.wait_for_everyone()
    work.finish()
    return done


def _train_(
    recipe: Recipe,
    model: nn.Module,
    data: DataSplits,
    work: Work,
    tokenizer: Any,
    accelerator: Any,
    save_every: float,
    steps: Steps | None,
    progress: Progress,
) -> dict[str, Any] | None:
    """Trains the dense model, or loads it where that has been done; returns how it went, if it was trained."""
    training = recipe.dense.train
    if training is None:
        return None
    if not work.dense.exists():
        if recipe.dense.weights is not None:
            logger.warning(
                "training the dense model for %d epochs from %s: dense.train=null takes its weights as they are",
                training.epochs,
                recipe.dense.weights,
            )
        check(recipe, model, data)
        start = time.perf_counter()
        train = copy.copy(data.train)  # one of its own: that this one was read must not change the order of the other
        train.batch_size = recipe.dense.batch_size or train.batch_size
        history = finetune(
            model,
            train,
            validation=data.validation,
            seed=recipe.seed,
            state=work.training,
            save_every=save_every,
            accelerator=accelerator,
            log=None if steps is None else steps.stage("dense/"),
            progress=progress,
            **training.options(),
        )
        trained = sum(epoch.seconds for epoch in history.epochs)  # also before a kill
        record = {"history": history.to_dict(), "seconds": max(trained, time.perf_counter() - start)}
        if work.first:
            with fresh_directory(work.dense) as staging:
                _write(model, staging, tokenizer)
                write_json(staging / HISTORY, record)
        if accelerator is not None:
            accelerator.wait_for_everyone()
    elif steps is not None:  # what comes is counted after them
        batches = -(-data.train.samples // (recipe.dense.batch_size or data.train.batch_size))
        shared = -(-batches // (1 if accelerator is None else accelerator.num_processes))
        steps.stage("dense/")({}, -(-shared // training.accumulate) * training.epochs)
    # From the file also what was trained just now: so that both are the same to the bit.
    load_weights_(model, work.dense / WEIGHTS)
    logger.info("the dense model is in %s", work.dense)
    return dict(json.loads((work.dense / HISTORY).read_text(encoding="utf-8")))


def _write(model: nn.Module, directory: Path, tokenizer: Any) -> None:
    """The tensors, and of a Hugging Face model all that `from_pretrained` needs."""
    write_model(directory / WEIGHTS, model)
    if pretrained.is_pretrained(model):
        pretrained.write(model, directory, tokenizer)
