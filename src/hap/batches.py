"""What a batch is, and how a model reads it.

A batch is ``(inputs, targets)`` or a dict of keyword arguments as Hugging Face gives it, with its
labels under ``"labels"``. Everything that runs a model over data goes through this file.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from hap.errors import HapError

IGNORED_LABEL = -100  # as `torch.nn.functional.cross_entropy` and Hugging Face have it

Batch = Any
Loss = Callable[[Any, Batch], torch.Tensor]


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on `device`; a mapping becomes a plain dict."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device, non_blocking=True), _plain(batch))


def _plain(batch: Batch) -> Batch:
    """A mapping as a plain dict: what collators of transformers give is a leaf to `pytree`."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model's positional and keyword arguments in a batch.

    Raises:
        HapError: the batch is neither a pair nor a dict.
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs = batch[0]
        return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}
    raise HapError(
        "this is not a batch",
        expected="(inputs, targets), or a dict of the model's keyword arguments",
        got=f"{type(batch).__name__}" + (f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""),
        remedy="let your data loader yield pairs, or dicts as Hugging Face collators do",
    )


def size(batch: Batch) -> int:
    """The number of examples: the length of the first tensor's first axis."""
    args, kwargs = arguments(batch)
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.ndim:
            return leaf.shape[0]
    raise HapError("a batch holds no tensor", expected="at least one tensor with a batch axis", got=repr(batch)[:80])


def targets(batch: Batch) -> torch.Tensor:
    """The labels of a batch."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise HapError("a batch has no labels", expected="a key 'labels'", got=f"keys {sorted(batch)}")
        return batch["labels"]
    return batch[1]


def real_tokens(batch: Batch) -> torch.Tensor | None:
    """Which positions are text and no padding, boolean (examples, positions); None if no ``attention_mask`` says so.

    >>> real_tokens({"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])})
    tensor([[ True,  True, False]])
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask != 0 if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def forward(model: nn.Module, batch: Batch) -> Any:
    """The model's outputs for a batch.

    Raises:
        HapError: the model cannot read the batch (wrong shape or dtype); says which tensors came.
    """
    args, kwargs = arguments(batch)
    try:
        return model(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        got = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors) or "no tensors"
        raise HapError(
            f"{type(model).__name__} cannot read this batch: {(str(error) or repr(error)).splitlines()[0]}",
            expected="inputs of the shape and dtype that the model was made for",
            got=got,
            remedy="check the data set, its transform and the model's input size",
        ) from error


def logits(outputs: Any) -> torch.Tensor:
    """The tensor of class scores in a model's outputs: itself, ``.logits``, or the first element."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    if hasattr(outputs, "logits"):
        return outputs.logits
    if isinstance(outputs, (tuple, list)) and outputs and isinstance(outputs[0], torch.Tensor):
        return outputs[0]
    raise HapError(
        "the outputs hold no logits",
        expected="a tensor, an object with .logits, or a tuple that starts with a tensor",
        got=type(outputs).__name__,
        remedy="pass your own loss(outputs, batch)",
    )


def default_loss(outputs: Any, batch: Batch) -> torch.Tensor:
    """The model's own ``outputs.loss`` where it has one, else the mean cross-entropy of its logits."""
    own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if own is not None:
        return own
    scores, labels = logits(outputs), targets(batch)
    if scores.ndim < 2 or labels.dtype != torch.int64 or labels.shape != scores.shape[:1] + scores.shape[2:]:
        raise HapError(
            "cross-entropy does not fit this model and these targets",
            expected="logits (N, classes, ...) and int64 targets (N, ...)",
            got=f"logits {tuple(scores.shape)}, targets {tuple(labels.shape)} {labels.dtype}",
            remedy="pass your own loss(outputs, batch)",
        )
    if labels.device.type == "cpu":  # elsewhere, looking at the labels would stop the device at every step
        check_labels(labels, scores.shape[1])
    return F.cross_entropy(scores, labels)


def check_labels(labels: torch.Tensor, classes: int) -> None:
    """Refuses labels that are neither classes nor `IGNORED_LABEL`.

    Raises:
        HapError: there is one.
    """
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != IGNORED_LABEL)]
    if len(wrong):
        raise HapError(
            "a label is out of range",
            expected=f"labels from 0 to {classes - 1}, one for each output, or {IGNORED_LABEL} to ignore one",
            got=f"labels from {int(wrong.min())} to {int(wrong.max())} besides",
            remedy="check that the model's number of classes is the data set's",
        )


