"""Directories that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from hap.errors import HapError, unwritable

RECORDS = ("plan.json", "finetune.json", "report.json")  # one of them is in every directory that hap writes


def refuse_existing(directory: Path, overwrite: bool) -> None:
    """Raises a HapError if nothing can be written at `directory`.

    It exists and may not be replaced, or is no directory that hap has written, or its place cannot be written to.
    """
    if directory.exists() and not directory.is_dir():
        raise HapError(f"{directory} is a file", expected="the path of a directory", remedy="choose another path")
    if directory.exists() and any(directory.iterdir()) and not overwrite:
        raise HapError(
            f"{directory} exists already",
            expected="a new or empty directory",
            remedy="choose another path, or pass --overwrite (overwrite=True)",
        )
    ours = any((directory / name).exists() for name in RECORDS)
    if overwrite and not ours and directory.exists() and any(directory.iterdir()):
        raise HapError(
            f"{directory} was not written by hap",
            expected=f"with overwrite a directory that holds {', '.join(RECORDS[:-1])} or {RECORDS[-1]}",
            remedy="choose another path, or remove it yourself",
        )
    if os.path.ismount(directory):
        raise HapError(
            f"{directory} is where another disk is mounted, and no directory can take its place",
            expected="a path that can be replaced as a whole",
            remedy=f"name a directory in it, such as {directory / 'run'}",
        )
    place = next(parent for parent in directory.absolute().parents if parent.exists())
    if not place.is_dir():
        raise unwritable(directory, NotADirectoryError(errno.ENOTDIR, f"{place} is a file"))
    if not os.access(place, os.W_OK | os.X_OK):
        raise unwritable(directory, PermissionError(errno.EACCES, f"no permission to write in {place}"))


@contextmanager
def fresh_directory(directory: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory that takes the place of `directory` when the block ends well.

    On an error or an interrupt it is removed, and what stood at `directory` stays as it was.

    Raises:
        HapError: `directory` exists and `overwrite` is False, or the disk is full or read-only.
    """
    directory = directory.resolve()  # through a link, so that the link stays one
    refuse_existing(directory, overwrite)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{directory.name}-", dir=directory.parent, ignore_cleanup_errors=True
        ) as place:
            fresh = Path(place, "new")
            fresh.mkdir()  # not `place` itself, which is for its owner alone
            yield fresh
            for file in fresh.rglob("*.safetensors"):  # which safetensors lets only the owner read
                file.chmod(fresh.stat().st_mode & 0o666)
            _swap(fresh, directory, Path(place, "old"))
    except (OSError, SafetensorError) as error:
        raise unwritable(directory, error) from error


def _swap(fresh: Path, directory: Path, old: Path) -> None:
    """Puts the new directory in place of what stood there, which goes to `old`; or leaves all as it was.

    What is new is whole, and kept beside where it cannot have its place.
    """
    try:
        if directory.exists():
            os.replace(directory, old)
        os.replace(fresh, directory)
    except BaseException as error:  # also an interrupt in between
        if old.exists() and not directory.exists():
            os.replace(old, directory)
        if not (isinstance(error, OSError) and fresh.exists()):
            raise
        kept = directory.with_name(f"{directory.name}-{secrets.token_hex(4)}")
        os.replace(fresh, kept)
        raise HapError(
            f"{directory} cannot be replaced; what was to be there is whole, in {kept}",
            expected="a directory that no other program holds",
            got=str(error),
            remedy=f"move {kept} there yourself",
        ) from error
