from __future__ import annotations

import torch
from torch.nn import functional as F

from hap.curvature import measure


def flat(case, result):
    return case.flat(result.scores, result.filters), case.flat(result.stderr, result.filters_stderr)


def test_taylor_is_the_sum_of_gradient_times_weight(case):
    loss, weights, masks = case.loss_of_weights()
    gradient = torch.autograd.functional.jacobian(loss, weights)
    result = measure(case.model, case.batches, None, case.structure, criterion="taylor")
    expected = (masks.double() @ (gradient * weights)).abs()
    torch.testing.assert_close(flat(case, result)[0], expected, rtol=1e-10, atol=1e-13)
    assert (result.samples, result.draws) == (case.examples, 0)


def test_taylor_takes_any_loss(mlp):
    total = lambda out, batch: out.sum() / len(out)  # noqa: E731
    doubled = measure(mlp.model, mlp.batches, lambda o, b: 2 * total(o, b), mlp.structure, criterion="taylor")
    once = measure(mlp.model, mlp.batches, total, mlp.structure, criterion="taylor")
    torch.testing.assert_close(doubled.scores["first"], 2 * once.scores["first"])


def test_taylor_stderr_is_the_spread_over_batches(mlp):
    inputs, targets = (torch.cat(parts)[:6] for parts in zip(*mlp.batches, strict=True))
    pairs = list(zip(inputs.split(2), targets.split(2), strict=True))
    weight = mlp.model.last.weight
    sums = []
    for x, y in pairs:
        gradient = torch.autograd.grad(F.cross_entropy(mlp.model(x), y), weight)[0]
        sums.append((gradient * weight).sum(1).detach())
    expected = torch.stack(sums).std(0) / len(pairs) ** 0.5
    result = measure(mlp.model, pairs, None, mlp.structure, criterion="taylor")
    torch.testing.assert_close(result.filters_stderr["last"], expected, rtol=1e-10, atol=0)


def test_taylor_of_one_batch_has_no_stderr(mlp):
    result = measure(mlp.model, mlp.batches[:1], None, mlp.structure, criterion="taylor")
    assert result.stderr["first"].isnan().all()
    assert not result.scores["first"].isnan().any()


def test_random_is_uniform_and_seeded(conv):
    values = [
        flat(conv, measure(conv.model, None, None, conv.structure, criterion="random", seed=seed))[0]
        for seed in (*range(100), 0)
    ]
    assert torch.equal(values[0], values[-1])
    every = torch.stack(values[:-1])
    assert 0 <= every.min() < every.max() < 1
    assert abs(every.mean() - 0.5) < 4 * (1 / 12 / every.numel()) ** 0.5
    assert abs(torch.corrcoef(every[:, :2].T)[0, 1]) < 0.4


def test_empirical_fisher_of_single_examples_is_the_dense_quadratic(weighted):
    """``1/2 w_p' E[g g'] w_p`` with the data's labels."""
    x, y = (torch.cat(parts) for parts in zip(*weighted.batches, strict=True))
    batches = list(zip(x.split(1), y.split(1), strict=True))
    names = [layer.weight for layer in weighted.structure.layers]
    weights = [weighted.model.get_parameter(name) for name in names]
    removed = weighted.mask() * torch.cat([w.detach().flatten() for w in weights])
    rows = []
    for image, label in batches:
        gradients = torch.autograd.grad(F.cross_entropy(weighted.model(image), label), weights)
        rows.append((removed @ torch.cat([g.flatten() for g in gradients])).square() / 2)
    expected = torch.stack(rows)
    result = measure(weighted.model, batches, None, weighted.structure, criterion="empirical-fisher")
    value, stderr = flat(weighted, result)
    torch.testing.assert_close(value, expected.mean(0), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(stderr, expected.std(0) / len(rows) ** 0.5, rtol=1e-10, atol=1e-14)


def test_empirical_fisher_of_one_batch_is_its_square_times_its_size(mlp):
    taylor = measure(mlp.model, mlp.batches[:1], None, mlp.structure, criterion="taylor").scores["first"]
    result = measure(mlp.model, mlp.batches[:1], None, mlp.structure, criterion="empirical-fisher")
    torch.testing.assert_close(result.scores["first"], 5 * taylor.square() / 2, rtol=1e-10, atol=0)
    assert result.stderr["first"].isnan().all()
