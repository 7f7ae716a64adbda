"""The folder in which a recipe keeps what is done, until all is done."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hap.checkpoint import fresh_directory
from hap.errors import HapError
from hap.planning import versions
from hap.recipes.recipe import Recipe
from hap.report import write_json

SUFFIX = ".work"
RECIPE, DENSE = "recipe.json", "dense"
_WORDS_ONLY = ("title", "targets", "notes")  # these change no result


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one recipe: the folder beside the run directory.

    Attributes:
        folder: holds ``recipe.json``, the dense model that was trained (``dense/``), its training while that goes on,
            and for each round what `hap.pipeline.run` keeps.
        first: whether this is the first of several processes, the only one that writes here what all have in common.
    """

    folder: Path
    first: bool = True

    @staticmethod
    def beside(out: Path, recipe: Recipe, *, first: bool = True) -> Work:
        """The folder for `out`, made if it is not there.

        Raises:
            HapError: it is there and of another recipe, or was begun with other versions.
        """
        folder = out.with_name(f"{out.name}{SUFFIX}")
        here = {**dict(_flat(as_data(recipe))), **{f"version of {name}": text for name, text in versions().items()}}
        if (folder / RECIPE).exists():
            _need_same(folder, here)
        elif first:
            with fresh_directory(folder, overwrite=True) as staging:
                write_json(staging / RECIPE, here)
        return Work(folder, first)

    @property
    def dense(self) -> Path:
        """The directory of the dense model."""
        return self.folder / DENSE

    @property
    def training(self) -> Path:
        """The state of the dense training."""
        return self.folder / "training.safetensors"

    def finish(self, out: Path) -> None:
        """Moves the dense model into the run directory and removes the folder."""
        if self.first:
            if self.dense.exists():
                self.dense.replace(out / DENSE)
            shutil.rmtree(self.folder)


def as_data(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain dicts, lists, texts and numbers, without what changes no result."""
    data = json.loads(json.dumps(dataclasses.asdict(recipe), default=str))
    return {name: value for name, value in data.items() if name not in _WORDS_ONLY}


def _flat(data: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """The values by dotted key."""
    for name, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{place}{name}.")
        else:
            yield f"{place}{name}", value


def _need_same(folder: Path, here: Mapping[str, Any]) -> None:
    remedy = f"go on with the recipe it was begun with, delete {folder}, or choose another --out"
    try:
        there = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HapError(
            f"{folder / RECIPE} cannot be read", expected="JSON", got=str(error), remedy=f"delete {folder}"
        ) from error
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            raise HapError(
                f"{folder} holds the work of another recipe",
                expected=f"{name} {there.get(name)}, as there",
                got=f"{name} {here.get(name)}",
                remedy=remedy,
            )
