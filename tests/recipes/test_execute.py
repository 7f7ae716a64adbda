"""A recipe from start to end, stopped at every stage and resumed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import hap
from hap import recipes, zoo
from hap.cli import app


def execute(recipe: recipes.Recipe, out: Path, **more: Any) -> Any:
    data = zoo.load_data("digits", batch_size=recipe.data.batch_size, limit=recipe.data.limit, seed=recipe.seed)
    return recipes.execute(recipe, zoo.build("digits-cnn", seed=recipe.seed), data, out, save_every=0.0, **more)


def result(out: Path) -> tuple[dict[str, torch.Tensor], str, dict[str, Any]]:
    """The tensors, the plan, and what the report says of the outcome."""
    report = json.loads((out / "report.json").read_text())
    history = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in report["history"]["epochs"]]
    outcome = {"targets": report["targets"], "accuracy": report["comparison"]["accuracy"], "history": history}
    return load_file(out / "model.safetensors"), (out / "plan.json").read_text(), outcome


def assert_same(one: Path, two: Path) -> None:
    (tensors, plan, outcome), (others, other_plan, other_outcome) = result(one), result(two)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    assert plan == other_plan and outcome == other_outcome
    dense = [load_file(out / "dense" / "model.safetensors") for out in (one, two)]
    assert all(torch.equal(tensor, dense[1][name]) for name, tensor in dense[0].items())


ROUNDS = ["plan.iterations=2"]


@pytest.fixture(scope="module")
def undisturbed(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    execute(recipes.read(recipe_file, ROUNDS), out, rival=0.9)
    return out


def test_the_run_directory(undisturbed: Path, recipe_file: Path) -> None:
    """A checkpoint, the dense model that was trained, and a report with the targets; nothing lies beside it."""
    assert [path.name for path in undisturbed.parent.iterdir()] == ["run"]
    dense = zoo.build("digits-cnn", weights=undisturbed / "dense" / "model.safetensors")
    small, plan = hap.load(undisturbed, dense)
    assert 0.49 <= plan.small.params / plan.dense.params <= 0.5
    report = json.loads((undisturbed / "report.json").read_text())
    test = zoo.load_data("digits", limit=200).test
    assert report["comparison"]["accuracy"]["small"] == hap.evaluate(small, test).accuracy
    assert report["comparison"]["accuracy"]["dense"] == hap.evaluate(dense, test).accuracy
    assert report["options"]["recipe"]["finetune"]["lr"] == 0.01
    trained = report["options"]["dense_training"]
    assert len(trained["history"]["epochs"]) == 2 and report["seconds"]["dense"] == trained["seconds"] > 0
    stages = {"trace", "measure", "decide", "apply", "verify", "evaluate", "finetune"}
    assert stages < set(report["seconds"]) and all(spent > 0 for spent in report["seconds"].values())
    accuracy, kept, gain = report["targets"]
    assert accuracy["reached"] == report["comparison"]["accuracy"]["small"] and accuracy["met"]
    assert accuracy["difference"] == accuracy["reached"] - 0.5
    assert kept["reached"] == plan.small.params / plan.dense.params and not kept["met"]
    assert gain["reached"] == accuracy["reached"] - 0.9


STOPS = {
    "dense training": ("hap.recipes.execute.finetune", 1),
    "dense model written": ("hap.recipes.execute.run", 1),
    "measuring": ("hap.pipeline.stages.measure", 1),
    "deciding": ("hap.pipeline.stages.decide", 1),
    "cutting": ("hap.pipeline.stages.apply", 1),
    "fine-tuning": ("hap.pipeline.experiment.finetune", 1),
    "second measuring": ("hap.pipeline.stages.measure", 2),
    "second fine-tuning": ("hap.pipeline.experiment.finetune", 2),
    "writing": ("hap.pipeline.experiment.write_run", 1),
}


QUICK = ("dense training", "cutting", "second fine-tuning")


@pytest.mark.parametrize("stage", [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in STOPS])
def test_a_stopped_run_goes_on_with_the_same_result(
    undisturbed: Path, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    name, call = STOPS[stage]
    calls = 0
    module, _, attribute = name.rpartition(".")
    place = importlib.import_module(module)
    function = getattr(place, attribute)
    recipe = recipes.read(recipe_file, ROUNDS)

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(place, attribute, stopping)
        with pytest.raises(KeyboardInterrupt):
            execute(recipe, tmp_path / "run", rival=0.9)
    assert not (tmp_path / "run").exists() and (tmp_path / "run.work").exists()
    execute(recipe, tmp_path / "run", rival=0.9)
    assert_same(undisturbed, tmp_path / "run")
    assert not (tmp_path / "run.work").exists()


@pytest.mark.parametrize("epoch", [2, 6], ids=["dense training", "second fine-tuning"])
def test_a_training_stopped_within_an_epoch(undisturbed: Path, recipe_file: Path, tmp_path: Path, epoch: int) -> None:
    """Its epochs come in the order of the run: two of the dense training, and two in each round."""
    epochs = 0

    def stopping(items: Any, description: str, total: int | None = None) -> Any:
        nonlocal epochs
        epochs += description.startswith("epoch")
        for count, item in enumerate(items):
            if epochs == epoch and count == 1 and description.startswith("epoch"):
                raise KeyboardInterrupt
            yield item

    recipe = recipes.read(recipe_file, ROUNDS)
    with pytest.raises(KeyboardInterrupt):
        execute(recipe, tmp_path / "run", rival=0.9, progress=stopping)
    assert epochs == epoch and list((tmp_path / "run.work").glob("training.*" if epoch == 2 else "round2/finetune.*"))
    execute(recipe, tmp_path / "run", rival=0.9)
    assert_same(undisturbed, tmp_path / "run")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("plan.minimum={nosuch.*: 0.5}", "unknown family 'nosuch"),
        ("plan.units=[head]", "no units of kind 'head'"),
        ("budget.heads=0.5", "no attention heads"),
        ("plan.protect=[nosuch]", "unknown module to protect"),
    ],
)
def test_what_does_not_fit_is_said_before_the_training(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, message: str
) -> None:
    place = importlib.import_module("hap.recipes.execute")
    monkeypatch.setattr(place, "finetune", lambda *_, **__: pytest.fail("the dense model was trained"))
    with pytest.raises(hap.HapError, match=message):
        execute(recipes.read(recipe_file, [setting]), tmp_path / "run")


def test_a_run_directory_is_trained_on(undisturbed: Path, tmp_path: Path) -> None:
    """`hap finetune` opens what `hap run` wrote."""
    given = {"--model": f"hap:{undisturbed}", "--data": "digits", "--out": tmp_path / "tuned", "--limit": 64}
    given |= {"--epochs": 1, "--device": "cpu"}
    words = [str(word) for pair in given.items() for word in pair]
    done = CliRunner().invoke(app, ["finetune", *words])
    assert done.exit_code == 0, done.output
    assert hap.load(tmp_path / "tuned", zoo.build("digits-cnn"))[1] == hap.load(undisturbed, zoo.build("digits-cnn"))[1]


def test_the_directory_appears_whole(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill right then, what it was made from goes, and nothing is done again."""
    out, recipe = tmp_path / "run", recipes.read(recipe_file)

    def killed(_: recipes.Work) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(recipes.Work, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            execute(recipe, out)
    assert (out / "dense" / "model.safetensors").exists() and (tmp_path / "run.work").exists()
    monkeypatch.setattr("hap.cli.run.open_job", lambda *_, **__: pytest.fail("model and data were opened"))
    done = CliRunner().invoke(app, ["run", str(recipe_file), "--out", str(out), "--device", "cpu"])
    assert done.exit_code == 0 and "is whole" in " ".join(done.output.split()), done.output
    assert not (tmp_path / "run.work").exists()


def test_the_pipeline_counts_its_steps_on_from_the_dense_training(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trackers drop what comes with a smaller step than before."""
    told: list[tuple[int, set[str]]] = []

    def stop(*_: Any, log: Any, **__: Any) -> None:
        log({"train/loss": 1.0}, 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("hap.recipes.execute"), "run", stop)
    with pytest.raises(KeyboardInterrupt):
        execute(recipes.read(recipe_file), tmp_path / "run", log=lambda values, step: told.append((step, set(values))))
    (before, dense), (after, pruned) = told[-2:]
    assert before > 1 and after == before + 1
    assert all(name.startswith("dense/") for name in dense) and pruned == {"train/loss"}


def test_nothing_is_done_where_the_directory_exists(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").touch()
    with pytest.raises(hap.HapError, match="exists already"):
        execute(recipes.read(recipe_file), tmp_path / "run")
    assert not (tmp_path / "run.work").exists()


def test_says_that_given_weights_are_only_where_training_begins(
    recipe_file: Path, undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = undisturbed / "dense" / "model.safetensors"
    execute(recipes.read(recipe_file, [f"dense.weights={weights}"]), tmp_path / "one")
    assert f"training the dense model for 2 epochs from {weights}: dense.train=null" in caplog.text
    caplog.clear()
    execute(recipes.read(recipe_file, [f"dense.weights={weights}", "dense.train=null"]), tmp_path / "two")
    assert "training the dense model" not in caplog.text
