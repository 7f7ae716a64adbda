from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hap import HapError
from hap.checkpoint import directory as module
from hap.checkpoint import fresh_directory, refuse_existing


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A directory with a file, alone in its parent."""
    directory = tmp_path / "out"
    directory.mkdir()
    (directory / "plan.json").write_text("old")
    return directory


def contents(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()}


def test_appears_at_the_end(tmp_path) -> None:
    out = tmp_path / "a" / "out"
    with fresh_directory(out) as staging:
        (staging / "new").write_text("new")
        assert not out.exists()
        assert staging.stat().st_dev == tmp_path.stat().st_dev  # the move is one step
    assert contents(tmp_path) == {"a/out/new": "new"}


def test_an_empty_directory_may_be_there(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    with fresh_directory(tmp_path / "out") as staging:
        (staging / "new").write_text("new")
    assert contents(tmp_path) == {"out/new": "new"}


def test_a_full_one_is_refused(there) -> None:
    entered = False
    with pytest.raises(HapError, match="exists already"), fresh_directory(there):
        entered = True
    assert not entered
    assert contents(there.parent) == {"out/plan.json": "old"}


def test_a_file_is_refused_even_with_overwrite(tmp_path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(HapError, match="is a file"), fresh_directory(tmp_path / "out", overwrite=True):
        pass
    assert contents(tmp_path) == {"out": "mine"}


def test_overwrite_replaces_all_of_it(there) -> None:
    with fresh_directory(there, overwrite=True) as staging:
        (staging / "new").write_text("new")
        assert contents(there) == {"plan.json": "old"}
    assert contents(there.parent) == {"out/new": "new"}
    assert os.listdir(there.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_error_inside_leaves_the_old_one(there, error) -> None:
    with pytest.raises(error), fresh_directory(there, overwrite=True) as staging:
        (staging / "new").write_text("half of it")
        raise error
    assert contents(there) == {"plan.json": "old"}
    assert os.listdir(there.parent) == ["out"]


def test_an_error_inside_leaves_nothing_where_nothing_was(tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt), fresh_directory(tmp_path / "out") as staging:
        (staging / "new").write_text("half of it")
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")], ids=str)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("move", [1, 2])
def test_an_error_while_the_two_change_places(there, monkeypatch, error, when, move) -> None:
    """One of them is there, whole, whichever move is interrupted."""
    replace, moves = os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        moves.append(target)
        if when == "after" or len(moves) != move:
            replace(source, target)
        if len(moves) == move:
            raise error

    monkeypatch.setattr(module.os, "replace", interrupted)
    with (
        pytest.raises((KeyboardInterrupt, HapError)),
        fresh_directory(there, overwrite=True) as staging,
    ):
        (staging / "new").write_text("new")
    done = (when, move) == ("after", 2)
    assert contents(there) == ({"new": "new"} if done else {"plan.json": "old"})
    kept = [path for path in there.parent.iterdir() if path != there]
    if done or error is KeyboardInterrupt:
        assert not kept
    else:  # what is new is whole, and not thrown away
        assert [contents(path) for path in kept] == [{"new": "new"}]


def test_where_another_disk_is_mounted_nothing_can_be_replaced(there, monkeypatch) -> None:
    monkeypatch.setattr(module.os.path, "ismount", lambda path: Path(path) == there)
    with pytest.raises(HapError, match="another disk is mounted") as caught:
        refuse_existing(there, overwrite=True)
    assert str(there / "run") in caught.value.remedy


def test_a_full_disk_says_so(there) -> None:
    with (
        pytest.raises(HapError, match="could not write .*out") as error,
        fresh_directory(there, overwrite=True) as staging,
    ):
        (staging / "new").write_text("half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (error.value.got, error.value.remedy) == (
        "No space left on device",
        "free some space, or choose another disk",
    )
    assert contents(there.parent) == {"out/plan.json": "old"}


def test_a_parent_that_is_a_file_says_so(tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(HapError, match="could not write") as error, fresh_directory(tmp_path / "file" / "out"):
        pass
    assert "permissions" in error.value.remedy


def test_a_link_stays_a_link(there, tmp_path) -> None:
    link = tmp_path / "link"
    link.symlink_to(there)
    with fresh_directory(link, overwrite=True) as staging:
        (staging / "new").write_text("new")
    assert link.is_symlink()
    assert contents(there) == {"new": "new"}


def test_relative_paths(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with fresh_directory(Path("out")) as staging:
        (staging / "new").write_text("new")
    assert contents(tmp_path) == {"out/new": "new"}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_of_any_new_directory(tmp_path, umask) -> None:
    old = os.umask(umask)
    try:
        with fresh_directory(tmp_path / "out"):
            pass
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_refuse_existing(there, tmp_path) -> None:
    refuse_existing(tmp_path / "new", False)
    refuse_existing(there, True)
    with pytest.raises(HapError, match="exists already"):
        refuse_existing(there, False)


def test_only_what_hap_has_written_is_replaced(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(HapError, match="was not written by hap"), fresh_directory(tmp_path, overwrite=True):
        pass
    assert contents(tmp_path) == {"thesis.tex": "mine"}


def test_weights_are_for_whoever_may_read_the_rest(tmp_path: Path) -> None:
    with fresh_directory(tmp_path / "out") as staging:
        (staging / "dense").mkdir()
        for file in (staging / "plan.json", staging / "dense" / "model.safetensors"):
            file.write_text("x")
        file.chmod(0o600)  # as safetensors does
    modes = {path.suffix: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*.*")}
    assert modes[".safetensors"] == modes[".json"]
