"""Tiny float64 networks with structures written by hand, and dense oracles for their curvature.

The networks take `read` and `write`, called on what a family's consumers read and on what a layer puts
out, so that the oracles can multiply gates in openly; the library sees none of that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hap.types import Family, Layer, Member, Structure, TensorSpec

collect_ignore = ["distributed_worker.py"]  # a program, which imports this file by name


def read_as_is(family: str, x: torch.Tensor) -> torch.Tensor:
    return x


def singles(count: int) -> tuple[tuple[int, ...], ...]:
    return tuple((i,) for i in range(count))


def structure_of(model: nn.Module, families: list[Family], layers: list[Layer]) -> Structure:
    tensors = {n: TensorSpec(tuple(p.shape), "float64", True) for n, p in model.named_parameters()}
    tensors |= {n: TensorSpec(tuple(b.shape), str(b.dtype)[6:], False) for n, b in model.named_buffers()}
    modules = {n: type(m).__name__ for n, m in model.named_modules()}
    return Structure(tuple(families), (), tuple(layers), tensors, modules)


def layer_of(model: nn.Module, name: str) -> Layer:
    module = model.get_submodule(name)
    kernel = tuple(getattr(module, "kernel_size", ()))
    transposed = isinstance(module, nn.ConvTranspose2d)
    filters = module.out_channels if kernel else module.out_features
    bias = f"{name}.bias" if module.bias is not None else None
    groups = getattr(module, "groups", 1)
    return Layer(name, f"{name}.weight", bias, filters, int(transposed), kernel, groups, transposed, 1)


class ConvNet(nn.Module):
    """A stem and a residual block, then a grouped convolution, pooling, and a linear layer.

    The residual stream (family "stem") is read twice, by `conv1` and by the grouped convolution, and also flows
    through the addition, which must not count. The grouped convolution ties its channels 0-2 and 1-3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)  # no normalisation: the addition overwrites its output
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.fc = nn.Linear(6 * 4, 5)

    def forward(self, x, read=read_as_is, write=read_as_is):
        x = F.silu(self.bn0(write("stem", self.stem(x))), inplace=True)
        y = F.silu(self.bn1(write("conv1", self.conv1(read("stem", x)))), inplace=True)
        y = write("conv2", self.conv2(read("conv1", y)))
        y += x
        y = write("grouped", self.grouped(read("stem", y)))
        y = F.adaptive_avg_pool2d(F.silu(y, inplace=True), 2)
        return write("fc", self.fc(read("grouped", y).flatten(1)))


def conv_structure(model: ConvNet) -> Structure:
    tied = ((0, 2), (1, 3))
    read_by_fc = tuple(tuple(4 * c + k for c in (u, u + 3) for k in range(4)) for u in range(3))
    families = [
        Family(
            "stem",
            "channel",
            2,
            True,
            (
                Member("stem.weight", 0, tied, "producer"),
                Member("bn0.weight", 0, tied, "follower"),
                Member("conv2.weight", 0, tied, "producer"),
                Member("conv2.bias", 0, tied, "follower"),
                Member("conv1.weight", 1, tied, "consumer"),
                Member("grouped.weight", 1, singles(2), "consumer"),
            ),
        ),
        Family(
            "conv1",
            "channel",
            6,
            True,
            (Member("conv1.weight", 0, singles(6), "producer"), Member("conv2.weight", 1, singles(6), "consumer")),
        ),
        Family(
            "grouped",
            "channel",
            3,
            True,
            (
                Member("grouped.weight", 0, ((0, 3), (1, 4), (2, 5)), "producer"),
                Member("fc.weight", 1, read_by_fc, "consumer"),
            ),
        ),
    ]
    layers = [layer_of(model, name) for name in ("stem", "conv1", "conv2", "grouped", "fc")]
    return structure_of(model, families, layers)


class Mlp(nn.Module):
    """Sequences (N, 3, features); `shared` is called twice; its overwritten outputs are views."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.shared = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x, read=read_as_is, write=read_as_is):
        x = torch.tanh(write("first", self.first(x)))
        for _ in range(2):
            x = F.silu(write("shared", self.shared(read("first", x))), inplace=True)
        return write("last", self.last(input=read("first", x))).mean(1)


def mlp_structure(model: Mlp) -> Structure:
    members = (
        Member("first.weight", 0, singles(6), "producer"),
        Member("first.bias", 0, singles(6), "follower"),
        Member("shared.weight", 0, singles(6), "producer"),
        Member("shared.weight", 1, singles(6), "consumer"),
        Member("last.weight", 1, singles(6), "consumer"),
    )
    family = Family("first", "neuron", 6, True, members)
    return structure_of(model, [family], [layer_of(model, name) for name in ("first", "shared", "last")])


class Attention(nn.Module):
    """One head of attention in plain tensor operations. A dimension of q and k is a unit that no weight reads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(5, 3) for _ in range(3))
        self.out = nn.Linear(3, 4)

    def forward(self, x):
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 3**0.5
        return self.out(scores.softmax(-1) @ self.v(x)).mean(1)


