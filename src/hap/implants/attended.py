"""Watches attention calls while a model reads data: queries, keys, values, and what becomes of the result."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hap.attention import opened
from hap.batches import Batch, evaluating, forward
from hap.implants.heads import Heads
from hap.implants.sdpa import Arguments

Part = Literal["query", "key", "value"]
Place = tuple[str, int]  # a weight, and which of its chunks
Linear = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # input, weight and bias
CLOSE = 1e-3  # of the largest value: how far rounding may take apart what is equal


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call of a module whose heads are watched.

    Attributes:
        query, key, value: what it is given, ``(..., heads, tokens, width)``.
        mask, causal, scale: how it is called.
        context: what it gives and the output layer reads, as they.
        own: whether queries and keys are of the same input, so that a mask of keys is one of queries too.
        places: where the weights of queries, keys and values are; of those alone that a linear layer gave as they are
            in all calls so far. A single key has all of the attention, whatever it is, and tells nothing of queries and
            keys.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    causal: bool
    scale: float
    context: torch.Tensor
    own: bool
    places: Mapping[Part, Place]


Visit = Callable[[str, Call], None]


def watch(model: nn.Module, sites: Mapping[str, Heads], batches: Iterable[Batch], visit: Visit) -> dict[str, str]:
    """Runs the model in evaluation mode; `visit` is given each call, with the module's name.

    Returns:
        The modules whose heads cannot become narrow, each with the reason: something other than linear layers stands
        between values and attention call or after it, the call is not ``scaled_dot_product_attention``, or there are
        several, as where one attention module calls another. Not all of their calls are visited.
    """
    with evaluating(model), opened(model), torch.no_grad():
        found = {name: _Site(heads) for name, heads in sites.items()}
        with _hooked(model, found) as active, _Watch(model, found.values(), active, visit):
            for batch in batches:
                forward(model, batch)
    return {
        name: site.problem or "it makes no call of scaled_dot_product_attention"
        for name, site in found.items()
        if site.problem is not None or not site.visited
    }


@dataclass(eq=False)
class _Site:
    """What is known of a module while the model runs."""

    heads: Heads
    read: dict[str, torch.Tensor] = field(default_factory=dict)  # by the weight that reads it, since the last call
    written: dict[str, torch.Tensor] = field(default_factory=dict)
    call: tuple[torch.Tensor, ...] | None = None
    calls: int = 0  # since the module was entered
    how: tuple[torch.Tensor | None, bool, float] = (None, False, 1.0)
    places: dict[Part, Place | None] = field(default_factory=dict)  # None where it is not what a linear layer gives
    visited: bool = False
    problem: str | None = None


class _Watch(TorchFunctionMode):
    def __init__(self, model: nn.Module, sites: Iterable[_Site], active: list[_Site], visit: Visit) -> None:
        super().__init__()
        self.active, self.visit = active, visit
        tensors = dict(model.named_parameters())
        self.layers: dict[int, tuple[_Site, str]] = {}
        for site in sites:
            for layer in (*site.heads.projections, site.heads.output):
                self.layers[id(tensors[layer.weight])] = (site, layer.weight)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention and self.active:
            _attended(self.active[-1], y, Arguments(*args, **(kwargs or {})))
        elif (given := linear(func, args, kwargs or {})) is not None:
            x, weight, _ = given
            site, name = self.layers.get(id(weight), (None, ""))
            if site is not None and name == site.heads.output.weight:
                self._read(site, x)
            elif site is not None:
                site.read[name], site.written[name] = x, y
        return y

    def _read(self, site: _Site, x: torch.Tensor) -> None:
        """The output layer reads: now all of a call is known."""
        heads, call = site.heads, site.call
        if site.problem is not None or call is None:
            return
        positions = torch.tensor(heads.chunks(heads.member(heads.output.weight)), device=x.device)
        read = x.reshape(-1, x.shape[-1])[:, positions.transpose(0, 1).flatten(0, 1)]
        query, key, value, y = call
        if not _same(_tokens(y), read):
            site.problem = "its output layer reads something else than the heads"
            return
        shared = value.shape[-3] // heads.family.size  # the model may have repeated it for each of a group
        parts: dict[Part, torch.Tensor] = {"value": value[..., ::shared, :, :]}
        if key.shape[-2] > 1:
            parts |= {"query": query, "key": key}
        found = _places(site, parts)
        site.places |= {part: place if site.places.get(part, place) == place else None for part, place in found.items()}
        places = {part: place for part, place in site.places.items() if place is not None}
        if "value" not in places:
            site.problem = missing(places)
            return
        self.visit(heads.module, Call(query, key, value, *site.how, y, _own(site, places["value"]), places))
        site.visited, site.call = True, None
        site.read.clear()
        site.written.clear()


def _attended(site: _Site, y: torch.Tensor, given: Arguments) -> None:
    if site.problem is not None:
        return
    site.calls += 1
    if site.calls > 1 or site.call is not None:
        site.problem = "it calls scaled_dot_product_attention several times"
    size, group = site.heads.family.size, site.heads.group
    query, key, value = given.query, given.key, given.value
    allowed = ((query, (size * group,)), (key, (size, size * group)), (value, (size, size * group)))
    if any(x.ndim < 3 or x.shape[-3] not in counts for x, counts in allowed):
        site.problem = "queries and keys have not one head for each unit"
        return
    site.call, site.how = (query, key, value, y), (given.attn_mask, given.is_causal, given.scaling)


def missing(places: Collection[Part]) -> str:
    """What stands in the way of narrow queries, keys and values alike."""
    names = ", ".join(sorted(set(get_args(Part)) - set(places)))
    return f"its {names} are not what a linear layer gives (rotary positions, norms), or one token does not tell"


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """(..., heads, tokens, width) as (tokens, heads, width)."""
    return x.movedim(-3, -2).flatten(0, -3)


def _own(site: _Site, value: Place) -> bool:
    """Whether what gives queries and keys reads the same; what gives values alone may read something else."""
    first, *others = (x for name, x in site.read.items() if len(site.read) < 3 or name != value[0])
    return all(x is first or (x.shape == first.shape and torch.equal(x, first)) for x in others)


def _places(site: _Site, parts: Mapping[Part, torch.Tensor]) -> dict[Part, Place | None]:
    """For queries, keys and values, the weight whose outputs they are; None where they are not."""
    found: dict[Part, Place | None] = dict.fromkeys(parts)
    for name, written in site.written.items():
        orders = [written] + ([written.transpose(0, 1)] if written.ndim == 3 else [])  # examples or tokens come first
        for number, positions in enumerate(site.heads.chunks(site.heads.member(name))):
            index = torch.tensor(positions, device=written.device)
            outputs = [y.reshape(-1, y.shape[-1])[:, index] for y in orders]
            for part, x in parts.items():
                if found[part] is None and any(_same(_tokens(x), y) for y in outputs):
                    found[part] = (name, number)
                    break
    return found


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether x is y, or y times a number."""
    if x.shape != y.shape:
        return False
    x, y = x.double(), y.double()
    factor = (x * y).sum() / y.square().sum().clamp_min(1e-300)
    return bool(factor != 0 and (x - factor * y).abs().max() <= CLOSE * x.abs().max())


