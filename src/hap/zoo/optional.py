"""Importing the packages that only the data sets need."""

from __future__ import annotations

import importlib
from typing import Any

from hap.errors import HapError


def require(module: str) -> Any:
    """The module of that name.

    Raises:
        HapError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise HapError(
            f"this data set needs the package {module.partition('.')[0]!r}",
            expected="an installation with the extra 'vision'",
            got=str(error),
            remedy="pip install 'torch-hap[vision]'",
        ) from error
