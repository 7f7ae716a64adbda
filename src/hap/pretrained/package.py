"""Importing `transformers`, which is heavy and optional: nothing is imported before it is needed."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from hap.errors import missing


def transformers() -> Any:
    """The package.

    Raises:
        HapError: it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise missing("Hugging Face models need", "transformers", "text", error) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the package's progress bars and warnings: what they would say, errors of ours say."""
    logging = transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
