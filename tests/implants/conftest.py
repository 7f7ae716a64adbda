"""Convolutions of every kind that the implants must stand in for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from hap.implants import Dense, Fitted, Geometry, Implanted, Target, build, form_of, from_weights
from hap.types import Layer

SPATIAL = {nn.Conv1d: (11,), nn.Conv2d: (9, 10), nn.Conv3d: (6, 7, 6)}
CASES = {
    "1d": (nn.Conv1d, 3, {"padding": 1}),
    "1d, even": (nn.Conv1d, 2, {}),
    "2d": (nn.Conv2d, 3, {"padding": 1}),
    "2d, no bias": (nn.Conv2d, 3, {"padding": 1, "bias": False}),
    "2d, no padding": (nn.Conv2d, 3, {}),
    "2d, strided": (nn.Conv2d, 3, {"padding": 1, "stride": 2}),
    "2d, dilated": (nn.Conv2d, 3, {"padding": 2, "dilation": 2}),
    "2d, strided and dilated": (nn.Conv2d, 3, {"padding": (0, 3), "stride": (2, 3), "dilation": (2, 1)}),
    "2d, 5 x 5": (nn.Conv2d, 5, {"padding": 2, "stride": 2}),
    "2d, padded too much": (nn.Conv2d, 3, {"padding": 3, "stride": 2}),
    "2d, even": (nn.Conv2d, 4, {"padding": 1, "stride": 2}),
    "2d, even, 2": (nn.Conv2d, 2, {"padding": 1}),
    "2d, 1 x 3": (nn.Conv2d, (1, 3), {"padding": (0, 1)}),
    "2d, same": (nn.Conv2d, 3, {"padding": "same", "dilation": 2}),
    "2d, same, even": (nn.Conv2d, 4, {"padding": "same", "dilation": (1, 2)}),
    "2d, valid": (nn.Conv2d, (3, 2), {"padding": "valid", "stride": 2}),
    "2d, reflect": (nn.Conv2d, 3, {"padding": 3, "padding_mode": "reflect"}),
    "2d, reflect, uneven": (nn.Conv2d, (5, 3), {"padding": (1, 2), "padding_mode": "reflect", "stride": 2}),
    "2d, circular": (nn.Conv2d, 3, {"padding": 2, "padding_mode": "circular"}),
    "2d, replicate": (nn.Conv2d, 4, {"padding": 3, "padding_mode": "replicate"}),
    "2d, same, reflect": (nn.Conv2d, 2, {"padding": "same", "padding_mode": "reflect"}),
    "1d, circular": (nn.Conv1d, 3, {"padding": 3, "padding_mode": "circular", "dilation": 2}),
    "3d": (nn.Conv3d, 3, {"padding": (1, 0, 1), "stride": (1, 2, 1)}),
    "3d, 1 in the middle": (nn.Conv3d, (3, 1, 2), {"padding": 1, "stride": (2, 3, 1)}),
    "3d, replicate": (nn.Conv3d, (2, 3, 3), {"padding": 2, "padding_mode": "replicate"}),
    "depthwise": (nn.Conv2d, 3, {"padding": 1, "groups": 6}),
    "depthwise, strided, no bias": (nn.Conv2d, 3, {"padding": 1, "groups": 6, "stride": 2, "bias": False}),
    "depthwise, 1d": (nn.Conv1d, 5, {"padding": "same", "groups": 6}),
    "grouped": (nn.Conv2d, 3, {"padding": 1, "groups": 3}),
    "grouped, reflect": (nn.Conv2d, 3, {"padding": 2, "padding_mode": "reflect", "groups": 3}),
}


@pytest.fixture
def every_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """For oracles that fit on all positions."""
    monkeypatch.setattr("hap.implants.sums.FEW", 1 << 30)


@pytest.fixture(params=CASES)
def conv(request: pytest.FixtureRequest) -> _ConvNd:
    """6 channels in and 6 out (12 where there are 3 groups), float64."""
    kind, kernel, options = CASES[request.param]
    made = kind(6, 12 if options.get("groups") == 3 else 6, kernel, **options).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return made


@pytest.fixture
def x(conv: _ConvNd) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 6, *SPATIAL[type(conv)], generator=generator, dtype=torch.float64)


FORMS = {"pointwise": None, "low-rank": 2, "depthwise": 1, "depthwise, 2 kernels": 2, "spatial": 3, "tucker": 4}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> tuple[str, int | None]:
    """Every form, by name, with a rank."""
    return request.param.partition(",")[0], FORMS[request.param]


def record(layer: Dense) -> Layer:
    """What a structure would say of it."""
    bias = None if layer.bias is None else "bias"
    geometry = Geometry.of(layer)
    return Layer("", "weight", bias, len(layer.weight), 0, geometry.kernel, geometry.groups, False, 1)


@pytest.fixture
def layer_of() -> Callable[[Dense], Layer]:
    return record


@pytest.fixture
def implant() -> Callable[..., Implanted]:
    """Makes an implanted layer of a whole one, fitted to the weights alone."""

    def make(
        layer: Dense,
        rows: Sequence[int],
        form: str = "pointwise",
        rank: int | None = None,
        fitted: Fitted | None = None,
    ) -> Implanted:
        target = Target(sorted(rows), range(layer.weight.shape[1]), form_of(form), rank)
        bias = None if layer.bias is None else layer.bias.detach()
        flags = [i in rows for i in range(len(layer.weight))]
        return build(layer, layer.weight.detach(), bias, flags, fitted or from_weights(layer, target))

    return make
