"""The registry of data sets, and `load_data`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from hap.errors import HapError, unknown
from hap.zoo import cifar, digits, imagefolder
from hap.zoo.splits import DataSplits, Normalisation, Options, root_of


@dataclass(frozen=True)
class Dataset:
    """A data set that `load_data` knows.

    Attributes:
        what: one line about it.
        load: reads it from a directory.
        needs_directory: whether its spec is ``name:DIR``.
        resizes: whether it takes `image_size`.
    """

    what: str
    load: Callable[[Path, Options], DataSplits]
    needs_directory: bool = True
    resizes: bool = False


DATASETS: Mapping[str, Dataset] = MappingProxyType(
    {
        "digits": Dataset(
            "scikit-learn's handwritten digits, 1 x 8 x 8",
            lambda root, options: digits.load(options),
            needs_directory=False,
        ),
        "cifar10": Dataset("CIFAR-10, 3 x 32 x 32, in the layout of Hugging Face or torchvision", cifar.load),
        "imagefolder": Dataset(
            "DIR/train/CLASS/*, DIR/val, DIR/test, such as ImageNet", imagefolder.load, resizes=True
        ),
    }
)


def load_data(
    spec: str,
    *,
    batch_size: int = 128,
    seed: int = 0,
    validation: int | None = None,
    limit: int | None = None,
    image_size: int | None = None,
    workers: int = 0,
    device: str | torch.device = "cpu",
    normalisation: Normalisation | None = None,
) -> DataSplits:
    """A data set, cut into training, calibration, validation and test images.

    Args:
        spec: ``"digits"``, ``"cifar10:DIR"`` or ``"imagefolder:DIR"``; without DIR, the environment variable
            HAP_DATA says where.
        batch_size: images in a batch.
        seed: of the validation split, the order and the augmentation. Keep it for all that you compare: another
            seed validates on images that this one trains on. The test images do not depend on it.
        validation: number of images cut from the training set; None: a tenth of it.
        limit: at most so many images in each split, for quick runs: a random part of the split without a limit,
            so validation stays disjoint from training whatever the limits.
        image_size: height and width that ``imagefolder`` resizes to; None: 224.
        workers: processes that read images for ``imagefolder``; the batches do not depend on it.
        normalisation: of the pixels of ``imagefolder``, the one that the model was trained with; None: ImageNet's.
        device: where the batches are made, the same on each. CIFAR-10 and the digits are held there altogether.

    Raises:
        HapError: unknown name, directory, layout or files that miss or are damaged, options out of range, or the
            extra ``vision`` is not installed.

    >>> data = load_data("digits", batch_size=100)
    >>> data.train.samples, data.validation.samples, data.test.samples, len(data.train)
    (1294, 143, 360, 13)
    """
    name, _, directory = spec.partition(":")
    if name not in DATASETS:
        raise unknown("data set", name, DATASETS)
    dataset = DATASETS[name]
    if image_size is not None and not dataset.resizes:
        raise HapError(f"{name} has images of one size", expected="no image_size=", got=str(image_size))
    if normalisation is not None and not dataset.resizes:
        raise HapError(f"{name} has a normalisation of its own", expected="no normalisation=", got=str(normalisation))
    options = Options(batch_size, seed, validation, limit, image_size, workers, torch.device(device), normalisation)
    return dataset.load(_root(name, directory, needed=dataset.needs_directory), options)


def _root(name: str, directory: str, *, needed: bool) -> Path:
    if not needed:
        if directory:
            raise HapError(f"{name} needs no directory", expected=f"{name!r}", got=f"'{name}:{directory}'")
        return Path()
    remedy = f"give its directory: {name}:path/to/data"
    return root_of(name, directory, expected=f"'{name}:DIR'", got=f"{name!r}, and ", remedy=remedy)
