from __future__ import annotations

import math

import pytest

from hap.errors import HapError
from hap.zoo.optional import require


def test_present():
    assert require("math") is math


def test_absent():
    with pytest.raises(HapError, match=r"the package 'no_such_package'[\s\S]*torch-hap\[vision\]"):
        require("no_such_package.part")
