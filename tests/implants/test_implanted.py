"""An implanted layer is an ordinary module: it exports, compiles, runs in ONNX Runtime, copies, trains."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from hap.implants import Implanted

KINDS = {
    "tail": ([4, 5], 1, "pointwise", None),
    "head": ([0, 1], 1, "pointwise", None),
    "gather": ([0, 3], 1, "pointwise", None),
    "depthwise layer": ([0, 3], 6, "pointwise", None),
    "all": (range(6), 1, "pointwise", None),
    "low-rank": ([4, 5], 1, "low-rank", 2),
    "depthwise": ([4, 5], 1, "depthwise", 1),
    "depthwise, 2 kernels": (range(6), 1, "depthwise", 2),
    "spatial": ([4, 5], 1, "spatial", 2),
    "tucker": (range(6), 1, "tucker", 3),
    "linear": ([4, 5], 0, "low-rank", 2),
}


@pytest.fixture(params=KINDS)
def module(request: pytest.FixtureRequest, implant) -> Implanted:
    rows, groups, form, rank = KINDS[request.param]
    generator = torch.Generator().manual_seed(0)
    layer = (
        nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=groups, padding_mode="reflect") if groups else nn.Linear(6, 6)
    )
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return implant(layer, list(rows), form, rank)


@pytest.fixture
def x(module: Implanted) -> torch.Tensor:
    shape = (2, 6, 8, 8) if module.geometry.kernel else (2, 3, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_exports_without_scatter_and_gathers_only_what_is_out_of_order(module, x) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module.eval(), (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(x[:1]), module(x[:1]))
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not any(name for name in operators if "scatter" in name or "index_put" in name or "copy" in name)
    gathers = sum("index_select" in name for name in operators)
    assert gathers == (module.order is not None) + (module.input_order is not None)


def test_runs_in_onnx_runtime(module, x) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = io.BytesIO()
    torch.onnx.export(module.eval(), (x,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), module(x).detach(), rtol=1e-4, atol=1e-4)


def test_compiles_in_one_graph(module, x) -> None:
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))


def test_deepcopy_and_state_dict(module, x) -> None:
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
        assert not torch.equal(twin(x), module(x))
        twin.load_state_dict(module.state_dict())
        assert torch.equal(twin(x), module(x))


def test_channels_last(module, x) -> None:
    if x.ndim == 3:
        pytest.skip("a linear layer has no memory format")
    want = module(x)
    module.to(memory_format=torch.channels_last)
    got = module(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if module.order is None and module.input_order is None:  # PyTorch's gathers write the other format
        assert got.is_contiguous(memory_format=torch.channels_last)


def test_runs_under_autocast(module, x) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(x)
    assert got.dtype == torch.bfloat16
    want = module(x)
    assert (got.float() - want).norm() < 0.03 * want.norm()


def test_trains_in_data_parallel(module, x, tmp_path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(module)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
        before = [p.detach().clone() for p in module.parameters()]
        parallel(x).square().mean().backward()
        optimizer.step()
        assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    finally:
        torch.distributed.destroy_process_group()


def test_is_called_by_the_keyword_of_the_layer(module, x) -> None:
    assert torch.equal(module(input=x), module(x))


def test_answers_what_forward_passes_ask_a_layer_for(module) -> None:
    layer = module.merged()
    if module.geometry.kernel:
        names = ["kernel_size", "stride", "padding", "dilation", "groups", "in_channels", "out_channels"]
        assert not hasattr(module, "in_features") and not hasattr(module, "out_features")
    else:
        names = ["in_features", "out_features"]
        assert not hasattr(module, "in_channels") and not hasattr(module, "out_channels")
    assert {name: getattr(module, name) for name in names} == {name: getattr(layer, name) for name in names}


def test_no_weight_of_a_part_passes_for_that_of_the_whole(module, x) -> None:
    """Kernels that take weights past the modules must not give numbers that look right."""
    layer = module.merged()
    assert (module.weight.shape, module.bias.shape) == (layer.weight.shape, layer.bias.shape)
    assert (module.weight.dtype, module.weight.device) == (layer.weight.dtype, layer.weight.device)
    assert (x.flatten()[0] * module.weight).isnan().all() and module.bias.isnan().all()
    assert not {"weight", "bias"} & {name for name, _ in module.named_parameters()}


def test_a_layer_without_a_bias_has_none(implant) -> None:
    assert implant(nn.Linear(6, 6, bias=False), [4, 5], "low-rank", 2).bias is None


def test_shows_its_form_and_whether_a_gather_is_left(implant) -> None:
    assert repr(implant(nn.Conv2d(2, 4, 3), [2, 3])).startswith("Implanted(\n  form='pointwise'\n")
    assert "form='pointwise', reordered=True" in repr(implant(nn.Conv2d(2, 4, 3), [1]))
