"""torchvision: every family of classifiers, two models for segmentation and two for detection.

Convolutional networks are as they come, on small images; transformers are made narrow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support_case import Case, Example
from torch import nn

GROUP = "torchvision"

# Name, image size and options of `torchvision.models.get_model`.
_CLASSIFIERS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("alexnet", 64, {}),
    ("convnext_tiny", 64, {}),
    ("densenet121", 64, {}),
    ("efficientnet_b0", 64, {}),
    ("efficientnet_v2_s", 64, {}),
    ("googlenet", 64, {"init_weights": False}),
    ("inception_v3", 299, {"init_weights": False}),
    ("mnasnet1_0", 64, {}),
    ("mobilenet_v2", 64, {}),
    ("mobilenet_v3_small", 64, {}),
    ("regnet_x_400mf", 64, {}),
    ("regnet_y_400mf", 64, {}),
    ("resnet18", 64, {}),
    ("resnet50", 64, {}),
    ("resnext50_32x4d", 64, {}),
    ("wide_resnet50_2", 64, {}),
    ("shufflenet_v2_x1_0", 64, {}),
    ("squeezenet1_1", 64, {}),
    ("vgg11", 32, {}),
    ("vgg11_bn", 32, {}),
)


def _image(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size)


def _classifier(name: str, size: int, options: dict[str, Any]) -> Case:
    def make() -> Example:
        from torchvision import models

        return Example(models.get_model(name, weights=None, num_classes=10, **options), (_image(size),))

    return Case(GROUP, name, "torchvision", make)


def _maxvit() -> Example:
    from torchvision.models import MaxVit

    model = MaxVit(
        input_size=(64, 64),
        stem_channels=16,
        partition_size=4,
        block_channels=[16, 32],
        block_layers=[1, 2],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=10,
    )
    return Example(model, (_image(64),))


def _swin(version: int) -> Callable[[], Example]:
    def make() -> Example:
        from torchvision.models import swin_transformer as swin

        newer = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if version == 2 else {}
        model = swin.SwinTransformer(
            patch_size=[4, 4],
            embed_dim=24,
            depths=[2, 2],
            num_heads=[3, 6],
            window_size=[4, 4],
            num_classes=10,
            **newer,
        )
        return Example(model, (_image(64),))

    return make


def _vit() -> Example:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    return Example(model, (_image(32),))


def _segmentation(name: str) -> Case:
    def make() -> Example:
        from torchvision import models

        options = {"weights": None, "weights_backbone": None, "num_classes": 5}
        return Example(models.get_model(name, **options), (_image(64),))

    return Case(GROUP, name, "torchvision", make)


def _detector(name: str) -> nn.Module:
    from torchvision import models

    return models.get_model(name, weights=None, weights_backbone=None, num_classes=5, min_size=64, max_size=64)


def _whole(name: str) -> Case:
    def make() -> Example:
        return Example(_detector(name), ([torch.rand(3, 64, 64), torch.rand(3, 64, 64)],))

    return Case(GROUP, name, "torchvision", make)


def _backbone(name: str) -> Case:
    """What can be traced, pruned and put back where a whole detector is refused."""

    def make() -> Example:
        return Example(_detector(name).backbone, (_image(64),))

    return Case(GROUP, f"{name}: backbone", "torchvision", make)


_DETECTORS = ("fasterrcnn_mobilenet_v3_large_fpn", "retinanet_resnet50_fpn")

CASES = (
    *(_classifier(*row) for row in _CLASSIFIERS),
    Case(GROUP, "maxvit", "torchvision", _maxvit),
    Case(GROUP, "swin", "torchvision", _swin(1)),
    Case(GROUP, "swin_v2", "torchvision", _swin(2)),
    Case(GROUP, "vit", "torchvision", _vit),
    _segmentation("fcn_resnet50"),
    _segmentation("deeplabv3_mobilenet_v3_large"),
    *(_whole(name) for name in _DETECTORS),
    *(_backbone(name) for name in _DETECTORS),
)
