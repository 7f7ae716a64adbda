"""Models in the styles that users write, each for one habit that a tracer must understand."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


def block(inside: int, outside: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU())


class UNet(nn.Module):
    """Skips joined by ``cat``, transposed convolutions on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = block(3, 8), block(8, 16), block(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.join2, self.join1 = block(32, 16), block(16, 8)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.middle(F.max_pool2d(second, 2))
        x = self.join2(torch.cat([self.up2(x), second], dim=1))
        return self.out(self.join1(torch.cat([self.up1(x), first], dim=1)))


class LSTMTagger(nn.Module):
    """Embedding, a bidirectional LSTM of two layers, a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 24, num_layers=2, batch_first=True, bidirectional=True)
        self.hidden, self.out = nn.Linear(48, 32), nn.Linear(32, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(self.embed(tokens))
        return self.out(F.relu(self.hidden(states[:, -1])))


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` in a block of one's own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class CrossAttention(nn.Module):
    """`nn.MultiheadAttention` from one sequence to another of other width, its weights returned too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 32)
        self.attention = nn.MultiheadAttention(32, 4, kdim=20, vdim=20, batch_first=True)
        self.out = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, weights = self.attention(self.embed(x), memory, memory)
        return self.out(y.mean(1)), weights


class Encoder(nn.Module):
    """`nn.TransformerEncoder` with a padding mask."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(32, 5)

    def forward(self, tokens: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.out(self.encoder(self.embed(tokens), src_key_padding_mask=padding).mean(1))


class Translator(nn.Module):
    """`nn.Transformer`, tokens first, with a causal mask.

    Without ``tgt_is_causal`` the module looks at the mask's values to find out, which no graph can hold.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.transformer = nn.Transformer(32, 4, 1, 1, 64)
        self.out = nn.Linear(32, 50)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        source, target = self.embed(source).transpose(0, 1), self.embed(target).transpose(0, 1)
        return self.out(self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True).transpose(0, 1))


class BareParameters(nn.Module):
    """Weights that are parameters of no layer: ``@``, ``F.linear``, ``addmm`` and a scale by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shift = nn.Parameter(torch.randn(12, 24) / 3), nn.Parameter(torch.randn(24))
        self.scale = nn.Parameter(torch.ones(24))
        self.second = nn.Parameter(torch.randn(20, 24) / 5)
        self.third, self.bias = nn.Parameter(torch.randn(20, 5) / 4), nn.Parameter(torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(x @ self.first + self.shift) * self.scale
        x = F.relu(F.linear(x, self.second))
        return torch.addmm(self.bias, x, self.third)


class Gather(nn.Module):
    """Token of a given position by ``gather``, rows by ``index_select`` and by fancy indexing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(50, 24), nn.Linear(24, 32)
        self.middle, self.out = nn.Linear(32, 16), nn.Linear(16, 5)
        self.register_buffer("order", torch.tensor([2, 0, 1, 3]))

    def forward(self, tokens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.hidden(self.embed(tokens))).index_select(1, self.order)
        where = last[:, None, None].expand(-1, 1, x.shape[-1])
        x = x.gather(1, where).squeeze(1) + x[torch.arange(x.shape[0]), last]
        return self.out(F.relu(self.middle(x)))


