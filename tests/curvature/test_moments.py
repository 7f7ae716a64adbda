from __future__ import annotations

import torch

from hap.curvature.moments import Moments


def test_batches_merge_to_the_whole():
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = Moments()
    for part in rows.split([1, 7, 12]):
        moments.add(part)
    assert moments.count == 20
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(moments.stderr(), rows.std(0) / 20**0.5, rtol=1e-12, atol=0)


def test_a_large_offset_does_not_cancel():
    rows = torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=torch.float64)
    moments = Moments()
    for part in (rows + 1e9).split(2):
        moments.add(part)
    torch.testing.assert_close(moments.stderr(), rows.std(0) / 2, rtol=1e-12, atol=0)


def test_one_row_has_no_stderr():
    moments = Moments()
    moments.add(torch.ones(1, 2))
    assert moments.stderr().isnan().all()
