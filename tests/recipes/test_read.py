"""Files become recipes, or errors that name the place and the nearest right name."""

from __future__ import annotations

from pathlib import Path

import pytest

from hap import recipes
from hap.errors import HapError
from hap.types import Budget


def test_a_file(recipe_file: Path) -> None:
    recipe = recipes.read(recipe_file)
    assert recipe.model == "zoo:digits-cnn" and recipe.budget == Budget(params=0.5)
    assert recipe.dense.train is not None and recipe.dense.train.lr == 0.05 and recipe.dense.batch_size == 32
    assert recipe.plan.mode == "optimal" and recipe.seed == 0
    assert [target.of for target in recipe.targets] == ["accuracy", "kept_params", "gain"]


def test_settings_take_the_place_of_the_file_s(recipe_file: Path) -> None:
    settings = [
        "finetune.lr=1e-3", "dense.train=null", "plan.minimum={layer1.*: 0.5, conv1: 3}", "plan.units=[channel]",
        "budget.macs=0.5", "budget.params=null", "measure.samples=auto", "plan.joint=false", "data.directory=~/x",
    ]  # fmt: skip
    recipe = recipes.read(recipe_file, settings)
    assert recipe.finetune.lr == 1e-3 and recipe.finetune.epochs == 2
    assert recipe.dense.train is None
    assert recipe.plan.minimum == {"layer1.*": 0.5, "conv1": 3} and recipe.plan.units == ("channel",)
    assert isinstance(recipe.plan.minimum["conv1"], int)
    assert recipe.budget == Budget(macs=0.5)
    assert recipe.measure.samples == "auto" and recipe.plan.joint is False
    assert recipe.data.directory == Path("~/x").expanduser()


