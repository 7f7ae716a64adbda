from __future__ import annotations

import pytest
import torch
from torch import nn

from hap.structure.attributes import sizes


def test_a_depthwise_convolution_loses_groups() -> None:
    conv = nn.Conv2d(8, 16, 3, groups=8)
    conv.weight.data = conv.weight.data[:6]  # the filters of groups 0, 3 and 7
    assert sizes(conv, [0, 1, 6, 7, 14, 15]) == {"groups": 3, "in_channels": 3, "out_channels": 6}


def test_wide_groups_stay() -> None:
    conv = nn.Conv2d(8, 8, 3, groups=2)
    conv.weight.data = conv.weight.data[:6, :3]
    assert sizes(conv, [0, 1, 3, 4, 5, 7]) == {"groups": 2, "in_channels": 6, "out_channels": 6}


@pytest.mark.parametrize(
    ("module", "want"),
    [
        (nn.ConvTranspose1d(4, 6, 3), {"in_channels": 4, "out_channels": 6}),
        (nn.Linear(3, 5), {"in_features": 3, "out_features": 5}),
        (nn.Embedding(10, 4), {"embedding_dim": 4}),
        (nn.LayerNorm((4, 3)), {"normalized_shape": (4, 3)}),
        (nn.RMSNorm(4), {"normalized_shape": (4,)}),
        (nn.GroupNorm(2, 4), {"num_channels": 4}),
        (nn.PReLU(4), {"num_parameters": 4}),
        (nn.BatchNorm1d(4), {"num_features": 4}),
        (nn.BatchNorm1d(4, affine=False), {"num_features": 4}),
        (nn.InstanceNorm2d(4), {}),
        (nn.ReLU(), {}),
    ],
)
def test_attributes_mirror_tensors(module: nn.Module, want: dict[str, object]) -> None:
    """As the constructor sets them: so an untouched module would change nothing."""
    assert sizes(module, ()) == want
    assert all(getattr(module, name) == value for name, value in want.items())
    for parameter in module.parameters():
        assert torch.is_tensor(parameter)
