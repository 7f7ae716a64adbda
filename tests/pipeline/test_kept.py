"""A `prune` that was stopped goes on where it was, with the same result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hap
from hap import zoo
from hap.pipeline import Training, run

OPTIONS: dict[str, Any] = {"samples": 64, "seed": 3}


def prune(model: nn.Module, data: zoo.DataSplits, state: Path | None, **more: Any) -> hap.Result:
    return hap.prune(model, data.calibration, None, hap.Budget(params=0.5), state=state, **{**OPTIONS, **more})


def test_the_plan_is_kept(
    model: nn.Module, data: zoo.DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much is measured and decided once; the model is cut from the plan again, to the same bits."""
    alone = prune(model, data, None)
    first = prune(model, data, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "sensitivity.safetensors"}
    monkeypatch.setattr("hap.pipeline.stages.measure", lambda *_, **__: pytest.fail("measured again"))
    again = prune(model, data, tmp_path)
    assert first.plan == again.plan == alone.plan
    for name, scores in alone.sensitivity.scores.items():
        assert torch.equal(scores, again.sensitivity.scores[name])
        assert torch.equal(alone.sensitivity.stderr[name], again.sensitivity.stderr[name])
    assert again.sensitivity.filters.keys() == alone.sensitivity.filters.keys()
    tensors = again.model.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in alone.model.state_dict().items())


def test_measuring_goes_on(
    model: nn.Module, data: zoo.DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while deciding, it finds the state of the measurement gone and measures again; the result is the same."""

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("hap.pipeline.stages.decide", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(model, data, tmp_path)
    assert prune(model, data, tmp_path).plan == prune(model, data, None).plan


@pytest.mark.parametrize("more", [{"seed": 4}, {"samples": 32}, {"mode": "paper"}, {"criterion": "magnitude"}])
def test_another_run_is_refused(model: nn.Module, data: zoo.DataSplits, tmp_path: Path, more: dict[str, Any]) -> None:
    prune(model, data, tmp_path)
    with pytest.raises(hap.HapError, match=f"does not fit this run[\\s\\S]*expected: +{next(iter(more))}"):
        prune(model, data, tmp_path, **more)


def test_other_weights_are_refused(model: nn.Module, data: zoo.DataSplits, tmp_path: Path) -> None:
    prune(model, data, tmp_path)
    with pytest.raises(hap.HapError, match=r"expected: +weights"):
        prune(zoo.build("digits-cnn", seed=1), data, tmp_path)


def test_damaged_files_are_refused(model: nn.Module, data: zoo.DataSplits, tmp_path: Path) -> None:
    prune(model, data, tmp_path)
    (tmp_path / "sensitivity.safetensors").write_bytes(b"no")
    with pytest.raises(hap.HapError, match="does not fit this run"):
        prune(model, data, tmp_path)


def test_other_data_or_another_loss_is_refused(model: nn.Module, data: zoo.DataSplits, tmp_path: Path) -> None:
    prune(model, data, tmp_path)
    other = zoo.load_data("digits", batch_size=64, seed=1)
    with pytest.raises(hap.HapError, match=r"does not fit this run[\s\S]*data "):
        prune(model, other, tmp_path)

    def own(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return outputs.logsumexp(1).mean()

    with pytest.raises(hap.HapError, match=r"does not fit this run[\s\S]*loss None, as there[\s\S]*own"):
        hap.prune(model, data.calibration, own, hap.Budget(params=0.5), state=tmp_path, **OPTIONS)


def test_the_recovered_model_is_kept(
    model: nn.Module, data: zoo.DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while fine-tuning and started again where sums have other last bits, it goes on from the same weights."""
    options: dict[str, Any] = {"training": Training(epochs=1), "samples": 64}
    budget, work = hap.Budget(params=0.5), tmp_path / "work"
    work.mkdir()
    alone = run(model, data, budget, tmp_path / "alone", **options)

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("hap.pipeline.experiment.finetune", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, data, budget, tmp_path / "run", work=work, **options)
    monkeypatch.setattr("hap.pipeline.experiment.refit_", lambda *_, **__: pytest.fail("refitted again"))
    with pytest.raises(hap.HapError, match=r"does not fit this run[\s\S]*recover refit"):
        run(model, data, budget, tmp_path / "run", work=work, recover="none", **options)
    again = run(model, data, budget, tmp_path / "run", work=work, **options)
    assert [found.as_cut for found in again.rounds] == [found.as_cut for found in alone.rounds]
    assert [found.rise for found in again.rounds] == [found.rise for found in alone.rounds]
    tensors = again.result.model.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in alone.result.model.state_dict().items())
