"""VGG-16 with batch norm for CIFAR (Simonyan and Zisserman 2015; Li et al. 2017, arXiv 1608.08710, section 4.1).

Module names are those of the widely used code (github.com/kuangliu/pytorch-cifar).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class CifarVGG(nn.Module):
    """Thirteen 3 x 3 convolutions, halved in size after each of five stages, and one linear layer.

    For images (N, 3, 32, 32).
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for stage in STAGES:
            for outputs in stage:
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
