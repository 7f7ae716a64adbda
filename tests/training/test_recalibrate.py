from __future__ import annotations

import pytest
import torch
from torch import nn

from hap.errors import HapError
from hap.training import recalibrate_


def network(seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm2d(4)
    )
    for tensor in (*model.parameters(), model[1].running_mean, model[4].running_mean):
        tensor.data.normal_(generator=generator)
    return model.double()


def images(*sizes: int) -> list[tuple[torch.Tensor, None]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 6, 6, dtype=torch.float64, generator=generator), None) for n in sizes]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model: nn.Module, old: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(v, old[k]) for k, v in model.state_dict().items())


def test_statistics_are_the_average_of_the_batches_by_hand() -> None:
    model, data = network(), images(8, 8, 5)
    recalibrate_(model, data)
    first, second = [], []
    for x, _ in data:
        y = model[0](x)
        mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3))  # unbiased
        first.append((mean, var))
        # The second batch norm reads what the first gives in training mode: this batch's biased variance. No dropout.
        scale = model[1].weight / (y.var((0, 2, 3), correction=0) + model[1].eps).sqrt()
        z = ((y - mean[:, None, None]) * scale[:, None, None] + model[1].bias[:, None, None]).relu()
        second.append((z.mean((0, 2, 3)), z.var((0, 2, 3))))
    for norm, pairs in ((model[1], first), (model[4], second)):
        torch.testing.assert_close(norm.running_mean, torch.stack([m for m, _ in pairs]).mean(0), rtol=0, atol=1e-12)
        torch.testing.assert_close(norm.running_var, torch.stack([v for _, v in pairs]).mean(0), rtol=0, atol=1e-12)


def test_only_statistics_change_and_a_second_run_changes_nothing() -> None:
    model = network()
    model[3].eval()
    old, modes = state(model), [m.training for m in model.modules()]
    recalibrate_(model, images(4, 4))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, old[k])}
    statistics = {f"{i}.{name}" for i in (1, 4) for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed == statistics
    assert [model[1].momentum, model[4].momentum] == [0.3, 0.1]
    assert [m.training for m in model.modules()] == modes
    new = state(model)
    recalibrate_(model, images(4, 4))
    assert same(model, new)


def test_samples_reads_no_more() -> None:
    one, other = network(), network()
    recalibrate_(one, images(8, 8), samples=12)
    (first, _), (second, _) = images(8, 8)
    recalibrate_(other, [(first, None), (second[:4], None)])
    assert same(one, state(other))


@pytest.mark.parametrize("bad", [torch.ones(2, 5, 6, 6), torch.full((2, 3, 6, 6), torch.nan)], ids=["shape", "nan"])
def test_errors_bring_everything_back(bad: torch.Tensor) -> None:
    model = network().eval()
    old = state(model)
    with pytest.raises(HapError, match="cannot read|not finite"):
        recalibrate_(model, [*images(4), (bad.double(), None)])
    assert same(model, old)
    assert [model[1].momentum, model[4].momentum] == [0.3, 0.1]
    assert not any(m.training for m in model.modules())


def test_an_interrupt_brings_everything_back() -> None:
    def interrupted():  # type: ignore[no-untyped-def]
        yield from images(4)
        raise KeyboardInterrupt

    model = network()
    old = state(model)
    with pytest.raises(KeyboardInterrupt):
        recalibrate_(model, interrupted())
    assert same(model, old)
    assert model[1].momentum == 0.3


def test_a_batch_norm_that_is_not_reached_keeps_its_statistics() -> None:
    class Unused(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[1](self[0](x))

    model = Unused(*network())
    old = state(model)
    recalibrate_(model, images(4))
    assert torch.equal(model[4].running_mean, old["4.running_mean"])
    assert not torch.equal(model[1].running_mean, old["1.running_mean"])


def test_nothing_to_do_without_running_statistics() -> None:
    def unread():  # type: ignore[no-untyped-def]
        raise AssertionError("data were read")
        yield

    recalibrate_(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)), unread())


def test_no_data_is_refused() -> None:
    model = network()
    old = state(model)
    with pytest.raises(HapError, match="no data"):
        recalibrate_(model, [])
    assert same(model, old)
