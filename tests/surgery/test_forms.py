"""The law of surgery, the refit and the merge for every form of implant."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import hap
from hap.implants import Implanted
from hap.planning import CostModel, Implant, Plan
from hap.surgery import apply, merge, refit_, verify

FORMS = {
    "pointwise": {"stem": Implant((0, 3), "pointwise"), "inner": Implant((2, 4), "pointwise")},
    "low-rank": {"inner": Implant((2, 4, 5), "low-rank", 1), "fc": Implant((1, 2, 3), "low-rank", 2)},
    "depthwise": {"stem": Implant((0, 3), "depthwise", 1), "inner": Implant((1, 2, 4, 5), "depthwise", 2)},
    "spatial and tucker": {"stem": Implant((0, 3), "tucker", 1), "inner": Implant((1, 2, 4, 5), "spatial", 2)},
    "all of a layer": {"stem": Implant((0, 2, 3, 5, 6, 7), "low-rank", 2), "fc": Implant((0, 1, 2, 3), "low-rank", 1)},
    "groups": {"depthwise": Implant((3, 5, 6), "pointwise"), "stem": Implant((5, 6), "depthwise", 1)},
}


@pytest.fixture(params=FORMS)
def made(request: pytest.FixtureRequest, plan: Plan) -> Plan:
    """The plan of `conftest` with other implants."""
    implants = FORMS[request.param]
    masks = {n: torch.tensor([u in d.prune for u in range(len(d.keep) + len(d.prune))]).numpy()
             for n, d in plan.decisions.items()}  # fmt: skip
    small = CostModel(plan.structure)(masks, implants)
    return dataclasses.replace(plan, implants=implants, small=small)


@pytest.mark.parametrize("init", ["least-squares", "weights", "zeros"])
def test_small_is_gated_dense(net, made, image, init) -> None:
    small = apply(net, made, [(image, None)], init=init)
    found = verify(net, small, made, (image,))
    assert found.ok, found
    assert {name for name, m in small.named_modules() if isinstance(m, Implanted)} == set(made.implants)


def test_the_plan_survives_json_and_the_model_saving(net, made, image, tmp_path) -> None:
    small = apply(net, made, [(image, None)])
    loaded, plan = hap.load(hap.save(small, made, tmp_path / "saved"), net)
    assert plan.implants == made.implants == Plan.from_json(made.to_json()).implants
    assert torch.equal(loaded.eval()(image), small.eval()(image))


def test_merged_is_the_same_function(net, made, image) -> None:
    small = apply(net.double().eval(), retyped(net, made), [(image.double(), None)])
    before = small(image.double())
    merged = merge(small)
    assert not any(isinstance(m, Implanted) for m in merged.modules())
    torch.testing.assert_close(merged(image.double()), before, rtol=1e-10, atol=1e-10)
    assert torch.equal(small(image.double()), before), "the model itself is left as it is"
    torch.testing.assert_close(merge(merged)(image.double()), before, rtol=1e-10, atol=1e-10)


def retyped(net: nn.Module, plan: Plan) -> Plan:
    """The plan for the same network in its present dtype."""
    return dataclasses.replace(plan, structure=hap.trace(net, (torch.zeros(2, 3, 4, 4, dtype=net.fc.weight.dtype),)))


def test_the_refit_comes_nearer_to_the_dense_layers(net, made) -> None:
    """What `fc` gives, with the network cut and with it refitted; implants keep their form and size."""
    net = net.double().eval()
    made = retyped(net, made)
    x = torch.randn(200, 3, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    small = apply(net, made, init="zeros")

    def distance() -> float:
        return float((small(x) - net(x)).detach().square().mean())

    cut, shapes = distance(), {name: p.shape for name, p in small.named_parameters()}
    refit_(small, net, made, [(x, None)])
    assert distance() < 0.5 * cut
    assert {name: p.shape for name, p in small.named_parameters()} == shapes


@pytest.mark.parametrize(("form", "rank"), [("pointwise", None), ("low-rank", 2), ("depthwise", 1), ("spatial", 2)])
def test_refit_of_an_implant_is_its_fit(net, form, rank) -> None:
    """Where nothing else changed, the refit with no pull is the least-squares fit of `apply`."""
    net = net.double().eval()
    x = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    structure = hap.trace(net, (x,))
    keep = {f.name: hap.planning.Decision(tuple(range(f.size)), ()) for f in structure.families}
    implants = {"inner": Implant((1, 2, 4, 5), form, rank)}
    cost = CostModel(structure)
    plan = Plan(structure, keep, implants, hap.Budget(params=1.0), "by hand", cost.dense, cost({}, implants))
    want, small = apply(net, plan, [(x, None)]), apply(net, plan, init="zeros")
    refit_(small, net, plan, [(x, None)], ridge=1e-6)
    torch.testing.assert_close(small.inner.equivalent()[0], want.inner.equivalent()[0], rtol=1e-4, atol=1e-5)


class Block(nn.Module):
    """The second half of a transformer block, with an embedding before and a head behind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        return self.head(x + self.down(nn.functional.gelu(self.up(self.norm(x)))))


