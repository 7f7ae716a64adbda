"""Tries whether a model's own code bears fewer heads of values than of keys."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hap.batches import Batch, evaluating, forward
from hap.implants.attended import linear
from hap.implants.heads import Heads
from hap.implants.value_packing import ValuePacking

log = logging.getLogger(__name__)


def bears(model: nn.Module, sites: Mapping[str, Heads], batch: Batch) -> dict[str, Heads]:
    """The modules that run with two of their heads' values in one place.

    Args:
        model: left as it is.
        sites: modules whose values come from the last of three linear layers and whose heads attend once.
        batch: read once where all bear it, once for each module where one does not.
    """
    if _runs(model, sites, batch):
        return dict(sites)
    return {name: heads for name, heads in sites.items() if len(sites) > 1 and _runs(model, {name: heads}, batch)}


def _runs(model: nn.Module, sites: Mapping[str, Heads], batch: Batch) -> bool:
    with evaluating(model), torch.no_grad(), _Fewer(model, sites) as mode:
        try:
            forward(model, batch)
        except torch.OutOfMemoryError:  # says nothing of the code
            raise
        except Exception as error:  # users' code raises any type: an assertion on a shape, a view that does not fit
            why = error.__cause__ or error  # of what `forward` makes of it
            text = str(why).partition("\n")[0]
            log.info("fewer heads of values than of keys in %s: %s: %s", _named(sites), type(why).__name__, text)
            return False
    if left := set(sites) - mode.done:
        log.info("fewer heads of values than of keys do not reach the output layer in %s", _named(sorted(left)))
    return not left


def _named(sites: Iterable[str]) -> str:
    return ", ".join(map(repr, sites))


class _Fewer(TorchFunctionMode):
    """Gives one place less for values, and reads one less, with the weights as they are.

    Attributes:
        done: the modules whose output layer read what it should.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Heads]) -> None:
        super().__init__()
        tensors = dict(model.named_parameters())
        self.sites = sites
        self.values = {id(tensors[h.values.weight]): name for name, h in sites.items() if h.values is not None}
        self.outputs = {id(tensors[heads.output.weight]): name for name, heads in sites.items()}
        self.open: str | None = None  # the module whose values are given, until they are attended to
        self.done: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.open is not None:
            packing = ValuePacking(self.sites[self.open].family.size - 2, 2, 2)
            self.open = None
            return packing.attend(*args, **kwargs)
        if func is not F.linear or (given := linear(func, args, kwargs)) is None:
            return func(*args, **kwargs)
        x, weight, bias = given
        if (name := self.values.get(id(weight))) is not None:
            self.open = name
            return func(x, weight, bias)[..., : -self.sites[name].width]
        if (name := self.outputs.get(id(weight))) is not None:
            heads = self.sites[name]
            if x.shape[-1] == weight.shape[1] - heads.width * heads.group:
                self.done.add(name)
            return func(x, weight[:, : x.shape[-1]], bias)
        return func(x, weight, bias)
