"""The closed-form refit against ridge regression written out, and its laws."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hap


def sensitivity(structure: hap.Structure, seed: int = 0) -> hap.Sensitivity:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.rand(n, generator=generator, dtype=torch.float64)  # noqa: E731
    return hap.Sensitivity(
        "random",
        0,
        0,
        {f.name: draw(f.size) for f in structure.families},
        {f.name: torch.zeros(f.size) for f in structure.families},
        {layer.module: draw(layer.filters) for layer in structure.layers},
    )


class Residual(nn.Module):
    """A stream with two 3 x 3 writers: one family in the block, implants on the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 8, 3, padding=1, stride=1)
        self.norm = nn.BatchNorm2d(8)
        self.outer = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.outer(F.relu(self.norm(self.inner(x)))))
        return self.head(x.mean((2, 3)))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().double().eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def setting() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]], hap.Plan]:
    model = seeded(Residual)
    data = [(images(16, 2, 7, 7), torch.zeros(16, dtype=torch.int64)) for _ in range(2)]
    structure = hap.trace(model, (data[0][0],))
    plan = hap.decide(structure, sensitivity(structure), hap.Budget(params=0.6), implant_ratio=0.3)
    assert plan.implants and any(d.prune for d in plan.decisions.values())
    return model, data, plan


def test_a_linear_consumer_is_ridge_regression() -> None:
    """Two layers: the second one's weights are the ridge solution over the kept neurons, bias included."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    x = images(40, 4)
    structure = hap.trace(model, (x,))
    plan = hap.decide(structure, sensitivity(structure), hap.Budget(params=0.7), implant_ratio=0)
    small = hap.apply(model, plan)
    hap.refit_(small, model, plan, [(x, x)], ridge=0.1)
    kept = list(plan.decisions["0"].keep)
    with torch.no_grad():
        assert torch.allclose(small[0].weight, model[0].weight[kept])  # the first layer reads what it read
        hidden, want = model[:2](x)[:, kept], model(x)
        h, y = hidden - hidden.mean(0), want - want.mean(0)
        gram = h.T @ h / 40
        pull = 0.1 * gram.diagonal().mean()
        weight = torch.linalg.inv(gram + pull * torch.eye(len(gram))) @ (
            h.T @ y / 40 + pull * model[2].weight[:, kept].T
        )
    assert torch.allclose(small[2].weight, weight.T)
    assert torch.allclose(small[2].bias, want.mean(0) - hidden.mean(0) @ weight)


def test_keeping_all_changes_nothing(setting) -> None:
    model, data, _ = setting
    structure = hap.trace(model, (data[0][0],))
    plan = hap.decide(structure, sensitivity(structure), hap.Budget(params=1.0))
    small = hap.apply(model, plan)
    hap.refit_(small, model, plan, data)
    assert torch.allclose(small(data[0][0]), model(data[0][0]), rtol=1e-8, atol=1e-10)


def test_the_small_model_comes_closer_and_the_dense_one_stays(setting) -> None:
    model, data, plan = setting
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = hap.apply(model, plan, data)
    fresh = images(32, 2, 7, 7).flip(0)

    def distance() -> float:
        with torch.no_grad():
            return float((small(fresh) - model(fresh)).square().mean())

    cut = distance()
    hap.refit_(small, model, plan, data)
    assert distance() < 0.5 * cut
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert sum(p.numel() for p in small.parameters()) == plan.small.params


def test_an_error_puts_the_weights_back(setting) -> None:
    model, data, plan = setting
    small = hap.apply(model, plan)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}

    def interrupted(jobs, description, total=None):
        yield from itertools.islice(jobs, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hap.refit_(small, model, plan, data, progress=interrupted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


def test_refuses_another_model_and_no_data(setting) -> None:
    model, data, plan = setting
    small = hap.apply(model, plan)
    with pytest.raises(hap.HapError, match="not the model that the plan was made for"):
        hap.refit_(small, small, plan, data)
    with pytest.raises(hap.HapError, match="no data"):
        hap.refit_(small, model, plan, [])
    with pytest.raises(hap.HapError, match="has no implant"):
        hap.refit_(model, model, plan, data)
