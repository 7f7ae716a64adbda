"""`verify`: does the smaller model compute what the plan promised?"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hap.attention import has_kernels, opened
from hap.batches import copied, evaluating, tensors
from hap.errors import HapError
from hap.implants import Implanted
from hap.planning import Plan
from hap.surgery.apply import check, targets
from hap.surgery.heads import widened_
from hap.surgery.layout import layout
from hap.types import Verification

_USUAL = 1e-4  # what may lie between two models in ordinary inference, parts of which may be in float32


def verify(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float = 1e-9,
) -> Verification:
    """Compares the small model with the dense one whose pruned units' gates are closed, in float64.

    The gates are closed where units are read: the consumers' weights for them become zero. Filters
    with implants are replaced by the dense filters that compute what the implants do, narrow heads
    by full ones whose rest is zero. It holds right after `apply`, before anything is trained or refitted.

    Where PyTorch has fused kernels for a part of the model, which read sizes and weights past the modules, both models
    run once more as they do in ordinary inference, without gradients, and may differ by 1e-4 there.

    Where units leave that a normalisation mixes (``Family.exact`` is False), closed gates are another function than
    units that have gone, and nothing says what the small model should compute. Then it passes if it runs, gives outputs
    of the dense model's shapes, finite wherever those are, and has the promised number of parameters.

    Args:
        model: the dense model.
        small: what `apply` made of it.
        plan: the plan in between.
        args, kwargs: inputs; on the models' device.
        tolerance: largest relative error that passes.

    Raises:
        HapError: `model` is not the dense model of the plan, or the small model does not run, or lacks implants of
            the plan.
    """
    check(model, plan)
    args, kwargs = _double((args, dict(kwargs or {})))
    reference = _gated(model, small, plan)
    remedy = "pass inputs that the model was made for; its forward pass must not fix a dtype"
    want = _looked_into("the dense model does not run in float64", reference, args, kwargs, remedy)
    usual = _usual(reference, small, args, kwargs) if has_kernels(model) else None
    del reference
    pruned = copied(small).to(torch.float64)
    remedy = "a size is probably written as a number in its forward pass; name that module in trace(ignore=)"
    have = _looked_into("the pruned model does not run", pruned, args, kwargs, remedy)
    exact = all(family.exact or not plan.decisions[family.name].prune for family in plan.structure.families)
    error_found = _relative_error(want, have)
    passes = error_found <= tolerance if exact else _sound(want, have)
    if usual is not None:
        have = _outputs("the pruned model does not run in ordinary inference", pruned, args, kwargs, remedy)
        apart = _relative_error(usual, have)
        if not (apart <= max(tolerance, _USUAL) if exact else _sound(usual, have)):
            passes, error_found = False, max(error_found, apart)
    params = sum(p.numel() for p in small.parameters())
    return Verification(
        ok=passes and params == plan.small.params,
        max_relative_error=error_found,
        params=params,
        promised_params=plan.small.params,
        exact=exact,
    )


class _Wide(TorchFunctionMode):
    """Computes in float64 what a forward pass casts to float32, as norms and softmax do.

    In float32 the mere order of summation, which implants change, would look like an error.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args, kwargs = pytree.tree_map_only(torch.dtype, _wide, (args, kwargs or {}))
        return func(*args, **kwargs)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float32 else dtype


def _looked_into(failure: str, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], remedy: str) -> Any:
    """The outputs, without fused kernels and in float64 throughout."""
    with opened(model), _Wide():
        return _outputs(failure, model, args, kwargs, remedy)


def _usual(reference: nn.Module, small: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The outputs in ordinary inference, of nested tensors only where `small` has them: they show zeros for padding.

    None where a cast to float32 is in the way.
    """
    modules = dict(reference.named_modules())
    for name, module in small.named_modules():
        twin = modules.get(name)
        if isinstance(module, nn.TransformerEncoder) and isinstance(twin, nn.TransformerEncoder):
            twin.use_nested_tensor = module.use_nested_tensor
    try:
        return _outputs("", reference, args, kwargs, "")
    except HapError:
        return None


def _outputs(failure: str, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], remedy: str) -> Any:
    try:
        with evaluating(model), torch.no_grad():
            return model(*args, **kwargs)
    except Exception as error:  # users' code raises any type: an assertion on a shape, a missing attribute
        raise HapError(
            f"{failure}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            expected="a forward pass on the inputs of the dense model",
            remedy=remedy,
        ) from error


def _double(tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, tree)


def _gated(model: nn.Module, small: nn.Module, plan: Plan) -> nn.Module:
    """The dense model in float64 with closed gates, and implants in place of the filters they replace."""
    reference = copied(model).to(torch.float64)
    parameters, modules, places = dict(reference.named_parameters()), dict(small.named_modules()), layout(plan)
    widened_(reference, small, plan, places)
    with torch.no_grad():
        for name, target in targets(plan, places).items():
            implanted, layer = modules.get(name), plan.structure.layer(name)
            if not isinstance(implanted, Implanted):
                raise HapError(
                    f"{name!r} has no implant",
                    expected="the model that hap.apply made of this plan",
                    got=type(implanted).__name__,
                    remedy="a merged model is no longer the plan's: verify it before hap.merge",
                )
            weight, bias = copy.deepcopy(implanted).to(torch.float64).equivalent()
            dense = parameters[layer.weight]
            rows, columns = (torch.tensor(found, device=dense.device) for found in (target.rows, target.columns))
            dense[rows] = torch.zeros_like(dense[rows]).index_copy_(1, columns, weight)
            if bias is not None and layer.bias is not None:
                parameters[layer.bias][rows] = bias
        for family in plan.structure.families:
            for member in family.roles("consumer"):
                lost = [i for u in plan.decisions[family.name].prune for i in member.indices[u]]
                weight = parameters[member.parameter]
                weight.index_fill_(member.axis, torch.tensor(lost, dtype=torch.long, device=weight.device), 0.0)
    return reference


def _relative_error(want: Any, have: Any) -> float:
    """max |have - want| / max |want| over all tensors of the outputs; infinite where there is none to compare.

    What is infinite in both alike, as the logits of masked classes are, does not differ, and is no scale.
    """
    left, right = tensors(want), tensors(have)
    if not left or len(left) != len(right) or any(a.shape != b.shape for a, b in zip(left, right, strict=False)):
        return float("inf")
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        a, b = a.double(), b.double()
        scale = float(torch.where(a.isfinite(), a, 0.0).abs().max()) if a.numel() else 0.0
        difference = float(torch.where(a == b, 0.0, (a - b).abs()).max()) if a.numel() else 0.0
        ratio = difference / scale if scale else difference
        worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst


def _sound(want: Any, have: Any) -> bool:
    """Whether both have the same shapes, and `have` is finite wherever `want` is."""
    left, right = tensors(want), tensors(have)
    return (
        bool(left)
        and [a.shape for a in left] == [b.shape for b in right]
        and all(bool((b.isfinite() | ~a.isfinite()).all()) for a, b in zip(left, right, strict=True))
    )
