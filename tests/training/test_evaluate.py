from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hap.errors import HapError
from hap.training import evaluate

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 4.0], [1.0, 0.0]])
LABELS = torch.tensor([0, 1, 1, 1, 0])  # the third is wrong
# -log softmax of the label: log(1 + exp(other - own))
NATS = [math.log1p(math.exp(x)) for x in (-2.0, -1.0, 3.0, -4.0, -1.0)]


def batches(*cuts: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(LOGITS.split(list(cuts)), LABELS.split(list(cuts)), strict=True))


def test_by_hand_with_a_short_last_batch() -> None:
    result = evaluate(nn.Identity(), batches(3, 2))
    assert result.loss == pytest.approx(sum(NATS) / 5, rel=1e-6)  # not the mean of the two batch means
    assert result.accuracy == 0.8
    assert result.samples == 5


def test_samples_cuts_the_last_batch() -> None:
    result = evaluate(nn.Identity(), batches(2, 2, 1), samples=3)
    assert result.loss == pytest.approx(sum(NATS[:3]) / 3, rel=1e-6)
    assert (result.accuracy, result.samples) == (2 / 3, 3)


class Report(nn.Module):
    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": x.mean() * 0 + 7, "logits": x}


def test_dict_batches_and_the_models_own_loss() -> None:
    result = evaluate(Report(), [{"x": LOGITS, "labels": LABELS}])
    assert (result.loss, result.accuracy) == (7.0, 0.8)


def test_dense_labels_leave_out_the_ignored_ones() -> None:
    labels = torch.tensor([[0, 1, 1, 1, -100]])  # five positions, one of them ignored, one wrong
    assert evaluate(nn.Identity(), [(LOGITS.T[None], labels)]).accuracy == 0.75


@pytest.mark.parametrize(
    "labels",
    [LABELS.float(), LABELS[:, None].float(), torch.zeros(5, 3, dtype=torch.int64)],
    ids=["float", "regression", "shape"],
)
def test_no_accuracy_where_targets_are_not_classes(labels: torch.Tensor) -> None:
    result = evaluate(nn.Identity(), [(LOGITS, labels)], lambda outputs, batch: outputs.mean())
    assert result.accuracy is None
    assert result.loss == pytest.approx(float(LOGITS.mean()))


def test_no_accuracy_for_a_single_output() -> None:
    assert evaluate(nn.Identity(), [(LOGITS[:, :1], LABELS)], lambda o, b: o.mean()).accuracy is None


def test_modes_come_back_and_dropout_is_off_also_on_errors() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2))
    model[0].eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert evaluate(model, batches(5)) == evaluate(model, batches(5))
    with pytest.raises(HapError, match="cannot read this batch"):
        evaluate(model, [(torch.ones(2, 9), LABELS)])
    assert [m.training for m in model.modules()] == modes == [True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_error_without_words_is_named() -> None:
    class Silent(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError

    with pytest.raises(HapError, match=r"cannot read this batch: RuntimeError\(\)"):
        evaluate(Silent(), [(LOGITS, LABELS)])


def test_no_graph_is_kept() -> None:
    seen = []
    evaluate(nn.Linear(2, 2), batches(5), lambda outputs, batch: seen.append(outputs.requires_grad) or outputs.mean())
    assert seen == [False]


def test_what_a_model_caches_can_be_trained_through_afterwards() -> None:
    class Cached(nn.Linear):
        cache: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.cache is None:
                self.cache = torch.ones(2) * 2
            return super().forward(x * self.cache) * self.cache

    model = Cached(2, 2)
    evaluate(model, batches(5))
    model(LOGITS).sum().backward()
    assert model.weight.grad is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused(bad: float) -> None:
    values = iter([1.0, bad, 1.0])
    with pytest.raises(HapError, match="not finite at batch 2 of the evaluation"):
        evaluate(nn.Identity(), batches(2, 2, 1), lambda outputs, batch: torch.tensor(next(values)))


@pytest.mark.parametrize("value", [torch.ones(5), 1.0])
def test_a_loss_that_is_not_a_scalar_is_refused(value: object) -> None:
    with pytest.raises(HapError, match="not a scalar"):
        evaluate(nn.Identity(), batches(5), lambda outputs, batch: value)  # type: ignore[arg-type,return-value]


def test_no_data_is_refused() -> None:
    with pytest.raises(HapError, match="no data"):
        evaluate(nn.Identity(), iter(()))


def test_progress_sees_every_batch() -> None:
    calls = []

    def progress(items, description, total=None):  # type: ignore[no-untyped-def]
        calls.append((description, total))
        return items

    evaluate(nn.Identity(), batches(2, 2, 1), progress=progress)
    evaluate(nn.Identity(), iter(batches(2, 2, 1)), progress=progress)
    assert calls == [("evaluate", 3), ("evaluate", None)]


def test_metrics_see_all_labels_that_count() -> None:
    seen: list[torch.Tensor] = []

    def second(labels: torch.Tensor, predictions: torch.Tensor) -> float:
        seen.extend((labels, predictions))
        return float(((predictions == 1) & (labels == 1)).sum())

    data = [*batches(3, 2), (LOGITS[:1], torch.tensor([-100]))]
    result = evaluate(nn.Identity(), data, lambda outputs, batch: outputs.mean(), metrics={"second": second})
    assert result.metrics == {"second": 2.0}
    assert torch.equal(seen[0], LABELS)
    assert seen[1].tolist() == [0, 1, 0, 1, 0]


def test_no_metrics_where_targets_are_not_classes() -> None:
    with pytest.raises(HapError, match="no f1 where targets are not classes"):
        evaluate(nn.Identity(), [(LOGITS, LABELS.float())], lambda outputs, batch: outputs.mean(), metrics={"f1": min})
