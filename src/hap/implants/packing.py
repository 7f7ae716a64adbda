"""Narrow heads at run time: several of them lie side by side in the place of one full head.

A model's own code goes on splitting its projections into heads of one width; only the attention call has to know which
of these hold narrow ones. The module around the call gets a class that derives from its own and says so to
``scaled_dot_product_attention``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hap.errors import HapError
from hap.implants.sdpa import Arguments
from hap.implants.value_packing import ValuePacking


@dataclass(frozen=True)
class Packing:
    """Where an attention module has its narrow heads.

    Attributes:
        packed: how many of its heads, the last ones, hold narrow heads.
        parts: narrow heads in each of these, side by side along its width.
    """

    packed: int
    parts: int

    def __str__(self) -> str:
        return f"{self.packed} heads of {self.parts} narrow ones each"

    def attend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``scaled_dot_product_attention`` of heads ``(..., heads, tokens, width)`` of which the last are packed.

        Where the mask has an axis of heads, all parts of a packed one have its mask.
        """
        given = Arguments(*args, **kwargs)
        full = given.query.shape[-3] - self.packed
        heads = (given.query, given.key, given.value)
        how: dict[str, Any] = {"dropout_p": given.dropout_p, "is_causal": given.is_causal, "scale": given.scaling}
        masks = (given.attn_mask, given.attn_mask)
        if given.attn_mask is not None and given.attn_mask.ndim > 2 and given.attn_mask.shape[-3] > 1:
            wide, narrow = given.attn_mask.split([full, self.packed], -3)
            masks = (wide, narrow.repeat_interleave(self.parts, -3))
        q, k, v = (_unpacked(x[..., full:, :, :], self.parts) for x in heads)
        y = F.scaled_dot_product_attention(q, k, v, masks[1], **how)
        y = y.unflatten(-3, (self.packed, self.parts)).movedim(-3, -2).flatten(-2)
        if not full:
            return y
        q, k, v = (x[..., :full, :, :] for x in heads)
        return torch.cat([F.scaled_dot_product_attention(q, k, v, masks[0], **how), y], -3)


Packed = Packing | ValuePacking

_DERIVED: dict[tuple[type[nn.Module], Packed], type[nn.Module]] = {}  # a class is made once


def packed_type(base: type[nn.Module], packing: Packed) -> type[nn.Module]:
    """The class, derived from `base`, of modules whose last heads are packed; for ``module.__class__``.

    Such a module computes each narrow head by its own narrow attention call, with the scale of the full heads. It is
    copied and pickled like any other.
    """
    key = (base, packing)
    if key not in _DERIVED:
        _DERIVED[key] = _derived(base, packing)
    return _DERIVED[key]


def _derived(base: type[nn.Module], packing: Packed) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            with _Unpacking(packing) as calls:
                y = base.forward(self, *args, **kwargs)
        except Exception as error:
            if calls.seen or type(error) not in (RuntimeError, IndexError, ValueError):  # those of shapes, none derived
                raise
            raise _uncalled(base, f"{type(error).__name__}: {error}") from error
        if not calls.seen:
            raise _uncalled(base)
        return y

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _blank, (base, packing), self.__dict__

    def extra_repr(self: nn.Module) -> str:
        own = base.extra_repr(self)
        return f"{own}{', ' if own else ''}{packing}"

    methods = {"forward": forward, "__reduce_ex__": reduce, "extra_repr": extra_repr, "packing": packing}
    return type(f"Packed{base.__name__}", (base,), {**methods, "__module__": base.__module__})


def _uncalled(base: type[nn.Module], got: str = "") -> HapError:
    return HapError(
        f"{base.__name__} with narrow heads did not call scaled_dot_product_attention",
        expected="an attention that goes through torch.nn.functional.scaled_dot_product_attention",
        got=got,
        remedy="attn_implementation='sdpa' in transformers, and no cache_implementation='static'; "
        "need_weights=False in nn.MultiheadAttention",
    )


def _blank(base: type[nn.Module], packing: Packed) -> nn.Module:
    """A module without its state, for copies."""
    made = packed_type(base, packing)
    return made.__new__(made)


class _Unpacking(TorchFunctionMode):
    """While it is active, the attention call sees narrow heads. A second one is refused: it has heads of its own.

    Attributes:
        seen: whether there was any call.
    """

    def __init__(self, packing: Packed) -> None:
        super().__init__()
        self.packing = packing
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            if self.seen:
                raise HapError(
                    "a module with narrow heads calls scaled_dot_product_attention several times",
                    expected="one call, of the heads that became narrow",
                    remedy="protect the module whose attention calls another attention module",
                )
            self.seen = True
            return self.packing.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _unpacked(x: torch.Tensor, parts: int) -> torch.Tensor:
    """(..., packed, tokens, width) as (..., packed * parts, tokens, width / parts)."""
    return x.unflatten(-1, (parts, -1)).movedim(-2, -3).flatten(-4, -3)
