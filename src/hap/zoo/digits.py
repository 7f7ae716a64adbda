"""Scikit-learn's handwritten digits (1,797 images, 1 x 8 x 8, no download) and a small network for them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from hap.zoo.memory import MemorySplit, Stored
from hap.zoo.optional import require
from hap.zoo.resnet import BasicBlock
from hap.zoo.splits import DataSplits, Normalisation, Options, cut_validation, divide

TEST_IMAGES = 360
NORMALISATION = Normalisation(16, (0.305,), (0.376,))


class DigitsCNN(nn.Module):
    """A small residual CNN for images (N, 1, 8, 8).

    Both residual streams have several 3 x 3 writers (a plain convolution and the blocks' second ones), so every
    kind of unit that a CIFAR ResNet has is here as well, at a hundredth of the cost.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16))
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.layer2 = nn.Sequential(BasicBlock(32, 32))
        self.linear = nn.Linear(32, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer1(F.relu(self.bn1(self.conv1(x))))
        out = self.layer2(F.relu(self.bn2(self.conv2(out))))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def load(options: Options) -> DataSplits:
    """The digits; the same 360 are the test images whatever the seed."""
    data = require("sklearn.datasets").load_digits()
    images = torch.from_numpy(data.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(data.target).to(torch.int64)
    # The set has no official test part, and a test set that moved with the seed would leak into training.
    rest, test = divide(len(labels), TEST_IMAGES, seed=0)
    train, validation = (rest[part] for part in cut_validation(len(rest), options))

    held, known = Stored(images, options.device), Stored(labels, options.device)

    def split(indices: torch.Tensor, *, shuffle: bool = False) -> MemorySplit:
        return MemorySplit(
            held,
            known,
            indices,
            normalise=NORMALISATION,
            batch_size=options.batch_size,
            seed=options.seed,
            shuffle=shuffle,
        )

    return DataSplits(
        name="digits",
        classes=tuple(str(name) for name in data.target_names),
        input_shape=(1, 8, 8),
        train=split(train, shuffle=True),
        calibration=split(train),
        validation=split(validation),
        test=split(test[: options.limit]),
    )
