from __future__ import annotations

import pytest
import torch
from torch import nn

from hap.implants import Implanted, Target, build, form_of, from_weights
from hap.surgery import apply, merge


def implanted(rows: list[int], conv: nn.Conv2d) -> Implanted:
    fitted = from_weights(conv, Target(rows, range(conv.in_channels), form_of("pointwise")))
    flags = [i in rows for i in range(conv.out_channels)]
    return build(conv, conv.weight.detach(), None if conv.bias is None else conv.bias.detach(), flags, fitted)


def test_mode_gradients_and_format_are_kept(net, plan) -> None:
    net.stem.requires_grad_(False)
    net.inner.eval()
    net.to(memory_format=torch.channels_last)
    merged = merge(apply(net, plan))
    assert not any(p.requires_grad for p in merged.stem.parameters())
    assert all(p.requires_grad for p in merged.inner.parameters())
    assert merged.stem.training and not merged.inner.training
    assert merged.inner.weight.is_contiguous(memory_format=torch.channels_last)


def test_hooks_are_kept(net, plan, image) -> None:
    calls = []
    net.stem.register_forward_hook(lambda *_: calls.append(1))
    merge(apply(net, plan))(image)
    assert calls == [1]


def test_a_model_that_is_one_layer(image) -> None:
    layer = implanted([1], nn.Conv2d(3, 4, 3))
    merged = merge(layer)
    assert type(merged) is nn.Conv2d
    torch.testing.assert_close(merged(image), layer(image))


@pytest.mark.parametrize("whole", [1.1, 0.9])
def test_only_where_it_is_faster(net, plan, image, monkeypatch, whole) -> None:
    """The timings decide: of each layer on what it reads, then of the whole model on the inputs."""
    small = apply(net, plan)
    seen = []

    def ratio(layer: nn.Module, dense: nn.Module, args: tuple[torch.Tensor, ...], runs: int, seconds: float) -> float:
        torch.testing.assert_close(dense.eval()(*args), layer.eval()(*args))
        seen.append(tuple(args[0].shape))
        if not isinstance(layer, Implanted):
            return whole
        return 0.9 if layer.dense.in_channels == 3 else 1.1

    monkeypatch.setitem(merge.__globals__, "_ratio", ratio)  # the package's function has its module's name
    merged = merge(small, faster_on=(image,))
    assert seen == [(2, 3, 4, 4), (2, 6, 4, 4), tuple(image.shape)]
    assert (type(merged.stem), type(merged.inner)) == (nn.Conv2d, Implanted if whole > 1 else nn.Conv2d)
    torch.testing.assert_close(merged.eval()(image), small.eval()(image))


def test_faster_is_really_timed(net, plan, image) -> None:
    small = apply(net, plan).eval()
    merged = merge(small, faster_on=(image,), runs=5, seconds=0.1)
    torch.testing.assert_close(merged(image), small(image))


def test_layers_that_are_not_called_stay() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Conv2d(2, 2, 3), implanted([1], nn.Conv2d(2, 2, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Half()
    assert isinstance(merge(model, faster_on=(torch.zeros(1, 2, 4, 4),)).spare, Implanted)
    assert not model.spare._forward_pre_hooks


@pytest.mark.parametrize("rows", [[0], [1, 3], [0, 1, 2, 3]])
def test_merged_channels_are_in_the_order_of_the_consumers(rows) -> None:
    conv = nn.Conv2d(2, 4, 3)
    layer, x = implanted(rows, conv), torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merge(layer)(x), layer(x))
    kept = [i for i in range(4) if i not in rows]
    assert torch.equal(merge(layer).weight[kept], conv.weight[kept])
