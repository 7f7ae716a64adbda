"""A recipe of seconds, on digits."""

from __future__ import annotations

from pathlib import Path

import pytest

TEXT = """
title: digits
model: zoo:digits-cnn
data: {name: digits, batch_size: 64, limit: 200}
dense: {batch_size: 32, train: {epochs: 2, lr: 0.05}}
measure: {samples: 64}
budget: {params: 0.5}
finetune: {epochs: 2, lr: 0.01}
targets:
  - {of: accuracy, value: 0.5, source: this test}
  - {of: kept_params, value: 0.4, source: this test}
  - {of: gain, value: 0.0, source: this test}
"""


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "digits.yaml"
    path.write_text(TEXT)
    return path