def test_the_last_setting_wins(recipe_file: Path) -> None:
    assert recipes.read(recipe_file, ["seed=3", "seed=4"]).seed == 4


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("finetun.epochs=3", r"unknown key 'finetun' of a recipe[\s\S]*did you mean 'finetune'"),
        ("finetune.epoch=3", r"unknown key 'epoch' of finetune[\s\S]*did you mean 'epochs'"),
        ("dense.train.epoch=3", r"unknown key 'epoch' of dense.train"),
        ("plan.mode=papr", r"plan.mode: unknown value 'papr'[\s\S]*did you mean 'paper'"),
        ("measure.criterion=hesian-trace", r"measure: unknown criterion[\s\S]*did you mean 'hessian-trace'"),
        ("data.name=cifar", r"data: unknown data set 'cifar'[\s\S]*did you mean 'cifar10'"),
        ("model=zoo:resnet57", r"unknown model 'resnet57'[\s\S]*did you mean 'resnet5"),
        ("finetune.lr=fast", r"finetune.lr has a wrong value[\s\S]*a number[\s\S]*'fast'"),
        ("finetune.epochs=1.5", r"finetune.epochs has a wrong value[\s\S]*a whole number"),
        ("finetune.epochs=true", r"finetune.epochs has a wrong value"),
        ("finetune.epochs=-1", r"finetune: epochs is out of range"),
        ("dense.train.distill=0.5", r"dense: there is no teacher"),
        ("finetune.schedule=cosin", r"finetune[\s\S]*did you mean 'cosine'"),
        ("plan.joint=maybe", r"plan.joint has a wrong value[\s\S]*true or false or auto"),
        ("plan.protect=conv1", r"plan.protect has a wrong value[\s\S]*a list"),
        ("plan.units=[heads]", r"plan.units\[0\]|plan.units has a wrong value"),
        ("budget.params=2", r"budget: budget params is out of range"),
        ("budget=null", r"budget is missing"),
        ("title=null", r"title is missing"),
        (
            "targets=[{of: acuracy, value: 1, source: x}]",
            r"targets\[0\].of: unknown value[\s\S]*did you mean 'accuracy'",
        ),
        ("finetune=3", r"finetune has a wrong value[\s\S]*keys and values"),
        ("data.name=glue/mrpc", r"glue/mrpc needs a model of texts"),
        ("data.batch_size=0", r"data: batch_size is out of range"),
        ("implants.ratio=2", r"implants: ratio is out of range"),
        ("seed", r"this sets nothing"),
        ("seed=[", r"the value of seed cannot be read"),
        ("plan.minimum={[a]: 1}", r"the value of plan.minimum cannot be read"),
        ("seed=1:30", r"seed has a wrong value"),
        ("seed=1_000", r"seed has a wrong value"),
        ("model=hap:run", r"hap:run is pruned already"),
        ("plan={joint: true, mode: paper}", r"units cannot be chosen together"),
    ],
)
def test_what_is_wrong_is_named(recipe_file: Path, setting: str, message: str) -> None:
    with pytest.raises(HapError, match=f"digits.yaml: {message}"):
        recipes.read(recipe_file, [setting])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read"),
        ("a: 1\na: 2", r"cannot be read[\s\S]*'a' is there twice"),
        ("? [a]\n: 1", "cannot be read"),
        ("- a", "is no recipe"),
        ("!!python/object/apply:os.system [ls]", "cannot be read"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(HapError, match=message):
        recipes.read(tmp_path / "x.yaml")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(HapError, match=r"x.yaml cannot be read[\s\S]*configs/"):
        recipes.read(tmp_path / "x.yaml")


def test_yaml_is_read_as_of_version_1_2(recipe_file: Path) -> None:
    """``no`` is a text there, and 1e-3 a number; in version 1.1 a truth value, and a text."""
    assert recipes.read(recipe_file, ["title=no"]).title == "no"
    assert recipes.read(recipe_file, ["title=2020-01-01"]).title == "2020-01-01"
    for text, seed in {"010": 10, "0o17": 15, "0x1f": 31, "+3": 3}.items():
        assert recipes.read(recipe_file, [f"seed={text}"]).seed == seed
    for text, value in {"1e-3": 1e-3, "2E4": 2e4, "1.5": 1.5, ".5": 0.5, "-1.e-2": None, "3": 3.0}.items():
        if value is not None:
            assert recipes.read(recipe_file, [f"finetune.lr={text}"]).finetune.lr == value


def test_limit_scales_all_counts_down(recipe_file: Path) -> None:
    recipe = recipes.read(recipe_file, ["measure.draws=9", "measure.criterion=hessian-trace"], limit=8)
    assert (recipe.data.limit, recipe.data.batch_size, recipe.dense.batch_size) == (8, 8, 8)
    assert (recipe.measure.samples, recipe.measure.draws) == (8, 9)  # what is set wins
    assert recipe.dense.train is not None
    assert (recipe.dense.train.epochs, recipe.finetune.epochs) == (1, 1)
    assert recipe.dense.train.lr == 0.05 and recipe.budget == Budget(params=0.5)


def test_settings_win_over_limit(recipe_file: Path) -> None:
    recipe = recipes.read(recipe_file, ["finetune.epochs=3", "dense.train=null"], limit=8)
    assert recipe.finetune.epochs == 3 and recipe.dense.train is None and recipe.data.limit == 8


def test_draws_of_a_criterion_without(recipe_file: Path) -> None:
    with pytest.raises(HapError, match=r"measure: head-gradient makes no random draws[\s\S]*measure.draws=null"):
        recipes.read(recipe_file, ["measure.criterion=head-gradient", "measure.draws=3"])


def test_limit_out_of_range(recipe_file: Path) -> None:
    with pytest.raises(HapError, match="limit is out of range"):
        recipes.read(recipe_file, limit=0)


def test_texts_are_trained_on_as_usual_for_texts(tmp_path: Path) -> None:
    path = tmp_path / "texts.yaml"
    path.write_text(
        "title: x\nmodel: hf:some\ndata: {name: glue/mrpc}\nbudget: {heads: 0.5}\ndense: {train: {lr: 1e-5}}\n"
    )
    recipe = recipes.read(path)
    assert (recipe.finetune.optimizer, recipe.finetune.lr, recipe.finetune.clip) == ("adamw", 5e-5, 1.0)
    assert recipe.dense.train is not None
    assert (recipe.dense.train.optimizer, recipe.dense.train.lr) == ("adamw", 1e-5)
    slow = recipes.read(path, ["finetune.optimizer=sgd", "dense.train=null"])
    assert (slow.finetune.optimizer, slow.finetune.lr, slow.dense.train) == ("sgd", None, None)  # AdamW's is its own


def test_null_is_for_what_is_usual(tmp_path: Path) -> None:
    path = tmp_path / "texts.yaml"
    path.write_text("title: x\nmodel: hf:some\ndata: {name: glue/mrpc}\nbudget: {heads: 0.5}\n")
    recipe = recipes.read(path, ["finetune.optimizer=null", "finetune.lr=null"])
    assert (recipe.finetune.optimizer, recipe.finetune.lr) == ("adamw", 5e-5)


def test_limit_makes_nothing_larger(recipe_file: Path) -> None:
    assert recipes.read(recipe_file, ["measure.samples=null"], limit=20_000).measure.samples is None
