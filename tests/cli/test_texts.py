"""Models of texts from end to end: fine-tuned, pruned, opened alone, trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import hap
from hap.cli import app

transformers = pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
QUICK = ["--batch-size", "16", "--max-length", "24", "--device", "cpu"]


def run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output + str(result.exception or "")
    return result.output


@pytest.fixture(scope="module")
def dense(tiny_bert: Path, glue_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that `hap finetune` has written."""
    out = tmp_path_factory.mktemp("finetune") / "dense"
    data = ("--task", "glue/mrpc", "--data", glue_dir)
    text = run("finetune", "--model", f"hf:{tiny_bert}", *data, "--out", out, "--epochs", 2, "--lr", 0.01, *QUICK)
    assert "accuracy" in text and "f1" in text
    return out


def test_finetune_writes_what_transformers_opens(dense: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(dense)
    tokenizer = transformers.AutoTokenizer.from_pretrained(dense)
    assert model.config.id2label == {0: "not_equivalent", 1: "equivalent"}
    classify = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    assert classify("a good film")[0]["label"] in model.config.label2id
    record = json.loads((dense / "finetune.json").read_text())
    assert record["test"]["samples"] == 24 and "f1" in record["test"]["metrics"]
    assert len(record["history"]["epochs"]) == 2


def test_prune_heads_then_train_on(
    dense: Path,
    glue_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = ("--task", "glue/mrpc", "--data", glue_dir)
    out = tmp_path / "small"
    common = ("--units", "heads", "--keep-heads", 0.5, "--implant-ratio", 0, "--samples", 16, *QUICK)
    text = run("prune", "--model", f"hf:{dense}", *data, *common, "--out", out)
    assert "F1" in text and "accuracy" in text and "attention heads" in text
    small, plan = hap.load(out)
    families = {f.name: f.kind for f in plan.structure.families}
    assert sum(len(d.keep) for name, d in plan.decisions.items() if families[name] == "head") == 4
    assert not any(d.prune for name, d in plan.decisions.items() if families[name] != "head")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    classify = transformers.pipeline("text-classification", model=small, tokenizer=tokenizer)
    assert classify("a good film")[0]["label"] in ("equivalent", "not_equivalent")
    report = json.loads((out / "report.json").read_text())
    assert report["options"]["task"] == "glue/mrpc" and "f1" in report["comparison"]
    assert report["options"]["training"]["optimizer"] == "adamw"
    assert report["comparison"]["heads"] == {"dense": 8, "small": 4, "ratio": 0.5} and not report["notes"]
    card = (out / "README.md").read_text()
    assert "| attention heads | 8 | 4 |" in card and "`glue/mrpc`: not_equivalent, equivalent" in card
    monkeypatch.chdir(out)
    exec(card.split("```python")[1].split("```")[0], {})
    assert capsys.readouterr().out.strip() in ("equivalent", "not_equivalent")

    run("finetune", "--model", f"hap:{out}", *data, "--out", tmp_path / "tuned", "--epochs", 1, *QUICK)
    tuned, again = hap.load(tmp_path / "tuned")
    assert again == plan
    assert not torch.equal(tuned.classifier.weight, small.classifier.weight)


def test_prune_heads_and_neurons(dense: Path, glue_dir: Path, tmp_path: Path) -> None:
    budget = ("--units", "heads,neurons", "--keep-params", 0.9, "--keep-heads", 0.75, "--mode", "optimal")
    quick = ("--implant-ratio", 0, "--epochs", 0, "--samples", 16, *QUICK)
    run(
        "prune",
        "--model",
        f"hf:{dense}",
        "--task",
        "glue/mrpc",
        "--data",
        glue_dir,
        *budget,
        *quick,
        "--out",
        tmp_path / "x",
    )
    _, plan = hap.load(tmp_path / "x")
    assert plan.small.heads <= 0.75 * plan.dense.heads and plan.small.params <= 0.9 * plan.dense.params


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps one state in a process, and other tests have other precisions."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("option", [("--precision", "bf16"), ("--gradient-checkpointing",)], ids=lambda words: words[0])
def test_finetune_in_other_ways(
    option: tuple[str, ...], fresh_accelerate, tiny_bert: Path, glue_dir: Path, tmp_path: Path
) -> None:
    data = ("--task", "glue/sst2", "--data", glue_dir, "--limit", 16)
    run("finetune", "--model", f"hf:{tiny_bert}", *data, "--out", tmp_path / "x", "--epochs", 1, *option, *QUICK)
    assert transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "x").dtype == torch.float32


def test_one_process_needs_no_accelerator(
    tiny_bert: Path, glue_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would choose a device of its own."""
    seen: dict[str, object] = {}
    train = hap.finetune

    def noting(model: torch.nn.Module, *args: object, **options: object) -> hap.History:
        seen.update(options)
        return train(model, *args, **options)

    monkeypatch.setattr(hap, "finetune", noting)
    data = ("--task", "glue/sst2", "--data", glue_dir, "--limit", 16, "--precision", "bf16")
    run("finetune", "--model", f"hf:{tiny_bert}", *data, "--out", tmp_path / "x", "--epochs", 0, *QUICK)
    assert seen["accelerator"] is None and seen["precision"] == "bf16"


def test_no_more_tokens_than_positions(tiny_bert: Path, glue_dir: Path, tmp_path: Path) -> None:
    """Where the tokenizer does not know of them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert, model_max_length=10**30)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    common = ("finetune", "--model", f"hf:{tmp_path / 'model'}", "--task", "glue/sst2", "--data", glue_dir)
    quick = ("--limit", 16, "--epochs", 0, "--device", "cpu", "--out")
    assert "at most 64 tokens" in run(*common, "--max-length", 65, *quick, tmp_path / "x", code=2)
    assert "at least 8 tokens" in run(*common, "--max-length", 7, *quick, tmp_path / "x", code=2)
    run(*common, *quick, tmp_path / "x")


def test_models_of_images_are_trained_too(tmp_path: Path) -> None:
    out = tmp_path / "digits"
    model = ("--model", "zoo:digits-cnn", "--data", "digits", "--device", "cpu")
    run("finetune", *model, "--out", out, "--epochs", 1, "--lr", 0.01, "--limit", 128)
    again = run("finetune", *model, "--out", tmp_path / "again", "--weights", out / "model.safetensors", "--epochs", 0)
    assert "accuracy" in again


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"--task": "glue/mrcp"}, "did you mean 'glue/mrpc'"),
        ({"--model": "zoo:resnet20"}, "this is no model of texts"),
        ({"--model": "hf:/nowhere/at/all"}, "there is no model in /nowhere/at/all"),
        ({"--data": "/nowhere"}, "there is no glue/mrpc in /nowhere"),
        ({"--units": "haeds"}, "did you mean 'head'"),
        ({"--units": "channels"}, "no units of kind 'channel'"),
        ({"--keep-heads": "1.5"}, "--keep-heads is out of range"),
        ({"--max-length": "65"}, "at most 64 tokens"),
        ({"--weights": "x.safetensors"}, "in the model's own directory"),
    ],
)
def test_bad_input(change: dict[str, str], text: str, dense: Path, glue_dir: Path, tmp_path: Path) -> None:
    options = {"--model": f"hf:{dense}", "--task": "glue/mrpc", "--data": str(glue_dir), "--keep-heads": "0.5"}
    options |= {"--max-length": "24", "--out": str(tmp_path / "x"), "--device": "cpu", "--samples": "16", **change}
    output = run("prune", *(word for pair in options.items() for word in pair), code=2)
    assert text in " ".join(output.split())
    assert not (tmp_path / "x").exists()


def test_inspect_opens_models_as_prune_does(dense: Path, tiny_bert: Path) -> None:
    model = ("--model", f"hf:{dense}")
    text = run("inspect", *model, "--task", "glue/mrpc", "--max-length", 24, "--frozen")
    assert "bert.encoder.layer.0.attention.self.query" in text and "MACs per sample of 24 tokens" in text
    assert "the model's output" in text
    assert "sample of 64 tokens" in run("inspect", *model, "--task", "glue/sst2"), "all that the model reads"
    assert "name the task, such as --task glue/mrpc" in " ".join(run("inspect", *model, code=2).split())


def test_an_untrained_head_is_warned_of(tiny_bert: Path, glue_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "glue").symlink_to(glue_dir)
    data = ("--task", "glue/mrpc", "--data", tmp_path, "--keep-heads", 0.5, "--implant-ratio", 0, "--samples", 16)
    text = run("prune", "--model", f"hf:{tiny_bert}", *data, "--epochs", 0, *QUICK, "--out", tmp_path / "x")
    assert "warning: hf:" in text and "random last layer" in text
