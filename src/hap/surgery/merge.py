"""`merge`: implants back into dense layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hap.batches import copied, evaluating
from hap.implants import Dense, Implanted, inherit_
from hap.planning import measure_latency


def merge(
    model: nn.Module, *, faster_on: torch.Tensor | tuple[Any, ...] | None = None, runs: int = 50, seconds: float = 1.0
) -> nn.Module:
    """A copy in which every implanted layer is one dense layer again that computes the same.

    The widths stay: what was pruned is gone. It is for deployment: a checkpoint of the plan fits the unmerged model.

    Args:
        model: what `hap.apply` made; left as it is.
        faster_on: inputs of the model. If given, only those layers are merged that take longer as they are than
            merged, both timed in turns on what the layer reads when the model runs on these inputs; and all of them
            where the whole model is faster so, because what is true of single layers need not be true of their sum.
        runs, seconds: of each timing, at most.
    """
    if faster_on is None:
        return _with_merged(model, _implanted(model))
    given = (faster_on,) if isinstance(faster_on, torch.Tensor) else faster_on
    small = copied(model)
    layers = _implanted(small)
    inputs = _inputs(small, layers.values(), given)
    called = [name for name, layer in layers.items() if layer in inputs]
    slow = [n for n in called if _ratio(layers[n], _merged(layers[n]), (inputs[layers[n]],), runs, seconds) < 1]
    some = _with_merged(model, slow)
    if len(slow) == len(called):
        return some
    every = _with_merged(model, called)
    return every if _ratio(some, every, given, runs, seconds) < 1 else some


def _implanted(model: nn.Module) -> dict[str, Implanted]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Implanted)}


def _with_merged(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy in which these layers are merged, wherever they stand."""
    small = copied(model)
    layers = _implanted(small)
    dense = {layers[name]: _merged(layers[name]) for name in names}
    for parent in list(small.modules()):
        for key, child in list(parent._modules.items()):
            if isinstance(child, Implanted) and child in dense:
                setattr(parent, key, dense[child])
    return dense[small] if isinstance(small, Implanted) and small in dense else small


def _merged(layer: Implanted) -> Dense:
    new = layer.merged()
    inherit_(new, layer, layer.layers()[0] if layer.dense is None else layer.dense)
    return new


def _inputs(model: nn.Module, layers: Iterable[Implanted], args: tuple[Any, ...]) -> dict[Implanted, torch.Tensor]:
    """What each layer reads when the model runs; layers that are not called are left out."""
    found: dict[Implanted, torch.Tensor] = {}

    def note(layer: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        assert isinstance(layer, Implanted)
        found[layer] = args[0] if args else kwargs["input"]

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        with evaluating(model), torch.no_grad():
            model(*args)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _ratio(model: nn.Module, merged: nn.Module, args: tuple[Any, ...], runs: int, seconds: float) -> float:
    """Time when merged as a share of the time as it is, the median over turns."""
    return measure_latency({"as it is": model, "merged": merged}, args, runs=runs, seconds=seconds)["merged"].ratio
