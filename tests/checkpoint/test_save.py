from __future__ import annotations

import copy
import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hap
from hap import HapError
from hap.files import stored_bytes

FILES = {"model.safetensors", "plan.json", "README.md"}


@pytest.fixture
def saved(small, plan, tmp_path) -> Path:
    return hap.save(small, plan, tmp_path / "saved")


def test_loaded_is_what_was_saved(small, plan, dense, other_weights, inputs, saved) -> None:
    """Bit for bit, whatever weights the dense model has; and that one is left as it is."""
    assert plan.implants and any(d.prune for d in plan.decisions.values())
    before = copy.deepcopy(other_weights.state_dict())
    loaded, again = hap.load(saved, other_weights)
    assert again == plan
    assert torch.equal(loaded(inputs), small(inputs))
    assert not torch.allclose(small(inputs), hap.apply(dense, plan)(inputs)), "the training after pruning matters"
    assert all(torch.equal(before[name], tensor) for name, tensor in other_weights.state_dict().items())
    assert {str(p) for p in loaded.state_dict()} == {str(p) for p in small.state_dict()}


def test_save_returns_the_directory_and_writes_three_files(saved, tmp_path) -> None:
    assert saved == tmp_path / "saved"
    assert {path.name for path in saved.iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_strings_and_missing_parents_will_do(small, plan, dense, inputs, tmp_path) -> None:
    directory = hap.save(small, plan, str(tmp_path / "a" / "b"))
    assert torch.equal(hap.load(str(directory), dense)[0](inputs), small(inputs))


def test_the_same_model_gives_the_same_bytes(small, plan, saved, tmp_path) -> None:
    again = hap.save(small, plan, tmp_path / "again")
    for name in FILES:
        assert (saved / name).read_bytes() == (again / name).read_bytes()


def test_tied_parameters_are_stored_once_and_tied_again(small, dense, saved) -> None:
    assert small.first.weight is small.second.weight
    tensors = load_file(saved / "model.safetensors")
    assert len({"first.weight", "second.weight"} & set(tensors)) == 1
    loaded, _ = hap.load(saved, dense)
    assert loaded.first.weight is loaded.second.weight
    assert torch.equal(loaded.first.weight, small.first.weight)


def test_modes_and_requires_grad_are_the_dense_models(dense, saved) -> None:
    model = copy.deepcopy(dense).train()
    model.head.weight.requires_grad_(False)
    loaded, _ = hap.load(saved, model)
    assert all(m.training for m in loaded.modules())
    assert [name for name, p in loaded.named_parameters() if not p.requires_grad] == ["head.weight"]


def test_a_dense_model_without_weights_is_filled(dense, small, saved, inputs) -> None:
    """As it is built where memory is short: its weights do not matter."""
    with torch.device("meta"):
        empty = type(dense)().eval()
    loaded, _ = hap.load(saved, empty)
    assert torch.equal(loaded(inputs), small(inputs))
    assert loaded.first.weight is loaded.second.weight
    assert all(isinstance(parameter, torch.nn.Parameter) for parameter in loaded.parameters())
    assert all(tensor.is_meta for tensor in empty.state_dict().values())


def test_what_is_in_no_file_must_be_in_the_dense_model(dense, saved) -> None:
    model = copy.deepcopy(dense)
    model.norm.register_buffer("running_mean", model.norm.running_mean.to("meta"), persistent=False)
    with pytest.raises(HapError, match="'norm.running_mean' has no values"):
        hap.load(saved, model)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(small, plan, tmp_path, umask) -> None:
    old = os.umask(umask)
    try:
        directory = hap.save(small, plan, tmp_path / "saved")
    finally:
        os.umask(old)
    assert directory.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o666 & ~umask}


def test_an_existing_directory_is_refused(small, plan, saved) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(HapError, match="exists already"):
        hap.save(small, plan, saved)
    assert before == {path.name: path.read_bytes() for path in saved.iterdir()}


def test_overwrite_replaces_all_of_it(foreign, dense, inputs, saved) -> None:
    (saved / "left-over.txt").write_text("old")
    small, plan = foreign
    hap.save(small, plan, saved, overwrite=True)
    assert {path.name for path in saved.iterdir()} == FILES
    loaded, again = hap.load(saved, dense)
    assert again == plan and torch.equal(loaded(inputs), small(inputs))


