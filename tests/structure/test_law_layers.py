"""The law on small networks, by layer type and by architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

S = nn.Sequential


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 3, 8, 8)), generator=torch.Generator().manual_seed(3))


def conv(i: int, o: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, kernel, padding=kernel // 2, **options)


def pooled(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3))


def end(channels: int) -> S:
    return S(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


class Block(nn.Module):
    """A residual block of a CIFAR ResNet, with the option A shortcut: subsampled, padded with zero channels."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = conv(o, o, bias=False), nn.BatchNorm2d(o)
        self.more = o - i

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(y + x)


class SqueezeExcite(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(n, n // 4), nn.Linear(n // 4, n)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.up(self.down(pooled(x)).relu()).sigmoid()[:, :, None, None]


class Inverted(nn.Module):
    """An inverted residual with squeeze and excitation (MobileNetV3)."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        n = 4 * i
        self.body = S(
            S(nn.Conv2d(i, n, 1), nn.BatchNorm2d(n), nn.ReLU6()),
            S(conv(n, n, groups=n), nn.BatchNorm2d(n), nn.Hardswish()),
            SqueezeExcite(n),
            S(nn.Conv2d(n, o, 1), nn.BatchNorm2d(o)),
        )
        self.residual = i == o

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class ConvNextBlock(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.depthwise, self.norm = conv(n, n, 7, groups=n), nn.LayerNorm(n)
        self.up, self.down = nn.Linear(n, 4 * n), nn.Linear(4 * n, n)
        self.scale = nn.Parameter(torch.randn(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.down(F.gelu(self.up(y))) * self.scale).permute(0, 3, 1, 2)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d1, self.d2, self.d3 = self.double(3, 8), self.double(8, 12), self.double(12, 16)
        self.u2, self.c2 = nn.ConvTranspose2d(16, 12, 2, 2), self.double(24, 12)
        self.u1, self.c1 = nn.ConvTranspose2d(12, 8, 2, 2), self.double(16, 8)
        self.out = nn.Conv2d(8, 4, 1)

    @staticmethod
    def double(i: int, o: int) -> S:
        norm = lambda: (nn.BatchNorm2d(o), nn.ReLU(inplace=True))  # noqa: E731
        return S(conv(i, o, bias=False), *norm(), conv(o, o, bias=False), *norm())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.d1(x)
        b = self.d2(F.max_pool2d(a, 2))
        y = self.c2(torch.cat([self.u2(self.d3(F.max_pool2d(b, 2))), b], 1))
        return self.out(self.c1(torch.cat([a, self.u1(y)], 1)))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.layers = nn.ModuleList(S(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), conv(8 + 4 * i, 4)) for i in range(3))
        self.norm, self.fc = nn.BatchNorm2d(20), nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.fc(pooled(self.norm(x).relu()))


class Standardised(nn.Conv2d):
    """A convolution that computes its weight; surgery must cope with the subclass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, torch.tanh(self.weight), self.bias)


class BatchStandardised(nn.Conv2d):
    """A convolution whose filters are standardised by `F.batch_norm` (timm's ScaledStdConv2d)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


class Tanh(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.tanh(weight)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 3)


def parametrized(module: nn.Module) -> nn.Module:
    torch.nn.utils.parametrize.register_parametrization(module, "weight", Tanh())
    return module


def tied(*names: str, **modules: nn.Module) -> dict[str, nn.Module]:
    """The second named module gets the first one's weight."""
    modules[names[1]].weight = modules[names[0]].weight
    return modules


def two_names(module: nn.Module, **modules: nn.Module) -> dict[str, nn.Module]:
    return {**modules, "b": module, "c": module}


def chain(s: Any, x: torch.Tensor) -> torch.Tensor:
    return s.fc(pooled(s.c(s.b(s.a(x)).relu())))


def shuffle_net(s: Any, x: torch.Tensor) -> torch.Tensor:
    a, b = s.a(x).chunk(2, 1)
    n, c, h, w = x.shape[0], 16, *x.shape[2:]
    y = torch.cat([a, s.branch(b)], 1)
    c = y.shape[1]
    return s.out(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def selective(s: Any, x: torch.Tensor) -> torch.Tensor:
    u = torch.stack([s.a(x), s.b(x)], 1)
    w = s.up(s.down(pooled(u.sum(1))).relu()).view(x.shape[0], 2, -1).softmax(1)
    return s.out((u * w[..., None, None]).sum(1))


def pyramid(s: Any, x: torch.Tensor) -> list[torch.Tensor]:
    a = s.a(x).relu()
    b = s.b(a).relu()
    top = s.side_b(b)
    return [s.head(s.smooth(p).relu()) for p in (s.side_a(a) + F.interpolate(top, scale_factor=2), top)]


def recurrent(s: Any, x: torch.Tensor) -> torch.Tensor:
    y = s.a(x)
    for _ in range(3):
        y = (y + s.again(y)).tanh()
    return s.out(y)


def mixer(s: Any, x: torch.Tensor) -> torch.Tensor:
    y = s.patches(x).flatten(2).transpose(1, 2)
    y = y + s.t2(s.t1(y.transpose(1, 2)).relu()).transpose(1, 2)
    return s.fc((y + s.c2(s.c1(y).relu())).mean(1))


def norm(module: Callable[[], nn.Module], families: str = "a:16 d:8") -> tuple[Any, Any, str]:
    """A case with one norm, or another layer per channel, between convolutions."""
    parts = lambda: {"a": conv(3, 16), "norm": module(), "d": conv(16, 8), "fc": nn.Linear(8, 5)}  # noqa: E731
    return parts, lambda s, x: s.fc(pooled(s.d(s.norm(s.a(x))).relu())), families


CASES: dict[str, tuple[Any, Any, str]] = {
    "mlp": (lambda: S(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 2)), None, "0:12 2:10"),
    "unet": (UNet, None, "d1.0:8 d1.3:8 d2.0:12 d2.3:12 d3.0:16 d3.3:16 u2:12 c2.0:12 c2.3:12 u1:8 c1.0:8 c1.3:8"),
    "resnet, option A": (
        lambda: S(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), Block(8, 8), Block(8, 16, 2), Block(16, 16), end(16)),
        None,
        "0:8 3.conv1:8 4.conv1:16 5.conv1:16",
    ),
    "inverted residuals": (
        lambda: S(conv(3, 8), Inverted(8, 8), Inverted(8, 12), end(12)),
        None,
        "0:8 1.body.0.0:32 1.body.2.down:8 2.body.0.0:32 2.body.2.down:8 2.body.3.0:12",
    ),
    "convnext": (
        lambda: S(nn.Conv2d(3, 8, 2, 2), ConvNextBlock(8), nn.Conv2d(8, 12, 2, 2), ConvNextBlock(12), end(12)),
        None,
        "0:8~ 1.up:32 2:12~ 3.up:48",
    ),
    "densenet": (DenseNet, None, "stem:8 layers.0.2:4 layers.1.2:4 layers.2.2:4"),
    "shufflenet v2": (
        lambda: {
            "a": conv(3, 16),
            "branch": S(nn.Conv2d(8, 8, 1), nn.ReLU(), conv(8, 8, groups=8), nn.Conv2d(8, 8, 1)),
            "out": nn.Conv2d(16, 3, 1),
        },
        shuffle_net,
        "a:8 branch.0:8",
    ),
    "selective kernels": (
        lambda: {"a": conv(3, 8), "b": conv(3, 8), "down": nn.Linear(8, 4), "up": nn.Linear(4, 16), "out": conv(8, 2)},
        selective,
        "a:8 down:4",
    ),
    "feature pyramid": (
        lambda: {
            "a": nn.Conv2d(3, 8, 3, 2, 1), "b": nn.Conv2d(8, 10, 3, 2, 1), "side_a": nn.Conv2d(8, 12, 1),
            "side_b": nn.Conv2d(10, 12, 1), "smooth": conv(12, 6), "head": nn.Conv2d(6, 2, 1),
        },
        pyramid,
        "a:8 b:10 side_b:12 smooth:6",
    ),
    "mlp mixer": (
        lambda: {
            "patches": nn.Conv2d(3, 8, 2, 2), "t1": nn.Linear(16, 12), "t2": nn.Linear(12, 16),
            "c1": nn.Linear(8, 20), "c2": nn.Linear(20, 8), "fc": nn.Linear(8, 5),
        },
        mixer,
        "patches:8 t1:12 c1:20",
    ),
    "recurrent convolution": (
        lambda: {"a": conv(3, 8), "again": conv(8, 8), "out": conv(8, 3)}, recurrent, "a:8",
    ),
    "depthwise separable": (
        lambda: S(conv(3, 8), nn.ReLU(), conv(8, 8, groups=8), nn.Conv2d(8, 16, 1), nn.ReLU(), end(16)),
        None,
        "0:8 3:16",
    ),
    "depth multiplier": (
        lambda: S(conv(3, 8), conv(8, 24, groups=8), nn.ReLU(), nn.Conv2d(24, 16, 1), nn.ReLU(), end(16)),
        None,
        "0:8 3:16",
    ),
    "two groups": (
        lambda: S(conv(3, 8), conv(8, 12, groups=2), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 8), end(8)),
        None,
        "0:4 1:6 4:8",
    ),
    "four groups, then two": (
        lambda: S(conv(3, 16), conv(16, 32, groups=4), nn.ReLU(), conv(32, 8, groups=2), end(8)), None, "0:4 1:8 3:4",
    ),
    "eight narrow groups": (
        lambda: S(conv(3, 16), conv(16, 32, groups=8), nn.BatchNorm2d(32), nn.ReLU(), conv(32, 8), end(8)),
        None,
        "0:8 4:8",
    ),
    "conv 1d": (
        lambda: S(
            nn.Conv1d(3, 8, 5, padding=2), nn.BatchNorm1d(8), nn.MaxPool1d(2), nn.Conv1d(8, 12, 3, dilation=2),
            nn.Upsample(scale_factor=2, mode="linear"), nn.Conv1d(12, 2, 1),
        ),
        None,
        "0:8 3:12",
    ),
    "conv 3d": (
        lambda: S(
            nn.Conv3d(3, 6, 3, padding=1), nn.BatchNorm3d(6), nn.MaxPool3d(2), nn.Conv3d(6, 8, (1, 3, 3)),
            nn.Upsample(scale_factor=2, mode="trilinear"), nn.Conv3d(8, 2, 1),
        ),
        None,
        "0:6 3:8",
    ),
    "transposed 1d": (
        lambda: S(nn.ConvTranspose1d(3, 8, 3, 2), nn.ReLU(), nn.ConvTranspose1d(8, 3, 3, 2, output_padding=1)),
        None,
        "0:8",
    ),
    "padding modes": (
        lambda: S(
            nn.ReflectionPad2d(1), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding_mode="circular", padding=1),
            nn.ConstantPad2d(2, 0.7), nn.Conv2d(8, 8, 3, padding_mode="reflect", padding=1), nn.Conv2d(8, 3, 3),
        ),
        None,
        "1:8 2:8 4:8",
    ),
    "kernels and strides": (
        lambda: S(
            nn.Conv2d(3, 8, 4, padding="same"), nn.Conv2d(8, 8, (3, 5), padding="same", dilation=2),
            nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.Conv2d(6, 4, 2, stride=2), nn.Conv2d(4, 3, 1),
        ),
        None,
        "0:8 1:8 2:6 3:4",
    ),
    "one channel": (lambda: S(conv(3, 1), conv(1, 1), conv(1, 8), nn.ReLU(), conv(8, 2)), None, "2:8"),
    "bias straight into a sum": (
        lambda: {"a": conv(3, 8), "d": conv(8, 12), "b": conv(12, 8), "fc": nn.Linear(8, 5)},
        lambda s, x: s.fc(pooled((y := s.a(x)) + s.b(s.d(y).relu()))),
        "a:8 d:12",
    ),
    "flatten into batch norm": (
        lambda: S(conv(3, 8), nn.MaxPool2d(2), nn.Flatten(), nn.BatchNorm1d(128), nn.Linear(128, 6), nn.Dropout(),
                  nn.Linear(6, 5)),
        None,
        "0:8 4:6",
    ),
    "embedding": (
        lambda: {"e": nn.Embedding(10, 8), "fc": nn.Linear(8, 3)}, lambda s, i: s.fc(s.e(i).relu()), "e:8",
    ),
    "called twice": (
        lambda: {"a": conv(3, 8), "b": conv(8, 8), "c": conv(8, 12), "fc": nn.Linear(12, 5)},
        lambda s, x: s.fc(pooled(s.c(s.b(s.b(s.a(x)).relu())))),
        "a:8 c:12",
    ),
    "one module, two names": (lambda: two_names(conv(8, 8), a=conv(3, 8), fc=nn.Linear(8, 5)), chain, "a:8"),
    "tied weights": (
        lambda: tied("b", "c", a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), fc=nn.Linear(8, 5)), chain, "a:8",
    ),
    "tied depthwise weights": (
        lambda: tied("b", "c", a=conv(3, 8), b=conv(8, 8, groups=8), c=conv(8, 8, groups=8), fc=nn.Linear(8, 5)),
        chain,
        "a:8",
    ),
    "a weight and its transpose": (
        lambda: {"a": nn.Linear(8, 8), "w": nn.Parameter(torch.randn(12, 8)), "b": nn.Linear(8, 2)},
        lambda s, x: s.b(F.linear(F.linear(s.a(x), s.w).relu(), s.w.t()).relu()),
        "a:8",
    ),
    "weights of no module": (
        lambda: {"p": weight(8, 12), "c": weight(12), "q": weight(12, 10), "b": nn.Linear(10, 2)},
        lambda s, x: s.b(((x @ s.p + s.c).relu() @ s.q).relu()),
        "p:12 q:10",
    ),
    "weights of no module and a bias": (
        lambda: {"p": weight(8, 12), "c": weight(12), "b": nn.Linear(12, 2)},
        lambda s, x: s.b(torch.addmm(s.c, x, s.p).relu()),
        "p:12",
    ),
    "added to a product": (
        lambda: {"a": nn.Linear(8, 12), "p": weight(8, 12), "b": nn.Linear(12, 6), "c": nn.Linear(6, 2)},
        lambda s, x: s.c(s.b(torch.addmm(s.a(x), x, s.p).relu()).relu()),
        "b:6",
    ),
    "a weight of no module, on the left": (
        lambda: {"p": weight(12, 8), "b": nn.Linear(12, 2)}, lambda s, x: s.b((s.p @ x.T).relu().T), "p:12",
    ),
    "experts": (
        lambda: {"p": weight(3, 8, 12), "q": weight(3, 12, 8), "b": nn.Linear(8, 2)},
        lambda s, x: s.b(torch.bmm(torch.bmm(x.expand(3, -1, -1), s.p).relu(), s.q).mean(0)),
        "p:12 q:8",
    ),
    "a shift of a product": (
        lambda: {"a": nn.Linear(8, 6), "p": weight(3, 4, 6), "b": nn.Linear(6, 9), "c": nn.Linear(9, 2)},
        lambda s, x: s.c(s.b(torch.baddbmm(s.p, x.expand(3, -1, -1), s.a(x.T @ x).expand(3, -1, -1))).relu()),
        "a:6 b:9",
    ),
    "weights multiplied with each other": (
        lambda: {"a": nn.Linear(8, 6), "p": weight(6, 4), "q": weight(4, 10), "b": nn.Linear(10, 9), "c": weight(9, 2)},
        lambda s, x: s.b((s.a(x) @ (s.p @ s.q)).relu()).relu() @ s.c,
        "b:9",
    ),
    "a weight used by a function": (
        lambda: {"a": conv(3, 8), "w": nn.Parameter(torch.randn(6, 8, 3, 3)), "b": conv(6, 3)},
        lambda s, x: s.b(F.conv2d(s.a(x), s.w).relu()),
        "a:8 w:6",
    ),
    "a convolution's weight used by a function too": (
        lambda: {"a": conv(3, 8), "b": conv(8, 3)},
        lambda s, x: s.b(s.a(x) + F.conv2d(x, s.a.weight, padding=2, dilation=2)),
        "a:8",
    ),
    "computed weights": (
        lambda: S(Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 8, 3), nn.ReLU(), conv(8, 2)), None, "0:8 2:8",
    ),
    "weights standardised as a batch": (
        lambda: S(BatchStandardised(3, 8, 1), nn.ReLU(), BatchStandardised(8, 6, 1), nn.ReLU(), conv(6, 2)),
        None,
        "0:8~ 2:6",
    ),
    "weight norm": (
        lambda: S(weight_norm(conv(3, 8)), nn.ReLU(), weight_norm(conv(8, 6)), nn.ReLU(), conv(6, 2)),
        None,
        "0.parametrizations.weight.original1:8~ 2.parametrizations.weight.original1:6",
    ),
    "parametrized": (
        lambda: S(conv(3, 8), nn.ReLU(), parametrized(conv(8, 8)), nn.ReLU(), conv(8, 2)),
        None,
        "0:8 2.parametrizations.weight.original:8",
    ),
    "batch norm": norm(lambda: nn.BatchNorm2d(16)),
    "batch norm without affine": norm(lambda: nn.BatchNorm2d(16, affine=False)),
    "batch norm without statistics": norm(lambda: nn.BatchNorm2d(16, track_running_stats=False)),
    "batch norm without anything": norm(lambda: nn.BatchNorm2d(16, affine=False, track_running_stats=False)),
    "instance norm": norm(lambda: nn.InstanceNorm2d(16, affine=True, track_running_stats=True)),
    "rms norm": (
        lambda: S(nn.Linear(8, 12), nn.RMSNorm(12, eps=1e-6), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 2)),
        None,
        "0:12~ 2:10",
    ),
    "group norm": norm(lambda: nn.GroupNorm(4, 16), "a:4~ d:8"),
    "group norm without affine": norm(lambda: nn.GroupNorm(4, 16, affine=False), "a:4~ d:8"),
    "local response norm": norm(lambda: nn.LocalResponseNorm(3), "d:8"),
    "prelu by channel": norm(lambda: nn.PReLU(16)),
    "prelu": norm(lambda: nn.PReLU()),
    "channel shuffle": norm(lambda: nn.ChannelShuffle(4), "a:4 d:8"),
    "dropout": norm(lambda: S(nn.Dropout(0.3), nn.Dropout2d(0.3), nn.AlphaDropout(0.3))),
    "pooling": norm(lambda: S(nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1), nn.AdaptiveMaxPool2d(4))),
    "upsampling": norm(
        lambda: S(
            nn.Upsample(scale_factor=2, mode="nearest-exact"), nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Upsample(size=(8, 8), mode="bicubic"), nn.Upsample(scale_factor=2, mode="area"),
        )
    ),
}  # fmt: skip

INPUTS: dict[str, tuple[Any, ...]] = {
    "mlp": (image(4, 8),),
    "rms norm": (image(4, 8),),
    "conv 1d": (image(2, 3, 16),),
    "conv 3d": (image(2, 3, 8, 8, 8),),
    "transposed 1d": (image(2, 3, 9),),
    "embedding": (torch.tensor([[1, 2, 3], [7, 1, 0]]),),
    "a weight and its transpose": (image(4, 8),),
    "weights of no module": (image(4, 8),),
    "a weight of no module, on the left": (image(4, 8),),
    "weights of no module and a bias": (image(4, 8),),
    "added to a product": (image(4, 8),),
    "experts": (image(4, 8),),
    "a shift of a product": (image(4, 8),),
    "weights multiplied with each other": (image(4, 8),),
}


@pytest.mark.parametrize("name", CASES)
def test_the_law_holds(name: str, make, law) -> None:
    build, forward, families = CASES[name]
    law(make(build, forward), INPUTS.get(name, (image(),)), {}, families)
