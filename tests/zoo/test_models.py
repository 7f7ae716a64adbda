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
        ("preresnet164", 1_703_258),  # He et al. 2016b, table 4: 1.7M
        ("vgg16-bn", 14_728_266),  # Li et al. 2017, table 1: 1.5e7
        ("wideresnet32", 7_427_914),
        ("preresnet29", 2_851_018),
        ("digits-cnn", 33_082),
    ],
)
def test_parameter_counts(name, parameters):
    assert sum(p.numel() for p in zoo.build(name).parameters()) == parameters


# torchvision's documentation, for 1,000 classes
@pytest.mark.parametrize("name, parameters", [("resnet50", 25_557_032), ("mobilenetv2", 3_504_872)])
def test_parameter_counts_of_torchvision(name, parameters):
    pytest.importorskip("torchvision")
    assert sum(p.numel() for p in zoo.build(name, classes=1000).parameters()) == parameters


def test_the_paper_s_preresnet_is_he_s_but_for_its_widths():
    """PreResNet-29 has 9n + 2 layers; with He's widths it would have 0.3M parameters, a tenth of the paper's."""
    model = zoo.build("preresnet29")
    main = [m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in name]
    assert len(main) + 1 == 29
    assert {m.out_channels for m in main} == {64, 128, 256}


@pytest.mark.parametrize("name, depth", [("wideresnet32", 32), ("vgg16-bn", 14), ("preresnet164", 164)])
def test_depth(name, depth):
    shortcuts = ("shortcut", "downsample")
    model = zoo.build(name)
    main = [
        name
        for name, m in model.named_modules()
        if isinstance(m, (nn.Conv2d, nn.Linear)) and not any(part in name for part in shortcuts)
    ]
    assert len(main) == depth


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder where torch.hub looks for weights, and nothing that it could fetch."""
    hub = tmp_path / "hub"
    monkeypatch.setenv("TORCH_HOME", str(hub))
    (hub / "hub" / "checkpoints").mkdir(parents=True)

    def offline(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    return hub / "hub" / "checkpoints"


def test_weights_of_torchvision(cache):
    models = pytest.importorskip("torchvision.models")
    with pytest.raises(HapError, match="cannot be fetched[\\s\\S]*no connection"):
        zoo.build("mobilenetv2", weights="torchvision:IMAGENET1K_V1", classes=1000)
    trained = zoo.build("mobilenetv2", classes=1000, seed=5).state_dict()
    torch.save(trained, cache / models.MobileNet_V2_Weights.IMAGENET1K_V1.url.rpartition("/")[2])
    model = zoo.build("mobilenetv2", weights="torchvision:IMAGENET1K_V1", classes=1000)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(HapError, match="torchvision:IMAGENET1K_V1 do not fit"):
        zoo.build("mobilenetv2", weights="torchvision:IMAGENET1K_V1", classes=10)


def test_weights_that_torchvision_has_not():
    with pytest.raises(HapError, match="did you mean 'IMAGENET1K_V1'"):
        zoo.build("resnet50", weights="torchvision:IMAGENET_V1", classes=1000)
    with pytest.raises(HapError, match="torchvision has no weights for 'resnet20'"):
        zoo.build("resnet20", weights="torchvision:IMAGENET1K_V1")


@pytest.mark.parametrize("name", ["resnet20", "wideresnet32", "preresnet29", "vgg16-bn", "digits-cnn"])
def test_input_shape_and_classes(name):
    model = zoo.build(name, classes=7)
    assert model.training
    assert model(torch.zeros(2, *zoo.MODELS[name].input_shape)).shape == (2, 7)


def test_all_models_say_what_they_are():
    for name, model in zoo.MODELS.items():
        digits = "".join(c for c in name.partition("-")[0] if c.isdigit())
        assert model.what and digits in model.what


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
