"""A small CNN trained on digits."""

from __future__ import annotations

import pytest
from torch import nn

import hap
from hap import zoo


@pytest.fixture(scope="package")
def data() -> zoo.DataSplits:
    return zoo.load_data("digits", batch_size=64)


@pytest.fixture(scope="package")
def model(data: zoo.DataSplits) -> nn.Module:
    trained = zoo.build("digits-cnn")
    hap.finetune(trained, data.train, epochs=4, lr=0.05)
    return trained
