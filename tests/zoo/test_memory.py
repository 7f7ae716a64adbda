from __future__ import annotations

import math

import pytest
import torch

from hap.zoo.memory import CropAndFlip, MemorySplit, Stored
from hap.zoo.splits import Normalisation

IDENTITY = Normalisation(1, (0.0,), (1.0,))


def stored(values: torch.Tensor, device: str = "cpu") -> Stored:
    return Stored(values, torch.device(device))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_batches_are_the_images_at_the_indices():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 2, 2)
    labels = torch.arange(6) * 10
    indices = torch.tensor([4, 1, 5])
    split = MemorySplit(stored(images), stored(labels), indices, normalise=IDENTITY, batch_size=2, seed=0)
    (first, first_labels), (last, last_labels) = split
    assert first[:, 0, 0, 0].tolist() == [4.0, 1.0] and first_labels.tolist() == [40, 10]
    assert last[:, 0, 0, 0].tolist() == [5.0] and last_labels.tolist() == [50]
    assert first.dtype == torch.float32 and labels.dtype == torch.int64


def augmented(device: str = "cpu", size: int = 8) -> MemorySplit:
    images = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8, generator=generator())
    kinds = {"normalise": Normalisation(255, (0.5,) * 3, (0.2,) * 3), "augment": CropAndFlip(), "shuffle": True}
    held, labels = stored(images, device), stored(torch.arange(8), device)
    return MemorySplit(held, labels, torch.arange(8), batch_size=size, seed=0, **kinds)


def test_augmentation_is_seeded_and_moves_with_the_epoch():
    a, b = (next(augmented().epoch(0))[0] for _ in range(2))
    c = next(augmented().epoch(1))[0]
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shards_hold_the_same_batches_in_turn(world: int):
    whole = list(augmented(size=3).epoch(4))
    shards = [list(augmented(size=3).epoch(4, rank=rank, world=world)) for rank in range(world)]
    assert {len(shard) for shard in shards} == {-(-3 // world)}
    dealt = [batch for group in zip(*shards, strict=True) for batch in group]
    for number, (images, labels) in enumerate(dealt):
        assert torch.equal(images, whole[number % 3][0]) and torch.equal(labels, whole[number % 3][1])


def test_a_split_goes_on_after_the_epochs_that_its_state_tells_of():
    first, second = augmented(), augmented()
    for _ in range(3):
        list(first)
    second.load_state_dict(first.state_dict())
    assert torch.equal(next(iter(first))[0], next(iter(second))[0])


def test_batches_are_made_on_the_device_of_the_images():
    images, labels = next(augmented("meta").epoch(0))
    assert images.device.type == labels.device.type == "meta"
    assert images.shape == (8, 3, 8, 8) and images.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_batches_are_the_same():
    for (here, one), (there, two) in zip(augmented().epoch(0), augmented("cuda").epoch(0), strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-6, atol=0)
        assert torch.equal(two.cpu(), one)


def test_every_crop_is_a_window_of_the_padded_image():
    pixels = torch.randint(1, 256, (400, 2, 4, 5), dtype=torch.uint8, generator=generator())
    augment = CropAndFlip(padding=1)
    out = augment(pixels, augment.draw(400, generator(1)))
    assert out.shape == pixels.shape and out.dtype == torch.uint8
    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1))
    windows = [padded[:, :, i : i + 4, j : j + 5] for i in range(3) for j in range(3)]
    kinds = torch.stack([view for window in windows for view in (window, window.flip(3))])
    hits = (kinds == out).flatten(2).all(2)
    assert (hits.sum(0) == 1).all()
    seen = hits.sum(1)
    # 18 kinds, each with probability 1/18 of 400 draws: binomial.
    assert ((seen - 400 / 18).abs() / math.sqrt(400 / 18 * 17 / 18)).max() < 4
