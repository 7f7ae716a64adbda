from __future__ import annotations

import io
import random

import pytest
import torch

from hap.errors import HapError
from hap.zoo.decoding import read_rgb, to_tensor

Image = pytest.importorskip("PIL.Image", reason="writes images")


def png(mode, size, data):
    stream = io.BytesIO()
    Image.frombytes(mode, size, data).save(stream, "PNG")
    return stream.getvalue()


def test_pixels_and_layout():
    image = to_tensor(read_rgb(io.BytesIO(png("RGB", (2, 1), bytes([1, 2, 3, 4, 5, 6]))), "it"))
    assert image.dtype == torch.uint8
    assert image.tolist() == [[[1, 4]], [[2, 5]], [[3, 6]]]


def test_grey_becomes_rgb():
    assert to_tensor(read_rgb(io.BytesIO(png("L", (1, 2), b"\7\11")), "it")).tolist() == [[[7], [9]]] * 3


@pytest.mark.parametrize(
    "content",
    [b"", b"no image", png("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3))[:5000]],
    ids=["empty", "foreign", "cut"],
)
def test_damaged(content):
    with pytest.raises(HapError, match="cannot read my picture"):
        read_rgb(io.BytesIO(content), "my picture")
