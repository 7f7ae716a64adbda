"""The model and the data that a verb works on, from the words behind --model, --weights, --task and --data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import hap
from hap import pretrained, zoo
from hap.cli import sources
from hap.errors import HapError


@dataclass(frozen=True, eq=False)
class Job:
    """A model, its data, and what came with the model.

    Attributes:
        model: on the CPU.
        data: its splits.
        tokenizer: of a model of texts.
        plan: of a model that hap has pruned.
    """

    model: nn.Module
    data: zoo.DataSplits
    tokenizer: Any = None
    plan: hap.Plan | None = None


def open_job(
    model: str,
    data: str,
    *,
    weights: Path | None = None,
    task: str | None = None,
    batch_size: int,
    seed: int,
    limit: int | None = None,
    workers: int = 0,
    max_length: int | None = None,
) -> Job:
    """Opens model and data, for texts where a task is named, else for images.

    Raises:
        HapError: one of them cannot be opened, or they do not go together.
    """
    if task is None:
        if max_length is not None:
            raise HapError("images have no length in tokens", expected="--max-length with --task", got=str(max_length))
        splits = zoo.load_data(data, batch_size=batch_size, seed=seed, limit=limit, workers=workers)
        return Job(sources.load_model(model, weights, len(splits.classes), seed=seed), splits)
    labels = zoo.task_of(task).labels
    opened, tokenizer, plan = _text_model(model, weights, labels, seed)
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "limit": limit, "max_length": max_length}
    splits = zoo.load_texts(task, data, tokenizer, **options)
    return Job(opened, splits, tokenizer, plan)


def _text_model(
    spec: str, weights: Path | None, labels: tuple[str, ...], seed: int
) -> tuple[nn.Module, Any, hap.Plan | None]:
    source, _, name = spec.partition(":")
    if source not in ("hf", "hap") or weights is not None:
        raise HapError(
            "this is no model of texts" if weights is None else "the weights are in the model's own directory",
            expected="hf:PATH, a directory or a name on the Hugging Face hub, or hap:DIR, which hap has pruned",
            got=spec if weights is None else f"--weights {weights}",
            remedy="for example hf:bert-base-uncased",
        )
    if source == "hf":
        return *pretrained.load_text_classifier(name, labels, seed=seed), None
    small, plan = hap.load(name)
    return small, pretrained.load_tokenizer(name), plan
