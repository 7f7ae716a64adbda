from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hap.curvature import measure
from hap.curvature.gram import Gram
from hap.errors import HapError


@pytest.mark.parametrize("max_memory", [None, 1, 700, 10**9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_make_up_the_whole(max_memory, dtype):
    rows = torch.randn(7, 11, generator=torch.Generator().manual_seed(0), dtype=dtype)
    gram = Gram(11, max_memory=max_memory)
    for part in rows.split(3):
        gram.add(part)
    expected = rows.double().T @ rows.double()
    torch.testing.assert_close(gram.total(), expected, rtol=1e-13, atol=1e-14)
    assert torch.equal(gram.total(), gram.total().T)


def test_blocks_keep_to_the_memory():
    for samples, memory in ((4, 1000), (64, 10_000), (1, 10**6)):
        width = Gram(10**6, max_memory=memory)._width(samples)
        assert 8 * (2 * samples * width + width**2) <= memory < 8 * (2 * samples * (width + 1) + (width + 1) ** 2)


def units(case):
    return sum(f.size for f in case.structure.families)


def test_ggn_gives_the_dense_matrix(case):
    expected = case.gate_matrices().mean(0)[: units(case), : units(case)]
    result = measure(case.model, case.batches, None, case.structure, criterion="gate-ggn", gram=True)
    torch.testing.assert_close(result.gram, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("criterion", ["gate-fisher", "gate-ggn", "gate-empirical"])
def test_the_diagonal_is_twice_the_scores(case, criterion):
    draws = 3 if criterion == "gate-fisher" else None
    result = measure(
        case.model, case.batches, None, case.structure, criterion=criterion, draws=draws, gram=True, max_memory=10**5
    )
    assert result.gram.dtype == torch.float64
    scores = torch.cat([result.scores[f.name] for f in case.structure.families])
    torch.testing.assert_close(result.gram.diagonal() / 2, scores, rtol=1e-10, atol=1e-14)
    assert torch.linalg.eigvalsh(result.gram).min() > -1e-12 * result.gram.trace()


def test_sampled_labels_estimate_the_whole_matrix(mlp):
    """The draws' spread bounds the error of each entry; entries off the diagonal have signs."""
    estimates = torch.stack(
        [measure(mlp.model, mlp.batches, None, mlp.structure, draws=20, seed=s, gram=True).gram for s in range(30)]
    )
    exact = mlp.gate_matrices().mean(0)[:6, :6]
    z = (estimates.mean(0) - exact) / (estimates.std(0) / 30**0.5)
    assert z.abs().max() < 4


def test_there_is_none_unless_asked_for(mlp):
    assert measure(mlp.model, mlp.batches, None, mlp.structure).gram is None


@pytest.mark.parametrize("criterion", ["gate-taylor", "gate-gradient", "magnitude"])
def test_criteria_without_pairs_refuse(mlp, criterion):
    with pytest.raises(HapError, match=f"{criterion} knows nothing of pairs") as caught:
        measure(mlp.model, mlp.batches, None, mlp.structure, criterion=criterion, gram=True)
    assert "gate-empirical, gate-fisher, gate-ggn" in caught.value.expected


def test_no_units_have_an_empty_matrix(conv):
    result = measure(conv.model, conv.batches, None, replace(conv.structure, families=()), gram=True)
    assert result.gram.shape == (0, 0)
