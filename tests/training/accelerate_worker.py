"""What each process of `accelerate launch` runs for `test_devices.py`: fine-tunes, and saves what it ended with.

With a second argument, ``sharded``, the model is cut into shards (FSDP2).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import hap


def build() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return model


def data(count: int, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * size, 4, generator=generator, dtype=torch.float64)
    return list(zip(x.split(size), (x[:, :3] * 3).argmax(1).split(size), strict=True))


def rounds() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What one process must train on to take the steps of two: the batches of each round together."""
    batches = data(7, 6)
    pairs = [*zip(batches[0:6:2], batches[1:7:2], strict=True), (batches[6], batches[0])]
    return [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in pairs]


OPTIONS = {"epochs": 3, "lr": 0.1, "clip": 0.5, "warmup": 0.2}


def open_accelerator(sharded: bool) -> Any:
    from accelerate import Accelerator, DistributedType
    from accelerate.utils import FullyShardedDataParallelPlugin

    accelerator = Accelerator(cpu=True)
    if sharded:  # Accelerate takes its plugin on GPUs only, but what it does with it works on a CPU
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def main(out: Path, sharded: bool) -> None:
    accelerator = open_accelerator(sharded)
    model = build()
    parameters = list(model.parameters())
    history = hap.finetune(model, data(7, 6), accelerator=accelerator, validation=data(3, 6), ema=0.9, **OPTIONS)
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in parameters]
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    seen = torch.tensor([record.samples for record in history.epochs])
    losses = torch.tensor([record.train_loss for record in history.epochs], dtype=torch.float64)
    accuracies = [record.validation.accuracy for record in history.epochs]
    again = hap.evaluate(model, data(3, 6), accelerator=accelerator)
    save_file(
        {
            **tensors,
            "seen": seen,
            "losses": losses,
            "chosen": torch.tensor(history.chosen),
            "accuracies": torch.tensor(accuracies, dtype=torch.float64),
            "again": torch.tensor([again.loss, again.accuracy, again.samples], dtype=torch.float64),
        },
        out / f"{accelerator.process_index}.safetensors",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["sharded"])
