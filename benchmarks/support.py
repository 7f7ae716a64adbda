"""The support matrix: what hap does with the models that people use; makes `docs/support.md`.

    make support                          # both of these
    python benchmarks/support.py run      # each model in a process of its own
    python benchmarks/support.py page     # the page, from the raw results

Raw results are in `benchmarks/results/support.jsonl`, one line for each model, made by one version of the source. A run
goes on where it was stopped; when the source of `hap` has changed, it starts again.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import json
import multiprocessing
import os
import platform
import time
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from curvature_records import read, say
from support_case import Case
from support_cases import CASES
from support_page import page as render

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "support.jsonl"
PACKAGES = ("torch", "torchvision", "timm", "transformers", "einops")

# Imported once, before the processes are forked. Not the least because importing takes as long as most models.
PRELOAD = ["torch", "torchvision", "timm", "transformers", "hap", "torch.export", "support_cases", "support_check"]

Row = dict[str, Any]
Results = Annotated[Path, typer.Option(help="The raw results.")]

app = typer.Typer(help="What hap does with the models that people use.", no_args_is_help=True)


@app.command()
def run(
    only: Annotated[str, typer.Option(help="Names to run, as group/name, with wildcards.")] = "*",
    again: Annotated[bool, typer.Option(help="Also what this source has been run on.")] = False,
    not_green: Annotated[bool, typer.Option(help="Only what was not green the last time.")] = False,
    seconds: Annotated[float, typer.Option(help="Time limit for one model.")] = 60.0,
    results: Results = RESULTS,
) -> None:
    """Runs the models that have no result of this source yet."""
    rows = {f"{row['group']}/{row['name']}": row for row in read(results)}
    code = digest()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    for case in CASES:
        old = rows.get(case.key, {})
        skipped = old.get("code") == code and not again or not_green and old.get("status") == "green"
        if skipped or not fnmatch.fnmatchcase(case.key, only):
            continue
        if importlib.util.find_spec(case.needs) is None:
            say(f"{case.key}: {case.needs} is not installed")
            continue
        start = time.perf_counter()
        row = _guarded(context, case, seconds)
        rows[case.key] = row | {"seconds": round(time.perf_counter() - start, 1), "code": code, "versions": versions()}
        _write(results, [rows[c.key] for c in CASES if c.key in rows])
        say(f"{case.key}: {row['status']} {row.get('step', '')} {row.get('message', '')}"[:200])


@app.command()
def page(
    results: Results = RESULTS,
    to: Annotated[Path, typer.Option(help="The page.")] = ROOT / "docs" / "support.md",
) -> None:
    """Writes the page from the raw results."""
    to.write_text(render(read(results)))


def digest() -> str:
    """Of the source that the results are about."""
    spec = importlib.util.find_spec("hap")
    assert spec is not None and spec.submodule_search_locations
    source = b"".join(path.read_bytes() for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")))
    return hashlib.sha256(source).hexdigest()[:12]


def versions() -> dict[str, str]:
    """Of Python and of the packages whose models these are."""
    installed = {name: metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    return {"python": platform.python_version(), **installed}


def _guarded(context: Any, case: Case, seconds: float) -> Row:
    """The row of one case, from a process that may crash or hang."""
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(case.key, there))
    process.start()
    there.close()
    failed: Row = {"group": case.group, "name": case.name, "status": "failed", "step": "start"}
    deadline = time.monotonic() + seconds
    try:
        while here.poll(max(0.0, deadline - time.monotonic())):
            said = here.recv()
            if isinstance(said, dict):
                return said
            failed["step"] = said
        return failed | {"message": f"not done after {seconds:g} s"}
    except EOFError:
        process.join()
        return failed | {"message": f"the process ended with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _child(key: str, to: Connection) -> None:
    import torch
    from support_check import check

    quiet = os.open(os.devnull, os.O_WRONLY)  # torch.export prints the graphs that it gives up on
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    torch.set_num_threads(1)
    to.send(check(next(case for case in CASES if case.key == key), to.send))


def _write(path: Path, rows: list[Row]) -> None:
    """All at once: a run that is killed loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(draft, path)


if __name__ == "__main__":
    app()
