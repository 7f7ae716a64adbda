"""timm: convolutional networks, hybrids and transformers; narrow and shallow where timm lets us."""

from __future__ import annotations

from typing import Any

import torch
from support_case import Case, Example

GROUP = "timm"

_SHALLOW_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
_SHALLOW_SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6)}

# Name, image size and options of `timm.create_model`.
_MODELS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    # convolutional
    ("convnextv2_atto", 64, {}),
    ("cspresnet50", 64, {}),
    ("dla34", 64, {}),
    ("ecaresnet26t", 64, {}),
    ("efficientnet_lite0", 64, {}),
    ("ese_vovnet19b_dw", 64, {}),
    ("fastvit_t8", 64, {}),
    ("ghostnet_050", 64, {}),
    ("hrnet_w18_small", 64, {}),
    ("inception_next_atto", 64, {}),
    ("mobilenetv4_conv_small", 64, {}),
    ("mobileone_s0", 64, {}),
    ("nf_regnet_b0", 64, {}),
    ("regnety_002", 64, {}),
    ("repvgg_a0", 64, {}),
    ("res2net50_14w_8s", 64, {}),
    ("resnetv2_50x1_bit", 64, {}),
    ("rexnet_100", 64, {}),
    ("skresnet18", 64, {}),
    ("xception41", 64, {}),
    # hybrid
    ("coatnet_nano_rw_224", 64, {"img_size": 64}),
    ("edgenext_xx_small", 64, {}),
    ("efficientformer_l1", 224, {}),
    ("efficientvit_b0", 64, {}),
    ("levit_128s", 224, {}),
    ("mobilenetv4_hybrid_medium", 64, {}),
    ("mobilevit_xxs", 64, {}),
    ("repvit_m0_9", 64, {}),
    # transformers
    ("beit_base_patch16_224", 32, _SHALLOW_VIT),
    ("cait_xxs24_224", 32, _SHALLOW_VIT),
    ("convit_tiny", 32, _SHALLOW_VIT),
    ("davit_tiny", 64, {"depths": (1, 1, 1, 1)}),
    ("deit_tiny_distilled_patch16_224", 32, _SHALLOW_VIT),
    ("eva02_tiny_patch14_224", 32, _SHALLOW_VIT),
    ("mixer_s32_224", 128, {"img_size": 128}),
    ("poolformer_s12", 64, {}),
    ("pvt_v2_b0", 64, {}),
    ("swin_tiny_patch4_window7_224", 64, _SHALLOW_SWIN),
    ("twins_svt_small", 64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
    ("vit_tiny_patch16_224", 32, _SHALLOW_VIT),
    ("xcit_nano_12_p16_224", 32, _SHALLOW_VIT),
)


def _case(name: str, size: int, options: dict[str, Any]) -> Case:
    def make() -> Example:
        import timm

        model = timm.create_model(name, pretrained=False, num_classes=10, **options)
        return Example(model, (torch.randn(2, 3, size, size),))

    return Case(GROUP, name, "timm", make)


CASES = tuple(_case(*row) for row in _MODELS)
