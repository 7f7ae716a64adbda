"""Fine-tunes, in one process or under torchrun, and kills itself on the way if told so; for `test_resume.py`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hap


def main(out: Path, state: Path, kill: str, sharded: bool) -> None:
    """Writes the weights to ``OUT.RANK``; the last process dies in the step numbered `kill`."""
    torch.set_num_threads(1)
    rank, accelerator = int(os.environ.get("RANK", "0")), None
    if "RANK" in os.environ:
        from accelerate import Accelerator, DistributedType
        from accelerate.utils import FullyShardedDataParallelPlugin

        accelerator = Accelerator(cpu=True)
        if sharded:  # Accelerate takes its plugin on GPUs only, but what it does with it works on a CPU
            accelerator.state.distributed_type = DistributedType.FSDP
            plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
            accelerator.state.fsdp_plugin = plugin
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    x = torch.randn(44, 4)
    batches = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=4, shuffle=True)
    steps = iter(range(1000))

    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        if outputs.requires_grad and str(next(steps)) == kill and rank == int(os.environ.get("WORLD_SIZE", "1")) - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.cross_entropy(outputs, batch[1])

    validation = [(x[:12], x[:12, :3].argmax(1)), (x[12:16], x[12:16, :3].argmax(1)), (x[:8], x[:8, :3].argmax(1))]
    hap.finetune(
        model,
        batches,
        loss,
        epochs=3,
        lr=0.01,
        optimizer="adamw",
        ema=0.8,
        validation=validation,
        accelerator=accelerator,
        state=state,
        save_every=0,
    )
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, f"{out}.{rank}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:] == ["sharded"])
