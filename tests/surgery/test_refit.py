"""The closed-form refit against ridge regression written out, and its laws."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hap
from hap import zoo
from hap.attention import opened
from hap.implants import options
from hap.surgery.refit import _jobs


def sensitivity(structure: hap.Structure, seed: int = 0) -> hap.Sensitivity:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.rand(n, generator=generator, dtype=torch.float64)  # noqa: E731
    return hap.Sensitivity(
        "random",
        0,
        0,
        {f.name: draw(f.size) for f in structure.families},
        {f.name: torch.zeros(f.size) for f in structure.families},
        {layer.module: draw(layer.filters) for layer in structure.layers},
    )


class Residual(nn.Module):
    """A stream with two 3 x 3 writers: one family in the block, implants on the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 8, 3, padding=1, stride=1)
        self.norm = nn.BatchNorm2d(8)
        self.outer = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.outer(F.relu(self.norm(self.inner(x)))))
        return self.head(x.mean((2, 3)))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().double().eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def setting() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]], hap.Plan]:
    model = seeded(Residual)
    data = [(images(16, 2, 7, 7), torch.zeros(16, dtype=torch.int64)) for _ in range(2)]
    structure = hap.trace(model, (data[0][0],))
    plan = hap.decide(structure, sensitivity(structure), hap.Budget(params=0.6), implant_ratio=0.3)
    assert plan.implants and any(d.prune for d in plan.decisions.values())
    return model, data, plan


def test_a_linear_consumer_is_ridge_regression() -> None:
    """Two layers: the second one's weights are the ridge solution over the kept neurons, bias included."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    x = images(40, 4)
    structure = hap.trace(model, (x,))
    plan = hap.decide(structure, sensitivity(structure), hap.Budget(params=0.7), implant_ratio=0)
    small = hap.apply(model, plan)
    hap.refit_(small, model, plan, [(x, x)], ridge=0.1)
    kept = list(plan.decisions["0"].keep)
    with torch.no_grad():
        assert torch.allclose(small[0].weight, model[0].weight[kept])  # the first layer reads what it read
        hidden, want = model[:2](x)[:, kept], model(x)
        h, y = hidden - hidden.mean(0), want - want.mean(0)
        gram = h.T @ h / 40
        pull = 0.1 * gram.diagonal().mean()
        weight = torch.linalg.inv(gram + pull * torch.eye(len(gram))) @ (
            h.T @ y / 40 + pull * model[2].weight[:, kept].T
        )
    assert torch.allclose(small[2].weight, weight.T)
    assert torch.allclose(small[2].bias, want.mean(0) - hidden.mean(0) @ weight)


class _Reached(Exception):
    """Ends a forward pass."""


def reached(model: nn.Module, module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a module reads and gives in the forward pass."""
    caught = []

    def stop(_, args, output) -> None:
        caught.append((args[0], output))
        raise _Reached

    handle = module.register_forward_hook(stop)
    with pytest.raises(_Reached):
        model(x)
    handle.remove()
    return caught[0]


@torch.no_grad()
def one_by_one(small: nn.Module, model: nn.Module, plan: hap.Plan, data: Sequence[tuple[torch.Tensor, object]]) -> None:
    """The refit with a pass of both models up to each layer."""
    jobs = _jobs(small, model, plan, 1 << 30)
    with opened(small), opened(model):
        for job in jobs.values():
            ends = [(reached(small, job.entry, b[0])[0], reached(model, job.dense, b[0])[1], b) for b in data]
            job.solve(ends, 1e-3)


def encoder() -> nn.Module:
    layer = lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)  # noqa: E731
    return nn.Sequential(nn.Linear(5, 8), layer(), layer(), nn.Linear(8, 3))


CASES = {
    "residual": (Residual, [(16, 2, 7, 7), (5, 2, 6, 6)], 0.3),
    "resnet": (lambda: zoo.build("resnet20"), [(4, 3, 32, 32), (3, 3, 32, 32)], 0.1),
    "transformer": (encoder, [(6, 4, 5), (3, 7, 5), (1, 2, 5)], 0.3),
}


