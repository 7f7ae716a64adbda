from __future__ import annotations

import pytest
import torch

from hap.errors import HapError
from hap.training.meter import Meter, length


def test_looks_at_values_only_at_intervals_and_names_the_first_bad_one() -> None:
    class Waits(Meter):
        interval = 3

    meter = Waits("epoch 1")
    values = [torch.tensor(v, device="meta") for v in (1.0, 2.0)]
    for value in values:
        meter.add(value, 1)  # a meta tensor holds no value: reading it would raise
    with pytest.raises((RuntimeError, NotImplementedError)):
        meter.add(torch.tensor(3.0, device="meta"), 1)


def test_sums_in_float64() -> None:
    meter = Meter("evaluation")
    for value in (2.0**24, 1.0, 1.0, -(2.0**24)):
        meter.add(torch.tensor(value), 1)
    assert meter.mean() == 0.5  # float32 would lose both ones


def test_keeps_no_graph() -> None:
    meter = Meter("evaluation")
    meter.add(torch.ones((), requires_grad=True) * 2, 1)
    assert not meter._values[0].requires_grad


def test_a_late_nan_is_found_by_mean() -> None:
    meter = Meter("evaluation")
    meter.add(torch.tensor(1.0), 1)
    meter._values.append(torch.tensor(float("nan")))  # as on a GPU, where add has not looked yet
    with pytest.raises(HapError, match="batch 2 of evaluation"):
        meter.mean()


def test_length() -> None:
    assert length([1, 2]) == 2
    assert length(iter([1, 2])) is None
    loader = torch.utils.data.DataLoader(torch.utils.data.ChainDataset([]))
    assert length(loader) == 0
