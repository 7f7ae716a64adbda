from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hap.errors import HapError
from hap.files import stored_bytes, write_json, write_model


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    data = {"model": "résumé", "values": [1, 2.5, None, True]}
    write_json(tmp_path / "new" / "folders" / "results.json", data)
    assert json.loads((tmp_path / "new" / "folders" / "results.json").read_text("utf-8")) == data
    write_json(str(tmp_path / "new" / "folders" / "results.json"), [])
    assert (tmp_path / "new" / "folders" / "results.json").read_text() == "[]\n"


@pytest.mark.parametrize("data", [float("nan"), {"a": [float("inf")]}, {"a": object()}, {(1, 2): 3}])
def test_what_is_no_json_is_refused_before_anything_is_written(tmp_path: Path, data: Any) -> None:
    with pytest.raises(HapError, match="cannot be written as JSON"):
        write_json(tmp_path / "new" / "results.json", data)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.ENOSPC, "free some space"), (errno.EACCES, "its permissions"), (errno.EIO, "check the path")],
)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int, remedy: str
) -> None:
    path = tmp_path / "results.json"
    write_json(path, "old")

    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(HapError, match=f"(?s)could not write .*results.json.*{os.strerror(code)}.*{remedy}"):
        write_json(path, "new")
    assert json.loads(path.read_text()) == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "results.json", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "results.json").mkdir()
    with pytest.raises(HapError, match="could not write"):
        write_json(tmp_path / "results.json", 1)
    (tmp_path / "file").touch()
    with pytest.raises(HapError, match="could not write"):
        write_json(tmp_path / "file" / "results.json", 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "results.json"]


def test_the_file_follows_the_umask(tmp_path: Path) -> None:
    """As any file that a program writes: others may read it where the user's umask lets them."""
    before = os.umask(0o022)
    try:
        write_json(tmp_path / "results.json", 1)
    finally:
        os.umask(before)
    assert (tmp_path / "results.json").stat().st_mode & 0o777 == 0o644


class Views(nn.Module):
    """Tensors that are parts of larger ones, and one with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.tied = nn.Linear(3, 2)
        self.tied.weight = self.first.weight
        self.part = nn.Parameter(torch.arange(6.0)[2:])
        self.register_buffer("wide", torch.ones(1).expand(4))
        self.register_buffer("count", torch.tensor(3))


def test_views_and_tied_tensors_of_a_model_are_written(tmp_path: Path) -> None:
    model = Views()
    write_model(tmp_path / "model.safetensors", model)
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == {"first.weight", "first.bias", "tied.bias", "part", "wide", "count"}
    assert all(torch.equal(found[name], model.state_dict()[name]) for name in found)
    assert abs(stored_bytes(model) - (tmp_path / "model.safetensors").stat().st_size) <= 8


def test_tensors_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(HapError, match="could not write .*missing"):
        write_model(tmp_path / "missing" / "model.safetensors", nn.Linear(2, 2))