@pytest.mark.parametrize("case", CASES)
def test_one_pass_does_what_a_pass_for_each_layer_does(case: str) -> None:
    build, shapes, ratio = CASES[case]
    model = seeded(build)
    data = [(images(*shape), None) for shape in shapes]
    structure = hap.trace(model, (data[0][0],))
    plan = hap.decide(structure, sensitivity(structure), hap.Budget(params=0.6), implant_ratio=ratio)
    small, want = hap.apply(model, plan, data), hap.apply(model, plan, data)
    cut = small(data[0][0])
    hap.refit_(small, model, plan, data)
    one_by_one(want, model, plan, data)
    for x, _ in data:
        assert torch.allclose(small(x), want(x), rtol=1e-8, atol=1e-10)
    assert not torch.allclose(small(data[0][0]), cut, rtol=1e-3)


def test_each_model_runs_over_the_data_once(setting) -> None:
    model, data, plan = setting
    small = hap.apply(model, plan)
    calls: Counter[str] = Counter()
    for name, module in (("small", small), ("dense", model)):
        module.register_forward_pre_hook(lambda _, args, name=name: calls.update({name: len(args[0])}))
    hap.refit_(small, model, plan, data)
    assert calls == {"small": 32 + 16, "dense": 32}  # the first batch shows how often layers are called


class Awkward(nn.Module):
    """Layers that are called twice, not at all, out of order, share a weight, or lend theirs without a call."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(6, 2), nn.Linear(3, 6)
        self.twice, self.never, self.lent = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(self.first(x).relu()).relu()).relu()
        x = F.linear(x, self.lent.weight).relu()
        return self.last(self.other(self.one(x).relu()).relu())


def test_layers_without_one_input_stay_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    model = seeded(Awkward)
    data = [(images(20, 3), None)]
    structure = hap.trace(model, (data[0][0],))
    plan = hap.decide(structure, sensitivity(structure), hap.Budget(params=0.8), implant_ratio=0)
    small = hap.apply(model, plan)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="hap.surgery.refit"):
        hap.refit_(small, model, plan, data)
    changed = {name.partition(".")[0] for name, t in small.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"first", "last"}
    assert "3 layers stay as they are: twice, lent, one" in caplog.text


def test_layers_whose_moments_do_not_fit_stay_as_they_are(setting) -> None:
    model, data, plan = setting
    small = hap.apply(model, plan)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    hap.refit_(small, model, plan, data, memory=8 * 6 * (6 + 3))  # of `head`, and of nothing with 3 x 3 kernels
    changed = {name for name, tensor in small.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_a_refit_of_nothing_is_a_warning(setting, caplog: pytest.LogCaptureFixture) -> None:
    model, data, plan = setting
    hap.refit_(hap.apply(model, plan), model, plan, data)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    hap.refit_(hap.apply(model, plan), model, plan, data, memory=0)
    assert [r.getMessage()[:32] for r in caplog.records if r.levelno >= logging.WARNING] == [
        "refit: 4 layers stay as they are"
    ]


def test_autocast_is_of_the_models_and_not_of_the_sums(setting) -> None:
    """In bf16 the layers' ends are rounded, and what is solved from them is not rounded again."""
    model, data = setting[0].float(), [(x.float(), y) for x, y in setting[1]]
    structure = hap.trace(model, (data[0][0],))
    plan = hap.decide(structure, sensitivity(structure), hap.Budget(params=0.6), implant_ratio=0.3)
    small, want = hap.apply(model, plan), hap.apply(model, plan)
    hap.refit_(want, model, plan, data)
    with torch.autocast("cpu", torch.bfloat16):
        hap.refit_(small, model, plan, data)
    x = data[0][0]
    got, exact = small(x).detach(), want(x).detach()
    assert not torch.equal(got, exact)
    assert torch.allclose(got, exact, atol=0.05 * float(exact.abs().max()))


