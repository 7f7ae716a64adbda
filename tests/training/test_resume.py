from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

import hap
from hap.batches import default_loss
from hap.errors import HapError
from hap.training import Distillation, History, finetune
from hap.training.devices import Alone
from hap.training.loop import Loop, make_optimizer
from hap.training.saved import Saved
from hap.training.state import unpack_

SOURCE = Path(hap.__file__).parents[1]
WORKER = Path(__file__).with_name("resume_worker.py")
OPTIONS: dict[str, Any] = {"epochs": 3, "lr": 0.1, "warmup": 0.2, "seed": 3}


def network() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 3)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model


def images(seed: int = 0) -> TensorDataset:
    x = torch.randn(22, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.flatten(1)[:, :3].argmax(1))


def shuffled(generator: torch.Generator | None = None) -> DataLoader[Any]:
    return DataLoader(images(), batch_size=4, shuffle=True, generator=generator)


class Stop(Exception):
    pass


def stopping(after: int) -> Callable[[Any, Any], torch.Tensor]:
    """Cross-entropy that raises in the training step after `after` of them."""
    steps = iter(range(1000))

    def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        if outputs.requires_grad and next(steps) == after:
            raise Stop
        return default_loss(outputs, batch)

    return loss


def plain(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    return default_loss(outputs, batch)


plain.__qualname__ = stopping(0).__qualname__  # the state knows a loss by its name


def alike(one: History, other: History) -> bool:
    def without_times(history: History) -> Any:
        return [{**record, "seconds": 0} for record in history.to_dict()["epochs"]], history.start, history.chosen

    return without_times(one) == without_times(other)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def interrupted(state: Path, after: int, batches: Any, **options: Any) -> None:
    with pytest.raises(Stop):
        finetune(network(), batches, stopping(after), state=state, save_every=0, **OPTIONS, **options)


@pytest.mark.parametrize("after", [1, 5, 6, 8, 17])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"validation": [images(1)[:8]], "ema": 0.8, "clip": 1.0},
        {"optimizer": "adamw", "select": "last", "validation": [images(1)[:8]]},
        {"accumulate": 2, "channels_last": True, "precision": "bf16"},
    ],
    ids=["sgd", "average", "adamw", "groups"],
)
def test_goes_on_to_the_same_bits(tmp_path: Path, after: int, options: dict[str, Any]) -> None:
    whole, again = network(), network()
    undisturbed = finetune(whole, shuffled(), plain, **OPTIONS, **options)
    interrupted(tmp_path / "state", after, shuffled(), **options)
    finished = finetune(again, shuffled(), plain, state=tmp_path / "state", **OPTIONS, **options)
    assert same(whole, again) and alike(undisturbed, finished)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_data_with_a_generator_or_a_state_of_their_own_go_on_as_well(tmp_path: Path) -> None:
    from hap.zoo import load_data

    pytest.importorskip("sklearn")

    def loader() -> DataLoader[Any]:
        return shuffled(torch.Generator().manual_seed(7))

    def digits() -> Any:
        return load_data("digits", batch_size=4, limit=22).train

    def flat() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(True)

    for name, make, build in (("loader", loader, network), ("split", digits, flat)):
        torch.manual_seed(0)
        first = build()
        start = {key: value.clone() for key, value in first.state_dict().items()}
        finetune(first, make(), plain, **OPTIONS)
        second, third = build(), build()
        for model in (second, third):
            model.load_state_dict(start)
        with pytest.raises(Stop):
            finetune(second, make(), stopping(8), state=tmp_path / name, save_every=0, **OPTIONS)
        finetune(third, make(), plain, state=tmp_path / name, **OPTIONS)
        assert same(first, third), name


@pytest.mark.parametrize("after", [6, 8])  # between two epochs, and in the middle of one
@pytest.mark.parametrize("place", ["sampler", "batch_sampler", "batches"])
def test_a_generator_of_the_sampler_goes_on_as_well(tmp_path: Path, place: str, after: int) -> None:
    def loader() -> DataLoader[Any]:
        drawn = torch.Generator().manual_seed(7)
        if place == "batches":
            ready = [images()[at : at + 4] for at in range(0, 22, 4)]
            return DataLoader(ready, batch_size=None, sampler=RandomSampler(ready, generator=drawn))
        order = RandomSampler(images(), generator=drawn)
        if place == "sampler":
            return DataLoader(images(), batch_size=4, sampler=order)
        return DataLoader(images(), batch_sampler=BatchSampler(order, 4, drop_last=False))

    whole, again = network(), network()
    finetune(whole, loader(), plain, **OPTIONS)
    interrupted(tmp_path / "state", after, loader())
    finetune(again, loader(), plain, state=tmp_path / "state", **OPTIONS)
    assert same(whole, again)


