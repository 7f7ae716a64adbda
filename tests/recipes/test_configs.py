"""The recipes that come with hap: all are valid, and each runs, on little data."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import hap
from hap import recipes, zoo
from hap.cli import app
from hap.planning import Latency

CONFIGS = Path(__file__).parents[2] / "configs" / "paper"
CIFAR = ("resnet56", "preresnet29", "wideresnet32", "vgg16")
GLUE = ("mrpc", "sst2", "qnli", "cola", "rte")
ROWS = (*(f"cifar10-{name}" for name in CIFAR), "imagenet-resnet50", *(f"glue-{task}-roberta" for task in GLUE))


def test_every_row_has_its_two_recipes() -> None:
    assert {path.stem for path in CONFIGS.iterdir()} == {*ROWS, *(f"{row}-ours" for row in ROWS)}


@pytest.mark.parametrize("row", ROWS)
def test_recipes_are_valid_and_comparable(row: str) -> None:
    """Ours differs from the published one in the choice and the fine-tuning, not in what is compared."""
    published, ours = (recipes.read(CONFIGS / f"{row}{end}.yaml") for end in ("", "-ours"))
    images = not published.data.is_text
    assert ours.budget == (dataclasses.replace(published.budget, latency=1.0) if images else published.budget)
    for name in ("model", "data", "dense", "targets", "seed"):
        assert getattr(published, name) == getattr(ours, name), name
    assert published.finetune.epochs == ours.finetune.epochs
    assert (published.measure.criterion, published.plan.mode) == ("hessian-trace", "paper")
    assert (published.measure.samples, published.measure.draws) == (512, 300)
    assert recipes.read(CONFIGS / f"{row}.yaml", limit=256).measure.draws == 16
    assert (ours.measure.criterion, ours.plan.mode) == ("gate-fisher", "optimal")
    assert published.notes and ours.notes


@pytest.mark.parametrize("task", GLUE)
@pytest.mark.parametrize("end", ["", "-ours"])
def test_the_rival_in_the_notes_is_a_recipe(task: str, end: str) -> None:
    path = CONFIGS / f"glue-{task}-roberta{end}.yaml"
    settings = re.findall(r"(?<=--set )\S+=[\w-]+", recipes.read(path).notes)
    rival = recipes.read(path, settings)
    assert rival.measure.criterion == "head-gradient" and rival.implants.ratio == 0


@pytest.mark.parametrize("row", [f"cifar10-{name}" for name in CIFAR])
def test_cifar_settings_are_the_authors(row: str) -> None:
    recipe = recipes.read(CONFIGS / f"{row}.yaml")
    tuning = recipe.finetune
    assert (tuning.optimizer, tuning.momentum, tuning.lr, tuning.weight_decay) == ("sgd", 0.9, 0.02, 4e-4)
    assert (tuning.schedule, recipe.data.batch_size) == ("step", 64)


def test_targets_are_the_abstract_s() -> None:
    def targets(row: str) -> dict[str, float]:
        return {target.of: target.value for target in recipes.read(CONFIGS / f"{row}.yaml").targets}

    assert targets("cifar10-preresnet29") == {"accuracy": 0.943, "lost": 0.001, "kept_params": 0.3}
    assert targets("imagenet-resnet50") == {"accuracy": 0.751, "lost": 0.005, "kept_params": 0.5}
    assert targets("glue-rte-roberta") == {"kept_heads": 0.4, "gain": 0.008}


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["run", *map(str, arguments), "--device", "cpu"])
    assert result.exit_code == 0, result.output + str(result.exception or "")
    return result.output


def encoded(seed: int, size: int) -> bytes:
    image = pytest.importorskip("PIL.Image")
    pixels = torch.randint(256, (size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    stream = io.BytesIO()
    image.fromarray(pixels.numpy()).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def cifar_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in CIFAR-10's layout."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("cifar")
    for name, count in {"train": 24, "test": 10}.items():
        images = [encoded(seed, 32) for seed in range(count)]
        table = pyarrow.table({"img": images, "label": [i % 10 for i in range(count)]})
        parquet.write_table(table, folder / f"cifar10_{name}.parquet")
    return folder


@pytest.fixture
def quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The latencies are of no interest here, and would take most of the time."""
    monkeypatch.setattr(
        "hap.pipeline.experiment._latency",
        lambda *_: {n: dict.fromkeys(("dense", "small"), Latency(1.0, 1.0, 1.0, 1.0, 1, 1.0)) for n in (1, 32)},
    )


def check(out: Path, recipe: str, dense: Callable[[], nn.Module] | None, kept: str = "params") -> dict[str, Any]:
    """The run directory opens, and the report has what the recipe asks for."""
    small, plan = hap.load(out, dense() if dense else None)
    what = recipes.read(CONFIGS / f"{recipe}.yaml")
    limit = what.budget.limits[kept]
    share = getattr(plan.small, kept) / getattr(plan.dense, kept)
    assert 0.9 * limit <= share <= limit
    assert sum(p.numel() for p in small.parameters()) == plan.small.params
    report = json.loads((out / "report.json").read_text())
    assert [target["of"] for target in report["targets"]] == [target.of for target in what.targets]
    assert report["verification"]["ok"] and report["criterion"] == what.measure.criterion
    return dict(report)


