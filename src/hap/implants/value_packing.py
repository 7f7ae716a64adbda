"""Narrow values at run time: several of them lie side by side in the place of one head of values.

Queries and keys are whole. A model's own code sees fewer heads of values than of keys, which is nothing to it until
the attention call, and as many contexts of full width as its output layer reads. In the call itself zeros stand behind
narrow values: fused kernels want values as wide as keys, and what is called in their stead is slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from hap.errors import HapError
from hap.implants.heads import packs
from hap.implants.sdpa import Arguments


@dataclass(frozen=True)
class ValuePacking:
    """Where an attention module has its heads of narrow values.

    Attributes:
        full: how many heads of keys come first, with values of full width.
        narrow: how many come after them, with narrow values.
        parts: narrow values in the place of a full one, side by side along its width; the last place need not be full.
    """

    full: int
    narrow: int
    parts: int

    def __str__(self) -> str:
        return f"{self.narrow} heads of narrow values, {self.parts} in a place"

    def attend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``scaled_dot_product_attention`` of heads ``(..., heads, tokens, width)``.

        Where heads of queries share one of keys, keys and values may come repeated for each of them, or once (with
        `enable_gqa`, or with the group side by side among the tokens).

        Returns:
            ``(..., places of queries, tokens, width)``: in each place, behind the full ones, the contexts of as many
            heads as share it, each of the same member of its group.

        Raises:
            HapError: there are not as many heads of values as there should be.
        """
        given = Arguments(*args, **kwargs)
        heads, places = self.full + self.narrow, self.full + packs(self.narrow, self.parts)
        queries, keys = given.query.shape[-3] // heads, given.key.shape[-3] // heads  # of each head
        if given.value.shape[-3] != places * keys:
            raise HapError(
                "a module with narrow values did not get as many heads of them as it has",
                expected=f"{places * keys} heads of values beside {given.key.shape[-3]} of keys",
                got=str(given.value.shape[-3]),
                remedy="a cache must not take values for as many as keys: leave out cache_implementation='static'",
            )
        value = torch.cat([given.value[..., : self.full * keys, :, :], self._unpacked(given.value, keys)], -3)
        y = F.scaled_dot_product_attention(**{**vars(given), "value": value})
        return torch.cat([y[..., : self.full * queries, :, :], self._packed(y, queries)], -3)

    def _unpacked(self, value: torch.Tensor, each: int) -> torch.Tensor:
        """Values of all places as those of the narrow heads, (..., narrow * each, tokens, width): zeros behind."""
        x = value[..., self.full * each :, :, :].unflatten(-3, (-1, each)).unflatten(-1, (self.parts, -1))
        x = x.movedim(-2, -4).flatten(-5, -3)[..., : self.narrow * each, :, :]
        return F.pad(x, (0, value.shape[-1] - x.shape[-1]))

    def _packed(self, y: torch.Tensor, each: int) -> torch.Tensor:
        """Contexts of all heads as those of the narrow ones' places, (..., places * each, tokens, width)."""
        x = y[..., self.full * each :, :, : y.shape[-1] // self.parts]
        if missing := -self.narrow % self.parts:
            x = F.pad(x, (0, 0, 0, 0, 0, missing * each))
        return x.unflatten(-3, (-1, self.parts, each)).movedim(-4, -2).flatten(-2).flatten(-4, -3)
