"""Figures without pyplot, whose global state belongs to the user."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Literal

from hap.errors import missing
from hap.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Tier = Literal["keep", "implant", "prune"]

# From Okabe and Ito's palette: told apart with any colour vision.
COLOURS: dict[Tier, str] = {"keep": "#0072B2", "implant": "#E69F00", "prune": "#4D4D4D"}


def has_plots() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches.

    Raises:
        HapError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("plots need", "matplotlib", "report", error) from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save_png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the figure as a PNG, whole or not at all.

    Raises:
        HapError: the file cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())