def test_linear_layers_of_a_transformer() -> None:
    """Neurons pruned and implanted, and filters that write to the residual stream implanted alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Block().double()
    x = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    structure = hap.trace(model, (x,))
    gone = {"up": (3, 4, 9)}
    decisions = {
        f.name: hap.planning.Decision(
            tuple(u for u in range(f.size) if u not in gone.get(f.name, ())), gone.get(f.name, ())
        )
        for f in structure.families
    }
    masks = {n: torch.tensor([u in gone.get(n, ()) for u in range(len(d.keep) + len(d.prune))]).numpy()
             for n, d in decisions.items()}  # fmt: skip
    implants = {"up": Implant((0, 5, 6, 7), "low-rank", 2), "down": Implant((0, 1, 3, 6), "low-rank", 1)}
    cost = CostModel(structure)
    plan = Plan(structure, decisions, implants, hap.Budget(params=1.0), "by hand", cost.dense, cost(masks, implants))
    small = apply(model, plan, [(x, None)])
    assert verify(model, small, plan, (x,)).ok
    torch.testing.assert_close(merge(small)(x), small(x))
    assert small.up.order is None and small.down.order is None


def test_an_unknown_start_is_refused(net, plan, image) -> None:
    with pytest.raises(hap.HapError, match="unknown start of implants 'zero'"):
        apply(net, plan, [(image, None)], init="zero")


@pytest.mark.parametrize(
    "implants",
    [
        {"depthwise": Implant((0, 2), "depthwise", 1)},  # in groups
        {"fc": Implant((0,), "pointwise")},  # no kernel
        {"inner": Implant((2,), "low-rank")},  # no rank
        {"inner": Implant((2,), "pointwise", 3)},  # a rank
    ],
)
def test_a_form_that_does_not_fit_is_refused(net, plan, implants) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(hap.HapError, match="cannot have the plan's implant"):
        hap.apply_(net, dataclasses.replace(plan, implants=implants))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_whole_networks_export_without_gather(net, made, image) -> None:
    """Only a family whose producers disagree needs one: none of these does."""
    program = torch.export.export(apply(net.eval(), made), (image,))
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not any("index" in name or "scatter" in name or "gather" in name for name in operators)


def test_a_whole_network_runs_in_onnx_runtime(net, plan, image, tmp_path) -> None:
    """A form for each layer."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    first = {"stem": Implant((0, 3), "depthwise", 2), "depthwise": Implant((0, 3), "pointwise")}
    implants = {**first, **FORMS["low-rank"]}
    small = apply(net.eval(), dataclasses.replace(plan, implants=implants), [(image, None)])
    torch.onnx.export(small, (image,), dynamo=True, verbose=False).save(str(tmp_path / "small.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), small(image).detach(), rtol=1e-4, atol=1e-4)
