"""`nn.MultiheadAttention` taken apart, so that its heads can be seen, gated and removed.

PyTorch's module hands its parameters to one function that checks them against ``embed_dim`` and
``num_heads``. `OpenAttention` computes the same from the same parameters, calls its output
projection as a module, and takes the number of heads from its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

Mask = torch.Tensor | None


class OpenAttention(nn.Module):
    """What ``nn.MultiheadAttention`` computes, with any number of heads; parameters and their names are its own.

    Takes the same arguments and gives the same results, floating-point rounding aside.
    """

    in_proj_weight: torch.Tensor | None
    q_proj_weight: torch.Tensor | None
    k_proj_weight: torch.Tensor | None
    v_proj_weight: torch.Tensor | None
    in_proj_bias: torch.Tensor | None

    _qkv_same_embed_dim = False  # tells nn.TransformerEncoderLayer to call this module and no fused kernel

    def __init__(self, dense: nn.MultiheadAttention) -> None:
        super().__init__()
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
            self.register_parameter(name, getattr(dense, name))
        self.out_proj = dense.out_proj
        self.embed_dim, self.head_dim = dense.embed_dim, dense.head_dim
        self.dropout, self.batch_first = dense.dropout, dense.batch_first
        self.training = dense.training

    @property
    def num_heads(self) -> int:
        """Number of heads that are left."""
        return self.out_proj.weight.shape[1] // self.head_dim

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: Mask = None,
        need_weights: bool = True,
        attn_mask: Mask = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As ``nn.MultiheadAttention.forward``."""
        batched = query.ndim == 3
        q, k, v = self._projected(query, key, value)
        if not batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        q, k, v = (x.reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for x in (q, k, v))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(key_padding_mask, attn_mask, q)
        rate = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), rate)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, rate, is_causal=causal)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _projected(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        biases: tuple[Mask, ...] = (None, None, None) if bias is None else bias.chunk(3)
        weights: tuple[Mask, ...]
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        else:
            weights = weight.chunk(3)
        triples = zip((query, key, value), weights, biases, strict=True)
        return tuple(F.linear(x, w, b) for x, w, b in triples if w is not None)

    @staticmethod
    def _mask(padding: Mask, mask: Mask, q: torch.Tensor) -> Mask:
        """Both masks as numbers to add to scores of shape (batch, heads, queries, keys); None without any."""
        if padding is not None:
            padding = padding[:, None, None, :]
        if mask is not None and mask.ndim == 3:  # one for each sample and head
            mask = mask.reshape(q.shape[0], q.shape[1], *mask.shape[1:])
        total = None
        for part in (padding, mask):
            if part is not None:
                added = part
                if part.dtype is torch.bool:
                    added = torch.zeros_like(part, dtype=q.dtype).masked_fill(part, -math.inf)
                total = added if total is None else total + added
        return total

    def extra_repr(self) -> str:
        """Sizes, as they are."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"


def closed(model: nn.Module) -> dict[str, nn.MultiheadAttention]:
    """The attention modules, by name, that `OpenAttention` can stand for."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn
    }


def has_kernels(model: nn.Module) -> bool:
    """Whether PyTorch has fused kernels for a part of the model, which read weights and sizes past the modules."""
    return any(isinstance(module, nn.MultiheadAttention) for module in model.modules())  # encoder layers have one


def fusing(model: nn.Module, layers: Collection[nn.Module]) -> list[nn.TransformerEncoderLayer]:
    """The encoder layers that would hand the weights of one of `layers` to their fused kernel.

    It is not used where ``activation_relu_or_gelu`` is 0.
    """
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    return [encoder for encoder in encoders if any(module in layers for module in encoder.modules())]


def nesting(model: nn.Module) -> list[nn.TransformerEncoder]:
    """The encoders that would hand nested tensors to their layers, which only PyTorch's fused kernel can read."""
    return [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor]


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Puts an `OpenAttention` in the place of each ``nn.MultiheadAttention``, and each back afterwards."""
    old, encoders = closed(model), nesting(model)
    new = {id(module): OpenAttention(module) for module in old.values()}
    try:
        for encoder in encoders:
            encoder.use_nested_tensor = False
        for name, module in old.items():
            _put(model, name, new[id(module)])
        yield
    finally:
        for encoder in encoders:
            encoder.use_nested_tensor = True
        for name, module in old.items():
            _put(model, name, module)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    model.get_submodule(parent)._modules[key] = module