def test_keeping_all_changes_nothing(setting) -> None:
    model, data, _ = setting
    structure = hap.trace(model, (data[0][0],))
    plan = hap.decide(structure, sensitivity(structure), hap.Budget(params=1.0))
    small = hap.apply(model, plan)
    hap.refit_(small, model, plan, data)
    assert torch.allclose(small(data[0][0]), model(data[0][0]), rtol=1e-8, atol=1e-10)


def test_the_small_model_comes_closer_and_the_dense_one_stays(setting) -> None:
    model, data, plan = setting
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = hap.apply(model, plan, data)
    fresh = images(32, 2, 7, 7).flip(0)

    def distance() -> float:
        with torch.no_grad():
            return float((small(fresh) - model(fresh)).square().mean())

    cut = distance()
    hap.refit_(small, model, plan, data)
    assert distance() < 0.5 * cut
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert sum(p.numel() for p in small.parameters()) == plan.small.params


def test_an_error_puts_the_weights_back(setting) -> None:
    model, data, plan = setting
    small = hap.apply(model, plan)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}

    def interrupted(jobs, description, total=None):
        yield from itertools.islice(jobs, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hap.refit_(small, model, plan, data, progress=interrupted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


def test_refuses_another_model_and_no_data(setting) -> None:
    model, data, plan = setting
    small = hap.apply(model, plan)
    with pytest.raises(hap.HapError, match="not the model that the plan was made for"):
        hap.refit_(small, small, plan, data)
    with pytest.raises(hap.HapError, match="no data"):
        hap.refit_(small, model, plan, [])
    with pytest.raises(hap.HapError, match="has no implant"):
        hap.refit_(model, model, plan, data)


class LinearReLU(nn.Linear):
    """Ends in an activation: what it puts out is no linear function of what it reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(super().forward(x))


def test_layers_that_compute_something_else_are_left_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), LinearReLU(12, 8), nn.Linear(8, 3)).eval()
    batches = [(torch.randn(64, 6), None)]
    structure = hap.trace(model, (batches[0][0],))
    plan = hap.decide(structure, sensitivity(structure), hap.Budget(params=0.7), implant_ratio=0)
    assert plan.decisions[structure.families[0].name].prune
    small = hap.apply(model, plan)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    hap.refit_(small, model, plan, batches)
    changed = {name for name, tensor in small.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and not any(name.startswith("2.") for name in changed)


class Tagger(nn.Module):
    """Scores for each token of a text; padding is as loud as it can be."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 6)
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 3)
        self.words.weight.data[0] = 10

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.outer(F.relu(self.inner(self.words(input_ids))))
        return found


def test_padding_of_texts_does_not_count() -> None:
    model = seeded(Tagger)
    lengths = torch.randint(2, 9, (12,), generator=torch.Generator().manual_seed(0))
    real = torch.arange(8) < lengths[:, None]
    words = torch.randint(1, 9, real.shape, generator=torch.Generator().manual_seed(1)).where(real, 0)
    padded = [{"input_ids": words, "attention_mask": real.long()}]
    alone = [
        {"input_ids": w[None, :n], "attention_mask": torch.ones(1, n)} for w, n in zip(words, lengths, strict=True)
    ]
    structure = hap.trace(model, (), padded[0])
    plan = hap.decide(structure, sensitivity(structure), hap.Budget(params=0.8))
    small, expected = hap.apply(model, plan), hap.apply(model, plan)
    hap.refit_(small, model, plan, padded)
    hap.refit_(expected, model, plan, alone)
    assert torch.allclose(small.outer.weight, expected.outer.weight, rtol=1e-6)
    offered, wanted = options(model, structure, padded), options(model, structure, alone)
    assert set(offered) == {"inner", "outer"}
    for one, other in zip(*(itertools.chain(*found.values()) for found in (offered, wanted)), strict=True):
        assert torch.allclose(one.undone, other.undone, rtol=1e-6)
