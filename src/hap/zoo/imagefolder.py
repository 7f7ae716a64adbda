"""Any data set laid out as DIR/train/CLASS/*, DIR/val/CLASS/*, DIR/test/CLASS/*, such as ImageNet."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from hap.errors import HapError
from hap.zoo.decoding import read_rgb, to_tensor
from hap.zoo.optional import require
from hap.zoo.splits import IMAGENET, DataSplits, ImageBatch, Options, Split, cut_validation, in_order, shuffled

Files = Sequence[tuple[str, int]]

PREFETCH = 4  # batches that each worker reads ahead


def load(root: Path, options: Options) -> DataSplits:
    """The images under `root`: DIR/train, and DIR/val, DIR/test or both.

    With all three, each is what its name says. Where one of val and test misses, the other one is the test set and
    validation is cut from train, so that no choice is made on the images that the report is about.

    Raises:
        HapError: train or both of the others miss, a folder is empty, or the folders' classes differ.
    """
    parts = {name: _folder(root / name) for name in ("train", "val", "test") if (root / name).is_dir()}
    if "train" not in parts or len(parts) == 1:
        raise HapError(
            f"there is no image data set in {root}",
            expected="train/CLASS/*, and val/CLASS/* or test/CLASS/* or both",
            got=(", ".join(f"{name}/" for name in parts) or "none of them") if root.is_dir() else "no such directory",
            remedy="give its directory, as imagefolder:DIR, or set HAP_DATA",
        )
    train_files, classes = parts["train"]
    for name, (_, others) in parts.items():
        if others != classes:
            odd = sorted(set(others) ^ set(classes))
            raise HapError(
                f"{root / name} has other classes than train",
                expected=f"the {len(classes)} classes of {root / 'train'}",
                got=f"{', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''} in one of them only",
            )
    test_files = (parts["test"] if "test" in parts else parts["val"])[0]
    if len(parts) == 3:
        if options.validation is not None:
            raise HapError(
                "this data set has its own validation images",
                expected="no validation=",
                got=str(options.validation),
                remedy=f"leave it out, or remove {root / 'val'}",
            )
        validation_files = parts["val"][0]
        train, validation = shuffled(len(train_files), options), in_order(len(validation_files), options.limit)
    else:
        validation_files = train_files
        train, validation = cut_validation(len(train_files), options)
    size = options.image_size or 224
    return DataSplits(
        name=root.resolve().name,
        classes=classes,
        input_shape=(3, size, size),
        train=FolderSplit(train_files, train, options, size, training=True),
        calibration=FolderSplit(train_files, train, options, size),
        validation=FolderSplit(validation_files, validation, options, size),
        test=FolderSplit(test_files, in_order(len(test_files), options.limit), options, size),
    )


def _folder(folder: Path) -> tuple[Files, tuple[str, ...]]:
    try:
        found = require("torchvision.datasets").ImageFolder(str(folder))
    except (FileNotFoundError, RuntimeError) as error:
        raise HapError(
            f"there are no images in {folder}",
            expected="one folder of images for each class",
            got=str(error).splitlines()[0],
            remedy="check the layout, or that every class has an image",
        ) from error
    return found.samples, tuple(found.classes)


class FolderSplit(Split):
    """Images that are read and decoded batch by batch.

    In training a random part of 8 to 100 % of the image, mirrored or not, is resized; otherwise the shorter side
    is resized to 256/224 of the input and the centre is cut out (the usual recipe for ImageNet).
    """

    def __init__(
        self, files: Files, indices: torch.Tensor, options: Options, image_size: int, *, training: bool = False
    ) -> None:
        super().__init__(indices, batch_size=options.batch_size, seed=options.seed, shuffle=training)
        self._files = files
        self._image_size = image_size
        self._training = training
        self._workers = options.workers
        self._device = options.device
        self._normalise = options.normalisation or IMAGENET

    def _batches(self, order: torch.Tensor, generator: torch.Generator, mine: Sequence[int]) -> Iterator[ImageBatch]:
        # A seed for each image, so that the batches do not depend on the number of workers.
        seeds = torch.randint(2**31, (len(order),), generator=generator).tolist() if self._training else None
        images = _Images([self._files[i] for i in order.tolist()], self._image_size, seeds)
        batches = torch.arange(len(order)).split(self.batch_size)
        loader = DataLoader(
            images,
            batch_sampler=[batches[number].tolist() for number in mine],
            num_workers=self._workers,
            prefetch_factor=PREFETCH if self._workers else None,
            pin_memory=self._device.type == "cuda",  # so that the copy runs beside the computation
            generator=generator,  # for workers' seeds, which nobody uses: not from the global generator
        )
        for pixels, labels in loader:  # bytes travel, and become numbers on the device
            yield (
                self._normalise(pixels.to(self._device, non_blocking=True)),
                labels.to(self._device, non_blocking=True),
            )


@dataclass(frozen=True)
class _Images(Dataset[tuple[torch.Tensor, int]]):
    """uint8 images (3, size, size) with their labels; `seeds`: for the augmentation of each, None for none."""

    files: Files
    size: int
    seeds: Sequence[int] | None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        path, label = self.files[position]
        transforms = require("torchvision.transforms.v2.functional")
        image = read_rgb(path, path)
        if self.seeds is None:
            image = transforms.resize(image, round(self.size * 256 / 224))
            image = transforms.center_crop(image, [self.size, self.size])
        else:
            chance = random.Random(self.seeds[position])
            image = transforms.resized_crop(image, *_box(image.height, image.width, chance), [self.size, self.size])
            if chance.random() < 0.5:
                image = transforms.horizontal_flip(image)
        return to_tensor(image), label


def _box(height: int, width: int, chance: random.Random) -> tuple[int, int, int, int]:
    """Top, left, height, width of a random part: 8 to 100 % of the area, aspect 3/4 to 4/3 (Szegedy et al. 2015).

    Where ten draws do not fit, the largest square in the middle.
    """
    for _ in range(10):
        area = height * width * chance.uniform(0.08, 1)
        aspect = math.exp(chance.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return chance.randint(0, height - h), chance.randint(0, width - w), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side
