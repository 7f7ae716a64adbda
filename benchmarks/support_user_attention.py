"""Attention as people write it; every module maps ``(batch, tokens, width)`` to the same shape."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class FusedQKV(nn.Module):
    """One projection for queries, keys and values, taken apart by a reshape (nanoGPT, timm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, n, -1))


class Chunked(nn.Module):
    """Taken apart by ``chunk``, and a softmax written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Split(nn.Module):
    """Taken apart by ``split`` with sizes; fewer keys and values than queries, repeated (grouped-query attention)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size, self.groups = width // heads, heads // 2
        self.qkv = nn.Linear(width, width + 2 * self.groups * self.size)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        narrow = self.groups * self.size
        q, k, v = self.qkv(x).split([self.out.in_features, narrow, narrow], dim=2)
        q, k, v = (t.unflatten(-1, (-1, self.size)).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, n, -1))


class Einsum(nn.Module):
    """Weights of three axes and einsum (Tensor2Tensor, JAX style)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        size = width // heads
        self.q, self.k, self.v = (nn.Parameter(torch.randn(width, heads, size) / width**0.5) for _ in range(3))
        self.out = nn.Parameter(torch.randn(heads, size, width) / width**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (torch.einsum("bnc,chd->bhnd", x, w) for w in (self.q, self.k, self.v))
        weights = torch.einsum("bhnd,bhmd->bhnm", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
        return torch.einsum("bhnd,hdc->bnc", torch.einsum("bhnm,bhmd->bhnd", weights, v), self.out)


class LinearThenEinsum(nn.Module):
    """Linear layers, with einsum for the two products."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = (layer(x).view(b, n, self.heads, -1) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1)
        return self.out(torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(b, n, -1))


class Einops(nn.Module):
    """Rearranged by einops (lucidrains' vit-pytorch)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from einops import rearrange

        qkv = self.to_qkv(x).chunk(3, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in qkv)
        weights = torch.matmul(q, k.transpose(-1, -2)).softmax(-1)
        return self.to_out(rearrange(torch.matmul(weights, v), "b h n d -> b n (h d)"))


class Rotary(nn.Module):
    """Rotary positions, normalised queries and keys, one key and value for all heads (multi-query attention)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * self.size, bias=False)
        self.norm = nn.RMSNorm(self.size)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q = self.norm(self.q(x).view(b, n, -1, self.size)).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, 1, self.size).permute(2, 0, 3, 1, 4)
        q, k = self._rotated(q), self._rotated(self.norm(k))
        y = F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q), is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        half = self.size // 2
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / 10.0 ** torch.arange(half, dtype=x.dtype)
        angle = torch.cat([angle, angle], dim=-1)
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * angle.cos() + turned * angle.sin()


class LinearAttention(nn.Module):
    """Feature maps in place of the softmax: keys and values are multiplied first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        scale = (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)
        return self.out((q @ (k.transpose(-2, -1) @ v) / scale).transpose(1, 2).flatten(2))


class BlockClassifier(nn.Module):
    """Embedding, two pre-norm blocks around the attention given, mean over tokens, linear classifier."""

    def __init__(self, attention: type[nn.Module], width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(12, width)
        self.attention = nn.ModuleList(attention(width, heads) for _ in range(2))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(2)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.classify = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for norm, attention, mlp in zip(self.norm, self.attention, self.mlp, strict=True):
            x = x + attention(norm(x))
            x = x + mlp(x)
        return self.classify(x.mean(1))
