from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from hap.curvature import CRITERIA, Criterion, Scores, Taylor, measure
from hap.errors import HapError
from hap.types import Structure, TensorSpec

FIT = sorted(set(CRITERIA) - {"bn-scale"})  # these networks have layers without batch norm
NEED_DATA = sorted(name for name, criterion in CRITERIA.items() if criterion.needs_data)


def state(model: nn.Module):
    """Everything about a model that measuring might change."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    grads = [None if p.grad is None else (id(p.grad), p.grad.clone().tolist()) for p in model.parameters()]
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        grads,
        hooks,
        {name: tensor.tolist() for name, tensor in model.state_dict().items()},
    )


def unsettle(model: nn.Module) -> None:
    """A model in the midst of something: mixed modes, some weights frozen, some gradients there."""
    model.train()
    modules = list(model.children())
    modules[1].eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
        parameter.grad = torch.full_like(parameter, 3.0) if i % 3 == 0 else None
    modules[0].register_forward_hook(lambda *a: None)


@pytest.mark.parametrize("criterion", FIT)
def test_the_model_is_left_as_found(case, criterion):
    unsettle(case.model)
    before = state(case.model)
    with torch.no_grad():
        result = measure(case.model, case.batches, None, case.structure, criterion=criterion)
    assert state(case.model) == before
    # Modes and frozen weights do not change the scores either.
    case.model.requires_grad_(True).eval()
    again = measure(case.model, case.batches, None, case.structure, criterion=criterion)
    for name, values in result.scores.items():
        assert torch.equal(values, again.scores[name])


@pytest.mark.parametrize("criterion", NEED_DATA)
def test_the_model_is_left_as_found_after_an_error(case, criterion):
    unsettle(case.model)
    before = state(case.model)
    second_is_bad = [case.batches[0], (torch.zeros(3, 7, 2, 2, 2, dtype=torch.float64), case.batches[1][1])]
    with pytest.raises(HapError, match="cannot read this batch"):
        measure(case.model, second_is_bad, None, case.structure, criterion=criterion)
    assert state(case.model) == before


def test_a_careless_criterion_does_no_harm(mlp):
    class Careless(Criterion):
        name = "careless"

        def score(self, problem):
            problem.model.requires_grad_(True).train()
            for batch in problem.batches(self.name):
                problem.model(batch[0]).sum().backward()
            raise ZeroDivisionError

    unsettle(mlp.model)
    before = state(mlp.model)
    with pytest.raises(ZeroDivisionError):
        measure(mlp.model, mlp.batches, None, mlp.structure, criterion=Careless())
    assert state(mlp.model) == before


def test_the_global_random_state_is_left_alone(mlp):
    before = torch.get_rng_state()
    for criterion in FIT:
        measure(mlp.model, mlp.batches, None, mlp.structure, criterion=criterion)
    assert torch.equal(torch.get_rng_state(), before)


def test_works_inside_inference_mode(mlp):
    outside = measure(mlp.model, mlp.batches, None, mlp.structure)
    with torch.inference_mode():
        inside = measure(mlp.model, mlp.batches, None, mlp.structure)
    assert torch.equal(inside.scores["first"], outside.scores["first"])


@pytest.mark.parametrize("criterion", NEED_DATA)
def test_samples_caps_the_data(mlp, criterion):
    capped = measure(mlp.model, mlp.batches, None, mlp.structure, criterion=criterion, samples=6)
    by_hand = [mlp.batches[0], tuple(t[:1] for t in mlp.batches[1])]
    same = measure(mlp.model, by_hand, None, mlp.structure, criterion=criterion)
    assert capped.samples == same.samples == 6
    assert torch.equal(capped.scores["first"], same.scores["first"])


def test_batches_may_be_a_generator(mlp):
    once = measure(mlp.model, iter(mlp.batches), None, mlp.structure)
    assert torch.equal(once.scores["first"], measure(mlp.model, mlp.batches, None, mlp.structure).scores["first"])


def test_a_criterion_that_is_not_known(mlp):
    with pytest.raises(HapError, match="unknown criterion 'gate-fischer'") as caught:
        measure(mlp.model, mlp.batches, None, mlp.structure, criterion="gate-fischer")
    assert "gate-fisher" in caught.value.remedy
    with pytest.raises(HapError, match="this is not a criterion"):
        measure(mlp.model, mlp.batches, None, mlp.structure, criterion=Taylor)


@pytest.mark.parametrize("options", [{"samples": 0}, {"draws": 0}, {"criterion": "taylor", "draws": 4}])
def test_counts_out_of_range(mlp, options):
    with pytest.raises(HapError, match="no samples|no draws|no random draws"):
        measure(mlp.model, mlp.batches, None, mlp.structure, **options)


@pytest.mark.parametrize("criterion", NEED_DATA)
def test_no_data(mlp, criterion):
    with pytest.raises(HapError, match=f"{criterion} needs data"):
        measure(mlp.model, None, None, mlp.structure, criterion=criterion)
    with pytest.raises(HapError, match="there is no data"):
        measure(mlp.model, [], None, mlp.structure, criterion=criterion)


@pytest.mark.parametrize("criterion", ["hessian-trace", "taylor"])
def test_a_loss_that_is_not_finite(mlp, criterion):
    with pytest.raises(HapError, match="the loss is not finite"):
        measure(mlp.model, mlp.batches, lambda out, batch: out.sum() / 0, mlp.structure, criterion=criterion)


def test_nothing_to_score(mlp):
    with pytest.raises(HapError, match="nothing to score"):
        measure(mlp.model, mlp.batches, None, Structure((), (), (), {}, {}))


@pytest.mark.parametrize("name", ["first.weight", "gone.weight"])
def test_the_structure_of_another_model(mlp, name):
    tensors = {**mlp.structure.tensors, name: TensorSpec((9, 9), "float64", True)}
    with pytest.raises(HapError, match="this structure is not this model's"):
        measure(mlp.model, mlp.batches, None, replace(mlp.structure, tensors=tensors))


@pytest.mark.parametrize("scores", [{}, {"first": torch.zeros(5)}, {"first": torch.full((6,), torch.nan)}])
def test_scores_that_are_not_scores(mlp, scores):
    class Wrong(Criterion):
        name = "wrong"
        needs_data = False

        def score(self, problem):
            return Scores(0, 0, scores, {"first": torch.zeros(6)})

    with pytest.raises(HapError, match="criterion 'wrong' gave"):
        measure(mlp.model, None, None, mlp.structure, criterion=Wrong())


def test_filters_alone_can_be_scored(conv):
    layers_only = replace(conv.structure, families=())
    for criterion in FIT:
        result = measure(conv.model, conv.batches, None, layers_only, criterion=criterion)
        assert result.scores == {}
        assert set(result.filters) == {y.module for y in conv.structure.layers}
