"""Runs the pipeline in one process or under torchrun; for `test_together.py`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import hap
from hap import zoo
from hap.cli.launch import accelerator
from hap.pipeline import Training, run, stages


class Failing:
    """A progress that raises on the last process when the fine-tuning begins."""

    def __call__(self, items: Any, description: str, total: int | None = None) -> Any:
        if description.startswith("epoch") and os.environ.get("RANK") == "1":
            raise hap.HapError("told to fail")
        return items


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("only the first process decides what the clock is to judge")


def main(out: Path, what: str) -> None:
    torch.set_num_threads(1)
    if what == "clock" and os.environ.get("RANK") == "1":
        stages.decide = refuse  # type: ignore[assignment]
    together = accelerator(torch.device("cpu"))
    data = zoo.load_data("digits", batch_size=16, limit=120)
    done = run(
        zoo.build("digits-cnn", seed=1),
        data,
        hap.Budget(params=0.6, latency=1.0 if what == "clock" else None),
        out / "run",
        training=Training(epochs=1, distill=0.5),
        samples=64,
        accelerator=together,
        **({"progress": Failing()} if what == "fail" else {}),
    )
    weights = {name: tensor.double().sum().item() for name, tensor in done.result.model.state_dict().items()}
    accuracy = [row.small.value for row in done.comparison.rows if row.quantity == "accuracy"]
    found = {"weights": weights, "plan": json.loads(done.result.plan.to_json()), "accuracy": accuracy}
    found["latency"] = done.latency[1]["small"].median
    (out / f"{os.environ.get('RANK', 'alone')}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "".join(sys.argv[2:]))
