from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file, save_model

from hap import zoo
from hap.errors import HapError
from hap.zoo.weights import load_weights_


@pytest.fixture
def stored():
    return zoo.build("digits-cnn", seed=1).state_dict()


def test_round_trip(tmp_path, stored):
    save_file(stored, tmp_path / "w.safetensors")
    loaded = zoo.build("digits-cnn", weights=tmp_path / "w.safetensors", seed=2).state_dict()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


def test_differences_are_named_and_nothing_is_loaded(tmp_path, stored):
    stored["linear.weight"] = torch.zeros(7, 32)
    stored["head.weight"] = stored.pop("conv1.weight")
    save_file(stored, tmp_path / "w.safetensors")
    model = zoo.build("digits-cnn", seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(HapError, match="do not fit DigitsCNN; nothing was loaded") as caught:
        load_weights_(model, tmp_path / "w.safetensors")
    assert "1 missing: conv1.weight" in caught.value.got
    assert "1 unexpected: head.weight" in caught.value.got
    assert "1 of another shape: linear.weight (7, 32) for (10, 32)" in caught.value.got
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_long_lists_are_cut(tmp_path, stored):
    save_file(stored, tmp_path / "w.safetensors")
    with pytest.raises(HapError, match=r"missing: \S+, \S+, \S+, \S+, \S+, \.\.\."):
        zoo.build("resnet20", weights=tmp_path / "w.safetensors")


def test_missing_file(tmp_path):
    with pytest.raises(HapError, match="no such file"):
        zoo.build("resnet20", weights=tmp_path / "w.safetensors")
    with pytest.raises(HapError, match="a directory"):
        zoo.build("resnet20", weights=tmp_path)


def test_damaged_file(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(HapError, match="cannot be read; nothing was loaded"):
        zoo.build("resnet20", weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_real_weights_fit(real_data, name):
    model = zoo.build(name, weights=real_data / f"{name}.safetensors")
    assert float(model.bn1.running_var.mean()) != 1


def test_a_file_may_hold_tied_weights_once(tmp_path):
    def tied(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5))
        model[1].weight = model[0].weight
        return model

    save_model(tied(0), str(tmp_path / "w.safetensors"))
    model = tied(1)
    load_weights_(model, tmp_path / "w.safetensors")
    assert torch.equal(model[1].weight, tied(0)[0].weight) and model[1].weight is model[0].weight
