from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hap.curvature.gatewise import _Labels
from hap.curvature.likelihoods import Bernoulli, Categorical, Gaussian


@pytest.mark.parametrize(
    ("likelihood", "shape"),
    [
        (Categorical(), (5, 3)),
        (Categorical(), (5, 3, 2, 4)),
        (Categorical(-1), (5, 7, 3)),
        (Categorical(-1, shift=True), (5, 7, 3)),
        (Bernoulli(), (5, 3)),
        (Gaussian(), (5, 2, 3)),
        (Gaussian(), (5,)),
    ],
)
def test_labels_that_others_sample_are_passed_over(likelihood, shape):
    """After a batch that is skipped the generator stands where sampling the batch would have left it."""
    outputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    batch = (outputs, None)
    sampled, skipped = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    likelihood.sampled(outputs, batch, sampled)
    gates = SimpleNamespace(outputs_of=lambda one: one[0])
    _Labels(gates, [skipped]).skip(likelihood, batch)
    assert torch.equal(skipped.get_state(), sampled.get_state())


def test_each_shape_is_looked_at_once():
    looked = []
    gates = SimpleNamespace(outputs_of=lambda one: looked.append(one[0].shape) or one[0])
    labels = _Labels(gates, [torch.Generator()])
    for shape in ((5, 3, 2), (4, 3, 2), (5, 3, 6)):
        labels.skip(Categorical(), (torch.zeros(shape), None))
    assert looked == [(1, 3, 2), (1, 3, 6)]
