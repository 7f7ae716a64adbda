"""Splits whose images are held in memory as one uint8 tensor; every batch is made in a few tensor operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch.nn import functional as F

from hap.zoo.splits import ImageBatch, Normalisation, Split

Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


class Images(Protocol):
    """uint8 images (C, H, W), read by a tensor of positions; a plain tensor is one."""

    def __getitem__(self, index: torch.Tensor, /) -> torch.Tensor: ...


class MemorySplit(Split):
    """A part of `images`, which other splits may share."""

    def __init__(
        self,
        images: Images,
        labels: torch.Tensor,
        indices: torch.Tensor,
        *,
        normalise: Normalisation,
        batch_size: int,
        seed: int,
        shuffle: bool = False,
        augment: Augment | None = None,
    ) -> None:
        super().__init__(indices, batch_size=batch_size, seed=seed, shuffle=shuffle)
        self._images = images
        self._labels = labels
        self._normalise = normalise
        self._augment = augment

    def _batches(self, order: torch.Tensor, generator: torch.Generator) -> Iterator[ImageBatch]:
        for index in order.split(self.batch_size):
            pixels = self._images[index]
            if self._augment:
                pixels = self._augment(pixels, generator)
            yield self._normalise(pixels), self._labels[index]


def crop_and_flip(pixels: torch.Tensor, generator: torch.Generator, padding: int = 4) -> torch.Tensor:
    """Each image shifted by up to `padding` pixels (black comes in) and mirrored or not (He et al. 2016, 4.2)."""
    count, _, height, width = pixels.shape
    padded = F.pad(pixels, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (N, C, shifts, shifts, H, W)
    down, right = torch.randint(2 * padding + 1, (2, count), generator=generator)
    cropped = windows.permute(0, 2, 3, 1, 4, 5)[torch.arange(count), down, right]
    mirrored = torch.rand(count, generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], cropped.flip(3), cropped)
