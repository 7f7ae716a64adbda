"""What a card says of a run, and what it warns of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hap import zoo
from hap.errors import HapError
from hap.pipeline.origin import origin, untrained


@pytest.mark.parametrize(
    ("spec", "made"),
    [
        ("zoo:digits-cnn", "DigitsCNN"),
        ("torchvision:resnet18", "ResNet"),
        ("timm:resnet10t", "ResNet"),
        ("/somewhere/else/nets.py:build", "Linear"),
    ],
)
def test_the_code_makes_the_dense_model(
    data: zoo.DataSplits, spec: str, made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many classes as the data; a user's own by the name of its file."""
    source = spec.partition(":")[0]
    if source in ("torchvision", "timm"):
        pytest.importorskip(source)
    (tmp_path / "nets.py").write_text("from torch import nn\n\n\ndef build():\n    return nn.Linear(64, 10)\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = origin({"model": spec, "weights": "x"}, data)
    scope: dict[str, Any] = {}
    exec(found.build, scope)
    assert type(scope["dense"]).__name__ == made
    assert list(scope["dense"].parameters())[-1].shape == (10,)
    assert "torch.zeros(1, 1, 8, 8)" in found.call


def test_no_directory_is_published(data: zoo.DataSplits, tmp_path: Path, tiny_bert: Path) -> None:
    options = {
        "model": f"{tmp_path}/net.py:build",
        "weights": f"{tmp_path}/w.safetensors",
        "data": f"cifar10:{tmp_path}",
    }
    found = origin(options, data)
    assert found.about["model"] == "`net.py:build`, weights `w.safetensors`"
    assert found.about["data"] == f"{data.name} (`cifar10`)" and str(tmp_path) not in repr(found)
    local = origin({"model": f"hf:{tiny_bert}", "weights": None, "task": "glue/mrpc", "data": str(tmp_path)}, data)
    assert local.about["model"] == f"`hf:{tiny_bert.name}`" and str(tiny_bert.parent) not in repr(local)


def test_models_without_weights_are_told_from_trained_ones(tiny_bert: Path) -> None:
    assert "random weights" in untrained("zoo:resnet20", None, 10)
    assert "--weights" in untrained("timm:resnet10t", None, 10)
    assert not untrained("zoo:resnet20", "r20.safetensors", 10) and not untrained("net.py:build", None, 10)
    assert "random last layer" in untrained(f"hf:{tiny_bert}", None, 2)
    with pytest.raises(HapError, match="no model in"):
        untrained("hf:/nowhere/at/all", None, 2)


def test_notes_on_what_numbers_are_worth(data: zoo.DataSplits) -> None:
    few = zoo.load_data("digits", limit=40)
    known = {"model": "zoo:digits-cnn", "weights": "x"}
    (note,) = origin({**known, "limit": 40}, few).notes
    assert "at most 40 examples" in note and "of 40 test examples" in note
    assert not origin({**known, "limit": 10**6}, data).notes and not origin(known, data).notes
    assert len(origin({"model": "zoo:digits-cnn"}, data).notes) == 1
    assert not origin({"model": "zoo:digits-cnn", "dense_training": {"seconds": 1.0}}, data).notes
    assert not origin({}, data).notes and not origin({}, data).build
