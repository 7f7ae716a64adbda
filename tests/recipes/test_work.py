"""The work folder belongs to one recipe."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from hap import recipes
from hap.errors import HapError


def test_the_same_recipe_goes_on(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    work = recipes.Work.beside(out, recipes.read(recipe_file))
    assert work.folder == tmp_path / "run.work"
    (work.folder / "something").write_text("kept")
    again = recipes.Work.beside(out, recipes.read(recipe_file, ["title=another", "targets=[]"]))
    assert again == work and (again.folder / "something").read_text() == "kept"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("dense.train.lr=0.5", r"dense.train.lr 0.05, as there[\s\S]*dense.train.lr 0.5"),
        ("seed=1", "seed 0, as there"),
        ("dense.train=null", "dense.train"),
        ("data.limit=100", "data.limit 200, as there"),
    ],
)
def test_another_dense_model_is_refused(recipe_file: Path, tmp_path: Path, setting: str, message: str) -> None:
    work = recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file))
    work.training.write_text("x")
    work.dense.mkdir()
    other = recipes.read(recipe_file, [setting])
    with pytest.raises(HapError, match=rf"holds the work of another recipe[\s\S]*{message}"):
        recipes.Work.beside(tmp_path / "run", other)
    assert work.training.exists()
    recipes.Work.beside(tmp_path / "run", other, restart=True)
    assert [path.name for path in work.folder.iterdir()] == ["recipe.json"]
    recipes.Work.beside(tmp_path / "run", other)


def test_other_versions_are_refused(recipe_file: Path, tmp_path: Path) -> None:
    work = recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file))
    work.dense.mkdir()
    record = json.loads((work.folder / "recipe.json").read_text())
    (work.folder / "recipe.json").write_text(json.dumps({**record, "version of torch": "2.0"}))
    with pytest.raises(HapError, match="version of torch 2.0, as there"):
        recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file))


def test_another_python_changes_nothing(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release with mended errors would cost days of training: not even the rounds go."""
    recipe = recipes.read(recipe_file)
    work = recipes.Work.beside(tmp_path / "run", recipe)
    (work.folder / "round1").mkdir()
    record = json.loads((work.folder / "recipe.json").read_text())
    (work.folder / "recipe.json").write_text(json.dumps({**record, "version of python": "3.11.1"}))
    assert recipes.Work.beside(tmp_path / "run", recipe) == work
    monkeypatch.setattr("platform.python_version", lambda: "3.99.9")
    assert recipes.Work.beside(tmp_path / "run", recipe) == work
    work.dense.mkdir()
    recipes.Work.beside(tmp_path / "run", recipe, restart=True)
    assert work.dense.exists() and not (work.folder / "round1").exists()


@pytest.mark.parametrize(
    ("setting", "deleted"),
    [("finetune.lr=0.5", "round1"), ("seed=1", "round1, the dense model, training.safetensors")],
)
def test_a_refusal_names_what_would_be_deleted(recipe_file: Path, tmp_path: Path, setting: str, deleted: str) -> None:
    work = recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file))
    for path in (work.dense, work.folder / "round1"):
        path.mkdir()
    work.training.write_text("x")
    with pytest.raises(HapError) as error:
        recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file, [setting]))
    assert f"it deletes {deleted}, and" in error.value.remedy


def test_a_damaged_record_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    work = recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file))
    (work.folder / "recipe.json").write_text("{")
    with pytest.raises(HapError, match=r"recipe.json cannot be read[\s\S]*delete"):
        recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file))


@pytest.mark.parametrize("setting", ["finetune.lr=0.5", "plan.minimum={a: 3}", "measure.samples=32"])
def test_rounds_of_other_settings_go_only_when_told(recipe_file: Path, tmp_path: Path, setting: str) -> None:
    """The dense model stays; and then the folder is of the recipe as it is now."""
    work = recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file))
    for name in ("dense", "round1"):
        (work.folder / name).mkdir()
        (work.folder / name / "model.safetensors").write_text("x")
    work.training.write_text("x")
    changed = recipes.read(recipe_file, [setting])
    name = setting.split("=")[0]
    with pytest.raises(HapError, match=rf"another recipe[\s\S]*{name} [\s\S]*, as there[\s\S]*--restart"):
        recipes.Work.beside(tmp_path / "run", changed)
    assert (work.folder / "round1" / "model.safetensors").exists()
    assert recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file)) == work
    assert recipes.Work.beside(tmp_path / "run", changed, restart=True).folder == work.folder
    assert {path.name for path in work.folder.iterdir()} == {"recipe.json", "dense", "training.safetensors"}
    (work.folder / "round1").mkdir()
    recipes.Work.beside(tmp_path / "run", changed)
    assert (work.folder / "round1").exists()
    recipes.Work.beside(tmp_path / "run", changed, restart=True)
    assert not (work.folder / "round1").exists()


