"""CIFAR-10 from the files that a user has: Parquet (Hugging Face) or torchvision's pickled batches."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hap.errors import HapError
from hap.zoo.decoding import read_rgb, to_tensor
from hap.zoo.memory import CropAndFlip, Images, MemorySplit, Stored
from hap.zoo.optional import require
from hap.zoo.splits import IMAGENET, DataSplits, Options, cut_validation, in_order

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE = (3, 32, 32)

PARQUET_LAYOUTS = (
    ("cifar10_train.parquet", "cifar10_test.parquet"),
    ("plain_text/train-*.parquet", "plain_text/test-*.parquet"),
)
PICKLED_LAYOUT = "cifar-10-batches-py"
IMAGE_COLUMNS = ("img.bytes", "image.bytes", "img", "image")


def load(root: Path, options: Options) -> DataSplits:
    """CIFAR-10 under `root`, in one of the layouts above.

    Images in Parquet are decoded when they are first read, once: what measures on 1,000 images pays for 1,000.

    Raises:
        HapError: no layout is there, or a file is damaged or empty.
    """
    train, test = _find(root, options.device)
    training, validation = cut_validation(len(train.labels), options)

    def split(part: _Part, indices: torch.Tensor, *, training: bool = False) -> MemorySplit:
        return MemorySplit(
            part.images,
            Stored(part.labels, options.device),
            indices,
            normalise=IMAGENET,
            batch_size=options.batch_size,
            seed=options.seed,
            shuffle=training,
            augment=CropAndFlip() if training else None,
        )

    return DataSplits(
        name="CIFAR-10 (JPEG)" if train.lossy or test.lossy else "CIFAR-10",
        classes=CLASSES,
        input_shape=SHAPE,
        train=split(train, training, training=True),
        calibration=split(train, training),
        validation=split(train, validation),
        test=split(test, in_order(len(test.labels), options.limit)),
    )


@dataclass(frozen=True)
class _Part:
    """The training or the test images. `lossy`: they went through JPEG, which costs some points of accuracy."""

    images: Images
    labels: torch.Tensor
    lossy: bool = False


def _find(root: Path, device: torch.device) -> tuple[_Part, _Part]:
    for patterns in PARQUET_LAYOUTS:
        train, test = (sorted(root.glob(pattern)) for pattern in patterns)
        if train and test:
            return _parquet(train, device), _parquet(test, device)
    if (root / PICKLED_LAYOUT).is_dir():
        return _pickled(root, device, train=True), _pickled(root, device, train=False)
    layouts = [" + ".join(patterns) for patterns in PARQUET_LAYOUTS] + [f"{PICKLED_LAYOUT}/"]
    raise HapError(
        f"there is no CIFAR-10 in {root}",
        expected="one of: " + "; ".join(layouts),
        got="none of them" if root.is_dir() else "no such directory",
        remedy="give its directory, as cifar10:DIR, or set HAP_DATA",
    )


class _DecodedOnce:
    """Encoded images (JPEG, PNG) that are decoded when first read. The memory is untouched until then."""

    def __init__(self, encoded: Any, source: str, device: torch.device) -> None:
        self._encoded = encoded
        self._source = source
        self._pixels = torch.empty((len(encoded), *SHAPE), dtype=torch.uint8, device=device)
        self._ready = torch.zeros(len(encoded), dtype=torch.bool)

    def __getitem__(self, index: torch.Tensor, /) -> torch.Tensor:
        device = self._pixels.device
        fresh = index[~self._ready[index]].unique()
        if len(fresh):
            # One thread: measured faster than 2 or 4, an image this small is mostly Python.
            images = torch.stack([self._image(position) for position in fresh.tolist()])
            self._pixels[fresh.to(device)] = images.to(device)
            self._ready[fresh] = True
        return self._pixels[index.to(device, non_blocking=True)]

    def _image(self, position: int) -> torch.Tensor:
        name = f"image {position} of {self._source}"
        image = to_tensor(read_rgb(io.BytesIO(self._encoded[position].as_py() or b""), name))
        if image.shape != SHAPE:
            raise _damaged(name, f"shape {SHAPE}", f"shape {tuple(image.shape)}")
        return image


def _parquet(files: Sequence[Path], device: torch.device) -> _Part:
    tables = [_table(path) for path in files]
    table = require("pyarrow").concat_tables(tables)
    source = ", ".join(str(path) for path in files)
    labels = _labels(table["label"].to_pylist(), source)
    images = _DecodedOnce(table["image"], source, device)
    images[torch.tensor([0])]  # the first image speaks for the file: say now, not in training, that it is no image
    return _Part(images, labels, lossy=table["image"][0].as_py().startswith(b"\xff\xd8"))


def _table(path: Path) -> Any:
    pyarrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    try:
        # Hugging Face stores an image as {bytes, path}, which flatten() turns into two columns.
        table = parquet.read_table(path).flatten()
        names = table.column_names
        column = next((name for name in IMAGE_COLUMNS if name in names), None)
        if column is None or "label" not in names:
            raise _damaged(str(path), "columns 'img' (or 'image') and 'label'", f"columns {names}")
        return pyarrow.table({"image": table[column].cast("binary"), "label": table["label"].cast("int64")})
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(str(path), "a Parquet file of images and labels", str(error)) from error


def _pickled(root: Path, device: torch.device, *, train: bool) -> _Part:
    try:
        # torchvision compares checksums before it unpickles, so that no foreign pickle is run.
        data = require("torchvision.datasets").CIFAR10(str(root), train=train, download=False)
    except (RuntimeError, OSError) as error:
        raise _damaged(str(root / PICKLED_LAYOUT), "the files that torchvision downloads", str(error)) from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return _Part(Stored(images, device), _labels(data.targets, str(root / PICKLED_LAYOUT)))


def _labels(values: Sequence[int | None], source: str) -> torch.Tensor:
    if not values:
        raise _damaged(source, "at least one image", "none")
    wrong = {value for value in values if value is None or not 0 <= value < len(CLASSES)}
    if wrong:
        raise _damaged(source, f"labels from 0 to {len(CLASSES) - 1}", f"labels {sorted(map(str, wrong))[:5]}")
    return torch.tensor(values, dtype=torch.int64)


def _damaged(source: str, expected: str, got: str) -> HapError:
    return HapError(f"cannot read {source}", expected=expected, got=got, remedy="fetch the file again")