def attention_structure(model: Attention) -> Structure:
    families = [
        Family(
            "q",
            "neuron",
            3,
            True,
            (Member("q.weight", 0, singles(3), "producer"), Member("k.weight", 0, singles(3), "producer")),
        ),
        Family(
            "v",
            "neuron",
            3,
            True,
            (Member("v.weight", 0, singles(3), "producer"), Member("out.weight", 1, singles(3), "consumer")),
        ),
    ]
    return structure_of(model, families, [layer_of(model, name) for name in ("q", "k", "v", "out")])


@dataclass(frozen=True)
class Case:
    """A model, its structure, batches of unequal size, and the channel that each unit gates when read."""

    model: nn.Module
    structure: Structure
    batches: list[tuple[torch.Tensor, torch.Tensor]]
    units: dict[str, list[int]]
    channel_axis: int

    @property
    def examples(self) -> int:
        return sum(len(x) for x, _ in self.batches)

    def logits(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """The outputs with all gates, units then filters, multiplied in openly; `channel_axis` 1 or -1."""
        parts = gates.split([f.size for f in self.structure.families] + [y.filters for y in self.structure.layers])
        names = [f"family {f.name}" for f in self.structure.families] + [y.module for y in self.structure.layers]
        gate = dict(zip(names, parts, strict=True))

        def multiply(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
            axis = self.channel_axis % x.ndim
            return x * a.view([-1 if i == axis else 1 for i in range(x.ndim)])

        def read(family: str, x: torch.Tensor) -> torch.Tensor:
            return multiply(x, gate[f"family {family}"][self.units[family]])

        return self.model(x, read, lambda layer, x: multiply(x, gate[layer]))

    def flat(self, units: dict[str, torch.Tensor], filters: dict[str, torch.Tensor]) -> torch.Tensor:
        """Results in the order of the gates."""
        structure = self.structure
        return torch.cat([units[f.name] for f in structure.families] + [filters[y.module] for y in structure.layers])

    @property
    def gates(self) -> int:
        return sum(f.size for f in self.structure.families) + sum(y.filters for y in self.structure.layers)

    def jacobians(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (examples, classes) of every example and their derivatives (examples, classes, gates) by its gates."""
        ones = torch.ones(self.gates, dtype=torch.float64)
        inputs = torch.cat([x for x, _ in self.batches])
        rows = [torch.autograd.functional.jacobian(lambda a, x=x: self.logits(x, a)[0], ones) for x in inputs.split(1)]
        return self.logits(inputs, ones).detach(), torch.stack(rows)

    def labels(self) -> torch.Tensor:
        """The labels of every example."""
        return torch.cat([y for _, y in self.batches])

    def gate_matrices(self) -> torch.Tensor:
        """``J' (diag p - p p') J`` for every example: (examples, gates, gates)."""
        logits, jacobians = self.jacobians()
        p = logits.softmax(1)
        return torch.einsum("ncp,ncd,ndq->npq", jacobians, torch.diag_embed(p) - p[:, :, None] * p[:, None], jacobians)

    def gate_curvature(self) -> torch.Tensor:
        """Half the diagonal of `gate_matrices`: (examples, gates)."""
        return self.gate_matrices().diagonal(dim1=1, dim2=2) / 2

    def groups(self, role: str = "producer") -> dict[str, list[torch.Tensor]]:
        """For each unit (its members in a role) and filter, in the order of the gates, a mask over each weight."""
        masks: dict[str, list[torch.Tensor]] = {y.weight: [] for y in self.structure.layers}

        def add(rows: list[tuple[str, int, tuple[int, ...]]]) -> None:
            for name, stack in masks.items():
                mask = torch.zeros_like(self.model.get_parameter(name), dtype=torch.bool)
                for weight, axis, positions in rows:
                    if weight == name:
                        mask.movedim(axis, 0)[list(positions)] = True
                stack.append(mask.flatten())

        for family in self.structure.families:
            for u in range(family.size):
                add([(m.parameter, m.axis, m.indices[u]) for m in family.roles(role)])
        for layer in self.structure.layers:
            for u in range(layer.filters):
                add([(layer.weight, layer.output_axis, (u,))])
        return masks

    def mask(self, role: str = "producer") -> torch.Tensor:
        """The masks of `groups` over all layers' weights laid flat: (gates, weights), float64."""
        masks = self.groups(role)
        rows = zip(*(masks[y.weight] for y in self.structure.layers), strict=True)
        return torch.stack([torch.cat(row) for row in rows]).double()

    def gauss_newton(self) -> torch.Tensor:
        """``J' (diag p - p p') J``, the mean over examples, by all layers' weights laid flat."""
        _, flat, _ = self.loss_of_weights()
        shapes = {y.weight: self.model.get_parameter(y.weight).shape for y in self.structure.layers}

        def logits(flat: torch.Tensor) -> torch.Tensor:
            parts = flat.split([shape.numel() for shape in shapes.values()])
            changed = {n: p.view(s) for p, (n, s) in zip(parts, shapes.items(), strict=True)}
            return torch.cat([torch.func.functional_call(self.model, changed, (x,)) for x, _ in self.batches])

        jacobian = torch.autograd.functional.jacobian(logits, flat)
        p = logits(flat).softmax(1).detach()
        hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        return torch.einsum("ncv,ncd,ndw->vw", jacobian, hessian, jacobian) / self.examples

    def loss_of_weights(self) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor, torch.Tensor]:
        """The mean loss as a function of all layers' weights laid flat, these weights, and (gates, weights) masks."""
        names = [y.weight for y in self.structure.layers]
        weights = [self.model.get_parameter(name).detach() for name in names]
        masks = self.groups()

        def loss(flat: torch.Tensor) -> torch.Tensor:
            parts = flat.split([w.numel() for w in weights])
            changed = {n: p.view(w.shape) for n, p, w in zip(names, parts, weights, strict=True)}
            losses = [
                F.cross_entropy(torch.func.functional_call(self.model, changed, (x,)), y, reduction="sum")
                for x, y in self.batches
            ]
            return sum(losses) / self.examples

        mask = torch.stack([torch.cat(row) for row in zip(*(masks[n] for n in names), strict=True)])
        return loss, torch.cat([w.flatten() for w in weights]), mask


def make_conv(sizes: tuple[int, ...] = (3, 4)) -> Case:
    generator = torch.Generator().manual_seed(1)
    model = ConvNet().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
        for norm in (model.bn0, model.bn1):
            norm.weight.add_(1)
            norm.running_mean.normal_(0, 0.3, generator=generator)
            norm.running_var.uniform_(0.5, 2.0, generator=generator)
    data = [
        (
            torch.randn(n, 2, 5, 5, generator=generator, dtype=torch.float64),
            torch.randint(5, (n,), generator=generator),
        )
        for n in sizes
    ]
    units = {"stem": [0, 1, 0, 1], "conv1": list(range(6)), "grouped": [0, 1, 2, 0, 1, 2]}
    case = Case(model, conv_structure(model), data, units, 1)
    model.eval()
    return case


def make_mlp(sizes: tuple[int, ...] = (5, 2)) -> Case:
    generator = torch.Generator().manual_seed(2)
    model = Mlp().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7)
    data = [
        (torch.randn(n, 3, 4, generator=generator, dtype=torch.float64), torch.randint(3, (n,), generator=generator))
        for n in sizes
    ]
    return Case(model.eval(), mlp_structure(model), data, {"first": list(range(6))}, -1)


def make_attention() -> Case:
    generator = torch.Generator().manual_seed(3)
    model = Attention().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7)
    data = [
        (torch.randn(n, 4, 5, generator=generator, dtype=torch.float64), torch.randint(4, (n,), generator=generator))
        for n in (5, 3)
    ]
    return Case(model.eval(), attention_structure(model), data, {}, -1)


MAKERS = {"conv": make_conv, "mlp": make_mlp}


@pytest.fixture(params=list(MAKERS))
def case(request: pytest.FixtureRequest) -> Case:
    """Both networks."""
    return MAKERS[request.param]()


@pytest.fixture
def conv() -> Case:
    """The convolutional network."""
    return make_conv()


@pytest.fixture
def mlp() -> Case:
    """The MLP on sequences."""
    return make_mlp()


@pytest.fixture(params=list(MAKERS))
def many(request: pytest.FixtureRequest) -> Case:
    """Both networks with 256 examples."""
    return MAKERS[request.param]((128, 128))


@pytest.fixture(params=["conv", "mlp", "attention"])
def weighted(request: pytest.FixtureRequest) -> Case:
    """Networks for curvature by the weights, which needs no gates."""
    return {**MAKERS, "attention": make_attention}[request.param]()
