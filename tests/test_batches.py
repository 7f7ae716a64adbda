"""Modes of a model: found as they were, whatever its classes make of `train`."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import nn

from hap.batches import evaluating, resized, settled_, take
from hap.errors import HapError


class Kept(nn.Module):
    """Makes what it needs in evaluation when it is put there, and drops it in training, as EfficientViT's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def train(self, mode: bool = True) -> Kept:
        super().train(mode)
        self.kept = None if mode else 2 * self.scale.detach()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (2 * self.scale if self.training else self.kept)


class Loop(nn.Sequential):
    """`train` is a training loop here."""

    def train(self, data: Any) -> None:  # type: ignore[override]
        raise AssertionError("nobody asked for it")


@pytest.fixture
def model() -> nn.Module:
    return Loop(nn.Linear(4, 6), nn.BatchNorm1d(6), Kept(), nn.Linear(6, 2))


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_caches_are_those_of_the_mode(model: nn.Module, training: bool) -> None:
    model[2].train(training)
    before = modes(model)
    with evaluating(model):
        assert not any(modes(model)) and model[2].kept is not None
    assert modes(model) == before and (model[2].kept is None) == training
    settled_(model)
    assert modes(model) == before and (model[2].kept is None) == training


def test_a_cache_is_as_wide_as_the_model_is(model: nn.Module) -> None:
    model[2].train(False)
    model[2].scale.data = torch.ones(4)
    settled_(model)
    assert model[2].kept.shape == (4,)


@pytest.mark.parametrize("samples", [0, -5])
def test_a_number_of_samples_below_one_is_named(samples: int) -> None:
    with pytest.raises(HapError, match="samples") as error:
        list(take([(torch.zeros(4, 3), torch.zeros(4))], samples, torch.device("cpu")))
    assert (error.value.expected, error.value.got) == ("a number of at least 1, or None for all", str(samples))


def test_batches_of_collators_are_cut_too() -> None:
    """They are mappings, and no dicts."""
    batch = UserDict(input_ids=torch.zeros(5, 3), labels=torch.zeros(5))
    found = list(take([batch, batch], 7, torch.device("cpu")))
    assert [len(part["input_ids"]) for part in found] == [5, 2]
    assert len(resized(batch, 8)["labels"]) == 8
