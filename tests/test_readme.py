"""Every Python block of the README runs, in order, as one program."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import CodeType, ModuleType

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, filename: str) -> list[CodeType]:
    """The blocks, compiled so that a traceback names the README's own lines."""
    return [
        compile("\n" * text.count("\n", 0, match.start(1)) + match[1], filename, "exec")
        for match in BLOCK.finditer(text)
    ]


def test_blocks_are_found_with_their_lines() -> None:
    code = blocks("# Title\n\n```python\nx = 1\n```\n```bash\nls\n```\n\n```python\ny = x\n\n```\n", "README.md")
    assert [next(line for *_, line in c.co_lines() if line) for c in code] == [4, 11]
    assert [c.co_names for c in code] == [("x",), ("x", "y")]


def test_readme_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = blocks(README.read_text(), str(README)) if README.exists() else []
    if not code:
        pytest.skip("the README has no Python block")
    module = ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)  # classes that a block defines look their module up
    monkeypatch.chdir(tmp_path)
    for block in code:
        exec(block, vars(module))
