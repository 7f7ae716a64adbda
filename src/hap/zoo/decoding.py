"""Encoded images to tensors."""

from __future__ import annotations

from typing import IO, Any

import torch

from hap.errors import HapError
from hap.zoo.optional import require


def read_rgb(source: str | IO[bytes], name: str) -> Any:
    """The image in a file, as a `PIL.Image.Image` in RGB; `name` is for the error.

    Raises:
        HapError: it is no image, or a damaged one.
    """
    try:
        with require("PIL.Image").open(source) as image:
            return image.convert("RGB")
    except HapError:  # there is no Pillow
        raise
    except Exception as error:  # decoders raise all kinds of errors for damaged files
        raise HapError(
            f"cannot read {name}",
            expected="an image, such as JPEG or PNG",
            got=str(error),
            remedy="the file may be damaged; fetch it again",
        ) from error


def to_tensor(image: Any) -> torch.Tensor:
    """A `PIL.Image.Image` in RGB as uint8 (3, H, W)."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)
