from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hap.curvature import GateFisher, GateGGN, measure
from hap.errors import HapError


def both(case, result):
    return case.flat(result.scores, result.filters), case.flat(result.stderr, result.filters_stderr)


def test_ggn_is_the_dense_one(case):
    rows = case.gate_curvature()
    result = measure(case.model, case.batches, None, case.structure, criterion="gate-ggn")
    values, stderr = both(case, result)
    torch.testing.assert_close(values, rows.mean(0), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(stderr, rows.std(0) / len(rows) ** 0.5, rtol=1e-10, atol=1e-13)
    assert (values > 0).all()
    assert (result.samples, result.draws, result.criterion) == (case.examples, 0, "gate-ggn")


def loss_gradients(case):
    """d cross-entropy / d gates of every example, from open gates."""
    logits, jacobians = case.jacobians()
    return torch.einsum("nc,ncp->np", logits.softmax(1) - F.one_hot(case.labels(), logits.shape[1]), jacobians)


def test_empirical_fisher_is_the_dense_one(case):
    rows = loss_gradients(case).square() / 2
    result = measure(case.model, case.batches, None, case.structure, criterion="gate-empirical")
    values, stderr = both(case, result)
    torch.testing.assert_close(values, rows.mean(0), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(stderr, rows.std(0) / len(rows) ** 0.5, rtol=1e-10, atol=1e-13)
    assert (result.samples, result.draws, result.criterion) == (case.examples, 0, "gate-empirical")


def test_first_order_is_taken_off(case):
    rows = case.gate_curvature() - loss_gradients(case)
    result = measure(case.model, case.batches, None, case.structure, criterion=GateGGN(first_order=True))
    values, stderr = both(case, result)
    torch.testing.assert_close(values, rows.mean(0), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(stderr, rows.std(0) / len(rows) ** 0.5, rtol=1e-10, atol=1e-13)
    assert result.criterion == "gate-ggn + first order"


def test_first_order_of_sampled_labels(case):
    plain = measure(case.model, case.batches, None, case.structure, draws=3)
    result = measure(case.model, case.batches, None, case.structure, criterion=GateFisher(first_order=True), draws=3)
    expected = both(case, plain)[0] - loss_gradients(case).mean(0)
    torch.testing.assert_close(both(case, result)[0], expected, rtol=1e-10, atol=1e-13)
    assert result.criterion == "gate-fisher + first order"


def test_fisher_estimates_the_ggn_with_calibrated_errors(many):
    """Only the sampled labels differ, so compare with the spread of the difference over samples: |z| is normal."""
    exact = measure(many.model, many.batches, None, many.structure, criterion="gate-ggn")
    values, errors = [], []
    for seed in range(20):
        estimate = measure(many.model, many.batches, None, many.structure, seed=seed, draws=2)
        value, error = both(many, estimate)
        values.append(value)
        errors.append(error)
    truth, data_error = both(many, exact)
    difference = torch.stack(values) - truth
    # The stderr covers labels and data; the data are the same for both, so take the exact spread over them off.
    label_error = (torch.stack(errors).square().mean(0) - data_error.square()).sqrt()
    z = difference / label_error
    assert z.abs().max() < 5
    assert 0.8 < z.square().mean().sqrt() < 1.2
    assert (difference.mean(0) / label_error * 20**0.5).abs().max() < 4.5  # no bias


def test_more_draws_reduce_the_error(many):
    one = measure(many.model, many.batches, None, many.structure, draws=1)
    eight = measure(many.model, many.batches, None, many.structure, draws=8)
    assert both(many, eight)[1].mean() < 0.8 * both(many, one)[1].mean()
    assert (one.draws, eight.draws) == (1, 8)


def test_seed_decides(case):
    first, again, other = (
        both(case, measure(case.model, case.batches, None, case.structure, seed=seed))[0] for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_labels_do_not_depend_on_the_batch_size(case):
    inputs, targets = (torch.cat(parts) for parts in zip(*case.batches, strict=True))
    whole = measure(case.model, [(inputs, targets)], None, case.structure, draws=3)
    parts = measure(
        case.model, list(zip(inputs.split(2), targets.split(2), strict=True)), None, case.structure, draws=3
    )
    torch.testing.assert_close(both(case, whole)[0], both(case, parts)[0], rtol=1e-9, atol=1e-12)


def test_positions_average():
    """Logits (N, classes, positions) that repeat one set of scores have the Fisher of one: independent labels."""
    generator = torch.Generator().manual_seed(5)
    from_one = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = from_one

        def forward(self, x):
            return self.inner(x).unsqueeze(2).expand(-1, -1, 50)

    layers, prefixed = (_sequential_structure(m, p) for m, p in ((from_one, ""), (Repeated(), "inner.")))
    x = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    exact = measure(from_one, [(x, None)], None, layers, criterion="gate-ggn")
    estimate = measure(Repeated(), [(x, None)], None, prefixed, criterion="gate-fisher", draws=4)
    ratio = estimate.filters["inner.0"] / exact.filters["0"]
    assert ratio.sub(1).abs().max() < 0.2
    with pytest.raises(HapError, match="one set of class scores"):
        measure(Repeated(), [(x, None)], None, prefixed, criterion="gate-ggn")


def _sequential_structure(model, prefix):
    from hap.types import Layer, Structure

    layers = tuple(
        Layer(f"{prefix}{i}", f"{prefix}{i}.weight", f"{prefix}{i}.bias", n, 0, (), 1, False, 1)
        for i, n in ((0, 4), (2, 3))
    )
    return Structure((), (), layers, {}, {})


def test_labels_are_not_needed(mlp):
    unlabelled = [(x, None) for x, _ in mlp.batches]
    with_labels = measure(mlp.model, mlp.batches, None, mlp.structure)
    without = measure(mlp.model, unlabelled, None, mlp.structure)
    assert torch.equal(with_labels.scores["first"], without.scores["first"])


def test_cross_entropy_passed_by_hand_is_accepted(mlp):
    by_hand = measure(mlp.model, mlp.batches, lambda out, batch: F.cross_entropy(out, batch[1]), mlp.structure)
    assert torch.equal(by_hand.scores["first"], measure(mlp.model, mlp.batches, None, mlp.structure).scores["first"])


@pytest.mark.parametrize("criterion", ["gate-fisher", "gate-ggn"])
@pytest.mark.parametrize(
    "loss",
    [
        lambda out, batch: F.cross_entropy(out, batch[1], label_smoothing=0.1),
        lambda out, batch: F.mse_loss(out, F.one_hot(batch[1], 3).double()),
        lambda out, batch: F.cross_entropy(out, batch[1], reduction="sum"),
    ],
)
def test_another_loss_is_refused(mlp, criterion, loss):
    with pytest.raises(HapError, match="needs cross-entropy") as caught:
        measure(mlp.model, mlp.batches, loss, mlp.structure, criterion=criterion)
    assert "taylor" in caught.value.remedy


def test_the_models_own_loss_is_checked(mlp):
    class Own(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.net, self.factor = mlp.model, factor

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": self.factor * F.cross_entropy(logits, labels), "logits": logits}

    structure = _prefixed(mlp.structure, "net.")
    data = [{"x": x, "labels": y} for x, y in mlp.batches]
    result = measure(Own(1.0), data, None, structure)
    plain = measure(mlp.model, mlp.batches, None, mlp.structure)
    assert torch.equal(result.scores["first"], plain.scores["first"])
    with pytest.raises(HapError, match="needs cross-entropy"):
        measure(Own(2.0), data, None, structure)


def _prefixed(structure, prefix):
    from dataclasses import replace

    families = tuple(
        replace(f, members=tuple(replace(m, parameter=prefix + m.parameter) for m in f.members))
        for f in structure.families
    )
    layers = tuple(replace(y, module=prefix + y.module, weight=prefix + y.weight) for y in structure.layers)
    tensors = {prefix + name: spec for name, spec in structure.tensors.items()}
    return replace(structure, families=families, layers=layers, tensors=tensors)


def test_logits_that_are_not_finite_are_refused(mlp):
    bad = [(torch.full_like(x, torch.nan), y) for x, y in mlp.batches]
    with pytest.raises(HapError, match="not finite"):
        measure(mlp.model, bad, None, mlp.structure)


def test_masked_classes_are_never_sampled(mlp):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp.model

        def forward(self, x):
            return F.pad(self.net(x), (1, 1), value=-torch.inf)

    structure = _prefixed(mlp.structure, "net.")
    exact = measure(mlp.model, mlp.batches, None, mlp.structure, criterion="gate-ggn")
    masked = measure(Masked(), mlp.batches, None, structure, criterion="gate-ggn")
    torch.testing.assert_close(masked.scores["first"], exact.scores["first"], rtol=1e-10, atol=0)
    sampled = measure(Masked(), mlp.batches, None, structure, draws=50)
    assert torch.isfinite(sampled.scores["first"]).all()


def test_logits_that_do_not_fit_the_batch_are_refused(mlp):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp.model

        def forward(self, x):
            return self.net(x).mean(0, keepdim=True)

    with pytest.raises(HapError, match="logits do not fit the batch"):
        measure(Flat(), mlp.batches, None, _prefixed(mlp.structure, "net."))


def test_float32_agrees_with_float64(conv):
    exact = measure(conv.model, conv.batches, None, conv.structure, criterion="gate-ggn")
    single = measure(
        conv.model.float(), [(x.float(), y) for x, y in conv.batches], None, conv.structure, criterion="gate-ggn"
    )
    for name, scores in exact.scores.items():
        torch.testing.assert_close(single.scores[name], scores, rtol=1e-3, atol=1e-7)
        assert single.scores[name].dtype == torch.float64
