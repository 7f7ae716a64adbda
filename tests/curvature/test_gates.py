from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from hap.curvature import measure
from hap.curvature.gates import gated
from hap.errors import HapError
from hap.types import Family, Layer, Member, Structure


def dense(case, x):
    """d logits[:, 0] / d gates by openly multiplied gates: (examples, gates)."""
    ones = torch.ones(case.gates, dtype=torch.float64)
    rows = [torch.autograd.functional.jacobian(lambda a, i=i: case.logits(i, a)[0, 0], ones) for i in x.split(1)]
    return torch.stack(rows)


def test_gradients_are_those_of_open_gates(case):
    expected = [(case.model(x), dense(case, x)) for x, _ in case.batches]
    with gated(case.model, case.structure) as gates:
        for batch, (logits, gradients) in zip(case.batches, expected, strict=True):
            outputs = gates.forward(batch)
            torch.testing.assert_close(outputs, logits, rtol=1e-12, atol=1e-12)
            found = gates.gradients(outputs[:, 0].sum(), keep=False)
            torch.testing.assert_close(found, gradients, rtol=1e-10, atol=1e-12)


def test_a_kept_graph_gives_the_same_again(case):
    with gated(case.model, case.structure) as gates:
        outputs = gates.forward(case.batches[0])
        first = gates.gradients(outputs[:, 0].sum(), keep=True)
        other = gates.gradients(outputs[:, 1].sum(), keep=True)
        assert torch.equal(gates.gradients(outputs[:, 0].sum(), keep=False), first)
        assert not torch.allclose(first, other)


def test_inputs_that_require_gradients_are_left_alone(mlp):
    x = mlp.batches[0][0].clone().requires_grad_()
    measure(mlp.model, [(x, mlp.batches[0][1])], None, mlp.structure)
    assert x.grad is None


def linear(name, filters):
    return Layer(name, f"{name}.weight", None, filters, 0, (), 1, False, 1)


def neurons(name, size, producer, consumer):
    each = tuple((i,) for i in range(size))
    members = (Member(producer, 0, each, "producer"), Member(consumer, 1, each, "consumer"))
    return Family(name, "neuron", size, True, members)


def numeric(model, module, axis, x):
    """d log p(0) / d gates on `module`'s input channels, by central differences."""
    gate = {}
    hook = model.get_submodule(module).register_forward_pre_hook(
        lambda m, a: (a[0] * gate["a"].view([-1 if i == axis % a[0].ndim else 1 for i in range(a[0].ndim)]),)
    )
    probe = {}
    peek = model.get_submodule(module).register_forward_pre_hook(lambda m, a: probe.update(size=a[0].shape[axis]))
    gate["a"] = torch.ones(1, dtype=torch.float64)
    with torch.no_grad():
        model(x)
        size, columns = probe["size"], []
        for channel in range(size):
            values = []
            for sign in (1, -1):
                gate["a"] = torch.ones(size, dtype=torch.float64)
                gate["a"][channel] += sign * 1e-5
                values.append(model(x).log_softmax(1)[:, 0])
            columns.append((values[0] - values[1]) / 2e-5)
    hook.remove()
    peek.remove()
    return torch.stack(columns, 1)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(groups):
    """Its weight's axis 0 is the input, whatever the groups."""
    torch_rng = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.ConvTranspose2d(4, 6, 2, groups=groups), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()
    each = tuple((i,) for i in range(4))
    members = (Member("0.weight", 0, each, "producer"), Member("1.weight", 0, each, "consumer"))
    layers = (
        Layer("0", "0.weight", "0.bias", 4, 0, (1, 1), 1, False, 1),
        Layer("1", "1.weight", "1.bias", 6, 1, (2, 2), groups, True, 1),
    )
    structure = Structure((Family("0", "channel", 4, True, members),), (), layers, {}, {})
    x = torch.randn(3, 2, 4, 4, generator=torch_rng, dtype=torch.float64)
    with gated(model, structure) as gates:
        outputs = gates.forward((x, None))
        found = gates.gradients(outputs.log_softmax(1)[:, 0].sum(), keep=False)[:, :4]
    torch.testing.assert_close(found, numeric(model, "1", 1, x), rtol=1e-6, atol=1e-8)


def test_two_families_read_by_one_module():
    class Cat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 2), nn.Linear(3, 4), nn.Linear(6, 3)

        def forward(self, x):
            return self.c(torch.cat([self.a(x), self.b(x)], 1).tanh())

    model = Cat().double()
    a, b = neurons("a", 2, "a.weight", "c.weight"), neurons("b", 4, "b.weight", "c.weight")
    shifted = replace(b.members[1], indices=tuple((i + 2,) for i in range(4)))
    families = (a, replace(b, members=(b.members[0], shifted)))
    structure = Structure(families, (), (linear("a", 2), linear("b", 4), linear("c", 3)), {}, {})
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with gated(model, structure) as gates:
        outputs = gates.forward((x, None))
        found = gates.gradients(outputs.log_softmax(1)[:, 0].sum(), keep=False)[:, :6]
    torch.testing.assert_close(found, numeric(model, "c", 1, x), rtol=1e-6, atol=1e-8)


