"""Every output distribution against dense matrices from a gate that is multiplied in openly."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hap.curvature import GateGGN, measure
from hap.curvature.likelihoods import Bernoulli, Categorical, Gaussian, _sample
from hap.errors import HapError
from hap.types import Family, Layer, Member, Structure

N, T, UNITS, CLASSES = 6, 3, 5, 4
EXACT = {"criterion": "gate-ggn", "gram": True}


class Tokens(nn.Module):
    """Features (N, T, 2) to scores (N, T, classes), or (N, classes) of texts of one token; its loss as asked for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.last = nn.Linear(2, UNITS), nn.Linear(UNITS, CLASSES)
        self.double()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def scores(self, x: torch.Tensor, gates: torch.Tensor | float = 1.0) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)) * gates)

    def forward(self, x, labels=None, attention_mask=None):
        logits = self.scores(x)
        if labels is None:
            return {"logits": logits}
        if self.kind == "next token":
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        elif self.kind == "tokens":
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        elif self.kind == "yes or no":
            loss = F.binary_cross_entropy_with_logits(logits, labels)
        else:
            loss = F.mse_loss(logits, labels)
        return {"loss": loss, "logits": logits}


def structure() -> Structure:
    each = tuple((i,) for i in range(UNITS))
    members = (Member("first.weight", 0, each, "producer"), Member("last.weight", 1, each, "consumer"))
    layers = (
        Layer("first", "first.weight", "first.bias", UNITS, 0, (), 1, False, 1),
        Layer("last", "last.weight", "last.bias", CLASSES, 0, (), 1, False, 1),
    )
    return Structure((Family("first", "neuron", UNITS, True, members),), (), layers, {}, {})


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def jacobians(model: Tokens, x: torch.Tensor) -> torch.Tensor:
    """d scores / d gates of every example: (N, ..., classes, units)."""
    one = torch.ones(UNITS, dtype=torch.float64)
    return torch.stack([torch.autograd.functional.jacobian(lambda a, x=x: model.scores(x, a), one) for x in x])


def softmax_curvature(model: Tokens, x: torch.Tensor) -> torch.Tensor:
    """``J' (diag p - p p') J`` of every position: (N, T, units, units)."""
    j, p = jacobians(model, x), model.scores(x).softmax(-1).detach()
    return torch.einsum("...cp,...cd,...dq->...pq", j, torch.diag_embed(p) - p[..., :, None] * p[..., None, :], j)


def text_labels() -> torch.Tensor:
    """Labels of tokens, of which some are ignored: 3, 2, 1, 0, 3 and 2 count."""
    labels = torch.randint(CLASSES, (N, T), generator=torch.Generator().manual_seed(5))
    for sample, ignored in enumerate(([], [1], [0, 2], [0, 1, 2], [], [0])):
        labels[sample, ignored] = -100
    return labels


