from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def real_data(data_dir: Path) -> Path:
    """The folder of data sets, if CIFAR-10 and the weights that fit it are in it."""
    for name in ("cifar10_train.parquet", "cifar10_test.parquet", "resnet20.safetensors", "resnet56.safetensors"):
        if not (data_dir / name).is_file():
            pytest.skip(f"there is no {name} in {data_dir}; name another folder with HAP_DATA")
    return data_dir
