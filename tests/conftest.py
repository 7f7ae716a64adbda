"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# Examples are the same in every run, and a busy machine fails no test.
settings.register_profile("hap", derandomize=True, deadline=None)
settings.load_profile("hap")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # several workers share the cores already


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of data sets and trained weights: $HAP_DATA, or shared/data beside the repository."""
    path = Path(os.environ.get("HAP_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"there is no data at {path}; name another folder with HAP_DATA")
    return path
