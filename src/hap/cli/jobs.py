"""The model and the data that a verb works on, from the words behind --model, --weights, --task and --data."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hap
from hap import pretrained, zoo
from hap.cli import sources
from hap.errors import HapError, unknown
from hap.zoo.glue import directory_of
from hap.zoo.splits import IMAGENET


@dataclass(frozen=True, eq=False)
class Job:
    """A model, its data, and what came with the model.

    Attributes:
        model: on the CPU.
        data: its splits.
        tokenizer: of a model of texts.
        plan: of a model that hap has pruned.
        dense: the words behind --model for the dense model; None of a pruned one that opens alone.
        normalisation: of images, as the model's files say; None where they say nothing.
    """

    model: nn.Module
    data: zoo.DataSplits
    tokenizer: Any = None
    plan: hap.Plan | None = None
    dense: str | None = None
    normalisation: zoo.Normalisation | None = None


def same_inputs(student: Job, teacher: Job) -> None:
    """Raises a HapError if the teacher would read the student's batches as something else."""
    ours, theirs = ((job.normalisation or IMAGENET) for job in (student, teacher))
    if ours != theirs:
        raise HapError(
            "the teacher's images are normalised otherwise",
            expected=f"mean {ours.mean}, standard deviation {ours.std}, as the student's",
            got=f"mean {theirs.mean}, standard deviation {theirs.std}",
            remedy="take a teacher that was trained on images like the student's",
        )
    words = [None if job.tokenizer is None else job.tokenizer.get_vocab() for job in (student, teacher)]
    if words[0] != words[1]:
        raise HapError(
            "the teacher's tokens are others than the student's",
            expected=f"the same vocabulary, of {len(words[0] or ()):,} tokens",
            got=f"{len(words[1] or ()):,} tokens, or other ones",
            remedy="take a teacher with the student's tokenizer",
        )


def open_job(
    model: str,
    data: str | None,
    *,
    weights: Path | None = None,
    task: str | None = None,
    batch_size: int | None = None,
    seed: int,
    limit: int | None = None,
    validation: int | None = None,
    image_size: int | None = None,
    workers: int = 0,
    max_length: int | None = None,
    device: torch.device | str = "cpu",
) -> Job:
    """Opens model and data, for texts where a task is named, else for images.

    Args:
        data: None, of a task, for the directory that the environment names.
        batch_size: None for 128 images or 32 texts.

    Raises:
        HapError: one of them cannot be opened, or they do not go together.
    """
    if batch_size is None:
        batch_size = 128 if task is None else 32
    if task is None:
        if max_length is not None:
            raise HapError("images have no length in tokens", expected="--max-length with --task", got=str(max_length))
        if data is None:
            raise HapError(
                "there is no data", expected=f"--data, one of: {', '.join(zoo.DATASETS)}; or --task for texts"
            )
        kind = data.partition(":")[0]
        if kind not in zoo.DATASETS:
            error = unknown("data set", kind, zoo.DATASETS)
            remedy = error.remedy or "for texts name the task, such as --task glue/mrpc"
            raise HapError(error.what, expected=error.expected, got=error.got, remedy=remedy)
        normalisation = None
        if zoo.DATASETS[kind].resizes:
            normalisation, own_size = _prepared(model)
            image_size = image_size or own_size
        splits = zoo.load_data(
            data,
            batch_size=batch_size,
            seed=seed,
            limit=limit,
            validation=validation,
            image_size=image_size,
            workers=workers,
            device=device,
            normalisation=normalisation,
        )
        return dataclasses.replace(_image_job(model, weights, splits, seed), normalisation=normalisation)
    labels, place = zoo.task_of(task).labels, directory_of(task, data)
    opened, tokenizer, plan = text_model(model, weights, labels, seed)
    if image_size is not None:
        raise HapError("texts have no size in pixels", expected="image_size for images", got=str(image_size))
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": seed,
        "limit": limit,
        "validation": validation,
        "max_length": longest(opened, tokenizer, max_length),
    }
    splits = zoo.load_texts(task, place, tokenizer, **options)
    return Job(opened, splits, tokenizer, plan, dense=model if plan is None else None)


