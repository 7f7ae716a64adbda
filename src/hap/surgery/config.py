"""Numbers of heads that a configuration repeats for all layers (Hugging Face models have one)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hap.planning import Plan

_NAMES = (
    "num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "n_heads",
    "encoder_attention_heads", "decoder_attention_heads",
)  # fmt: skip


def counts(model: nn.Module, plan: Plan, *, dense: bool = False) -> list[tuple[Any, str, int]]:
    """Each configuration, with the name and the value of a number of heads that must follow the plan.

    Where the layers of one configuration keep different shares of their heads, no number is right for
    all, and theirs stays as it is.

    Args:
        model: dense; or pruned, if `dense` values are asked for.
        plan: what is done to its heads.
        dense: the values before.
    """
    shares: dict[int, set[tuple[int, int]]] = defaultdict(set)
    configs: dict[int, Any] = {}
    for family in plan.structure.families:
        config = _config(model, family.roles("producer")[0].parameter) if family.kind == "head" else None
        if config is not None:
            configs[id(config)] = config
            shares[id(config)].add((len(plan.decisions[family.name].keep), family.size))
    found = []
    for key, config in configs.items():
        if len({kept / size for kept, size in shares[key]}) == 1:
            new, old = next(iter(shares[key]))[:: -1 if dense else 1]
            values = {name: getattr(config, name, None) for name in _NAMES}
            found += [(config, name, v * new // old) for name, v in values.items() if isinstance(v, int)]
    return found


@contextmanager
def dense_config(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Gives the pruned model's configuration the dense numbers for a while, to write it down."""
    values = counts(model, plan, dense=True)
    small = [(config, name, getattr(config, name)) for config, name, _ in values]
    try:
        for config, name, value in values:
            setattr(config, name, value)
        yield
    finally:
        for config, name, value in small:
            setattr(config, name, value)


def _config(model: nn.Module, parameter: str) -> Any:
    """The configuration of the nearest module around a parameter that has one."""
    path = parameter.rpartition(".")[0]
    while True:
        config = getattr(model.get_submodule(path), "config", None)
        if config is not None or not path:
            return config
        path = path.rpartition(".")[0]