def test_another_order_is_refused_between_two_epochs_as_well(tmp_path: Path) -> None:
    """Data with random numbers of their own, which nobody can ask for their state."""

    class Order(RandomSampler):
        def __init__(self) -> None:
            super().__init__(images())
            self.hidden = torch.Generator().manual_seed(7)

        def __iter__(self) -> Iterator[int]:
            return iter(torch.randperm(22, generator=self.hidden).tolist())

    interrupted(tmp_path / "state", 6, DataLoader(images(), batch_size=4, sampler=Order()))
    with pytest.raises(HapError, match="does not fit this run") as caught:
        finetune(
            network(), DataLoader(images(), batch_size=4, sampler=Order()), plain, state=tmp_path / "state", **OPTIONS
        )
    assert "same batches" in caught.value.expected


def test_losses_are_taken_back_to_the_models_device(tmp_path: Path) -> None:
    """As a file holds them they are on the CPU; the next loss is on the model's device, here ``meta``."""
    interrupted(tmp_path / "state", 8, shuffled())
    with safe_open(tmp_path / "state", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        about = json.loads(file.metadata()["about"])
    model = network().to("meta")
    optimizer = make_optimizer("sgd", model, lr=0.1, momentum=0.9, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda tick: 1.0)
    nobody: Any = None
    loop = Loop(model, shuffled(), plain, optimizer, scheduler, None, None, 1, Alone(), nobody)
    at, _ = unpack_(tensors, about, model, loop)
    losses, sizes = at.meter.state()
    assert losses.device.type == "meta" and len(sizes) == 2


def test_validation_without_a_length(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(images())

    def validation() -> DataLoader[Any]:
        return DataLoader(Stream(), batch_size=4)

    whole, again = network(), network()
    finetune(whole, shuffled(), plain, validation=validation(), **OPTIONS)
    interrupted(tmp_path / "state", 8, shuffled(), validation=validation())
    with pytest.raises(HapError, match="does not fit") as caught:
        finetune(network(), shuffled(), plain, state=tmp_path / "state", **OPTIONS)
    assert "validation unknown" in caught.value.expected
    finetune(again, shuffled(), plain, validation=validation(), state=tmp_path / "state", **OPTIONS)
    assert same(whole, again)


def test_data_without_a_length_go_on_as_well(tmp_path: Path) -> None:
    class Stream:
        def __iter__(self) -> Iterator[Any]:
            return iter(DataLoader(images(), batch_size=4))

    whole, again = network(), network()
    finetune(whole, Stream(), plain, **OPTIONS)
    interrupted(tmp_path / "state", 8, Stream())
    finetune(again, Stream(), plain, state=tmp_path / "state", **OPTIONS)
    assert same(whole, again)


def test_a_complete_run_is_not_repeated(tmp_path: Path) -> None:
    first, second = network(), network()
    options = {**OPTIONS, "validation": [images(1)[:8]], "state": tmp_path / "state"}
    history = finetune(first, shuffled(), **options)
    read = []
    second.register_forward_pre_hook(lambda module, args: read.append(1))
    again = finetune(second, shuffled(), **options)
    assert same(first, second) and history == again and not read


def test_may_be_interrupted_twice(tmp_path: Path) -> None:
    whole, again = network(), network()
    finetune(whole, shuffled(), plain, **OPTIONS)
    interrupted(tmp_path / "state", 4, shuffled())
    interrupted(tmp_path / "state", 5, shuffled())
    (tmp_path / "state.tmp").write_bytes(b"half a state")
    finetune(again, shuffled(), plain, state=tmp_path / "state", **OPTIONS)
    assert same(whole, again)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"epochs": 4}, "epochs 3"),
        ({"seed": 0}, "seed 3"),
        ({"label_smoothing": 0.1, "loss": None}, "label_smoothing 0.0"),
        ({"precision": "bf16"}, "precision no"),
        ({"train_batches": [images()[:4]]}, "train_batches 6"),
        ({"distill": Distillation(network())}, "distill None"),
        ({"validation": [images()[:4]]}, "validation None"),
    ],
)
def test_the_state_of_another_run_is_refused(tmp_path: Path, changed: dict[str, Any], expected: str) -> None:
    state = tmp_path / "state"
    interrupted(state, 8, shuffled())
    before = state.read_bytes()
    given = {"train_batches": shuffled(), "loss": plain, **OPTIONS, "state": state, **changed}
    with pytest.raises(HapError, match="does not fit this run") as caught:
        finetune(network(), **given)
    assert expected in caught.value.expected
    assert state.read_bytes() == before


def test_the_state_of_other_weights_or_data_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    interrupted(state, 8, shuffled())
    other = network()
    with torch.no_grad():
        other[0].weight[0] += 1
    with pytest.raises(HapError, match="does not fit") as caught:
        finetune(other, shuffled(), plain, state=state, **OPTIONS)
    assert "weights" in caught.value.expected
    with pytest.raises(HapError, match="does not fit") as caught:
        finetune(network(), DataLoader(images(5), batch_size=4, shuffle=True), plain, state=state, **OPTIONS)
    assert "same batches" in caught.value.expected


