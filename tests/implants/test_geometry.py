from __future__ import annotations

import pytest
import torch
from torch import nn

from hap.implants import Geometry
from hap.implants.pointwise import Shift


def test_the_filters_times_the_views_are_the_outputs(conv, x) -> None:
    geometry = Geometry.of(conv)
    views = geometry.views(x)
    positions = views.shape[3:]
    grouped = views.reshape(3, conv.groups, -1, geometry.taps, *positions)
    weight = conv.weight.reshape(conv.groups, -1, conv.weight.shape[1], geometry.taps)
    y = torch.einsum("goct,ngct...->ngo...", weight, grouped).reshape(3, -1, *positions)
    if conv.bias is not None:
        y = y + conv.bias.reshape(-1, *[1] * len(positions))
    torch.testing.assert_close(y, conv(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(geometry.views(x, centre=True), views[:, :, [geometry.centre]])
    some = torch.tensor([0, views[0, 0, 0].numel() - 1])
    at = (..., *torch.unravel_index(some, positions))
    assert torch.equal(geometry.views(x, at=at), views.flatten(3)[..., some])


def test_a_linear_layer_has_one_tap() -> None:
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(3, 4, bias=False)
    geometry = Geometry.of(layer)
    assert (geometry.taps, geometry.channel_axis) == (1, -1)
    views = geometry.views(x)
    assert views.shape == (2, 3, 1, 5)
    torch.testing.assert_close(torch.einsum("oc,nctp->npo", layer.weight, views), layer(x))


def test_the_centre_is_the_earlier_middle_tap() -> None:
    assert [Geometry((k,)).centre for k in (1, 2, 3, 4, 5)] == [0, 0, 1, 1, 2]
    assert Geometry((3, 4)).centre == 1 * 4 + 1


def test_a_layer_has_the_settings(conv, x) -> None:
    made = Geometry.of(conv).layer(conv.weight.detach(), None if conv.bias is None else conv.bias.detach())
    assert type(made) is type(conv) and repr(made) == repr(conv)
    assert torch.equal(made(x), conv(x))
    assert made.weight.data_ptr() != conv.weight.data_ptr()


def test_shifts_of_the_usual_convolution_are_nothing() -> None:
    assert Geometry.of(nn.Conv2d(1, 1, 3, padding=1, stride=2)).shifts() == [(0, 0), (0, 0)]


def test_shifts_crop_and_pad() -> None:
    assert Geometry.of(nn.Conv2d(1, 1, (3, 4), padding=(0, 3))).shifts() == [(-1, -1), (2, 1)]
    x = torch.arange(1.0, 4.0)[None, None]
    assert Shift([(-1, 2)], "zeros")(x).tolist() == [[[2, 3, 0, 0]]]
    assert Shift([(-1, 1)], "replicate")(x).tolist() == [[[2, 3, 3]]]
    assert Shift([(-1, 0), (0, -2)], "zeros")(torch.zeros(1, 1, 4, 5)).shape == (1, 1, 3, 3)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name_stays_so(padding: str) -> None:
    conv = nn.Conv2d(2, 2, 4, padding=padding)
    assert Geometry.of(conv).layer(conv.weight.detach(), None).padding == padding