def checked(loss: Loss | None) -> Loss:
    """`loss` (None: `default_loss`), refusing values that are not finite scalars."""
    function = loss or default_loss

    def compute(outputs: Any, batch: Batch) -> torch.Tensor:
        value = function(outputs, batch)
        if value.ndim:
            raise HapError("the loss is not a scalar", expected="shape ()", got=f"shape {tuple(value.shape)}")
        if not torch.isfinite(value.detach()):
            raise HapError(
                "the loss is not finite",
                expected="a finite number",
                got=str(float(value.detach())),
                remedy="check inputs and weights for NaN or overflow, or lower the learning rate",
            )
        return value

    return compute


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Examples `start` to `stop` of a batch; what has no batch axis stays whole."""
    batch, total = _plain(batch), size(batch)
    return pytree.tree_map_only(torch.Tensor, lambda t: t[start:stop] if t.ndim and t.shape[0] == total else t, batch)


def resized(batch: Batch, count: int) -> Batch:
    """The batch with `count` examples: its own, over and over."""
    batch, total = _plain(batch), size(batch)
    index = torch.arange(count) % total
    pick = lambda t: t[index.to(t.device)] if t.ndim and t.shape[0] == total else t  # noqa: E731
    return pytree.tree_map_only(torch.Tensor, pick, batch)


def take(batches: Iterable[Batch] | None, samples: int | None, device: torch.device) -> Iterator[Batch]:
    """The first `samples` examples (None: all) on `device`, the last batch cut to fit.

    Raises:
        HapError: there is no example at all, or `samples` is below 1.
    """
    if samples is not None and samples < 1:
        raise HapError(
            "samples is out of range",
            expected="a number of at least 1, or None for all",
            got=repr(samples),
            remedy="pass how many examples to read at most",
        )
    left = samples
    seen = 0
    for batch in batches if batches is not None else ():
        count = size(batch)
        if left is not None and count > left:
            batch, count = cut(batch, 0, left), left
        if count:
            seen += count
            yield to_device(batch, device)
        if left is not None:
            left -= count
            if left <= 0:
                break
    if not seen:
        raise HapError(
            "there is no data",
            expected="batches with at least one example",
            got="None" if batches is None else "an empty or exhausted iterable",
            remedy="pass a list or a DataLoader; a generator can be read only once",
        )


def tensors(outputs: Any) -> list[torch.Tensor]:
    """Every tensor in a model's outputs: in containers, and in the fields of objects such as dataclasses.

    Caches of keys and values (classes named ``...Cache``) are left out: they have as many heads as the model has.

    >>> [t.shape[0] for t in tensors({"a": torch.zeros(1), "b": (torch.zeros(2), [None, torch.zeros(3)])})]
    [1, 2, 3]
    """
    found: list[torch.Tensor] = []
    seen: set[int] = set()

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif id(value) not in seen and not type(value).__name__.endswith("Cache"):
            seen.add(id(value))
            if isinstance(value, Mapping):
                parts: Iterable[Any] = value.values()
            elif isinstance(value, (tuple, list, set)):
                parts = value
            else:
                parts = getattr(value, "__dict__", {}).values() if not isinstance(value, (nn.Module, type)) else ()
            for part in parts:
                walk(part)

    walk(outputs)
    return found


def digest(tensors: Iterable[torch.Tensor] | Batch) -> str:
    """A short hash of the shapes, types and bytes of all tensors in a batch or a list."""
    found = hashlib.sha256()
    for tensor in pytree.tree_leaves(tensors):
        if isinstance(tensor, torch.Tensor):
            found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, of a model that drops what it keeps between calls (see `settled_`): not all of it can be copied."""
    settled_(model)
    return copy.deepcopy(model)


def settled_(model: nn.Module) -> None:
    """Lets modules drop what they keep between calls in evaluation mode, as they do when they are put in training.

    Such caches are as wide as the model was, and not every one can be copied.
    """
    modes = _modes(model)
    _switch_(dict.fromkeys(modes, True))
    _switch_(modes)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every module in evaluation mode, and each back into its own mode afterwards."""
    modes = _modes(model)
    try:
        _switch_(dict.fromkeys(modes, False))
        yield
    finally:
        _switch_(modes)


def _modes(model: nn.Module) -> dict[nn.Module, bool]:
    return {module: module.training for module in model.modules()}


def _switch_(modes: Mapping[nn.Module, bool]) -> None:
    """Puts each module into its mode.

    Where a class has its own ``train(mode)`` it is called, since it may make or drop a cache; one without that argument
    is something else, such as a training loop.
    """
    for module, mode in modes.items():
        own = type(module).train
        if own is not nn.Module.train and "mode" in inspect.signature(own).parameters:
            module.train(mode)
    for module, mode in modes.items():
        module.training = mode
