"""The main job on a real pretrained network and real images."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import hap
from hap import zoo
from hap.cli import app


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["--keep-params", "--keep-macs"])
def test_resnet20_on_cifar10(data_dir: Path, tmp_path: Path, budget: str) -> None:
    """Within 1 % of the budget, and far above chance (10 %) without fine-tuning."""
    weights = data_dir / "resnet20.safetensors"
    arguments = ["--model", "zoo:resnet20", "--weights", str(weights), "--data", f"cifar10:{data_dir}"]
    arguments += [budget, "0.7", "--implant-ratio", "0.1", "--epochs", "0", "--limit", "2000"]
    result = CliRunner().invoke(app, ["prune", *arguments, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    dense = zoo.build("resnet20", weights=weights)
    small, plan = hap.load(tmp_path / "run", dense)
    kept = plan.small.params / plan.dense.params if budget == "--keep-params" else plan.small.macs / plan.dense.macs
    assert 0.693 <= kept <= 0.7
    test = zoo.load_data(f"cifar10:{data_dir}", limit=2000).test
    accuracy = hap.evaluate(small, test).accuracy
    assert accuracy is not None and accuracy > 0.6
