"""A recipe from start to end, stopped at every stage and resumed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hap
from hap import recipes, zoo


def execute(recipe: recipes.Recipe, out: Path, **more: Any) -> Any:
    data = zoo.load_data("digits", batch_size=recipe.data.batch_size, limit=recipe.data.limit, seed=recipe.seed)
    return recipes.execute(recipe, zoo.build("digits-cnn", seed=recipe.seed), data, out, **more)


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
    assert len(report["options"]["dense"]["history"]["epochs"]) == 2 and report["options"]["dense"]["seconds"] > 0
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


def test_nothing_is_done_where_the_directory_exists(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").touch()
    with pytest.raises(hap.HapError, match="exists already"):
        execute(recipes.read(recipe_file), tmp_path / "run")
    assert not (tmp_path / "run.work").exists()