def linear(func: Any, args: Any, kwargs: Any) -> Linear | None:
    """What a linear layer's function is given, by position or by name; None for other functions."""
    if func is F.linear:
        return _linear(*args, **kwargs)
    return _addmm(*args, **kwargs) if func is torch.addmm else None


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    return input, weight, bias


def _addmm(input: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, **_: Any) -> Linear:
    return mat1, mat2, input


@contextmanager
def _hooked(model: nn.Module, sites: Mapping[str, _Site]) -> Iterator[list[_Site]]:
    """The modules that are running now, the innermost last."""
    active: list[_Site] = []

    def enter(site: _Site) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any) -> None:
            if active and active[-1].problem is None:
                active[-1].problem = "it calls another attention module"
            if "forward" in vars(module):  # a class with another `forward` would not be heard
                site.problem = "the instance has a forward of its own"
            site.calls = 0
            active.append(site)

        return hook

    def leave(*_: Any) -> None:
        active.pop()

    modules = [(model.get_submodule(name), site) for name, site in sites.items()]
    handles = [module.register_forward_pre_hook(enter(site)) for module, site in modules]
    handles += [module.register_forward_hook(leave, always_call=True) for module, _ in modules]
    try:
        yield active
    finally:
        for handle in handles:
            handle.remove()
