from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hap import zoo
from hap.errors import HapError


# He et al. 2016, table 6: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M; exactly, with batch norm and option A:
@pytest.mark.parametrize(
    "name, parameters",
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
        ("digits-cnn", 33_082),
    ],
)
def test_parameter_counts(name, parameters):
    assert sum(p.numel() for p in zoo.build(name).parameters()) == parameters


@pytest.mark.parametrize("name", ["resnet20", "digits-cnn"])
def test_input_shape_and_classes(name):
    model = zoo.build(name, classes=7)
    assert model.training
    assert model(torch.zeros(2, *zoo.MODELS[name].input_shape)).shape == (2, 7)


def test_all_models_say_what_they_are():
    assert set(zoo.MODELS) == {"resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "digits-cnn"}
    assert "ResNet-110" in zoo.MODELS["resnet110"].what


def test_seed_decides_the_weights():
    first, again, other = (zoo.build("digits-cnn", seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["linear.weight"], other["linear.weight"])


def test_global_generator_is_neither_read_nor_moved():
    state = torch.get_rng_state()
    first = zoo.build("digits-cnn").state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    again = zoo.build("digits-cnn").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_initialisation_is_he_normal():
    weight = zoo.build("resnet20", seed=1).layer3[1].conv2.weight.detach()
    count, std = weight.numel(), math.sqrt(2 / (64 * 9))
    # The standard error of a normal sample's standard deviation is std / sqrt(2 n), of its mean std / sqrt(n).
    assert abs(float(weight.std()) / std - 1) * math.sqrt(2 * count) < 4
    assert abs(float(weight.mean())) / std * math.sqrt(count) < 4


def test_linear_bias_starts_at_zero():
    assert not zoo.build("resnet20").linear.bias.any()


def test_model_is_built_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        model = zoo.build("digits-cnn")
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_residual_streams_have_several_3x3_writers():
    model = zoo.build("digits-cnn")
    writers = [model.conv1, *(block.conv2 for block in model.layer1)]
    assert len(writers) == 3 and all(w.kernel_size == (3, 3) and w.out_channels == 16 for w in writers)
    assert all(isinstance(block.shortcut, nn.Identity) for block in (*model.layer1, *model.layer2))


def test_unknown_name():
    with pytest.raises(HapError, match=r"unknown model 'resnet18'[\s\S]*did you mean 'resnet"):
        zoo.build("resnet18")


def test_no_classes():
    with pytest.raises(HapError, match="classes >= 1"):
        zoo.build("resnet20", classes=0)