@pytest.mark.parametrize("setting", ["finetune.lr=0.5", "seed=1"])
def test_where_nothing_is_lost_a_recipe_may_change(recipe_file: Path, tmp_path: Path, setting: str) -> None:
    work = recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file))
    changed = recipes.read(recipe_file, [setting])
    assert recipes.Work.beside(tmp_path / "run", changed).folder == work.folder
    work.dense.mkdir()
    assert recipes.Work.beside(tmp_path / "run", changed).folder == work.folder


def test_workers_change_nothing(recipe_file: Path, tmp_path: Path) -> None:
    work = recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file))
    (work.folder / "round1").mkdir()
    recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file, ["data.workers=2"]))
    assert (work.folder / "round1").exists()


def test_a_folder_of_the_user_is_left_alone(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run.work").mkdir()
    (tmp_path / "run.work" / "mine.txt").write_text("mine")
    with pytest.raises(HapError, match=r"run.work is in the way"):
        recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file))
    assert (tmp_path / "run.work" / "mine.txt").read_text() == "mine"


def test_finishing_clears_up_and_can_be_killed(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of the folder is known as long as there is something in it."""
    work = recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file))
    work.dense.mkdir()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("hap.recipes.work.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            work.finish()
    assert (work.folder / "recipe.json").exists()
    work.finish()
    assert not work.folder.exists()


def test_a_whole_run_directory_is_known(recipe_file: Path, tmp_path: Path) -> None:
    """By the moment at which its folder was begun: not one that an earlier run of the recipe has left."""
    out, recipe = tmp_path / "run", recipes.read(recipe_file)
    work = recipes.Work.beside(out, recipe)
    assert not recipes.finished(recipe, out)
    out.mkdir()
    (out / "report.json").write_text(json.dumps({"options": {"begun": work.begun - 1}}))
    assert not recipes.finished(recipe, out) and work.folder.exists()
    (out / "report.json").write_text(json.dumps({"options": {"begun": work.begun}}))
    assert not recipes.finished(recipes.read(recipe_file, ["seed=1"]), out) and work.folder.exists()
    assert recipes.finished(recipe, out) and not work.folder.exists()


def test_a_run_directory_of_the_recipe_before_is_not_the_new_one_s(recipe_file: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "run", recipes.read(recipe_file, ["budget.params=0.75"])
    work = recipes.Work.beside(out, recipes.read(recipe_file))
    out.mkdir()
    (out / "report.json").write_text(json.dumps({"options": {"begun": work.begun}}))
    recipes.Work.beside(out, other, restart=True)  # killed: and begun once more
    again = recipes.Work.beside(out, other)
    assert not recipes.finished(other, out) and again.folder.exists()


def test_only_the_first_process_writes(recipe_file: Path, tmp_path: Path) -> None:
    work = recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file), first=False)
    assert not work.folder.exists()
    work.finish()


def test_two_runs_are_not_at_work_in_one_folder(recipe_file: Path, tmp_path: Path) -> None:
    fcntl, recipe = pytest.importorskip("fcntl"), recipes.read(recipe_file)
    work = recipes.Work.beside(tmp_path / "run", recipe)
    assert recipes.Work.beside(tmp_path / "run", recipe) == work  # again, in the process that has it
    recipes.work._release(work.folder)
    other = os.open(work.folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(HapError, match="another run is at work"):
        recipes.Work.beside(tmp_path / "run", recipe, restart=True)
    assert recipes.Work.beside(tmp_path / "run", recipe, first=False) == dataclasses.replace(work, first=False)
    os.close(other)  # as when it is killed
    recipes.Work.beside(tmp_path / "run", recipe).finish()
    assert not work.folder.exists()
