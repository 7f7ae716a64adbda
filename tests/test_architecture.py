"""The layers keep to the table of CONTRIBUTING.md, and the files to the house rules: read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parent.parent / "src" / "hap"
LONGEST_FILE = 400

# A layer is a folder or a file right under src/hap. hap/__init__.py only gathers the public names: it is
# exempt, and only the command line may import it.
FOUNDATION = {"errors", "types", "batches", "attention", "files"}
MAY_IMPORT: dict[str, set[str]] = {
    "structure": set(),
    "curvature": set(),
    "planning": {"implants"},
    "implants": set(),
    "training": set(),
    "zoo": set(),
    "pretrained": set(),
    "surgery": {"structure", "planning", "implants"},
    "checkpoint": {"planning", "surgery", "implants", "pretrained"},
    "report": {"planning"},
}
MAY_IMPORT["pipeline"] = set(MAY_IMPORT)
MAY_IMPORT["trainer"] = {"pipeline", "planning", "surgery", "checkpoint", "pretrained"}
MAY_IMPORT["recipes"] = set(MAY_IMPORT) - {"trainer"}
MAY_IMPORT["cli"] = {"pipeline", "recipes", "zoo", "report", "checkpoint", "pretrained", "hap"}
MAY_IMPORT["__main__"] = {"cli"}
MAY_IMPORT = {layer: allowed | FOUNDATION for layer, allowed in MAY_IMPORT.items()} | {
    layer: FOUNDATION for layer in FOUNDATION
}


def modules(src: Path) -> dict[str, Path]:
    """Every module under `src` by its dotted name; a package goes by its own name."""
    names = {path: path.relative_to(src.parent).with_suffix("").parts for path in sorted(src.rglob("*.py"))}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


def imported(name: str, path: Path, known: set[str]) -> set[str]:
    """The modules in `known` that a module imports, wherever in the file, under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            # `from hap.structure import units` names a module, or what a module holds
            found |= {full if (full := f"{base}.{alias.name}") in known else base for alias in node.names}
    unknown = {module for module in found if module.split(".")[0] == "hap"} - known
    assert not unknown, f"{name} imports {unknown}, which do not exist"
    return found & known


def layer(name: str) -> str:
    """The layer of a module; the top package is a layer of its own, `hap`."""
    return (name + ".").split(".")[1] or "hap"


def broken_layers(src: Path) -> list[str]:
    known = modules(src)
    problems = []
    for name, path in known.items():
        if name == "hap":
            continue
        allowed = MAY_IMPORT.get(layer(name))
        if allowed is None:
            problems.append(f"{name} is in no layer of the table")
            continue
        for other in sorted(imported(name, path, set(known))):
            if layer(other) not in allowed | {layer(name)}:
                problems.append(f"{name} imports {other}")
    return problems


def cycle(src: Path) -> list[str]:
    known = modules(src)
    try:
        TopologicalSorter({name: imported(name, path, set(known)) for name, path in known.items()}).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def house_rules(src: Path) -> Iterator[str]:
    for name, path in modules(src).items():
        text = path.read_text()
        if text.count("\n") > LONGEST_FILE:
            yield f"{name} is longer than {LONGEST_FILE} lines: split it"
        if path.stem == "utils":
            yield f"{name}: name the file for what it holds"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                yield f"{name}:{node.lineno} has a bare except"
            prints = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            if prints and layer(name) not in {"cli", "__main__"}:
                yield f"{name}:{node.lineno} prints: the library logs"


def test_the_table_has_no_cycle() -> None:
    TopologicalSorter({name: allowed - FOUNDATION for name, allowed in MAY_IMPORT.items()}).prepare()


def test_layers_import_what_the_table_allows() -> None:
    assert broken_layers(SRC) == []


def test_imports_have_no_cycle() -> None:
    assert cycle(SRC) == []


def test_files_keep_the_house_rules() -> None:
    assert list(house_rules(SRC)) == []


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A tiny package that keeps all the rules."""
    src = tmp_path / "hap"
    for path, text in {
        "__init__.py": "from hap.pipeline import prune\n",
        "errors.py": "",
        "types.py": "from hap.errors import HapError\n",
        "pipeline.py": "import hap.surgery.cut\nfrom hap.planning import plan\n",
        "planning/__init__.py": "from .plan import Plan\n",
        "planning/plan.py": "import torch\nfrom hap.types import Structure\n",
        "surgery/cut.py": "from hap.planning.plan import Plan\n",
        "cli/main.py": "import hap\nfrom hap import pipeline\nprint()\n",
    }.items():
        (src / path).parent.mkdir(parents=True, exist_ok=True)
        (src / path).write_text(text)
    return src


def test_the_checks_pass_a_clean_house(house: Path) -> None:
    assert broken_layers(house) == [] and cycle(house) == [] and list(house_rules(house)) == []


@pytest.mark.parametrize(
    ("path", "text", "problem"),
    [
        ("planning/plan.py", "from hap.surgery.cut import x", "hap.planning.plan imports hap.surgery.cut"),
        ("planning/plan.py", "from hap import surgery, pipeline", "hap.planning.plan imports hap.pipeline"),
        ("planning/plan.py", "from ..surgery import cut", "hap.planning.plan imports hap.surgery.cut"),
        ("planning/__init__.py", "from ..surgery import cut", "hap.planning imports hap.surgery.cut"),
        ("planning/plan.py", "def f():\n    import hap.cli.main", "hap.planning.plan imports hap.cli.main"),
        ("planning/plan.py", "if TYPE_CHECKING:\n    import hap", "hap.planning.plan imports hap"),
        ("types.py", "from hap.planning import plan", "hap.types imports hap.planning.plan"),
        ("cli/main.py", "from hap.surgery import cut", "hap.cli.main imports hap.surgery.cut"),
        ("helpers.py", "", "hap.helpers is in no layer of the table"),
    ],
)
def test_a_forbidden_import_is_seen(house: Path, path: str, text: str, problem: str) -> None:
    (house / "surgery" / "__init__.py").touch()
    (house / path).write_text(text)
    assert problem in broken_layers(house)


def test_a_cycle_is_seen(house: Path) -> None:
    (house / "errors.py").write_text("def f():\n    from hap.types import x")
    assert set(cycle(house)) == {"hap.errors", "hap.types"}


@pytest.mark.parametrize(
    ("path", "text", "problem"),
    [
        ("planning/plan.py", "x = 1\n" * 401, "hap.planning.plan is longer than 400 lines: split it"),
        ("planning/utils.py", "", "hap.planning.utils: name the file for what it holds"),
        ("types.py", "try:\n    pass\nexcept:\n    pass", "hap.types:3 has a bare except"),
        ("types.py", "def f():\n    print()", "hap.types:2 prints: the library logs"),
    ],
)
def test_a_broken_house_rule_is_seen(house: Path, path: str, text: str, problem: str) -> None:
    (house / path).write_text(text)
    assert list(house_rules(house)) == [problem]
