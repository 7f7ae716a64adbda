"""Splits whose images are held in memory as one uint8 tensor; every batch is made in a few tensor operations.

On a GPU they are made there: what travels for each batch are some numbers for each image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch.nn import functional as F

from hap.zoo.splits import ImageBatch, Normalisation, Split


class Images(Protocol):
    """uint8 images (C, H, W) on some device, read by a tensor of positions on the CPU."""

    def __getitem__(self, index: torch.Tensor, /) -> torch.Tensor: ...


class Stored:
    """Images, or labels, that are all there, on a device."""

    def __init__(self, values: torch.Tensor, device: torch.device) -> None:
        self._values = values.to(device)

    def __getitem__(self, index: torch.Tensor, /) -> torch.Tensor:
        return self._values[index.to(self._values.device, non_blocking=True)]


class Augment(Protocol):
    """A random change of images, in two parts: the draws are made on the CPU, the same for every device."""

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """int64 (draws, count)."""
        ...

    def __call__(self, pixels: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Changes `count` images, on whatever device they are."""
        ...


class MemorySplit(Split):
    """A part of `images`, which other splits may share."""

    def __init__(
        self,
        images: Images,
        labels: Images,
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

    def _batches(self, order: torch.Tensor, generator: torch.Generator, mine: Sequence[int]) -> Iterator[ImageBatch]:
        parts = order.split(self.batch_size)
        draws = [self._augment.draw(len(part), generator) for part in parts] if self._augment else []
        for number in mine:
            pixels = self._images[parts[number]]
            if self._augment:
                pixels = self._augment(pixels, draws[number].to(pixels.device, non_blocking=True))
            yield self._normalise(pixels), self._labels[parts[number]]


class CropAndFlip:
    """Each image shifted by up to `padding` pixels (black comes in) and mirrored or not (He et al. 2016, 4.2)."""

    def __init__(self, padding: int = 4) -> None:
        self.padding = padding

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Shift down, shift right, and whether to mirror: int64 (3, count)."""
        shifts = torch.randint(2 * self.padding + 1, (2, count), generator=generator)
        return torch.cat([shifts, (torch.rand(1, count, generator=generator) < 0.5).long()])

    def __call__(self, pixels: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """uint8 (N, C, H, W) to the same."""
        count, _, height, width = pixels.shape
        padded = F.pad(pixels, (self.padding,) * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (N, C, shifts, shifts, H, W)
        down, right, mirrored = draws
        cropped = windows.permute(0, 2, 3, 1, 4, 5)[torch.arange(count, device=pixels.device), down, right]
        return torch.where(mirrored.bool()[:, None, None, None], cropped.flip(3), cropped)
