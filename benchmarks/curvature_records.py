"""Raw results: one JSON object a line, appended as it comes, so that a run goes on where it was stopped."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


class Records:
    """The rows of one JSON-lines file that belong to one setting.

    Args:
        path: the file; it need not exist.
        setting: what all rows must agree on, written into each; rows of another setting are not seen.
    """

    def __init__(self, path: Path, **setting: Any) -> None:
        self.path = path
        self.setting = setting
        self.rows = [row for row in read(path) if all(row.get(k) == v for k, v in setting.items())]

    def has(self, **key: Any) -> bool:
        """Whether a row with these values is there."""
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.rows)

    def add(self, row: Row, said: str) -> None:
        """Append a row, and say so on standard error."""
        whole = {**self.setting, **row, "torch": str(torch.__version__), "threads": torch.get_num_threads()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_off = self.path.exists() and self.path.read_text()[-1:] not in ("", "\n")
        with self.path.open("a") as file:
            file.write("\n" * cut_off + json.dumps(whole) + "\n")
        self.rows.append(whole)
        say(said)


def read(path: Path) -> list[Row]:
    """All rows of a file; none if it does not exist. A line that was cut off by a crash is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def rounded(values: Sequence[float] | torch.Tensor) -> list[float]:
    """Six significant digits: more than any estimate here has."""
    return [float(f"{float(value):.6g}") for value in values]


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)
