"""The options of `finetune` that change how fast it trains, not what."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from hap.errors import HapError
from hap.pipeline import Training
from hap.training import finetune
from hap.training.layout import wants_channels_last


def network() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def batches(count: int = 4, size: int = 6, dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * size, 2, 5, 5, generator=generator).to(dtype)
    y = torch.randint(3, (count * size,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


def test_groups_of_batches_are_larger_batches() -> None:
    one, other = network().double(), network().double()
    small, large = batches(7, 3, torch.float64), batches(7, 3, torch.float64)
    pairs = [
        (torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in zip(large[0:6:2], large[1:7:2], strict=True)
    ]
    history = finetune(one, small, accumulate=2, epochs=2, lr=0.1)
    finetune(other, [*pairs, large[6]], epochs=2, lr=0.1)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-9, atol=1e-12)
    assert [record.samples for record in history.epochs] == [21, 21]


def test_channels_last_is_the_order_in_training_and_not_afterwards() -> None:
    model, plain, seen = network(), network(), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    finetune(model, batches(), channels_last=True, epochs=2, validation=batches(1))
    finetune(plain, batches(), channels_last=False, epochs=2, validation=batches(1))
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in seen) and seen
    for name, tensor in model.state_dict().items():
        assert tensor.is_contiguous()
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_model_that_came_in_channels_last_stays_so() -> None:
    model = network().to(memory_format=torch.channels_last)
    finetune(model, batches(), channels_last=True)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("options", [finetune, Training])
def test_another_order_in_memory_is_refused(options: Any) -> None:
    given = {} if options is Training else {"model": network(), "train_batches": batches()}
    with pytest.raises(HapError, match="unknown order in memory channels_last 'last'"):
        options(**given, channels_last="last")


def test_auto_wants_it_for_convolutions_on_a_gpu() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not wants_channels_last(network(), "auto", cpu) and wants_channels_last(network(), "auto", gpu)
    assert wants_channels_last(network(), True, cpu)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_computes_in_half_and_keeps_the_weights(precision: Any, dtype: torch.dtype) -> None:
    model, plain, seen, losses = network(), network(), [], []
    model[4].register_forward_hook(lambda module, args, output: seen.append(output.dtype))

    def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        losses.append(outputs.dtype)
        return nn.functional.cross_entropy(outputs, batch[1])

    finetune(model, batches(), loss, precision=precision, clip=1.0, validation=batches(1))
    finetune(plain, batches(), clip=1.0, validation=batches(1))
    assert set(seen) == {dtype} and set(losses) == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model[4].weight, plain[4].weight, rtol=0.05, atol=0.02)


def test_compiled_training_gives_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    compiler = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda model: calls.append(model) or compiler(model))
    model, plain = network(), network()
    finetune(model, batches(), compile=True, epochs=2)
    finetune(plain, batches(), epochs=2)
    assert calls == [model] and list(model.state_dict()) == list(plain.state_dict())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_numbers_are_told_on_the_way() -> None:
    told: list[Any] = []
    finetune(
        network(), batches(30), epochs=2, validation=batches(1), log=lambda values, step: told.append((step, values))
    )
    assert [step for step, _ in told] == [0, 30, 30, 50, 60, 60]
    assert set(told[0][1]) == {"validation/loss", "validation/accuracy"}
    assert set(told[1][1]) == {"train/epoch_loss", "train/seconds", "train/lr"}
    assert set(told[3][1]) == {"train/loss", "train/lr"}


def test_another_precision_than_the_accelerators_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    try:
        with pytest.raises(HapError, match="the accelerator has another precision"):
            finetune(network(), batches(), accelerator=accelerator, precision="fp16")
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
