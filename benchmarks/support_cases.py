"""Every line of the support matrix."""

from __future__ import annotations

import support_huggingface
import support_timm
import support_torchvision
import support_user
from support_case import Case

CASES: tuple[Case, ...] = (
    *support_torchvision.CASES,
    *support_timm.CASES,
    *support_huggingface.CASES,
    *support_user.CASES,
)
