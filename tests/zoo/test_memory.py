from __future__ import annotations

import math

import torch

from hap.zoo.memory import MemorySplit, crop_and_flip
from hap.zoo.splits import Normalisation

IDENTITY = Normalisation(1, (0.0,), (1.0,))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_batches_are_the_images_at_the_indices():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 2, 2)
    labels = torch.arange(6) * 10
    split = MemorySplit(images, labels, torch.tensor([4, 1, 5]), normalise=IDENTITY, batch_size=2, seed=0)
    (first, first_labels), (last, last_labels) = split
    assert first[:, 0, 0, 0].tolist() == [4.0, 1.0] and first_labels.tolist() == [40, 10]
    assert last[:, 0, 0, 0].tolist() == [5.0] and last_labels.tolist() == [50]
    assert first.dtype == torch.float32 and labels.dtype == torch.int64


def test_augmentation_is_seeded_and_moves_with_the_epoch():
    images = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8, generator=generator())

    def split():
        kinds = {"normalise": Normalisation(1, (0.0,) * 3, (1.0,) * 3), "augment": crop_and_flip}
        return MemorySplit(images, torch.arange(8), torch.arange(8), batch_size=8, seed=0, **kinds)

    a, b = (next(split().epoch(0))[0] for _ in range(2))
    c = next(split().epoch(1))[0]
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_every_crop_is_a_window_of_the_padded_image():
    pixels = torch.randint(1, 256, (400, 2, 4, 5), dtype=torch.uint8, generator=generator())
    out = crop_and_flip(pixels, generator(1), padding=1)
    assert out.shape == pixels.shape and out.dtype == torch.uint8
    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1))
    windows = [padded[:, :, i : i + 4, j : j + 5] for i in range(3) for j in range(3)]
    kinds = torch.stack([view for window in windows for view in (window, window.flip(3))])
    hits = (kinds == out).flatten(2).all(2)
    assert (hits.sum(0) == 1).all()
    seen = hits.sum(1)
    # 18 kinds, each with probability 1/18 of 400 draws: binomial.
    assert ((seen - 400 / 18).abs() / math.sqrt(400 / 18 * 17 / 18)).max() < 4