def test_tied_weights_are_read_in_both_places():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 3)
            self.c.weight = self.b.weight

        def forward(self, x):
            x = self.a(x).tanh()
            return self.b(x) + self.c(x.exp())

    model = Tied().double()
    layers = (linear("a", 4), linear("b", 3), replace(linear("c", 3), weight="b.weight"))
    structure = Structure((neurons("a", 4, "a.weight", "b.weight"),), (), layers, {}, {})
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with gated(model, structure) as gates:
        outputs = gates.forward((x, None))
        found = gates.gradients(outputs.log_softmax(1)[:, 0].sum(), keep=False)[:, :4]
    both = numeric(model, "b", 1, x) + numeric(model, "c", 1, x)
    torch.testing.assert_close(found, both, rtol=1e-6, atol=1e-8)


def test_an_input_that_is_overwritten_afterwards():
    """Possible where the consumer's weight is frozen: autograd does not keep its input then, so it cannot complain."""

    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            x = self.a(x) * 2
            y = self.b(x).tanh()
            x += 1
            return y + self.c(x)

    model = Overwrites().double()
    each = tuple((i,) for i in range(4))
    family = neurons("a", 4, "a.weight", "b.weight")
    family = replace(family, members=(*family.members, Member("c.weight", 1, each, "consumer")))
    structure = Structure((family,), (), (linear("a", 4), linear("b", 3), linear("c", 3)), {}, {})
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with gated(model, structure) as gates:
        outputs = gates.forward((x, None))
        found = gates.gradients(outputs.log_softmax(1)[:, 0].sum(), keep=False)[:, :4]
    model.requires_grad_(False)
    both = numeric(model, "b", 1, x) + numeric(model, "c", 1, x)
    torch.testing.assert_close(found, both, rtol=1e-6, atol=1e-8)


def test_an_encoder_layer_of_pytorch():
    """Hooks keep it from its fused kernel, which would call no module inside."""
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(24, 3)).double()
    structure = Structure(
        (neurons("0.linear1", 16, "0.linear1.weight", "0.linear2.weight"),),
        (),
        (linear("0.linear1", 16), linear("0.linear2", 8), linear("0.self_attn.out_proj", 8)),
        {},
        {},
    )
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = measure(model, [(x, None)], None, structure, criterion="gate-ggn")
    assert (result.scores["0.linear1"] > 0).any()
    assert set(result.filters) == set(result.filters_stderr) == {"0.linear1", "0.linear2", "0.self_attn.out_proj"}


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return nn.functional.linear(self.a(x).tanh(), self.b.weight)


def test_a_consumer_used_as_a_function_is_refused():
    structure = Structure((neurons("a", 4, "a.weight", "b.weight"),), (), (linear("a", 4), linear("b", 3)), {}, {})
    with pytest.raises(HapError, match="family 'a': it is read by 'b', which the model's forward never") as caught:
        measure(Functional(), [(torch.randn(2, 3), None)], None, structure)
    assert "ignore=['a']" in caught.value.remedy


def test_a_consumer_that_is_no_layer_is_refused():
    structure = Structure((neurons("a", 4, "a.weight", "b.weight"),), (), (linear("a", 4),), {}, {})
    with pytest.raises(HapError, match=r"family 'a': it is read by 'b.weight \(axis 1\)'"):
        measure(Functional(), [(torch.randn(2, 3), None)], None, structure)


def test_every_family_that_is_lost_is_named():
    families = (neurons("a", 4, "a.weight", "b.weight"), neurons("z", 4, "a.weight", "b.weight"))
    for layers in ((linear("a", 4),), (linear("a", 4), linear("b", 3))):
        with pytest.raises(HapError, match="and 1 more") as caught:
            measure(Functional(), [(torch.randn(2, 3), None)], None, Structure(families, (), layers, {}, {}))
        assert "ignore=['a', 'z']" in caught.value.remedy


def test_a_consumer_on_the_wrong_axis_is_refused():
    family = neurons("a", 4, "a.weight", "b.weight")
    wrong = replace(family, members=(family.members[0], replace(family.members[1], axis=0)))
    structure = Structure((wrong,), (), (linear("a", 4), linear("b", 3)), {}, {})
    with pytest.raises(HapError, match="axis 0"):
        measure(Functional(), [(torch.randn(2, 3), None)], None, structure)


@pytest.mark.parametrize("shape", [(3, 2, 4), (4,)])
def test_a_consumer_without_a_batch_axis_is_refused(shape):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(self.a(x.new_ones(shape)).tanh()).sum() + x

    structure = Structure((neurons("a", 4, "a.weight", "b.weight"),), (), (linear("a", 4), linear("b", 3)), {}, {})
    with pytest.raises(HapError, match="without a batch axis") as caught:
        measure(Inner(), [(torch.randn(4, 3), None)], None, structure)
    assert "family 'a': it is read by 'b'" in caught.value.what


def test_a_layer_that_is_seen_in_part_has_no_filter_scores():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(self.a(x) + self.a(x.new_ones(1, 4)))

    structure = Structure((), (), (linear("a", 4), linear("b", 3)), {}, {})
    result = measure(Part(), [(torch.randn(2, 4), None)], None, structure)
    assert set(result.filters) == set(result.filters_stderr) == {"b"}


def test_outputs_cut_off_from_the_gates_are_refused():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            return self.a(x).detach()

    with pytest.raises(HapError, match="do not depend on any unit"):
        measure(Cut(), [(torch.randn(2, 3), None)], None, Structure((), (), (linear("a", 3),), {}, {}))
