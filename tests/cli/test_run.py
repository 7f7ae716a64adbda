"""`hap run`: what is wrong is said before anything is opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hap.cli import app
from hap.errors import HapError

CONFIGS = Path(__file__).parents[2] / "configs" / "paper"


@pytest.fixture(autouse=True)
def nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    for opening in ("sources.load_model", "pretrained.load_text_classifier", "zoo.load_data"):
        monkeypatch.setattr(f"hap.cli.jobs.{opening}", lambda *_, **__: pytest.fail("model and data were opened"))
    monkeypatch.delenv("HAP_DATA", raising=False)


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["run", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def test_a_wrong_setting(tmp_path: Path) -> None:
    text = refused(CONFIGS / "cifar10-resnet56.yaml", "--set", "finetune.epoch=3", "--out", tmp_path / "run")
    assert "unknown key 'epoch' of finetune" in text and "did you mean 'epochs'?" in text
    assert not list(tmp_path.iterdir())


def test_a_directory_that_exists(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").touch()
    assert "exists already" in refused(CONFIGS / "cifar10-resnet56.yaml", "--out", tmp_path)


def test_texts_without_a_directory(tmp_path: Path) -> None:
    text = refused(CONFIGS / "glue-mrpc-roberta.yaml", "--out", tmp_path / "run", "--device", "cpu")
    assert "where is glue/mrpc?" in text and "HAP_DATA" in text


def test_a_rival_without_a_report(tmp_path: Path) -> None:
    text = refused(CONFIGS / "glue-mrpc-roberta.yaml", "--out", tmp_path / "run", "--against", tmp_path)
    assert "report.json gives no accuracy" in text


@pytest.mark.parametrize(
    ("data", "budget", "message"), [("glue/rte", 0.4, "data glue/mrpc"), ("glue/mrpc", 0.6, "'heads': 0.4")]
)
def test_a_rival_of_another_kind(tmp_path: Path, data: str, budget: float, message: str) -> None:
    options = {
        "recipe": {"data": {"name": data}},
        "budget": {"params": None, "macs": None, "latency": None, "heads": budget},
    }
    report = {"comparison": {"accuracy": {"small": 0.8}}, "options": options}
    (tmp_path / "report.json").write_text(json.dumps(report))
    text = refused(CONFIGS / "glue-mrpc-roberta.yaml", "--out", tmp_path / "run", "--against", tmp_path)
    assert "is no rival" in text and message in text


def test_weights_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: dict[str, object] = {}

    def open_job(*_: object, **options: object) -> None:
        opened.update(options)
        raise HapError("enough")

    monkeypatch.setattr("hap.cli.run.open_job", open_job)
    monkeypatch.setenv("HOME", str(tmp_path))
    setting = ("--set", "dense.weights=~/x.safetensors", "--device", "cpu")
    assert "enough" in refused(CONFIGS / "cifar10-resnet56.yaml", "--out", tmp_path / "run", *setting)
    assert opened["weights"] == tmp_path / "x.safetensors"


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    text = refused(CONFIGS / "cifar10-resnet56.yaml", "--out", tmp_path / "run", "--device", "tpu")
    assert "there is no device 'tpu'" in text


def test_the_nearest_recipes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the file that is not there, and among those that come with the project."""
    monkeypatch.chdir(CONFIGS.parents[1])
    assert "did you mean configs/paper/cifar10-resnet56.yaml" in refused("cifar10-resnet65.yaml")
    (tmp_path / "mine.yaml").touch()
    text = refused(tmp_path / "mien.yaml")
    assert "there is no recipe" in text and "mine.yaml?" in text.replace(" ", "")
    assert "did you mean" not in refused(tmp_path / "qqqqqqqqqq.yaml")
