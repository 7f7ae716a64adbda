"""The work folder belongs to one recipe."""

from __future__ import annotations

import json
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
        ("finetune.lr=0.5", r"finetune.lr 0.01, as there[\s\S]*finetune.lr 0.5"),
        ("seed=1", "seed 0, as there"),
        ("dense.train=null", "dense.train"),
        ("plan.minimum={a: 3}", "plan.minimum"),
    ],
)
def test_a_changed_recipe_is_refused(recipe_file: Path, tmp_path: Path, setting: str, message: str) -> None:
    recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file))
    with pytest.raises(HapError, match=rf"holds the work of another recipe[\s\S]*{message}"):
        recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file, [setting]))


def test_other_versions_are_refused(recipe_file: Path, tmp_path: Path) -> None:
    work = recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file))
    record = json.loads((work.folder / "recipe.json").read_text())
    (work.folder / "recipe.json").write_text(json.dumps({**record, "version of torch": "2.0"}))
    with pytest.raises(HapError, match="version of torch 2.0, as there"):
        recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file))


def test_a_damaged_record_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    work = recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file))
    (work.folder / "recipe.json").write_text("{")
    with pytest.raises(HapError, match=r"recipe.json cannot be read[\s\S]*delete"):
        recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file))


def test_finishing_moves_the_dense_model_and_clears_up(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    work = recipes.Work.beside(out, recipes.read(recipe_file))
    out.mkdir()
    work.dense.mkdir()
    (work.dense / "model.safetensors").write_text("x")
    work.finish(out)
    assert (out / "dense" / "model.safetensors").exists() and not work.folder.exists()


def test_only_the_first_process_writes(recipe_file: Path, tmp_path: Path) -> None:
    work = recipes.Work.beside(tmp_path / "run", recipes.read(recipe_file), first=False)
    assert not work.folder.exists()
    work.finish(tmp_path / "run")
