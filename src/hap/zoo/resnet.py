"""The CIFAR ResNets of He et al. 2016 (arXiv 1512.03385), section 4.2, and the wide one of EigenDamage and HAP.

Module names are those of the widely used weights (github.com/akamaster/pytorch_resnet_cifar10). "WideResNet-32" is none
of Zagoruyko and Komodakis (their depths are 6n + 4, their blocks pre-activated): in the code of both papers it is
ResNet-32 with four times the channels, and projections where the shape changes.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class OptionA(nn.Module):
    """The shortcut without parameters: every second pixel, and zero channels on both sides.

    Maps (N, C, H, W) to (N, C + 2 * `pad`, ceil(H / stride), ceil(W / stride)).

    >>> OptionA(pad=8, stride=2)(torch.ones(1, 16, 4, 4)).shape
    torch.Size([1, 32, 2, 2])
    """

    def __init__(self, *, pad: int, stride: int) -> None:
        super().__init__()
        self.pad = pad
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))

    def extra_repr(self) -> str:
        return f"pad={self.pad}, stride={self.stride}"


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: identity, or where the shape changes `OptionA` or a projection."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, projected: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride == 1 and inputs == outputs:
            return
        if projected:
            convolution = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))
        else:
            self.shortcut = OptionA(pad=(outputs - inputs) // 2, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """A ResNet of depth 6 * `blocks` + 2 for images (N, 3, 32, 32), in three stages.

    Args:
        blocks: in each stage.
        classes: number of outputs.
        width: channels of the first stage; twice and four times as many in the others.
        projected: the shortcuts between stages are 1 x 1 convolutions with a norm, instead of `OptionA`.
    """

    def __init__(self, blocks: int, classes: int, *, width: int = 16, projected: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2, projected=projected)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2, projected=projected)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _stage(inputs: int, outputs: int, blocks: int, *, stride: int, projected: bool = False) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride=stride, projected=projected)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))
