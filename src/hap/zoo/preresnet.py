"""The pre-activation bottleneck ResNets for CIFAR (He et al. 2016b, arXiv 1603.05027).

Module names are those of the widely used code (github.com/Eric-mingjie/rethinking-network-pruning). He's own networks
have 16, 32 and 64 channels inside their blocks and four times as many between them. PreResNet-29 of EigenDamage and HAP
has 64, 128 and 256 everywhere.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions, each behind a norm and a ReLU; the sum has neither.

    Where the shape changes, the shortcut is a 1 x 1 convolution of the block's input, `downsample`.
    """

    def __init__(self, inputs: int, inner: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        out = self.conv3(F.relu(self.bn3(out)))
        return out + self.downsample(x)


class PreResNet(nn.Module):
    """A network of depth 9 * `blocks` + 2 for images (N, 3, 32, 32), in three stages.

    Args:
        blocks: in each stage.
        classes: number of outputs.
        stem: channels of the first convolution.
        width: channels inside the blocks of the first stage; twice and four times as many in the others.
        expansion: channels between the blocks, in multiples of those inside.
    """

    def __init__(self, blocks: int, classes: int, *, stem: int, width: int, expansion: int) -> None:
        super().__init__()
        first, second, third = (width * expansion * 2**stage for stage in range(3))
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.layer1 = _stage(stem, width, first, blocks, stride=1)
        self.layer2 = _stage(first, 2 * width, second, blocks, stride=2)
        self.layer3 = _stage(second, 4 * width, third, blocks, stride=2)
        self.bn = nn.BatchNorm2d(third)
        self.fc = nn.Linear(third, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.bn(out)), 1).flatten(1))


def _stage(inputs: int, inner: int, outputs: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = Bottleneck(inputs, inner, outputs, stride=stride)
    return nn.Sequential(first, *(Bottleneck(outputs, inner, outputs) for _ in range(blocks - 1)))
