"""ResNet-50 and MobileNet-V2 for ImageNet: torchvision's classes, and its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from hap.errors import HapError, unknown
from hap.zoo.optional import require

SOURCE = "torchvision:"  # weights with this prefix are fetched
TORCHVISION: Mapping[str, str] = MappingProxyType({"resnet50": "resnet50", "mobilenetv2": "mobilenet_v2"})


def builder(name: str) -> Callable[[int], nn.Module]:
    """Makes the network for a number of classes.

    Raises:
        HapError: when called without torchvision.
    """
    return lambda classes: require("torchvision.models").get_model(TORCHVISION[name], weights=None, num_classes=classes)


def published(name: str, weights: str) -> dict[str, torch.Tensor]:
    """The tensors of trained weights, from torchvision's cache or its server.

    Args:
        name: of the network.
        weights: ``torchvision:IMAGENET1K_V1``, say.

    Raises:
        HapError: torchvision has no such weights for the network, or they cannot be fetched.
    """
    if name not in TORCHVISION:
        raise HapError(
            f"torchvision has no weights for {name!r}",
            expected=f"a safetensors file, or one of the networks {', '.join(TORCHVISION)}",
            got=weights,
        )
    models = require("torchvision.models")
    known = {weight.name: weight for weight in models.get_model_weights(TORCHVISION[name])}
    wanted = weights.removeprefix(SOURCE)
    if wanted not in known:
        raise unknown(f"weights of {name}", wanted, known)
    try:
        return dict(known[wanted].get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise HapError(
            f"the weights {wanted} of {name} cannot be fetched",
            expected=f"a connection, or the file in {torch.hub.get_dir()}/checkpoints",
            got=" ".join(str(error).split())[:200],
            remedy="or give a safetensors file",
        ) from error