class Pieces(nn.Module):
    """Channels split into unequal parts and joined again, shuffled and gated (``F.glu``)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 24)
        self.small, self.large = block(8, 8), block(16, 16)
        self.gates = nn.Conv2d(24, 32, 1)
        self.out = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.stem(x).split([8, 16], dim=1)
        x = torch.cat([self.large(right), self.small(left)], dim=1)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.out(F.glu(self.gates(x), dim=1).mean((2, 3)))


class Squeezed(nn.Module):
    """Grouped and depthwise convolutions, squeeze-and-excitation, pixel shuffle, GroupNorm in a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.wide, self.depthwise = nn.Conv2d(16, 48, 1), nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.squeeze, self.excite = nn.Conv2d(48, 12, 1), nn.Conv2d(12, 48, 1)
        self.narrow, self.norm = nn.Conv2d(48, 16, 1), nn.GroupNorm(4, 16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.up, self.out = nn.Conv2d(16, 24, 1), nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = F.silu(self.depthwise(F.silu(self.wide(x))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        x = self.norm(x + self.narrow(y))
        x = x + F.relu(self.grouped(x))
        return self.out(F.pixel_shuffle(self.up(x), 2))


class Signal(nn.Module):
    """One-dimensional dilated convolutions with a gate and skips (WaveNet), weight-normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 16, 1)
        norm = nn.utils.parametrizations.weight_norm
        self.filters = nn.ModuleList(norm(nn.Conv1d(16, 32, 3, padding=d, dilation=d)) for d in (1, 2))
        self.skips = nn.ModuleList(nn.Conv1d(16, 16, 1) for _ in range(2))
        self.hidden, self.out = nn.Conv1d(16, 24, 1), nn.Conv1d(24, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        total = torch.zeros_like(x)
        for gated, skip in zip(self.filters, self.skips, strict=True):
            a, b = gated(x).chunk(2, dim=1)
            y = skip(torch.tanh(a) * torch.sigmoid(b))
            x, total = x + y, total + y
        return self.out(F.relu(self.hidden(F.relu(total))))


class Volume(nn.Module):
    """Three-dimensional convolutions and a flattened classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv3d(1, 8, 3, padding=1), nn.InstanceNorm3d(8, affine=True), nn.ReLU(), nn.MaxPool3d(2),
            nn.Conv3d(8, 16, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2),
        )  # fmt: skip
        self.classify = nn.Sequential(nn.Flatten(), nn.Linear(16 * 8, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(self.features(x))


class Mixer(nn.Module):
    """Patches by ``unfold``, token mixing through a transposition, a gated feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(48, 32)
        self.tokens = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.gate, self.value, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.out = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(F.unfold(x, 4, stride=4).transpose(1, 2))
        x = x + self.tokens(x.mT).mT
        x = x + self.down(F.silu(self.gate(x)) * self.value(x))
        return self.out(x.mean(1))


class Shared(nn.Module):
    """One layer called twice, and an embedding whose weight is the classifier's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)
        self.head = nn.Linear(24, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for _ in range(2):
            x = x + self.down(F.gelu(self.up(x)))
        return self.head(x)


class Trunk(nn.Module):
    """A small network with two heads, for the modules below."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            block(3, 16), nn.MaxPool2d(2), block(16, 24), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.classify = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 5))
        self.locate = nn.Sequential(nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 4))


class TupleOutputs(Trunk):
    """Returns a tuple."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.features(x)
        return self.classify(x), self.locate(x)


class DictOutputs(Trunk):
    """Returns a dict, with a nested list."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        x = self.features(x)
        return {"logits": self.classify(x), "others": [self.locate(x), x.mean()]}


@dataclass
class Prediction:
    """A dataclass that PyTorch has not been told about."""

    logits: torch.Tensor
    box: torch.Tensor


class DataclassOutputs(Trunk):
    """Returns a dataclass of the user's."""

    def forward(self, x: torch.Tensor) -> Prediction:
        x = self.features(x)
        return Prediction(self.classify(x), self.locate(x))


@dataclass
class KnownPrediction:
    """A dataclass registered with `torch.export`."""

    logits: torch.Tensor
    box: torch.Tensor


torch.export.register_dataclass(KnownPrediction, serialized_type_name="KnownPrediction")


class KnownDataclassOutputs(DataclassOutputs):
    """Returns a registered dataclass."""

    def forward(self, x: torch.Tensor) -> KnownPrediction:  # type: ignore[override]
        found = super().forward(x)
        return KnownPrediction(**{field.name: getattr(found, field.name) for field in dataclasses.fields(found)})


class SeveralInputs(nn.Module):
    """An image and a row of numbers, with an optional mask by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(block(3, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.numbers = nn.Sequential(nn.Linear(6, 16), nn.ReLU())
        self.out = nn.Linear(32, 5)

    def forward(self, image: torch.Tensor, numbers: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        a, b = self.image(image), self.numbers(numbers)
        if mask is not None:
            b = b.masked_fill(mask[:, None], 0.0)
        return self.out(torch.cat([a, b], dim=1))


class Recurrent(nn.Module):
    """A recurrence written by hand over a few steps, with stacked outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.state, self.out = nn.Linear(6, 24), nn.Linear(24, 24, bias=False), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = x.new_zeros(x.shape[0], 24)
        states = []
        for step in range(x.shape[1]):
            state = torch.tanh(self.read(x[:, step]) + self.state(state))
            states.append(state)
        return self.out(torch.stack(states, dim=1))


class Experts(nn.Module):
    """A dense mixture of experts with stacked weights and ``bmm``."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(12, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 12, 24) / 3), nn.Parameter(torch.randn(4, 24, 12) / 5)
        self.out = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.router(x).softmax(-1)
        y = torch.bmm(F.gelu(torch.bmm(x.expand(4, -1, -1), self.up)), self.down)
        return self.out(torch.einsum("ebc,be->bc", y, weights))
