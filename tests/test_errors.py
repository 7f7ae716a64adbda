"""The errors that several parts of the library raise in the same words."""

from __future__ import annotations

import errno

from hap.errors import unwritable


def test_a_full_disk_is_told_from_a_forbidden_one() -> None:
    full = unwritable("x", OSError(errno.EDQUOT, "Disk quota exceeded"))
    forbidden = unwritable("x", OSError(errno.EACCES, "Permission denied"))
    assert "free some space" in full.remedy and "permissions" in forbidden.remedy
    assert unwritable("x", OSError("strange")).got == "strange"
    assert unwritable("x", ValueError("disk full")).got == "disk full"
