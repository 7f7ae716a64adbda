from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hap.batches import default_loss
from hap.errors import HapError
from hap.training import evaluate, finetune


def data(count: int = 96, seed: int = 0) -> TensorDataset:
    """Points in the plane, labelled by the sign of the product of their coordinates (not linearly separable)."""
    x = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return TensorDataset(x, (x.prod(1) > 0).long())


def batches(count: int = 96, size: int = 16, seed: int = 0) -> list[Any]:
    return list(DataLoader(data(count, seed), batch_size=size))


def network(dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 2))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, generator=generator)
    nn.init.zeros_(model[0].bias)
    nn.init.zeros_(model[4].bias)
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, old: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("options", [{"optimizer": "sgd", "lr": 0.1}, {"optimizer": "adamw", "lr": 0.01}])
def test_learns(options: dict[str, Any]) -> None:
    model, validation = network(), batches(seed=1)
    history = finetune(model, batches(), epochs=15, validation=validation, warmup=0.1, clip=5.0, **options)
    assert history.start is not None and history.start.accuracy is not None and history.start.accuracy < 0.75
    assert history.validation is not None and history.validation.accuracy is not None
    assert history.validation.accuracy > 0.9
    assert history.epochs[-1].train_loss < 0.5 * history.epochs[0].train_loss
    assert [record.samples for record in history.epochs] == [96] * 15
    assert evaluate(model, validation) == history.validation  # what the model holds is what was chosen


def test_equals_a_plain_torch_loop_with_decay_on_matrices_only() -> None:
    ours, plain = network(), network()
    finetune(ours, batches(), epochs=2, lr=0.1, weight_decay=0.05, schedule="constant")
    flat = [p for p in plain.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": 0.05}, {"params": flat}],
        lr=0.1,
        momentum=0.9,
        fused=True,
    )
    plain.train()
    for _ in range(2):
        for batch in batches():
            optimizer.zero_grad()
            default_loss(plain(batch[0]), batch).backward()
            optimizer.step()
    assert same(ours, state(plain))


def test_the_same_seed_gives_the_same_bits_whatever_the_state_outside() -> None:
    results, validation = [], batches(seed=1)
    for outside, seed in ((1, 0), (2, 0), (1, 3)):
        model = network(dropout=0.3)
        loader = DataLoader(data(), batch_size=16, shuffle=True)
        with torch.random.fork_rng():
            torch.manual_seed(outside)
            before = torch.get_rng_state()
            finetune(model, loader, epochs=2, validation=validation, select="last", seed=seed)
            assert torch.equal(torch.get_rng_state(), before)
        results.append(model)
    assert same(results[0], state(results[1]))
    assert not same(results[0], state(results[2]))


def test_validation_does_not_change_training() -> None:
    with_validation, without = network(dropout=0.3), network(dropout=0.3)
    shuffled = DataLoader(data(seed=1), batch_size=16, shuffle=True)
    finetune(with_validation, batches(), epochs=3, validation=shuffled, select="last")
    finetune(without, batches(), epochs=3)
    assert same(with_validation, state(without))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_generators_are_as_before() -> None:
    before = torch.cuda.get_rng_state()
    finetune(network(dropout=0.3).cuda(), batches())
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_learning_rates_follow_the_schedule() -> None:
    history = finetune(network(), batches(), epochs=4, lr=0.1, schedule="step")
    assert [record.lr for record in history.epochs] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    history = finetune(network(), batches(), epochs=2, lr=0.1, schedule="cosine", warmup=0.25)
    # 12 steps, 3 of them rising: the second epoch starts at (6 - 3) / 9 of the wave
    assert [record.lr for record in history.epochs] == pytest.approx([0.1 / 4, 0.1 * 0.75])


def test_without_a_length_the_schedule_counts_epochs() -> None:
    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Any]:
            return iter(data(32))

    history = finetune(network(), DataLoader(Stream(), batch_size=16), epochs=2, lr=0.1)
    assert [record.lr for record in history.epochs] == pytest.approx([0.1, 0.05])
    assert [record.samples for record in history.epochs] == [32, 32]


def test_an_iterator_does_for_one_epoch() -> None:
    one, other = network(), network()
    finetune(one, iter(batches()), schedule="constant")
    finetune(other, batches(), schedule="constant")
    assert same(one, state(other))