def test_another_model_than_the_plans_is_refused(dense, plan, tmp_path) -> None:
    with pytest.raises(HapError, match="this model is not what the plan made") as error:
        hap.save(dense, plan, tmp_path / "saved")
    assert error.value.expected == f"{plan.small.params:,} parameters"
    assert not list(tmp_path.iterdir())


@pytest.fixture
def file_limit() -> Iterator[None]:
    """No file may grow over 2,000 bytes: writing fails as on a full disk, in Python and elsewhere."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_tensors_that_do_not_fit_on_the_disk(small, plan, saved, file_limit) -> None:
    """safetensors raises an error of its own; the old checkpoint survives."""
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(HapError, match="could not write .*model.safetensors") as error:
        hap.save(small, plan, saved, overwrite=True)
    assert "File too large" in error.value.got
    assert before == {path.name: path.read_bytes() for path in saved.iterdir()}
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_a_plan_that_does_not_fit_on_the_disk(small, plan, tmp_path, file_limit, monkeypatch) -> None:
    module = sys.modules["hap.checkpoint.save"]  # the name in the package is the function
    monkeypatch.setattr(module, "write_model", lambda path, model: path.touch())
    with pytest.raises(HapError, match="could not write .*saved"):
        hap.save(small, plan, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json"])
def test_a_missing_file_is_named(dense, saved, name) -> None:
    (saved / name).unlink()
    with pytest.raises(HapError, match="is not a hap checkpoint") as error:
        hap.load(saved, dense)
    assert error.value.got == f"no {name}"


def test_no_directory_at_all(dense, tmp_path) -> None:
    with pytest.raises(HapError, match="is not a hap checkpoint") as error:
        hap.load(tmp_path / "nowhere", dense)
    assert error.value.got == "no such directory"


def test_the_card_is_not_needed(small, dense, inputs, saved) -> None:
    (saved / "README.md").unlink()
    assert torch.equal(hap.load(saved, dense)[0](inputs), small(inputs))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_tensors_cut_short_are_refused(dense, saved, share) -> None:
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(HapError, match="model.safetensors cannot be read"):
        hap.load(saved, dense)


def test_other_bytes_are_not_tensors(dense, saved) -> None:
    (saved / "model.safetensors").write_bytes(b"\x80\x04pickle, not safetensors" * 10)
    with pytest.raises(HapError, match="model.safetensors cannot be read"):
        hap.load(saved, dense)


def test_tensors_of_another_plan_are_refused(foreign, dense, saved, tmp_path) -> None:
    other = hap.save(*foreign, tmp_path / "other")
    (saved / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(HapError, match="model.safetensors cannot be read") as error:
        hap.load(saved, dense)
    assert "size mismatch" in error.value.got


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_tensors_too_few_or_too_many_are_refused(dense, saved, change) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["head.bias"]
    else:
        tensors["more"] = torch.zeros(1)
    save_file(tensors, path)
    with pytest.raises(HapError, match="does not fit its plan") as error:
        hap.load(saved, dense)
    name = "head.bias" if change == "missing" else "more"
    assert f"{change} ['{name}']" in error.value.got


def test_a_damaged_plan_is_refused(dense, saved) -> None:
    path = saved / "plan.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(HapError, match="this is not a plan"):
        hap.load(saved, dense)
    path.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(HapError, match="plan.json cannot be read"):
        hap.load(saved, dense)


def test_a_plan_of_another_version_is_refused(dense, saved) -> None:
    path = saved / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(HapError, match="another schema version"):
        hap.load(saved, dense)


def test_another_dense_model_is_refused(dense, saved) -> None:
    wrong = copy.deepcopy(dense)
    wrong.head = torch.nn.Linear(8, 4)
    with pytest.raises(HapError, match="not the model that the plan was made for") as error:
        hap.load(saved, wrong)
    assert "head.weight" in error.value.got


def test_the_small_model_is_not_the_dense_one(small, saved) -> None:
    with pytest.raises(HapError, match="not the model that the plan was made for"):
        hap.load(saved, small)


def test_stored_bytes_are_the_files(small, saved) -> None:
    assert stored_bytes(small) == (saved / "model.safetensors").stat().st_size
