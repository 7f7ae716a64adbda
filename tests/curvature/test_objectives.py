from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from hap.curvature.likelihoods import Bernoulli, Categorical, Gaussian
from hap.curvature.objectives import AnyLoss, mean_loss, need_likelihood, need_mean, objective_of
from hap.errors import HapError


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CLASSES = torch.tensor([0, 2, 1, 2])
TOKENS = torch.tensor([[0, 2, 1], [2, -100, 1], [1, 1, 0], [0, -100, -100]])
YES = (rand(4, 3, seed=1) > 0).double()

FOUND = {
    "classes": (Categorical(), rand(4, 3), CLASSES, F.cross_entropy),
    "positions": (Categorical(), rand(4, 3, 3), TOKENS, F.cross_entropy),
    "tokens": (Categorical(-1), rand(4, 3, 3), TOKENS, lambda o, y: F.cross_entropy(o.movedim(-1, 1), y)),
    "next token": (
        Categorical(-1, shift=True),
        rand(4, 3, 3),
        TOKENS,
        lambda o, y: F.cross_entropy(o[:, :-1].movedim(-1, 1), y[:, 1:]),
    ),
    "yes or no": (Bernoulli(), rand(4, 3), YES, F.binary_cross_entropy_with_logits),
    "yes or no of one": (Bernoulli(), rand(4), YES[:, 0], F.binary_cross_entropy_with_logits),
    "values": (Gaussian(), rand(4, 3), YES, F.mse_loss),
    "integers": (Gaussian(), rand(4), CLASSES, lambda o, y: F.mse_loss(o, y.double())),
    "one value": (Gaussian(), rand(4, 1), YES[:, 0], lambda o, y: F.mse_loss(o.squeeze(), y)),
}


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_is_found_out(name, dtype):
    expected, outputs, labels, function = FOUND[name]
    outputs = outputs.to(dtype)
    labels = labels.to(dtype) if labels.is_floating_point() else labels
    assert objective_of(lambda o, batch: function(o, batch[1]), outputs, (outputs, labels)) == expected


@pytest.mark.parametrize("name", FOUND)
def test_a_models_own_loss_is_found_out(name):
    expected, logits, labels, function = FOUND[name]
    outputs = SimpleNamespace(logits=logits, loss=function(logits, labels))
    assert objective_of(None, outputs, {"x": logits, "labels": labels}) == expected


@pytest.mark.parametrize("name", FOUND)
def test_twice_the_loss_is_another(name):
    _, outputs, labels, function = FOUND[name]
    batch = (outputs, labels)
    twice = lambda o, b: 2 * function(o, b[1])  # noqa: E731
    objective = objective_of(twice, outputs, batch)
    assert objective == AnyLoss(twice)
    with pytest.raises(
        HapError, match="gate-ggn needs cross-entropy, binary cross-entropy of logits or mean"
    ) as caught:
        need_likelihood("gate-ggn", objective, outputs, batch)
    assert f"loss {float(twice(outputs, batch)):.6g}" in caught.value.got
    assert f"{float(twice(outputs, batch)) / 2:.6g}" in caught.value.got.split(";")[1]
    for criterion in ("gate-empirical", "gate-gradient", "gate-taylor", "taylor", "hessian-trace"):
        assert criterion in caught.value.remedy


def test_mean_squares_that_broadcast_are_no_regression():
    """(N, 1) less (N,) is (N, N), a well-known mistake."""
    outputs, labels = rand(4, 1), rand(4, seed=2)
    with pytest.warns(UserWarning, match="target size"):
        objective = objective_of(lambda o, b: F.mse_loss(o, b[1]), outputs, (outputs, labels))
    assert isinstance(objective, AnyLoss)


def test_without_a_loss_it_is_cross_entropy():
    image, text = rand(4, 3, 5), rand(4, 5, 3)
    assert objective_of(None, image, (image, None)) == Categorical()
    assert objective_of(None, {"logits": text}, {"x": text}) == Categorical(-1)
    labels = torch.zeros(4, 3, dtype=torch.int64)
    assert objective_of(None, {"logits": text}, {"x": text, "labels": labels}) == Categorical()


def test_any_loss_counts_samples():
    outputs = rand(4, 3)
    objective = AnyLoss(lambda o, b: o.square().mean())
    assert objective.counts(outputs, (outputs, None)).tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(objective.total(outputs, (outputs, None)), 4 * outputs.square().mean())


def test_mean_loss_of_what_does_not_fit():
    assert mean_loss(Gaussian(), rand(4, 3), (rand(4), CLASSES)) is None


def test_a_sum_is_told_by_its_halves():
    need_mean(1.0, (0.9, 1.1))
    need_mean(0.0, (0.0, 0.0))
    with pytest.raises(HapError, match="sum over the samples"):
        need_mean(2.0, (0.9, 1.1))