def test_data_that_lost_its_generator_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path / "state", 7, shuffled(torch.Generator().manual_seed(1)))
    with pytest.raises(HapError, match="does not fit what is resumed"):
        finetune(network(), shuffled(), stopping(1000), state=tmp_path / "state", **OPTIONS)


def test_what_is_no_state_and_places_that_cannot_be_are_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"something else")
    with pytest.raises(HapError, match="does not fit this run"):
        finetune(network(), shuffled(), state=tmp_path / "state")
    for place in (tmp_path / "no folder" / "state", tmp_path):
        with pytest.raises(HapError, match="the state cannot be saved there"):
            finetune(network(), shuffled(), state=place)
    with pytest.raises(HapError, match="save_every is out of range"):
        finetune(network(), shuffled(), state=tmp_path / "new", save_every=-1)


def test_saves_only_when_it_is_time(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        finetune(network(), shuffled(), stopping(8), state=tmp_path / "state", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


class Other:
    """The other of two processes: what it has, and what it says."""

    world, rank = 2, 0

    def __init__(self, steps: list[tuple[int, int]]) -> None:
        self.steps = steps

    def gather(self, item: Any) -> list[Any]:
        return [item, self.steps]


@pytest.mark.parametrize(
    ("theirs", "expected"), [([(5, 0)], 5), ([(6, 0), (5, 0)], 6), ([(6, 0)], 6), ([(6, 1)], None), ([], None)]
)
def test_processes_go_on_from_the_last_step_that_all_have(
    tmp_path: Path, theirs: list[tuple[int, int]], expected: int | None
) -> None:
    saved = Saved(tmp_path / "state", {}, every=0, devices=Other(theirs))  # type: ignore[arg-type]
    saved.write((6, 0), {}, {"is": 6})
    os.replace(saved.path, saved.path.with_name(f"{saved.path.name}.next"))  # killed before it took the old one's place
    saved_before = Saved(tmp_path / "state", {}, every=0, devices=Other(theirs))  # type: ignore[arg-type]
    held = saved.path.with_name(f"{saved.path.name}.next").read_bytes()
    saved_before.write((5, 0), {}, {"is": 5})
    saved.path.with_name(f"{saved.path.name}.next").write_bytes(held)
    found = saved.read()
    assert (found and found[1]["is"]) == expected


def run(*arguments: str, count: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [*(launch if count > 1 else [sys.executable]), str(WORKER), *arguments],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=check,
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize(("count", "more"), [(1, ()), (2, ()), (2, ("sharded",))], ids=["alone", "ddp", "fsdp2"])
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, count: int, more: tuple[str, ...]) -> None:
    if count > 1:
        pytest.importorskip("accelerate")
    run(str(tmp_path / "whole"), str(tmp_path / "none"), "never", *more, count=count)
    killed = run(str(tmp_path / "again"), str(tmp_path / "state"), "8", *more, count=count, check=False)
    assert killed.returncode != 0 and not list(tmp_path.glob("again*"))
    run(str(tmp_path / "again"), str(tmp_path / "state"), "never", *more, count=count)
    for rank in range(count):
        assert (tmp_path / f"whole.{rank}").read_bytes() == (tmp_path / f"again.{rank}").read_bytes()


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    """Nothing could be taken from their files, and what they had done would be done again."""
    (tmp_path / "state.0-of-2").write_bytes(b"of others")
    with pytest.raises(HapError, match=r"2 processes, as there[\s\S]*got: +1"):
        finetune(network(), shuffled(), plain, state=tmp_path / "state", **OPTIONS)
    (tmp_path / "state.0-of-2").rename(tmp_path / "state.backup")
    finetune(network(), shuffled(), plain, state=tmp_path / "state", **OPTIONS)


def test_who_counts_the_steps_is_told_where_it_goes_on(tmp_path: Path) -> None:
    told: list[tuple[int, dict[str, float]]] = []
    interrupted(tmp_path / "state", 7, shuffled())
    finetune(
        network(), shuffled(), plain, state=tmp_path / "state", log=lambda v, step: told.append((step, v)), **OPTIONS
    )
    assert told[0] == (7, {}) and all(step >= 7 for step, _ in told)


def test_a_loader_that_accelerate_has_prepared(tmp_path: Path) -> None:
    """It always has the methods of one with a state, also where the loader inside has none."""
    accelerate = pytest.importorskip("accelerate")
    loader = accelerate.Accelerator(cpu=True).prepare_data_loader(shuffled())
    finetune(network(), loader, plain, state=tmp_path / "state", **OPTIONS)
