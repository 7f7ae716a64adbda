"""Importing the packages that only the data sets need."""

from __future__ import annotations

import importlib
from typing import Any

from hap.errors import missing


def require(module: str, extra: str = "vision") -> Any:
    """The module of that name.

    Raises:
        HapError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing("this data set needs", module.partition(".")[0], extra, error) from error
