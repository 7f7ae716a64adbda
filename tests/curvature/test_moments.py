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


def test_rows_of_several_terms_are_a_ratio_of_sums():
    """The mean over terms, its error that of a ratio; rows without terms, and batches of such, change no mean."""
    generator = torch.Generator().manual_seed(1)
    terms = torch.tensor([3, 1, 0, 4, 2, 0, 0, 5, 1])
    rows = torch.randn(9, 2, generator=generator, dtype=torch.float64) * terms.unsqueeze(1)
    moments = Moments()
    for part, weights in zip(rows.split([1, 4, 2, 2]), terms.split([1, 4, 2, 2]), strict=True):
        moments.add(part, weights)
    mean = rows.sum(0) / 16
    torch.testing.assert_close(moments.mean, mean, rtol=1e-12, atol=0)
    error = ((rows - mean * terms.unsqueeze(1)).square().sum(0) * 9 / 8).sqrt() / 16
    torch.testing.assert_close(moments.stderr(), error, rtol=1e-12, atol=0)
    assert (moments.count, moments.terms) == (9, 16)


def test_the_error_of_a_ratio_is_calibrated():
    """Over many data sets the ratio misses the truth by as much as its standard error says."""
    generator = torch.Generator().manual_seed(2)
    terms = torch.randint(1, 9, (2000, 60), generator=generator).double()
    rows = terms * 2 + torch.randn(2000, 60, generator=generator, dtype=torch.float64) * terms
    z = []
    for sums, weights in zip(rows, terms, strict=True):
        moments = Moments()
        moments.add(sums.unsqueeze(1), weights)
        z.append(((moments.mean - 2) / moments.stderr()).item())
    spread = torch.tensor(z).square().mean().sqrt()
    assert 0.93 < spread < 1.1
