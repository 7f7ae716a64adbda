"""`merge`: implants back into dense layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hap.batches import copied, evaluating
from hap.implants import Dense, Implanted, inherit_
from hap.planning import measure_latency


def merge(
    model: nn.Module, *, faster_on: tuple[Any, ...] | None = None, runs: int = 50, seconds: float = 1.0
) -> nn.Module:
    """A copy in which every implanted layer is one dense layer again that computes the same.

    The widths stay: what was pruned is gone. It is for deployment: a checkpoint of the plan fits the unmerged model.

    Args:
        model: what `hap.apply` made; left as it is.
        faster_on: inputs of the model. If given, only those layers are merged that take longer as they are than
            merged, both timed in turns on what the layer reads when the model runs on these inputs.
        runs, seconds: of the timing of a layer, at most.
    """
    small = copied(model)
    dense = {layer: _merged(layer) for layer in small.modules() if isinstance(layer, Implanted)}
    if faster_on is not None:
        inputs = _inputs(small, list(dense), faster_on)
        ratios = {layer: _ratio(layer, dense[layer], x, runs, seconds) for layer, x in inputs.items()}
        dense = {layer: dense[layer] for layer, ratio in ratios.items() if ratio < 1}
    for parent in list(small.modules()):
        for key, child in list(parent._modules.items()):
            if isinstance(child, Implanted) and child in dense:
                setattr(parent, key, dense[child])
    return dense[small] if isinstance(small, Implanted) and small in dense else small


def _merged(layer: Implanted) -> Dense:
    new = layer.merged()
    inherit_(new, layer, layer.layers()[0] if layer.dense is None else layer.dense)
    return new


def _inputs(model: nn.Module, layers: list[Implanted], args: tuple[Any, ...]) -> dict[Implanted, torch.Tensor]:
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


def _ratio(layer: Implanted, dense: Dense, x: torch.Tensor, runs: int, seconds: float) -> float:
    """Time of the merged layer as a share of the implanted one's, the median over turns."""
    return measure_latency({"implanted": layer, "merged": dense}, (x,), runs=runs, seconds=seconds)["merged"].ratio
