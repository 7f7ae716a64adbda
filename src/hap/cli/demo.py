"""`hap demo`: the whole job on data that scikit-learn brings along."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import hap
from hap import zoo
from hap.cli.screen import console, progress, show
from hap.pipeline import Training, run


def demo(
    out: Annotated[Path, typer.Option(help="The run directory; replaced if it exists.")] = Path("runs/demo"),
    epochs: Annotated[int, typer.Option(help="Epochs to train the dense network.")] = 20,
    keep_params: Annotated[float, typer.Option(help="Fraction of parameters that may remain.")] = 0.4,
) -> None:
    """Train a small CNN on scikit-learn's digits, then prune it, fine-tune and report."""
    with progress() as bars:
        data = zoo.load_data("digits", batch_size=64)
        model = zoo.build("digits-cnn")
        console.print(f"training a small CNN on {data.train.samples} images of digits")
        history = hap.finetune(
            model, data.train, epochs=epochs, validation=data.validation, lr=0.05, warmup=0.1, progress=bars
        )
        done = run(
            model,
            data,
            hap.Budget(params=keep_params, latency=1.0),
            out,
            training=Training(epochs=8),
            overwrite=True,
            options={"model": "zoo:digits-cnn", "data": "digits", "dense_training": history.to_dict()},
            progress=bars,
        )
    show(done)