def _prepared(spec: str) -> tuple[zoo.Normalisation | None, int | None]:
    """How the images are normalised that the model was trained with, and their size; of a pruned one by its own files.

    Else its dense model's. None where nobody says.
    """
    source, _, name = spec.partition(":")
    try:
        if source == "hap":
            spec = f"hf:{name}" if (Path(name) / pretrained.PROCESSOR).is_file() else _dense_spec(Path(name))
        return sources.normalisation(spec), sources.image_size(spec)
    except HapError:
        if source == "hap":
            return None, None  # it was written from Python, and does not say where it comes from
        raise


def _image_job(spec: str, weights: Path | None, data: zoo.DataSplits, seed: int) -> Job:
    source, _, name = spec.partition(":")
    if source != "hap":
        model = sources.load_model(spec, weights, len(data.classes), seed=seed)
        if source == "hf":
            pretrained.name_labels_(model, data.classes, name)
        return Job(model, data, dense=spec)
    if weights is not None:
        raise _own_weights(weights)
    directory = Path(name)
    if (directory / pretrained.CONFIG).is_file():  # of a model of transformers, which opens alone
        small, plan = hap.load(directory)
        return Job(small, data, plan=plan)
    dense = _dense_spec(directory)
    small, plan = hap.load(directory, sources.load_model(dense, None, len(data.classes), seed=seed))
    return Job(small, data, plan=plan, dense=dense)


RECORDS = ("report.json", "finetune.json")  # what hap prune and hap finetune write beside a model


def _dense_spec(directory: Path) -> str:
    """The dense model of a pruned one, as the command that wrote the directory was told.

    Raises:
        HapError: the directory does not say.
    """
    for name in RECORDS:
        try:
            options = json.loads((directory / name).read_text(encoding="utf-8"))["options"]
            found = str(options.get("dense") or options["model"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        source, _, before = found.partition(":")  # trained on from one that was pruned before
        return _dense_spec(Path(before)) if source == "hap" and Path(before) != directory else found
    raise HapError(
        f"{directory} does not say what its dense model is",
        expected=f"{' or '.join(RECORDS)}, which hap prune and hap finetune write beside the model",
        got="neither, with the name of a model" if directory.is_dir() else "no such directory",
        remedy="from Python: small, plan = hap.load(directory, dense), then hap.finetune(small, ...)",
    )


def _own_weights(weights: Path) -> HapError:
    return HapError("the weights are in the model's own directory", expected="no --weights", got=f"--weights {weights}")


def need_dense(plan: hap.Plan | None, model: str) -> None:
    """Raises a HapError for a model that hap has pruned, one with a plan."""
    if plan is not None:
        raise HapError(
            f"{model} is pruned already", expected="the dense model", remedy="prune the dense model to the whole budget"
        )


def text_model(
    spec: str, weights: Path | None, labels: tuple[str, ...], seed: int
) -> tuple[nn.Module, Any, hap.Plan | None]:
    """A classifier of texts with its tokenizer, and its plan if hap has pruned it.

    Raises:
        HapError: the words name no such model, or it cannot be opened.
    """
    source, _, name = spec.partition(":")
    if source not in ("hf", "hap"):
        raise HapError(
            "this is no model of texts",
            expected="hf:PATH, a directory or a name on the Hugging Face hub, or hap:DIR, which hap has pruned",
            got=spec,
            remedy="for example hf:bert-base-uncased",
        )
    if weights is not None:
        raise _own_weights(weights)
    if source == "hf":
        return *pretrained.load_text_classifier(name, labels, seed=seed), None
    small, plan = hap.load(name)
    return small, pretrained.load_tokenizer(name), plan


def longest(model: Any, tokenizer: Any, max_length: int | None) -> int | None:
    """`max_length`, where the model has so many positions, of which its tokenizer may not know."""
    positions = getattr(model.config, "max_position_embeddings", None) or 0
    if max_length is not None and 0 < positions < max_length:
        raise HapError(
            "max_length is out of range",
            expected=f"at most {positions} tokens, the positions that the model has",
            got=str(max_length),
            remedy="longer texts are cut",
        )
    if max_length is None and 0 < positions < 128:
        return min(positions, tokenizer.model_max_length)
    return max_length
