"""The arguments of ``scaled_dot_product_attention``, by name, for what stands in its place or looks on."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Arguments:
    """What one call is given; heads are ``(..., heads, tokens, width)``. Made of the call's own arguments."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def scaling(self) -> float:
        """What scores are multiplied by."""
        found: float = self.query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return found
