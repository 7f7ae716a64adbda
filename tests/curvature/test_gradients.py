from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hap.curvature import measure
from hap.errors import HapError


def flat(case, result):
    return case.flat(result.scores, result.filters), case.flat(result.stderr, result.filters_stderr)


def loss_gradients(case):
    """d cross-entropy / d gates of every example, from open gates."""
    logits, jacobians = case.jacobians()
    return torch.einsum("nc,ncp->np", logits.softmax(1) - F.one_hot(case.labels(), logits.shape[1]), jacobians)


def test_taylor_is_the_size_of_the_mean(case):
    rows = loss_gradients(case)
    result = measure(case.model, case.batches, None, case.structure, criterion="gate-taylor")
    values, stderr = flat(case, result)
    torch.testing.assert_close(values, rows.mean(0).abs(), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(stderr, rows.std(0) / len(rows) ** 0.5, rtol=1e-10, atol=1e-13)
    assert (result.samples, result.draws) == (case.examples, 0)


def test_gradient_is_the_mean_size(case):
    rows = loss_gradients(case).abs()
    values, stderr = flat(case, measure(case.model, case.batches, None, case.structure, criterion="gate-gradient"))
    torch.testing.assert_close(values, rows.mean(0), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(stderr, rows.std(0) / len(rows) ** 0.5, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("criterion", ["gate-taylor", "gate-gradient", "gate-empirical"])
def test_any_mean_over_samples_will_do(mlp, criterion):
    """Twice the cross-entropy is no likelihood that is known, but a mean over samples."""
    twice = lambda out, batch: 2 * F.cross_entropy(out, batch[1])  # noqa: E731
    doubled = measure(mlp.model, mlp.batches, twice, mlp.structure, criterion=criterion).scores["first"]
    once = measure(mlp.model, mlp.batches, None, mlp.structure, criterion=criterion).scores["first"]
    factor = 4 if criterion == "gate-empirical" else 2
    torch.testing.assert_close(doubled, factor * once, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("criterion", ["gate-taylor", "gate-gradient", "gate-empirical"])
def test_a_sum_over_samples_is_refused(mlp, criterion):
    total = lambda out, batch: F.cross_entropy(out, batch[1], reduction="sum")  # noqa: E731
    with pytest.raises(HapError, match="the loss is a sum over the samples"):
        measure(mlp.model, mlp.batches, total, mlp.structure, criterion=criterion)


@pytest.mark.parametrize("criterion", ["gate-taylor", "gate-gradient", "gate-empirical"])
def test_labels_are_needed(mlp, criterion):
    with pytest.raises(HapError, match="does not fit this model and these labels") as caught:
        measure(mlp.model, [(x, None) for x, _ in mlp.batches], None, mlp.structure, criterion=criterion)
    assert "no labels" in caught.value.got


def test_a_label_out_of_range_is_refused(mlp):
    wrong = [(x, torch.full_like(y, 3)) for x, y in mlp.batches]
    with pytest.raises(HapError, match="a label is out of range"):
        measure(mlp.model, wrong, None, mlp.structure, criterion="gate-gradient")


def test_head_gradient_is_the_share_of_its_family(case):
    plain = measure(case.model, case.batches, None, case.structure, criterion="gate-gradient")
    result = measure(case.model, case.batches, None, case.structure, criterion="head-gradient")
    for raw, errors, values, stderr in (
        (plain.scores, plain.stderr, result.scores, result.stderr),
        (plain.filters, plain.filters_stderr, result.filters, result.filters_stderr),
    ):
        assert values.keys() == raw.keys()
        for name, value in values.items():
            norm = raw[name].square().sum().sqrt()
            if norm == 0:  # a family that no weight reads has no gates
                assert not value.any()
                continue
            torch.testing.assert_close(value, raw[name] / norm, rtol=1e-12, atol=0)
            torch.testing.assert_close(stderr[name], errors[name] / norm, rtol=1e-12, atol=0)
    assert result.criterion == "head-gradient"
