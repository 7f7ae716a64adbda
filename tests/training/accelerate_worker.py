"""What each process of `accelerate launch` runs for `test_devices.py`: fine-tunes, and saves what it ended with."""

from __future__ import annotations

import sys
from pathlib import Path

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


def main(out: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = build()
    history = hap.finetune(model, data(7, 6), accelerator=accelerator, **OPTIONS)
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    seen = torch.tensor([record.samples for record in history.epochs])
    losses = torch.tensor([record.train_loss for record in history.epochs])
    save_file(
        {**tensors, "seen": seen, "losses": losses, "chosen": torch.tensor(history.chosen)},
        out / f"{accelerator.process_index}.safetensors",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
