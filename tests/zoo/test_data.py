from __future__ import annotations

import pytest

from hap import zoo
from hap.errors import HapError


def test_unknown_name():
    with pytest.raises(HapError, match=r"unknown data set 'cifar'[\s\S]*did you mean 'cifar10'"):
        zoo.load_data("cifar:somewhere")


@pytest.mark.parametrize("spec", ["cifar10", "imagefolder", "cifar10:"])
def test_directory_is_needed(spec, monkeypatch):
    monkeypatch.delenv("HAP_DATA", raising=False)
    with pytest.raises(HapError, match="HAP_DATA is not set"):
        zoo.load_data(spec)


def test_environment_variable_is_the_default_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HAP_DATA", str(tmp_path / "from-environment"))
    with pytest.raises(HapError, match="from-environment"):
        zoo.load_data("cifar10")
    with pytest.raises(HapError, match="from-spec"):
        zoo.load_data(f"cifar10:{tmp_path / 'from-spec'}")


def test_digits_take_no_directory():
    with pytest.raises(HapError, match="digits needs no directory"):
        zoo.load_data("digits:somewhere")


def test_image_size_is_for_image_folders():
    with pytest.raises(HapError, match="images of one size"):
        zoo.load_data("digits", image_size=16)


def test_bad_option_is_refused_first(tmp_path):
    with pytest.raises(HapError, match="batch_size is too small"):
        zoo.load_data(f"cifar10:{tmp_path}", batch_size=0)


def test_registry():
    assert set(zoo.DATASETS) == {"digits", "cifar10", "imagefolder"}
    assert all(dataset.what for dataset in zoo.DATASETS.values())