def in_batches(x: torch.Tensor, labels: torch.Tensor | None, **more: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Unequal batches, whose own numbers of tokens differ."""
    whole = {"x": x, **({} if labels is None else {"labels": labels}), **more}
    return [{k: v[a:b] for k, v in whole.items()} for a, b in ((0, 4), (4, 6))]


@pytest.mark.parametrize("kind", ["tokens", "next token"])
def test_fisher_of_tokens_is_the_mean_over_those_that_count(kind):
    model, x, labels = Tokens(kind), inputs(N, T, 2), text_labels()
    matrices, counted = softmax_curvature(model, x), labels != -100
    if kind == "next token":
        matrices, counted = matrices[:, :-1], counted[:, 1:]
    exact = matrices[counted].sum(0) / counted.sum()
    data = in_batches(x, labels)
    estimates = torch.stack(
        [measure(model, data, None, structure(), draws=20, seed=s, gram=True).gram for s in range(25)]
    )
    z = (estimates.mean(0) - exact) / (estimates.std(0) / 5)
    assert z.abs().max() < 4
    assert (estimates.std(0) / exact.diagonal().mean()).max() < 0.5  # precise enough to tell one count from another


@pytest.mark.parametrize("kind", ["tokens", "next token"])
def test_empirical_fisher_and_gradients_of_tokens(kind):
    model, x, labels = Tokens(kind), inputs(N, T, 2), text_labels()
    scores, j = model.scores(x).detach(), jacobians(model, x)
    if kind == "next token":
        scores, j, labels = scores[:, :-1], j[:, :-1], labels[:, 1:]
    counted = labels != -100
    wrong = scores.softmax(-1) - F.one_hot(labels.clamp(min=0), CLASSES)
    rows = torch.einsum("ntc,ntcp->np", wrong * counted[..., None], j)  # each text's summed loss
    data, tokens = in_batches(x, text_labels()), counted.sum()
    expected = {
        "gate-empirical": rows.square().sum(0) / 2 / tokens,
        "gate-taylor": rows.sum(0).abs() / tokens,
        "gate-gradient": rows.abs().sum(0) / tokens,
    }
    for criterion, values in expected.items():
        found = measure(model, data, None, structure(), criterion=criterion)
        torch.testing.assert_close(found.scores["first"], values, rtol=1e-10, atol=1e-14)
    # The mean gradient is that of the loss over all tokens at once.
    one = torch.ones(UNITS, dtype=torch.float64, requires_grad=True)
    logits = model.scores(x, one)[:, : scores.shape[1]]
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), one)
    torch.testing.assert_close(expected["gate-taylor"], gradient.abs(), rtol=1e-10, atol=1e-14)


def test_an_attention_mask_stands_in_for_labels():
    model, x = Tokens("tokens"), inputs(N, T, 2)
    mask = (text_labels() != -100).long()
    labelled = measure(model, in_batches(x, text_labels()), None, structure())
    masked = measure(model, in_batches(x, None, attention_mask=mask), None, structure())
    unmasked = measure(model, in_batches(x, None), None, structure())
    assert torch.equal(masked.scores["first"], labelled.scores["first"])
    assert not torch.allclose(masked.scores["first"], unmasked.scores["first"])


def test_tokens_have_no_exact_matrix():
    with pytest.raises(HapError, match="one set of class scores"):
        measure(Tokens("tokens"), in_batches(inputs(N, T, 2), text_labels()), None, structure(), criterion="gate-ggn")


def test_data_in_which_nothing_counts():
    data = in_batches(inputs(N, T, 2), None, attention_mask=torch.zeros(N, T))
    with pytest.raises(HapError, match="nothing in the data counts"):
        measure(Tokens("tokens"), data, None, structure())


def test_ignored_labels_of_whole_samples():
    """A sample without label is as good as none, for the exact matrix too."""
    model, x = Tokens("tokens"), inputs(N, 2)
    labels = torch.tensor([0, -100, 2, 3, -100, 1])
    some = measure(model, list(zip(x.split(4), labels.split(4), strict=True)), None, structure(), **EXACT)
    fewer = measure(model, [(x[labels != -100], labels[labels != -100])], None, structure(), **EXACT)
    torch.testing.assert_close(some.gram, fewer.gram, rtol=1e-12, atol=0)
    torch.testing.assert_close(some.scores["first"], fewer.scores["first"], rtol=1e-12, atol=0)


LABELS = {"yes or no": (inputs(N, CLASSES) > 0).double(), "values": inputs(N, CLASSES).cos()}


def dense(kind: str, model: Tokens, x: torch.Tensor) -> torch.Tensor:
    """The Gauss-Newton matrix of the mean loss over samples and outputs, for every sample."""
    j, p = jacobians(model, x), model.scores(x).sigmoid().detach()
    return (
        torch.einsum("ncp,nc,ncq->npq", j, p * (1 - p) if kind == "yes or no" else torch.full_like(p, 2), j) / CLASSES
    )


@pytest.mark.parametrize("kind", LABELS)
def test_ggn_of_multi_label_and_regression_is_the_dense_one(kind):
    model, x = Tokens(kind), inputs(N, 2)
    rows = dense(kind, model, x)
    data = in_batches(x, LABELS[kind])
    result = measure(model, data, None, structure(), criterion="gate-ggn", gram=True)
    torch.testing.assert_close(result.gram, rows.mean(0), rtol=1e-10, atol=1e-14)
    half = rows.diagonal(dim1=1, dim2=2) / 2
    torch.testing.assert_close(result.scores["first"], half.mean(0), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(result.stderr["first"], half.std(0) / N**0.5, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", LABELS)
def test_fisher_of_multi_label_and_regression_has_no_bias(kind):
    model, x = Tokens(kind), inputs(N, 2)
    exact = dense(kind, model, x).mean(0)
    data = in_batches(x, LABELS[kind])
    estimates = torch.stack(
        [measure(model, data, None, structure(), draws=20, seed=s, gram=True).gram for s in range(25)]
    )
    z = (estimates.mean(0) - exact) / (estimates.std(0) / 5)
    assert z.abs().max() < 4
    assert (estimates.std(0) / exact.diagonal().mean()).max() < 0.5


@pytest.mark.parametrize("kind", LABELS)
def test_outputs_with_positions_are_sampled_alike(kind):
    """Labels do not depend on the cut; exact matrices of positions are refused."""
    model, x = Tokens(kind), inputs(N, T, 2)
    labels = LABELS[kind].unsqueeze(1).expand(N, T, CLASSES)
    whole = measure(model, [{"x": x, "labels": labels}], None, structure(), draws=2)
    singles = [{"x": x[i : i + 1], "labels": labels[i : i + 1]} for i in range(N)]
    parts = measure(model, singles, None, structure(), draws=2)
    torch.testing.assert_close(whole.scores["first"], parts.scores["first"], rtol=1e-10, atol=0)
    with pytest.raises(HapError, match="one row of outputs"):
        measure(model, in_batches(x, labels), None, structure(), criterion="gate-ggn")


@pytest.mark.parametrize(
    ("likelihood", "outputs", "labels", "loss"),
    [
        (Categorical(), inputs(N, CLASSES), torch.arange(N) % 4, F.cross_entropy),
        (Categorical(), inputs(N, CLASSES, T), text_labels(), F.cross_entropy),
        (Bernoulli(), inputs(N, CLASSES), LABELS["yes or no"], F.binary_cross_entropy_with_logits),
        (Bernoulli(), inputs(N), LABELS["yes or no"][:, 0], F.binary_cross_entropy_with_logits),
        (Gaussian(), inputs(N, CLASSES), LABELS["values"], F.mse_loss),
    ],
)
def test_totals_over_counts_are_the_mean_loss(likelihood, outputs, labels, loss):
    batch = (outputs, labels)
    mean = likelihood.total(outputs, batch) / likelihood.counts(outputs, batch).sum()
    torch.testing.assert_close(mean, loss(outputs, labels), rtol=1e-12, atol=0)


def test_one_output_fits_labels_without_axis():
    outputs, labels = inputs(N, 1), inputs(N).cos()
    for likelihood in (Bernoulli(), Gaussian()):
        flat = likelihood.total(outputs.squeeze(1), (outputs, labels))
        torch.testing.assert_close(likelihood.total(outputs, (outputs, labels)), flat, rtol=1e-12, atol=0)
    with pytest.raises(HapError, match="mean squared error does not fit"):
        Gaussian().total(inputs(N, 2), (inputs(N, 2), labels))


def test_outputs_that_are_not_finite_are_refused():
    bad = torch.full((N, CLASSES), torch.nan)
    generator = torch.Generator()
    for likelihood in (Categorical(), Bernoulli(), Gaussian()):
        with pytest.raises(HapError, match="outputs are not finite"):
            likelihood.sampled(bad, (bad, None), generator)


def test_labels_follow_the_probabilities():
    """Rounding may leave the probabilities' sum below one: classes of probability zero must not catch the rest."""
    p = torch.tensor([0.0, 0.2, 0.0, 0.3, 0.0])  # the sum is 1/2
    labels = _sample(p.log().expand(4000, 5), torch.Generator().manual_seed(0))
    counts = torch.bincount(labels, minlength=5)
    assert counts.nonzero().flatten().tolist() == [1, 3]
    assert abs(counts[1] / 4000 - 0.4) < 4 * (0.24 / 4000) ** 0.5


def test_first_order_of_regression_is_the_rise_itself():
    """The outputs are linear in these gates, so for squared errors the Taylor sum of one removal is exact."""
    model, x = Tokens("values"), inputs(N, 2)
    criterion = GateGGN(first_order=True)
    result = measure(model, in_batches(x, LABELS["values"]), None, structure(), criterion=criterion)
    before = F.mse_loss(model.scores(x), LABELS["values"])
    closed = 1 - torch.eye(UNITS, dtype=torch.float64)
    rise = torch.stack([F.mse_loss(model.scores(x, a), LABELS["values"]) - before for a in closed]).detach()
    torch.testing.assert_close(result.scores["first"], rise, rtol=1e-10, atol=1e-14)


class OneWeight(nn.Module):
    """Scores (w x, 0) of each token: one number is the whole Hessian."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 1, bias=False).double()
        nn.init.constant_(self.fc.weight, 0.7)

    def forward(self, x, labels):
        logits = F.pad(self.fc(x), (0, 1))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@pytest.mark.parametrize("criterion", ["hessian-trace", "hessian-quadratic", "taylor", "empirical-fisher"])
def test_batches_weigh_as_much_as_their_tokens(criterion: str) -> None:
    """Their own mean losses count by how many tokens each has, not by how many texts."""
    model, x, labels = OneWeight(), inputs(N, T, 1), text_labels().clamp(max=1)
    data = in_batches(x, labels)
    counts = torch.tensor([float((batch["labels"] != -100).sum()) for batch in data], dtype=torch.float64)
    assert counts[0] / counts[1] != 4 / 2
    w, real = model.fc.weight.detach(), labels != -100
    p = (w * x).sigmoid()[..., 0]  # of the first class
    gradients = [model(**batch)["loss"] for batch in data]
    products = w[0] * torch.cat([torch.autograd.grad(loss, model.fc.weight)[0][0] for loss in gradients])
    hessian = w.square() / 2 * (p * (1 - p) * x[..., 0].square())[real].mean()
    expected = {
        "hessian-trace": hessian,
        "hessian-quadratic": hessian,
        "taylor": (counts * products).sum().abs() / counts.sum(),
        "empirical-fisher": (counts * counts * products.square() / 2).sum() / counts.sum(),
    }[criterion]
    only = Structure((), (), (Layer("fc", "fc.weight", None, 1, 0, (), 1, False, T),), {}, {})
    found = measure(model, data, None, only, criterion=criterion)
    torch.testing.assert_close(found.filters["fc"], expected.flatten(), rtol=1e-10, atol=0)
