"""The page on recipes shows the files that are there, and its commands are ones that `hap run` takes."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from hap import recipes
from hap.report import Reached

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "paper"
PAGE = (ROOT / "docs" / "recipes.md").read_text()
COMMANDS = re.findall(r"^    .*?hap run (.*)$", PAGE, re.MULTILINE)


def table() -> str:
    """A line for each pair of recipes."""
    lines = ["| recipe | model | kept | targets |", "|---|---|---|---|"]
    for path in sorted(CONFIGS.glob("*.yaml")):
        if path.stem.endswith("-ours"):
            continue
        recipe = recipes.read(path)
        kept = ", ".join(f"{name} {100 * limit:.0f} %" for name, limit in recipe.budget.limits.items())
        targets = ", ".join(" ".join(Reached(target, None).cells()[:2]) for target in recipe.targets)
        lines.append(f"| `{path.stem}`, `-ours` | `{recipe.model}` | {kept} | {targets} |")
    return "\n".join(lines)


def filled(page: str) -> str:
    """The page with the table and the file as they are now."""
    file = (CONFIGS / "cifar10-preresnet29.yaml").read_text().rstrip()
    shown = {"table: recipes": table(), "file: configs/paper/cifar10-preresnet29.yaml": f"```yaml\n{file}\n```"}
    for name, text in shown.items():
        start = f"<!-- {name} -->\n"
        before, found, rest = page.partition(start)
        assert found, name
        page = f"{before}{start}{text}\n{rest[rest.index('<!-- end -->') :]}"
    return page


def test_the_page_shows_the_files() -> None:
    assert filled(PAGE) == PAGE


def test_every_key_is_named() -> None:
    for section in dataclasses.fields(recipes.Recipe):
        row = re.search(rf"^\|[^|]*`{section.name}`.*$", PAGE, re.MULTILINE)
        assert row, section.name
        if section.name in ("data", "dense", "measure", "plan", "implants"):
            kind = getattr(recipes, {"plan": "Planning"}.get(section.name, section.name.capitalize()))
            for field in dataclasses.fields(kind):
                assert f"`{field.name}`" in row[0], field.name


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_valid(command: str) -> None:
    path, *words = shlex.split(command)
    options = list(zip(words[::2], words[1::2], strict=True))
    assert {name for name, _ in options} <= {
        "--data", "--out", "--device", "--seed", "--limit", "--set", "--against", "--log-to"
    }  # fmt: skip
    recipes.read(ROOT / path, [value for name, value in options if name == "--set"])


def test_commands_are_found() -> None:
    assert len(COMMANDS) >= 10
