"""`verify`: does the smaller model compute what the plan promised?"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hap.attention import opened
from hap.batches import copied, evaluating, tensors
from hap.errors import HapError
from hap.implants import Implanted
from hap.planning import Plan
from hap.surgery.apply import check, targets
from hap.surgery.heads import widened_
from hap.surgery.layout import layout
from hap.types import Verification


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

    Args:
        model: the dense model.
        small: what `apply` made of it.
        plan: the plan in between.
        args, kwargs: inputs; on the models' device.
        tolerance: largest relative error that passes.

    Raises:
        HapError: `model` is not the dense model of the plan, or the small model does not run.
    """
    check(model, plan)
    args, kwargs = _double((args, dict(kwargs or {})))
    reference = _gated(model, small, plan)
    want = _outputs(
        "the dense model does not run in float64",
        reference,
        args,
        kwargs,
        "pass inputs that the model was made for; its forward pass must not fix a dtype",
    )
    del reference
    have = _outputs(
        "the pruned model does not run",
        copied(small).to(torch.float64),
        args,
        kwargs,
        "a size is probably written as a number in its forward pass; name that module in trace(ignore=)",
    )
    error_found = _relative_error(want, have)
    params = sum(p.numel() for p in small.parameters())
    return Verification(
        ok=error_found <= tolerance and params == plan.small.params,
        max_relative_error=error_found,
        params=params,
        promised_params=plan.small.params,
    )


def _outputs(failure: str, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], remedy: str) -> Any:
    try:
        with evaluating(model), opened(model), torch.no_grad():
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
    parameters, places = dict(reference.named_parameters()), layout(plan)
    widened_(reference, small, plan, places)
    with torch.no_grad():
        for name, target in targets(plan, places).items():
            implanted, layer = small.get_submodule(name), plan.structure.layer(name)
            assert isinstance(implanted, Implanted)
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
    """max |have - want| / max |want| over all tensors of the outputs; infinite where there is none to compare."""
    left, right = tensors(want), tensors(have)
    if not left or len(left) != len(right) or any(a.shape != b.shape for a, b in zip(left, right, strict=False)):
        return float("inf")
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        scale = float(a.double().abs().max()) if a.numel() else 0.0
        difference = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        ratio = difference / scale if scale else difference
        worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst
