"""Which heads can become narrow, and the narrow heads that are closest to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hap
from hap.errors import HapError
from hap.implants import HEAD, VALUES, head_options, heads_of, narrow_heads
from hap.implants.narrow import Moments, fit, moments, output_weight

HEADS, WIDTH, INPUTS = 4, 8, 12


class Attention(nn.Module):
    """Attention written by a user; `kind` says how it goes about it."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(INPUTS, HEADS * WIDTH) for _ in range(3))
        self.o, self.kind = nn.Linear(HEADS * WIDTH, INPUTS, bias=kind != "no bias"), kind
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.kind == "rotary":
            angle = torch.arange(q.shape[-2], dtype=q.dtype)[:, None]
            turned = torch.cat([-q[..., WIDTH // 2 :], q[..., : WIDTH // 2]], -1)
            q = q * angle.cos() + turned * angle.sin()
        if self.kind == "norm":
            q, k = self.norm(q), self.norm(k)
        if self.kind == "scaled":
            y = F.scaled_dot_product_attention(q * WIDTH**-0.5, k, v, scale=1.0)
        elif self.kind == "eager":
            y = (q @ k.mT / WIDTH**0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        if self.kind == "gated":
            y = y.sigmoid()
        return self.o(y.transpose(1, 2).flatten(2))


def build(kind: str = "plain") -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = nn.Sequential(Attention(kind), nn.Flatten(), nn.Linear(6 * INPUTS, 3)).double().eval()
        for parameter in net[0].parameters():
            parameter.data *= 2
    return net


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, INPUTS, dtype=torch.float64, generator=generator)
    return [(part, torch.zeros(32, dtype=torch.long)) for part in x.split(32)]


@contextmanager
def contexts(attention: Attention) -> Iterator[list[torch.Tensor]]:
    """What the output layer reads, (examples, heads, tokens, width)."""
    seen: list[torch.Tensor] = []
    note = lambda _, args: seen.append(args[0].unflatten(-1, (-1, WIDTH)).transpose(1, 2))  # noqa: E731
    handle = attention.o.register_forward_pre_hook(note)
    yield seen
    handle.remove()


def test_where_heads_are(batches) -> None:
    heads = heads_of(hap.trace(build(), (batches[0][0],)))["0"]
    assert heads.modules == {"0.q", "0.k", "0.v", "0.o"} and heads.output.module == "0.o"
    assert (heads.width, heads.family.size, heads.ranks()) == (8, 4, (4, 2, 1))


@pytest.mark.parametrize("kind", ["plain", "scaled", "no bias"])
def test_what_is_undone_is_what_narrow_heads_miss(kind: str, batches) -> None:
    """Against the definition, with the attention of each narrow head written out."""
    model = build(kind)
    structure = hap.trace(model, (batches[0][0],))
    (options,) = head_options(model, structure, batches).values()
    assert [option.rank for option in options] == [4, 2, 1]
    heads = heads_of(structure)["0"]
    (fitted,) = narrow_heads(model, {"0": (heads, HEAD, 2)}, batches).values()
    narrow, layer = fitted.narrow, model[0]
    x = torch.cat([part for part, _ in batches])
    with torch.no_grad():
        q, k, v = (f(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
        scale = WIDTH**-0.5
        if kind == "scaled":
            q, scale = q * scale, 1.0
        weight = layer.o.weight.unflatten(1, (-1, WIDTH)).movedim(1, 0)  # (heads, outputs, width)
        full = (q @ k.mT * scale).softmax(-1) @ v @ weight.mT
        a, b, c = q @ narrow.query, k @ narrow.key, v @ narrow.value
        missed = full - (a @ b.mT * scale).softmax(-1) @ c @ narrow.output.mT
    spread = lambda y: y.var((0, 2), unbiased=False).sum(-1) if kind != "no bias" else y.square().mean((0, 2)).sum(-1)  # noqa: E731
    want = (spread(missed) / spread(full)).clamp(max=1)
    assert torch.allclose(options[1].undone, want, atol=1e-9)
    assert all((a.undone <= b.undone + 1e-9).all() for a, b in zip(options, options[1:], strict=False))


def test_the_fit_is_the_best_of_its_rank(batches) -> None:
    """Against reduced-rank regression by dense algebra, and random others of the same rank."""
    model = build()
    heads = heads_of(hap.trace(model, (batches[0][0],)))["0"]
    found = moments(model, {"0": heads}, batches)[0]["0"]
    weight = output_weight(model, heads)
    narrow = fit(found, weight, 2)

    def scores(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """E (q' k - q' A B' k)^2 of independent q and k - E k."""
        left = torch.eye(WIDTH, dtype=torch.float64) - first @ second.mT
        return (left.mT @ found.query @ left @ found.key).diagonal(dim1=-2, dim2=-1).sum(-1)

    def outputs(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        left = weight - second @ first.mT
        return (left @ found.context * left).sum((-2, -1))

    best_scores, best_outputs = scores(narrow.query, narrow.key), outputs(narrow.value, narrow.output)
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-3, 1e-1):
        for _ in range(20):
            q, k, v, o = (
                x * (1 + scale * torch.randn(x.shape, dtype=x.dtype, generator=generator))
                for x in (narrow.query, narrow.key, narrow.value, narrow.output)
            )
            assert (scores(q, k) > best_scores).all() and (outputs(v, o) > best_outputs).all()
    singular = torch.linalg.svdvals(torch.linalg.cholesky(found.query).mT @ torch.linalg.cholesky(found.key))
    assert torch.allclose(best_scores, singular[:, 2:].square().sum(-1), rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("eager", "no call of scaled_dot_product_attention"),
        ("gated", "its output layer reads something else"),
    ],
)
def test_heads_that_cannot_become_narrow(kind: str, problem: str, batches) -> None:
    model = build(kind)
    structure = hap.trace(model, (batches[0][0],))
    assert head_options(model, structure, batches) == {}
    with pytest.raises(HapError, match=problem):
        narrow_heads(model, {"0": (heads_of(structure)["0"], HEAD, 4)}, batches)


@pytest.mark.parametrize(("kind", "problem"), [("rotary", "its query are not"), ("norm", "its key, query are not")])
def test_where_queries_and_keys_must_stay_values_become_narrow(kind: str, problem: str, batches) -> None:
    """What is undone is what narrow values miss, written out."""
    model = build(kind)
    structure = hap.trace(model, (batches[0][0],))
    (options,) = head_options(model, structure, batches).values()
    assert [(option.form, option.rank) for option in options] == [(VALUES, 4), (VALUES, 2), (VALUES, 1)]
    heads = heads_of(structure)["0"]
    with pytest.raises(HapError, match=problem):
        narrow_heads(model, {"0": (heads, HEAD, 2)}, batches)
    (fitted,) = narrow_heads(model, {"0": (heads, VALUES, 2)}, batches).values()
    x = torch.cat([part for part, _ in batches])
    weight = model[0].o.weight.unflatten(1, (-1, WIDTH)).movedim(1, 0)  # (heads, outputs, width)
    with contexts(model[0]) as seen, torch.no_grad():
        model[0](x)
        full = seen[0] @ weight.mT
        missed = full - seen[0] @ fitted.narrow.value @ fitted.narrow.output.mT
    want = missed.var((0, 2), unbiased=False).sum(-1) / full.var((0, 2), unbiased=False).sum(-1)
    assert torch.allclose(options[1].undone, want, atol=1e-9)
    assert all((a.undone <= b.undone + 1e-9).all() for a, b in zip(options, options[1:], strict=False))


@pytest.mark.parametrize(("kind", "form"), [("plain", HEAD), ("rotary", VALUES)])
@pytest.mark.parametrize("first", [True, False])
def test_single_tokens_tell_nothing_of_queries_and_keys(kind: str, form: str, first: bool, batches) -> None:
    """Rotary positions turn the first token by nothing. Whether it comes first or last changes nothing else either."""
    model, single = build(kind)[0], (batches[0][0][:, :1], batches[0][1])
    structure = hap.trace(model, (batches[0][0],))
    (options,) = head_options(model, structure, [single, *batches] if first else [*batches, single]).values()
    assert {option.form for option in options} == {form}
    (site,) = heads_of(structure).values()
    found = moments(model, {"": site}, batches)[0][""]
    more = moments(model, {"": site}, [single, *batches] if first else [*batches, single])[0][""]
    assert isinstance(more, Moments) == (form == HEAD) and type(found) is type(more)
    if isinstance(found, Moments) and isinstance(more, Moments):
        assert torch.equal(found.query, more.query) and torch.equal(found.key, more.key)
    with pytest.raises(HapError, match="one token does not tell"):
        narrow_heads(model, {"": (site, HEAD, 4)}, [single])


class Placed(Attention):
    """Queries are turned by positions that come with the data."""

    def forward(self, x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        q, k, v = (layer(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q = q * angle.cos()[:, None] + q.roll(WIDTH // 2, -1) * angle.sin()[:, None]
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("first", [True, False])
def test_every_call_counts(first: bool, batches) -> None:
    """What holds of one batch need not hold of the next."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, x = Placed().double().eval(), batches[0][0]
    still, turned = torch.zeros(len(x), 6, 1), torch.arange(6.0)[:, None].expand(len(x), -1, -1)
    data = [((x, angle.double()), torch.zeros(len(x))) for angle in ((still, turned) if first else (turned, still))]
    structure = hap.trace(model, data[0][0])
    assert {option.form for option in head_options(model, structure, data)[""]} == {VALUES}
    with pytest.raises(HapError, match="its query are not"):
        narrow_heads(model, {"": (heads_of(structure)[""], HEAD, 4)}, data)


class Crossing(Attention):
    """As many queries, of another input than the keys, some of which are padding."""

    def forward(self, x: torch.Tensor, memory: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        inputs = ((self.q, x), (self.k, memory), (self.v, memory))
        q, k, v = (layer(y).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for layer, y in inputs)
        mask = (torch.arange(memory.shape[1]) < lengths[:, None])[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, mask.expand(-1, -1, x.shape[1], -1))
        return self.o(y.transpose(1, 2).flatten(2))


def test_padding_of_keys_is_none_of_queries_of_another_input() -> None:
    """One more key that nobody looks at, so that there are more keys than queries, changes nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Crossing().double().eval()
        x, memory = torch.randn(2, 16, 6, INPUTS, dtype=torch.float64)
    lengths, batch = torch.arange(16) % 4 + 2, torch.zeros(16)
    structure = hap.trace(model, (x, memory, lengths))
    longer = torch.cat([memory, memory[:, :1]], 1)
    first, second = (head_options(model, structure, [((x, each, lengths), batch)])[""] for each in (memory, longer))
    assert {option.form for option in first} == {HEAD}
    assert all(torch.allclose(a.undone, b.undone) for a, b in zip(first, second, strict=True))
    (site,) = heads_of(structure).values()
    a, b = (moments(model, {"": site}, [((x, each, lengths), batch)])[0][""] for each in (memory, longer))
    assert isinstance(a, Moments) and isinstance(b, Moments)
    assert torch.allclose(a.query, b.query) and torch.allclose(a.key, b.key) and torch.allclose(a.context, b.context)


class Read(Attention):
    """The mean of all its values is read outside the attention call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.v(x).mean((1, 2))[:, None, None]


def test_heads_that_something_else_reads_as_a_whole_are_left_alone(batches) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = nn.Sequential(Read(), nn.Flatten(), nn.Linear(6 * INPUTS, 3)).double().eval()
    structure = hap.trace(net, (batches[0][0],))
    assert [family.exact for family in structure.families if family.kind == "head"] == [False]
    assert heads_of(structure) == {} and head_options(net, structure, batches) == {}
    assert hap.prune(net, batches, None, hap.Budget(params=0.9), mode="optimal").verification.ok


class Named(nn.Module):
    """A linear layer of the user's own, called by name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.weight = inner, nn.Parameter(torch.ones(3, 6 * INPUTS, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.inner(x).flatten(1), weight=self.weight)


def test_linear_layers_called_by_name_anywhere(batches) -> None:
    net = Named(build()[0])
    assert list(head_options(net, hap.trace(net, (batches[0][0],)), batches)) == ["inner"]


def test_layers_that_are_left_alone(batches) -> None:
    model = build()
    structure = hap.trace(model, (batches[0][0],))
    assert head_options(model, structure, batches, layers={"0.q", "0.k", "0.v"}) == {}


def test_what_does_not_depend_on_the_key_does_not_matter(batches) -> None:
    """A bias of the keys adds the same to all scores of a query."""
    model, other = build(), build()
    with torch.no_grad():
        other[0].k.bias += 3.0
    structure = hap.trace(model, (batches[0][0],))
    first, second = (head_options(each, structure, batches)["0"] for each in (model, other))
    assert all(torch.allclose(a.undone, b.undone, atol=1e-9) for a, b in zip(first, second, strict=True))


def test_the_mean_stays(batches) -> None:
    """Where scores are exact, what is missed of the values is missed about the mean, which the output's bias keeps."""
    model = build()
    with torch.no_grad():
        model[0].k.weight.zero_()
        model[0].v.bias += 2.0
    structure = hap.trace(model, (batches[0][0],))
    plan = hap.decide(
        structure,
        hap.measure(model, batches, None, structure, criterion="magnitude"),
        hap.Budget(heads=0.5),
        mode="optimal",
        options={"0": head_options(model, structure, batches)["0"][:1]},
        floor=HEADS,
    )
    assert plan.implants["0"].indices == (0, 1, 2, 3)
    small = hap.apply(model, plan, batches)
    x = torch.cat([part for part, _ in batches])
    with torch.no_grad():
        want, have = model[0](x), small[0](x)
    assert (have - want).abs().max() > 0.1 and torch.allclose(have.mean((0, 1)), want.mean((0, 1)), atol=1e-9)


def test_padding_does_not_count() -> None:
    """What stands in tokens that nobody looks at changes nothing."""

    class Masked(Attention):
        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            q, k, v = (layer(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            mask = (torch.arange(x.shape[1]) < lengths[:, None])[:, None, None]
            y = F.scaled_dot_product_attention(q, k, v, mask.expand(-1, -1, x.shape[1], -1))
            return self.o(y.transpose(1, 2).flatten(2))[:, 0]

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Masked().double().eval()
        x, lengths = torch.randn(16, 6, INPUTS).double(), torch.arange(16) % 4 + 2
    other = torch.where((torch.arange(6) < lengths[:, None])[..., None], x, 100.0)
    structure = hap.trace(model, (x, lengths))
    first, second = (head_options(model, structure, [((inputs, lengths), torch.zeros(16))]) for inputs in (x, other))
    assert list(first) == [""]
    assert all(torch.allclose(a.undone, b.undone) for a, b in zip(first[""], second[""], strict=True))


class Nested(Attention):
    """Calls another attention module before or after its own heads attend."""

    def __init__(self, *, before: bool) -> None:
        super().__init__()
        self.cross, self.before = Attention(), before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.cross(x)) if self.before else self.cross(super().forward(x))


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("layers", [None, ["0.q", "0.k", "0.v", "0.o"]])
def test_attention_that_calls_attention_is_left_alone(before: bool, layers: list[str] | None, batches) -> None:
    """Whether the inner one is looked at or not, and from the first batch on; the inner one may become narrow."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = nn.Sequential(Nested(before=before), nn.Flatten(), nn.Linear(6 * INPUTS, 3)).double().eval()
    structure = hap.trace(net, (batches[0][0],))
    assert set(heads_of(structure)) == {"0", "0.cross"}
    assert list(head_options(net, structure, batches[:1], layers=layers)) == (["0.cross"] if layers is None else [])
    with pytest.raises(HapError, match="another attention module|several times"):
        narrow_heads(net, {"0": (heads_of(structure)["0"], HEAD, 4)}, batches[:1])


def test_a_forward_of_the_instance_is_left_alone(batches) -> None:
    """It would be called in place of that of the class that sees narrow heads."""
    net = build()
    net[0].forward = net[0].forward
    structure = hap.trace(net, (batches[0][0],))
    assert list(heads_of(structure)) == ["0"] and not head_options(net, structure, batches)