def test_keeps_the_best_epoch_by_accuracy_then_loss() -> None:
    """A bias moves by lr = 1 an epoch from -2; the validation labels make each accuracy known."""

    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.tensor(-2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.zeros_like(x), x + self.bias], 1)

    model = Bias()
    validation = [(torch.tensor([0.5, 1.5, -2.5]), torch.tensor([1, 1, 0]))]
    options: dict[str, Any] = {"lr": 1.0, "momentum": 0.0, "schedule": "constant"}

    def up(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return -model.bias if model.training else default_loss(outputs, batch)

    history = finetune(model, [validation[0]], up, epochs=6, validation=validation, **options)
    accuracies = [record.validation.accuracy for record in history.epochs if record.validation]
    # bias -1, 0, 1, 2, 3, 4: all right at 0, 1 and 2 (loss lowest at 1), then worse
    assert accuracies == pytest.approx([2 / 3, 1, 1, 1, 2 / 3, 2 / 3])
    assert (history.chosen, model.bias.item()) == (3, 1.0)
    history = finetune(Bias().train(), [validation[0]], epochs=0, validation=validation)
    assert (history.chosen, history.epochs) == (0, ())


def test_falls_back_to_the_start_when_training_hurts() -> None:
    model, validation = network(), batches(seed=1)
    finetune(model, batches(), epochs=15, validation=validation, lr=0.1)
    good = state(model)
    history = finetune(model, batches(), epochs=2, validation=validation, lr=30.0, momentum=0.0)
    assert history.chosen == 0
    assert history.validation is history.start
    assert all(record.validation is not None for record in history.epochs)
    assert same(model, good)


def test_of_equals_the_earliest_is_kept() -> None:
    model = network()
    old = state(model)

    def flat(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return default_loss(outputs, batch) if model.training else torch.tensor(1.0)

    history = finetune(model, batches(), flat, validation=[(torch.zeros(2, 2), None)])
    assert history.chosen == 0
    assert same(model, old)


def test_select_last_keeps_the_last() -> None:
    model, validation = network(), batches(seed=1)
    history = finetune(model, batches(), epochs=2, validation=validation, lr=30.0, momentum=0.0, select="last")
    assert history.chosen == 2
    assert evaluate(model, validation) == history.epochs[-1].validation


def test_zero_epochs_only_evaluate() -> None:
    model = network()
    old = state(model)
    history = finetune(model, batches(), epochs=0, validation=iter(batches(seed=1)))
    assert history.start == evaluate(model, batches(seed=1))
    assert (history.epochs, history.chosen) == ((), 0)
    assert same(model, old)


def test_ema_weights_are_validated_and_kept() -> None:
    decay, lr = 0.9, 0.25
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 4.0)
    batch = (torch.ones(1, 1, dtype=torch.float64), None)
    options: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    history = finetune(
        model, [batch] * 3, lambda o, b: o.square().mean(), epochs=2, validation=[batch], lr=lr, ema=decay, **options
    )
    # d(w^2)/dw = 2w, so each step halves w; ema_n = decay ema_(n-1) + (1 - decay) w_n
    average, losses = 4.0, []
    for step in range(1, 7):
        average = decay * average + (1 - decay) * 4.0 * 0.5**step
        losses.append(average**2)
    assert [r.validation.loss for r in history.epochs if r.validation] == pytest.approx([losses[2], losses[5]])
    assert model.weight.item() == pytest.approx(average, abs=1e-14)


def test_clip_bounds_the_step() -> None:
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    batch = (torch.full((1, 2), 100.0), None)
    finetune(model, [batch], lambda o, b: o.sum(), lr=1.0, weight_decay=0.0, clip=0.5)
    assert float((model.weight.detach() - before).norm()) == pytest.approx(0.5, rel=1e-4)


def test_modes_and_gradients_are_left_clean() -> None:
    model = network().eval()
    model[3].train()
    modes, training = [m.training for m in model.modules()], []
    model.register_forward_pre_hook(lambda module, args: training.append(module.training))
    finetune(model, batches(32), validation=batches(16))
    assert training == [False, True, True, False]
    assert [m.training for m in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_parameters_stay() -> None:
    model = network()
    model[0].requires_grad_(False)
    old = state(model)
    finetune(model, batches())
    assert torch.equal(model[0].weight, old["0.weight"])
    assert not torch.equal(model[4].weight, old["4.weight"])


def failing(at: int, error: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, Any], torch.Tensor]:
    """A loss that fails at training step `at`, counted from 1."""
    steps = iter(range(1, 1000))

    def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        value = default_loss(outputs, batch)
        return error(value) if outputs.requires_grad and next(steps) == at else value

    return loss


def interrupt(value: torch.Tensor) -> torch.Tensor:
    raise KeyboardInterrupt


@pytest.mark.parametrize("ema", [None, 0.5])
@pytest.mark.parametrize(
    ("error", "raised", "match"),
    [(lambda v: v * math.nan, HapError, "not finite at batch 2 of epoch"), (interrupt, KeyboardInterrupt, None)],
    ids=["nan", "interrupt"],
)
def test_a_failure_gives_back_the_last_complete_epoch(
    error: Any, raised: Any, match: str | None, ema: float | None
) -> None:
    options: dict[str, Any] = {"schedule": "constant", "ema": ema}
    first = network()
    start = state(first)
    with pytest.raises(raised, match=match):  # in the first epoch: back to the start
        finetune(first, batches(), failing(2, error), epochs=2, **options)
    assert same(first, start)
    second, one_epoch = network(), network()
    with pytest.raises(raised, match=match):  # in the second epoch: back to the first
        finetune(second, batches(), failing(8, error), epochs=2, **options)
    finetune(one_epoch, batches(), epochs=1, **options)
    assert same(second, state(one_epoch)) and not same(second, start)


def test_a_failure_gives_back_the_best_epoch_not_the_last() -> None:
    model, validation = network(), batches(seed=1)
    finetune(model, batches(), epochs=15, validation=validation, lr=0.1)
    good = state(model)
    options: dict[str, Any] = {"lr": 30.0, "momentum": 0.0, "schedule": "constant"}
    with pytest.raises(KeyboardInterrupt):
        finetune(model, batches(), failing(14, interrupt), epochs=3, validation=validation, **options)
    assert same(model, good)


def test_weights_broken_by_the_very_last_step_are_noticed() -> None:
    model = nn.Linear(2, 2)
    old = state(model)
    with pytest.raises(HapError, match="weights are not finite after epoch 1"):
        finetune(model, batches(16), lambda o, b: o.sum() * 1e30, lr=1e30)
    assert same(model, old)


def test_a_validation_loss_that_is_not_finite_gives_back_the_start() -> None:
    model = network()
    old = state(model)

    def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        value = default_loss(outputs, batch)
        return value if model.training or same(model, old) else value * math.inf

    with pytest.raises(HapError, match="not finite at batch 1 of the evaluation"):
        finetune(model, batches(), loss, validation=batches(seed=1))
    assert same(model, old)


class OnceOnly:
    """Looks like a data set, but is empty the second time."""

    def __init__(self) -> None:
        self._items = iter(batches())

    def __iter__(self) -> Iterator[Any]:
        return self._items


def test_data_that_run_out_are_explained() -> None:
    model = network()
    with pytest.raises(HapError, match="no data") as caught:
        finetune(model, OnceOnly(), epochs=2)
    assert "read only once" in caught.value.remedy


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epochs": -1}, "epochs is out of range"),
        ({"epochs": 1.5}, "epochs is out of range"),
        ({"lr": 0.0}, "lr is out of range"),
        ({"lr": math.nan}, "lr is out of range"),
        ({"momentum": 1.0}, "momentum is out of range"),
        ({"weight_decay": -1e-4}, "weight_decay is out of range"),
        ({"warmup": 1.0}, "warmup is out of range"),
        ({"ema": 1.0}, "ema is out of range"),
        ({"ema": 0.0}, "ema is out of range"),
        ({"clip": 0.0}, "clip is out of range"),
        ({"optimizer": "adam"}, "did you mean 'adamw'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"select": "first"}, "unknown selection"),
        ({"train_batches": iter(batches()), "epochs": 2}, "train_batches can be read only once, and 2 times"),
        ({"validation": iter(batches())}, "validation can be read only once, and 2 times"),
        ({"model": network().requires_grad_(False)}, "nothing to train"),
        ({"model": nn.ReLU()}, "nothing to train"),
        ({"train_batches": []}, "no data"),
        ({"train_batches": iter(())}, "no data"),
        ({"loss": lambda o, b: o.detach().sum()}, "does not depend"),
        ({"loss": lambda o, b: o.sum(0)}, "not a scalar"),
        ({"loss": lambda o, b: 1.0}, "not a scalar"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_input_is_refused_and_changes_nothing(options: dict[str, Any], match: str) -> None:
    arguments = {"model": network().eval(), "train_batches": batches(), **options}
    old, modes = state(arguments["model"]), [m.training for m in arguments["model"].modules()]
    with pytest.raises(HapError, match=match):
        finetune(**arguments)
    assert same(arguments["model"], old)
    assert [m.training for m in arguments["model"].modules()] == modes


def test_progress_sees_every_pass() -> None:
    calls = []

    def progress(items, description, total=None):  # type: ignore[no-untyped-def]
        calls.append((description, total))
        return items

    finetune(network(), batches(), epochs=2, validation=batches(32), progress=progress)
    assert calls == [("evaluate", 2), ("epoch 1/2", 6), ("evaluate", 2), ("epoch 2/2", 6), ("evaluate", 2)]
