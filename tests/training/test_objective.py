from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hap.errors import HapError
from hap.training import Distillation, evaluate, finetune
from hap.training.objective import Objective, divergence


def batch(seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, generator=generator, dtype=torch.float64), torch.randint(3, (6,), generator=generator)


def network(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def test_distillation_is_the_published_loss() -> None:
    teacher, student = network(1), network(2).eval()
    x, y = batch()
    outputs = student(x)
    found = Objective(None, distill=Distillation(teacher, 0.7, 3.0))(outputs, (x, y))
    p = (teacher.eval()(x) / 3).softmax(1)
    q = (outputs / 3).softmax(1)
    soft = (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(found, 0.3 * F.cross_entropy(outputs, y) + 0.7 * 9 * soft)


def test_the_teacher_is_read_in_evaluation_mode_and_left_as_it_is() -> None:
    teacher, student = network(1), network(2)
    before, modes = copy.deepcopy(teacher.state_dict()), [m.training for m in teacher.modules()]
    finetune(student, [batch()], distill=Distillation(teacher))
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert [m.training for m in teacher.modules()] == modes
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_student_comes_closer_to_its_teacher() -> None:
    teacher, student = network(1), network(2)
    student[3].p = 0.0
    batches = [batch(seed) for seed in range(4)]

    def apart() -> float:
        x = batch(0)[0]
        with torch.no_grad():
            return float(divergence(student.eval()(x), teacher.eval()(x), None, 1.0))

    start = apart()
    finetune(student, batches, epochs=20, lr=0.05, distill=Distillation(teacher, 1.0, 1.0), select="last")
    assert apart() < 0.5 * start


def test_ignored_tokens_do_not_count_in_the_divergence_of_language_models() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 2, 5, 7, generator=generator)
    labels = torch.randint(7, (2, 5), generator=generator)
    labels[0, 3:] = -100
    rows = labels != -100
    found = divergence(ours, theirs, labels, 2.0)
    torch.testing.assert_close(found, divergence(ours[rows], theirs[rows], None, 2.0))
    # Pixels: the classes are on axis 1.
    pixels = divergence(ours.movedim(-1, 1), theirs.movedim(-1, 1), labels, 2.0)
    torch.testing.assert_close(found, pixels)


def test_outputs_of_hugging_face_models_distil() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3).double()

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
            scores = self.inner(x)
            return SimpleNamespace(logits=scores, loss=F.cross_entropy(scores, labels))

    x, y = batch()
    teacher, student = Wrapped(), Wrapped()
    outputs = student(x, y)
    found = Objective(None, distill=Distillation(teacher, 0.5, 1.0))(outputs, {"x": x, "labels": y})
    soft = divergence(outputs.logits, teacher(x, y).logits, y, 1.0)
    torch.testing.assert_close(found, 0.5 * outputs.loss + 0.5 * soft)


def test_labels_are_smoothed_in_training_alone() -> None:
    model = network().eval()
    x, y = batch()
    found = Objective(None, smoothing=0.2)(model(x), (x, y))
    torch.testing.assert_close(found, F.cross_entropy(model(x), y, label_smoothing=0.2))
    one, other = network(), network()
    plain = finetune(one, [(x, y)], validation=[(x, y)], select="last")
    smooth = finetune(other, [(x, y)], validation=[(x, y)], label_smoothing=0.2, select="last")
    assert plain.start == smooth.start
    assert smooth.validation == evaluate(other, [(x, y)])
    assert not torch.equal(one[0].weight, other[0].weight)


def shared() -> Any:
    model = network()
    return model, {"distill": Distillation(nn.Sequential(model, nn.Identity()))}


@pytest.mark.parametrize(
    ("model", "options", "match"),
    [
        (network(), {"label_smoothing": 1.0}, "label_smoothing is out of range"),
        (network(), {"label_smoothing": 0.1, "loss": lambda o, b: o.sum()}, "no meaning for a loss of your own"),
        (*shared(), "the teacher has weights that are trained"),
        (network(), {"distill": Distillation(network().to("meta"))}, "the teacher is on another device"),
        (network(), {"distill": Distillation(nn.Linear(4, 5).double())}, "predict different things"),
        (nn.Linear(4, 3).double(), {"accumulate": 0}, "accumulate is out of range"),
        (nn.Linear(4, 3).double(), {"precision": "fp8"}, "unknown precision 'fp8'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(model: nn.Module, options: Any, match: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(HapError, match=match):
        finetune(model, [batch()], **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("field", "value"), [("weight", 1.5), ("temperature", 0.0)])
def test_a_distillation_checks_its_numbers(field: str, value: float) -> None:
    with pytest.raises(HapError, match="is out of range"):
        Distillation(network(), **{field: value})


def test_of_causal_language_models_the_label_is_the_next_token() -> None:
    """With a prompt that is ignored, the prediction of the first answer counts, and the one after the last does not."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 2, 5, 7, generator=generator)
    labels = torch.randint(7, (2, 5), generator=generator)
    labels[:, :2] = -100
    found = divergence(ours, theirs, labels, 2.0, shift=True)
    torch.testing.assert_close(found, divergence(ours[:, 1:4].flatten(0, 1), theirs[:, 1:4].flatten(0, 1), None, 2.0))

    class CausalLMOutput(SimpleNamespace):
        """As transformers call it."""

    class Same(nn.Module):
        def __init__(self, logits: torch.Tensor) -> None:
            super().__init__()
            self.logits = nn.Parameter(logits)

        def forward(self, **_: Any) -> Any:
            return CausalLMOutput(logits=self.logits, loss=self.logits.sum() * 0)

    objective = Objective(None, distill=Distillation(Same(theirs), weight=1.0, temperature=1.0))
    value = objective(Same(ours)(), {"labels": labels})
    torch.testing.assert_close(value, divergence(ours, theirs, labels, 1.0, shift=True))
