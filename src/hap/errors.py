"""The one error that users of hap see."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


class HapError(Exception):
    """Says what went wrong, what was expected, what came, and what to do about it.

    >>> print(HapError("no data", expected="at least one batch", got="none", remedy="check --data"))
    no data
      expected: at least one batch
      got:      none
      remedy:   check --data
    """

    def __init__(self, what: str, *, expected: str = "", got: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.expected = expected
        self.got = got
        self.remedy = remedy

    def __str__(self) -> str:
        lines = [self.what]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.got:
            lines.append(f"  got:      {self.got}")
        if self.remedy:
            lines.append(f"  remedy:   {self.remedy}")
        return "\n".join(lines)


def unknown(kind: str, name: str, known: Iterable[str]) -> HapError:
    """The error for a name that is not in a list, with the nearest names that are.

    >>> print(unknown("criterion", "gate-fischer", ["gate-fisher", "taylor"]))
    unknown criterion 'gate-fischer'
      expected: one of: gate-fisher, taylor
      remedy:   did you mean 'gate-fisher'?
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]!r}?" if near else ""
    return HapError(f"unknown {kind} {name!r}", expected=f"one of: {', '.join(known)}", remedy=remedy)


def need_same(
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    refused: Callable[[str, str], HapError],
    *,
    last: Sequence[str] = (),
) -> None:
    """Raises the error for a state that another run has left: it names the first entry in which the runs differ.

    Args:
        there: what made that run what it is, by name.
        here: the same of this run.
        refused: makes the error of what was expected, and what came.
        last: names of entries that say little; another that differs comes before them.

    >>> need_same({"seed": 0}, {"seed": 1}, lambda expected, got: HapError("no", expected=expected, got=got))
    Traceback (most recent call last):
    hap.errors.HapError: no
      expected: seed 0, as there
      got:      seed 1
    """
    for name in sorted({*there, *here}, key=lambda name: (name in last, name)):
        if there.get(name) != here.get(name):
            raise refused(f"{name} {there.get(name)}, as there", f"{name} {here.get(name)}")


def missing(need: str, package: str, extra: str | None, error: ImportError) -> HapError:
    """The error for an optional package that is not installed.

    Args:
        need: who needs it, with the verb.
        package: its name.
        extra: the extra of this library that brings it; None if it is in none.
        error: what the import said.

    >>> print(missing("plots need", "matplotlib", "report", ImportError("No module named 'matplotlib'")))
    plots need the package 'matplotlib'
      expected: an installation with the extra 'report'
      got:      No module named 'matplotlib'
      remedy:   pip install 'torch-hap[report]'
    """
    return HapError(
        f"{need} the package {package!r}",
        expected=f"an installation with the extra {extra!r}" if extra else "an installation",
        got=str(error),
        remedy=f"pip install 'torch-hap[{extra}]'" if extra else f"pip install {package}",
    )


def unwritable(path: str | os.PathLike[str], error: Exception) -> HapError:
    """The error for a file or directory that could not be written.

    Args:
        path: where to.
        error: an OSError, or what another library made of one.

    >>> print(unwritable("run/plan.json", OSError(errno.ENOSPC, "No space left on device")))
    could not write run/plan.json
      expected: a writable place with enough space
      got:      No space left on device
      remedy:   free some space, or choose another disk
    """
    code, text = (error.errno, error.strerror) if isinstance(error, OSError) else (None, None)
    full = code in (errno.ENOSPC, errno.EDQUOT)
    return HapError(
        f"could not write {os.fspath(path)}",
        expected="a writable place with enough space",
        got=text or str(error),
        remedy="free some space, or choose another disk" if full else "check the path, its permissions and the space",
    )
