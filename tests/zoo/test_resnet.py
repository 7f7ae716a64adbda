from __future__ import annotations

import pytest
import torch

from hap import zoo
from hap.zoo.resnet import BasicBlock, OptionA


def test_option_a_subsamples_and_pads_both_sides():
    x = torch.arange(2 * 4 * 5 * 6.0).view(2, 4, 5, 6) + 1
    out = OptionA(pad=2, stride=2)(x)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, :2].any() and not out[:, 6:].any()
    assert out.shape == (2, 8, 3, 3)


def test_option_a_exports_as_slice_and_pad():
    program = torch.export.export(OptionA(pad=8, stride=2), (torch.randn(1, 16, 4, 4),), strict=False)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.slice.Tensor" in operators
    assert operators & {"aten.pad.default", "aten.constant_pad_nd.default"}
    assert len(operators) == 2


def test_block_adds_the_shortcut():
    block = BasicBlock(4, 4).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("name, blocks", [("resnet20", 3), ("resnet32", 5), ("resnet44", 7), ("resnet56", 9)])
def test_depth(name, blocks):
    model = zoo.build(name)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) + 1 == int(name.removeprefix("resnet"))
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3)] == [blocks] * 3
