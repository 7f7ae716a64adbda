"""Importing the packages that only the data sets need."""

from __future__ import annotations

import importlib
from typing import Any

from hap.errors import HapError


def require(module: str, extra: str = "vision") -> Any:
    """The module of that name.

    Raises:
        HapError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise HapError(
            f"this data set needs the package {module.partition('.')[0]!r}",
            expected=f"an installation with the extra {extra!r}",
            got=str(error),
            remedy=f"pip install 'torch-hap[{extra}]'",
        ) from error
