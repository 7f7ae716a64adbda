"""Peak memory of one piece of work, in a process of its own so that no other work's peak hides it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MARK = "curvature-point: "


def in_fresh_process(kind: str, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Runs ``curvature.py point`` and returns what it found."""
    script = Path(__file__).with_name("curvature.py")
    command = [sys.executable, str(script), "point", kind, name, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not found:
        raise RuntimeError(f"{kind} {name} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return json.loads(found[-1].removeprefix(MARK))


def peak(work: Callable[[], object]) -> dict[str, float]:
    """Runs the work; the highest resident memory during it, and how much that is above what it was before, in MiB.

    Linux: writing 5 to clear_refs resets the process's high-water mark (man 5 proc).
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    high = _status("VmHWM")
    return {"extra_mib": (high - before) / 1024, "peak_mib": high / 1024}


def _status(field: str) -> int:
    """A field of the process's status, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise KeyError(field)
