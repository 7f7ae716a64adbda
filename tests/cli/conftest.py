"""Tables are as wide here as they are in a file, whatever the terminal is that the tests run in."""

from __future__ import annotations

import pytest

from hap.cli import screen


@pytest.fixture(autouse=True, scope="session")
def wide() -> None:
    screen.console.width = 160
