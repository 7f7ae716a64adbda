from __future__ import annotations

import weakref

import pytest
import torch

from hap.batches import cut
from hap.curvature import measure
from hap.curvature.gates import gated
from hap.curvature.pieces import Pieces
from hap.errors import HapError

CRITERIA = ["gate-fisher", "gate-ggn", "gate-empirical", "gate-taylor", "gate-gradient"]


def test_a_cut_takes_what_has_a_batch_axis():
    batch = {"x": torch.arange(4), "scale": torch.ones(3), "name": "a"}
    part = cut(batch, 1, 3)
    assert part["x"].tolist() == [1, 2]
    assert part["scale"].shape == (3,)
    assert part["name"] == "a"


def test_pieces_are_the_batch_in_order():
    pieces = list(Pieces(lambda b: 8, max_memory=24).of((torch.arange(8), torch.arange(8) + 8)))
    assert [len(x) for x, _ in pieces] == [3, 3, 2]
    assert torch.cat([x for x, _ in pieces]).tolist() == list(range(8))
    assert torch.cat([y for _, y in pieces]).tolist() == list(range(8, 16))


def test_a_batch_that_fits_is_left_whole():
    batch = (torch.arange(8), None)
    assert next(Pieces(lambda b: 8, max_memory=64).of(batch)) is batch
    assert next(Pieces(lambda b: 8, max_memory=None).of(batch)) is batch


def test_each_shape_of_sample_is_priced_once():
    asked = []
    pieces = Pieces(lambda b: asked.append(b[0].shape) or 8, max_memory=16)
    for length in (5, 7, 5):
        list(pieces.of((torch.zeros(4, length), None)))
    assert asked == [(1, 5), (1, 7)]


def test_saved_bytes_are_the_activations():
    """The float64 values that autograd or the gates keep, each once; the weights do not count."""
    from hap.types import Family, Layer, Member, Structure

    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2), torch.nn.Sigmoid()
    ).double()
    each = tuple((i,) for i in range(4))
    family = Family(
        "0", "neuron", 4, True, (Member("0.weight", 0, each, "producer"), Member("2.weight", 1, each, "consumer"))
    )
    layers = tuple(Layer(n, f"{n}.weight", f"{n}.bias", k, 0, (), 1, False, 1) for n, k in (("0", 4), ("2", 2)))
    structure = Structure((family,), (), layers, {}, {})
    with gated(model, structure) as gates:
        one, five = (gates.saved_bytes((torch.zeros(n, 3, dtype=torch.float64), None)) for n in (1, 5))
    # The first layer's output (4), tanh's (4), which the second layer reads, the second layer's output (2), and the
    # sigmoid's (2), which autograd alone keeps.
    assert one == 8 * (4 + 4 + 2 + 2)
    assert five == 5 * one


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_do_not_depend_on_the_pieces(case, criterion):
    whole = measure(case.model, case.batches, None, case.structure, criterion=criterion)
    with gated(case.model, case.structure) as gates:
        memory = 2 * gates.saved_bytes(cut(case.batches[0], 0, 1))
    sizes = []
    hook = case.model.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    parts = measure(case.model, case.batches, None, case.structure, criterion=criterion, max_memory=memory)
    hook.remove()
    graphs = [size for size in sizes if size <= 2]
    assert 2 in graphs and sum(graphs) >= case.examples
    for field in ("scores", "stderr", "filters", "filters_stderr"):
        found, expected = getattr(parts, field), getattr(whole, field)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=1e-10, atol=1e-15)
    assert parts.samples == whole.samples


@pytest.mark.parametrize("criterion", CRITERIA)
def test_one_graph_at_a_time(mlp, criterion):
    """What a piece puts out, with its graph, is gone when the next piece's forward pass begins."""
    made, alive = [], []
    enter = mlp.model.register_forward_pre_hook(lambda m, args: alive.append(sum(out() is not None for out in made)))
    leave = mlp.model.register_forward_hook(lambda m, args, out: made.append(weakref.ref(out)))
    measure(mlp.model, mlp.batches, None, mlp.structure, criterion=criterion)
    assert set(alive) == {0}
    enter.remove()
    leave.remove()


def test_one_sample_that_does_not_fit_is_refused(mlp):
    with pytest.raises(HapError, match="one sample does not fit") as caught:
        measure(mlp.model, mlp.batches, None, mlp.structure, max_memory=10)
    needed = int(caught.value.expected.split(":")[0].split(">= ")[1])
    measure(mlp.model, mlp.batches, None, mlp.structure, max_memory=needed)


def test_a_sum_is_told_from_a_mean_on_the_whole_batch(mlp):
    """On a piece of one sample they are the same."""
    with gated(mlp.model, mlp.structure) as gates:
        memory = gates.saved_bytes(cut(mlp.batches[0], 0, 1))
    total = lambda out, batch: torch.nn.functional.cross_entropy(out, batch[1], reduction="sum")  # noqa: E731
    with pytest.raises(HapError, match="gate-fisher needs"):
        measure(mlp.model, mlp.batches, total, mlp.structure, max_memory=memory)


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "hessian-trace"])
@pytest.mark.parametrize("option", [{"max_memory": 1000}, {"autocast": torch.bfloat16}])
def test_only_gate_criteria_take_the_options(mlp, criterion, option):
    with pytest.raises(HapError, match=f"{criterion} has no option {next(iter(option))}"):
        measure(mlp.model, mlp.batches, None, mlp.structure, criterion=criterion, **option)


@pytest.mark.parametrize("option", [{"max_memory": 0}, {"autocast": torch.float64}])
def test_options_out_of_range(mlp, option):
    with pytest.raises(HapError, match="no memory to use|needs a half precision"):
        measure(mlp.model, mlp.batches, None, mlp.structure, **option)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_autocast_is_close_to_single_precision(many, criterion):
    model = many.model.float()
    data = [(x.float(), y) for x, y in many.batches]
    dtypes = []
    hook = next(model.children()).register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))
    half = measure(model, data, None, many.structure, criterion=criterion, autocast=torch.bfloat16)
    assert set(dtypes[2:]) == {torch.bfloat16}  # after the survey
    hook.remove()
    single = measure(model, data, None, many.structure, criterion=criterion)
    for name, scores in single.scores.items():
        assert half.scores[name].dtype == torch.float64
        error = half.scores[name] - scores
        if criterion == "gate-fisher":  # a probability that moves may move a sampled label
            assert (error.abs() < 4 * single.stderr[name]).all()
        else:
            assert error.abs().max() < 0.05 * scores.max()