@pytest.mark.parametrize(
    "recipe",
    [
        f"cifar10-{name}{end}" if end == "" else pytest.param(f"cifar10-{name}{end}", marks=pytest.mark.slow)
        for name in CIFAR
        for end in ("", "-ours")
    ],
)
def test_cifar_recipes_run(recipe: str, cifar_dir: Path, tmp_path: Path, quick_timing: None) -> None:
    text = invoke(CONFIGS / f"{recipe}.yaml", "--limit", 4, "--data", cifar_dir, "--out", tmp_path / "run")
    name = recipes.read(CONFIGS / f"{recipe}.yaml").model.removeprefix("zoo:")
    report = check(tmp_path / "run", recipe, lambda: zoo.build(name))
    assert len(report["options"]["dense_training"]["history"]["epochs"]) == 1
    assert ("94.30 %" in text) == ("preresnet29" in recipe)


@pytest.mark.parametrize(
    "recipe", ["imagenet-resnet50", pytest.param("imagenet-resnet50-ours", marks=pytest.mark.slow)]
)
def test_imagenet_recipes_run(recipe: str, tmp_path: Path, quick_timing: None) -> None:
    """On noise in ImageNet's layout, in small, from weights in a file."""
    from safetensors.torch import save_file

    for split, count in {"train": 8, "val": 4}.items():
        for label in range(2):
            folder = tmp_path / "data" / split / f"class{label}"
            folder.mkdir(parents=True)
            for seed in range(count):
                (folder / f"{seed}.png").write_bytes(encoded(seed, 40))
    weights = tmp_path / "dense.safetensors"
    save_file(zoo.build("resnet50", classes=2).state_dict(), weights)
    invoke(
        CONFIGS / f"{recipe}.yaml", "--limit", 4, "--data", tmp_path / "data", "--out", tmp_path / "run",
        "--set", f"dense.weights={weights}", "--set", "data.image_size=32", "--set", "data.workers=0",
    )  # fmt: skip
    check(tmp_path / "run", recipe, lambda: zoo.build("resnet50", classes=2))


@pytest.fixture(scope="module")
def tiny_roberta(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RoBERTa of random weights, 2 layers of 5 heads, with the tokenizer of the tiny BERT."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("tiny-roberta")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # RoBERTa has one type of tokens only
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=40, num_hidden_layers=2, num_attention_heads=5, intermediate_size=24,
        max_position_embeddings=66, pad_token_id=0, bos_token_id=2, eos_token_id=3, type_vocab_size=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        transformers.RobertaModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def texts_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random words in the layout of each task."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("texts")
    words = ("a", "the", "film", "plot", "cast", "is", "good", "bad")
    order = torch.Generator().manual_seed(0)
    for task in GLUE:
        for split, count in {"train": 40, "validation": 12}.items():
            columns = {
                name: [" ".join(words[i] for i in torch.randint(8, (6,), generator=order)) for _ in range(count)]
                for name in zoo.TASKS[f"glue/{task}"].columns
            }
            table = pyarrow.table({**columns, "label": [i % 2 for i in range(count)]})
            parquet.write_table(table, folder / f"{task}_{split}.parquet")
    return folder


@pytest.mark.parametrize(
    "recipe",
    [
        f"glue-{task}-roberta{end}" if end == "" else pytest.param(f"glue-{task}-roberta{end}", marks=pytest.mark.slow)
        for task in GLUE
        for end in ("", "-ours")
    ],
)
def test_glue_recipes_run(
    recipe: str, texts_dir: Path, tiny_roberta: Path, tmp_path: Path, quick_timing: None, monkeypatch: Any
) -> None:
    """Where the data is comes from the environment; a rival gives the gain."""
    monkeypatch.setenv("HAP_DATA", str(texts_dir))
    common = (CONFIGS / f"{recipe}.yaml", "--limit", 8, "--set", f"model=hf:{tiny_roberta}")
    text = invoke(*common, "--out", tmp_path / "run")
    assert "not measured" in text
    check(tmp_path / "run", recipe, None, kept="heads")
    if recipe != "glue-mrpc-roberta":
        return
    rival = re.findall(r"--set|(?<=--set )\S+=[\w-]+", recipes.read(CONFIGS / f"{recipe}.yaml").notes)
    assert len(rival) == 6
    invoke(*common, *rival, "--out", tmp_path / "rival")
    invoke(*common, "--out", tmp_path / "again", "--against", tmp_path / "rival")
    gain = json.loads((tmp_path / "again" / "report.json").read_text())["targets"][1]
    one, two = (
        json.loads((tmp_path / name / "report.json").read_text())["comparison"]["accuracy"]["small"]
        for name in ("again", "rival")
    )
    assert gain["reached"] == one - two
    dense = ("--set", f"model=hf:{tmp_path / 'run' / 'dense'}", "--set", "dense.train=null")
    invoke(*common, *dense, "--out", tmp_path / "from-dense")  # which the first run has left


@pytest.mark.slow
def test_real_data_where_it_is(tmp_path: Path, data_dir: Path, quick_timing: None) -> None:
    """ResNet-56 from its trained weights, on real images."""
    weights = data_dir / "resnet56.safetensors"
    if not weights.is_file() or not (data_dir / "cifar10_train.parquet").is_file():
        pytest.skip(f"there is no CIFAR-10 or no resnet56.safetensors in {os.fspath(data_dir)}")
    invoke(
        CONFIGS / "cifar10-resnet56-ours.yaml", "--limit", 16, "--data", data_dir, "--out", tmp_path / "run",
        "--set", f"dense.weights={weights}", "--set", "dense.train=null",
    )  # fmt: skip
    report = check(tmp_path / "run", "cifar10-resnet56-ours", lambda: zoo.build("resnet56"))
    assert report["comparison"]["accuracy"]["dense"] > 0.6
