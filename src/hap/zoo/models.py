"""The registry of networks, and `build`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from types import MappingProxyType

import torch
from torch import nn

from hap.errors import HapError, unknown
from hap.zoo import imagenet
from hap.zoo.digits import DigitsCNN
from hap.zoo.preresnet import PreResNet
from hap.zoo.resnet import CifarResNet
from hap.zoo.vgg import CifarVGG
from hap.zoo.weights import fill_, load_weights_


@dataclass(frozen=True)
class Model:
    """A network that `build` knows.

    Attributes:
        what: one line about it.
        input_shape: channels, height, width.
        builder: makes the network for a number of classes.
    """

    what: str
    input_shape: tuple[int, int, int]
    builder: Callable[[int], nn.Module]


def _cifar_resnet(blocks: int) -> Model:
    what = f"CIFAR ResNet-{6 * blocks + 2} (He et al. 2016), option A shortcuts"
    return Model(what, CIFAR, partial(CifarResNet, blocks))


CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)
MODELS: Mapping[str, Model] = MappingProxyType(
    {f"resnet{6 * blocks + 2}": _cifar_resnet(blocks) for blocks in (3, 5, 7, 9, 18)}
    | {
        "wideresnet32": Model(
            "CIFAR ResNet-32 of four times the channels, with projections (HAP's WideResNet-32)",
            CIFAR,
            partial(CifarResNet, 5, width=64, projected=True),
        ),
        "preresnet29": Model(
            "CIFAR pre-activation bottleneck ResNet-29 of 64, 128 and 256 channels (HAP's)",
            CIFAR,
            partial(PreResNet, 3, stem=64, width=64, expansion=1),
        ),
        "preresnet164": Model(
            "CIFAR pre-activation bottleneck ResNet-164 (He et al. 2016b)",
            CIFAR,
            partial(PreResNet, 18, stem=16, width=16, expansion=4),
        ),
        "vgg16-bn": Model("CIFAR VGG-16 with batch norm and one linear layer", CIFAR, CifarVGG),
        "resnet50": Model("torchvision's ResNet-50", IMAGENET, imagenet.builder("resnet50")),
        "mobilenetv2": Model("torchvision's MobileNet-V2", IMAGENET, imagenet.builder("mobilenetv2")),
        "digits-cnn": Model("small residual CNN for scikit-learn's digits", (1, 8, 8), DigitsCNN),
    }
)


def build(name: str, *, weights: str | PathLike[str] | None = None, classes: int = 10, seed: int = 0) -> nn.Module:
    """A network of the zoo, in training mode, float32, on the CPU.

    Args:
        name: a key of `MODELS`.
        weights: a safetensors file with exactly the model's ``state_dict`` names and shapes; or for torchvision's
            networks the name of weights that it fetches, such as ``torchvision:IMAGENET1K_V1``; None initialises
            (He et al. 2015, normal, fan in; biases zero).
        classes: number of outputs.
        seed: of the initialisation; the global generators are neither read nor moved.

    Raises:
        HapError: unknown name, `classes` below 1, torchvision is needed and not installed, or weights that do not fit
            (nothing is loaded then).

    >>> sum(p.numel() for p in build("resnet20").parameters())
    269722
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    if classes < 1:
        raise HapError("a classifier needs a class", expected="classes >= 1", got=str(classes))
    # The modules' own constructors draw from the global generator: fork it, then draw again from our own.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = MODELS[name].builder(classes)
    if weights is None:
        _initialise_(model, torch.Generator().manual_seed(seed))
    elif str(weights).startswith(imagenet.SOURCE):
        fill_(model, imagenet.published(name, str(weights)), source=str(weights))
    else:
        load_weights_(model, weights)
    return model


def _initialise_(model: nn.Module, generator: torch.Generator) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
