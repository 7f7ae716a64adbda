"""Where the model of a run is from, in words and in code: for its model card, and for what its numbers are worth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hap import pretrained
from hap.checkpoint import Origin
from hap.zoo import TASKS, DataSplits

RANDOM = ("zoo", "torchvision", "timm")  # sources of models that have no weights of their own
RANDOM_NOTE = (
    "and what is measured on them says nothing of a trained model: give trained ones (--weights FILE.safetensors, in a "
    "recipe dense.weights), or train it first (hap finetune)"
)
HEAD_NOTE = "and what is measured says little: train it first (hap finetune), and prune what that writes"


def origin(options: Mapping[str, Any], data: DataSplits, model: nn.Module | None = None) -> Origin:
    """What a model card says of a run, and notes on what its numbers are worth.

    Directories are left out: a card is published.

    Args:
        options: ``model``, ``weights``, ``task``, ``data`` and ``limit`` as `hap prune` has them, each if it is known;
            and ``dense_training``, of a dense model that was trained.
        data: what was read.
        model: the dense model.
    """
    spec, task = options.get("model"), options.get("task")
    about: dict[str, str] = {}
    if spec:
        named = f"`{_public(spec)}`" + ("" if model is None else f", a {type(model).__name__}")
        weights = options.get("weights")
        about["model"] = named + (f", weights `{Path(weights).name}`" if weights else "")
    name = "" if task else (options.get("data") or "").partition(":")[0]
    about["data"] = f"{data.name} (`{name}`)" if name else data.name
    if task:
        about["task"] = f"`{task}`: {', '.join(data.classes)}"
    notes = (*_limited(options.get("limit"), data), *_untrained(options, len(data.classes)))
    return Origin(about, _build(spec or "", len(data.classes)), _call(task, data), notes)


def untrained(spec: str, weights: object, classes: int) -> str:
    """What to say of a dense model that starts from random weights, and what to do about it; "" if none is known of.

    Args:
        spec: the words behind --model.
        weights: those behind --weights; None without.
        classes: of the data.

    Raises:
        HapError: there is no model of transformers where `spec` says.
    """
    source, _, name = spec.partition(":")
    if source in RANDOM and weights is None:
        return f"{spec} has random weights, {RANDOM_NOTE}"
    if source == "hf" and not pretrained.is_classifier(name, classes):
        return f"{_public(spec)} is not trained for this task and has a random last layer, {HEAD_NOTE}"
    return ""


def _untrained(options: Mapping[str, Any], classes: int) -> list[str]:
    if not options.get("model") or options.get("dense_training"):
        return []
    found = untrained(options["model"], options.get("weights"), classes)
    return [found] if found else []


def _limited(limit: int | None, data: DataSplits) -> list[str]:
    splits = data.train, data.validation, data.test
    if limit is None or all(split.samples < limit for split in splits):
        return []
    return [
        f"at most {limit:,} examples of each split were read (--limit); the numbers are of {data.test.samples:,} test "
        "examples, and mean little"
    ]


def parts(spec: str) -> tuple[str, str]:
    """What comes before a spec's colon and after it: the last colon of FILE.py:FUNCTION, else the first."""
    before, _, after = spec.rpartition(":")
    if before.endswith(".py"):
        return before, after
    source, _, name = spec.partition(":")
    return source, name


def _public(spec: str) -> str:
    """Without the directory that a model or a file lies in here."""
    source, name = parts(spec)
    if source.endswith(".py"):
        return f"{Path(source).name}:{name}"
    local = source == "hf" and (Path(name).expanduser().exists() or name.startswith((".", "/", "~")))
    return f"{source}:{Path(name).name}" if local else spec


def _build(spec: str, classes: int) -> str:
    """Python that makes the dense model of a spec; "" for one that is not code."""
    source, name = parts(spec)
    if source == "zoo":
        return f'from hap import zoo\n\ndense = zoo.build("{name}", classes={classes})  # the weights do not matter'
    if source == "torchvision":
        code = f'get_model("{name}", weights=None, num_classes={classes})'
        return f"from torchvision.models import get_model\n\ndense = {code}"
    if source == "timm":
        return f'import timm\n\ndense = timm.create_model("{name}", num_classes={classes})'
    if source.endswith(".py"):
        file = Path(source)
        return f"from {file.stem} import {name}  # {file.name}, which defines the model\n\ndense = {name}()"
    return ""


def _call(task: str | None, data: DataSplits) -> str:
    if task is None:
        shape = ", ".join(map(str, (1, *data.input_shape)))
        return f"print(small.eval()(torch.zeros({shape})))  # batches of images, normalised as in training"
    texts = ", ".join(('"A text."', '"Another."')[: len(TASKS[task].columns)])
    label = "small.config.id2label[int(outputs.logits.argmax())]"
    return f'outputs = small(**tokenizer({texts}, return_tensors="pt"))\nprint({label})'
