from __future__ import annotations

import torch
from torch import nn

from hap.training.weights import Average, Snapshot


def test_average_is_the_closed_form() -> None:
    decay, steps = 0.75, 6
    model = nn.Linear(2, 1).double()
    history = [model.weight.detach().clone()]
    average = Average(model, decay)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        with torch.no_grad():
            model.weight.add_(torch.randn(1, 2, dtype=torch.float64, generator=generator))
        average.update()
        history.append(model.weight.detach().clone())
    closed = decay**steps * history[0] + (1 - decay) * sum(
        decay ** (steps - t) * history[t] for t in range(1, steps + 1)
    )
    with average.applied():
        torch.testing.assert_close(model.weight.detach(), closed, rtol=0, atol=1e-14)
    assert torch.equal(model.weight, history[-1])


def test_average_covers_batch_norm_statistics_and_nothing_else() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
    model.register_buffer("mask", torch.tensor([-torch.inf]))
    model.register_buffer("scale", torch.tensor([1.0]))
    model[1].requires_grad_(False)
    average = Average(model, 0.5)
    with torch.no_grad():
        for tensor in (model[0].running_mean, model[0].weight, model[1].weight, model.scale):
            tensor.copy_(torch.full_like(tensor, 9.0))
    average.update()
    with average.applied():
        assert (model[0].running_mean.item(), model[0].weight.item()) == (4.5, 5.0)
        assert (model[1].weight.item(), model.scale.item(), model.mask.item()) == (9.0, 9.0, -torch.inf)


def test_snapshot_restores_in_place() -> None:
    model = nn.BatchNorm1d(2)
    model.register_buffer("cache", torch.zeros(2), persistent=False)
    snapshot, weight = Snapshot(model), model.weight
    model(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        model.weight.zero_()
    model.cache = torch.zeros(5)  # grown: left alone
    snapshot.restore()
    assert model.weight is weight and model.weight.tolist() == [1, 1]
    assert (model.running_mean.tolist(), model.running_var.tolist()) == ([0, 0], [1, 1])
    assert (model.num_batches_tracked.item(), model.cache.shape) == (0, (5,))
