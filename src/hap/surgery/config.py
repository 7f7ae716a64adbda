"""Numbers of heads that a configuration repeats for all layers (Hugging Face models have one)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hap.planning import Plan
from hap.surgery.carriers import stored
from hap.types import Family

_NAMES = (
    "num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "n_heads",
    "encoder_attention_heads", "decoder_attention_heads",
)  # fmt: skip


def counts(model: nn.Module, plan: Plan, *, dense: bool = False) -> list[tuple[Any, str, int]]:
    """Each configuration, with the name and the value of a number of heads that must follow the plan.

    Where the layers of one configuration keep different numbers of heads, or one of them has heads that must stay,
    no number is right for all, and theirs stays as it is: the dense one, or that of the round before.

    Args:
        model: dense; or pruned, if `dense` values are asked for.
        plan: what is done to its heads.
        dense: the values before.
    """
    families: dict[int, list[Family]] = defaultdict(list)
    configs: dict[int, Any] = {}
    for family in plan.structure.families:
        config = _config(model, _home(plan, family)) if family.kind == "head" else None
        if config is not None:
            configs[id(config)] = config
            families[id(config)].append(family)
    found, decisions = [], stored(plan)
    for key, config in configs.items():
        left = {len(decisions[family.name].keep) for family in families[key]}
        sizes = {family.size for family in families[key]}
        if len(sizes) == 1 and (dense or len(left) == 1) and not _others(model, plan, config, families[key]):
            (units,) = sizes if dense else left
            values = {name: value for name in _NAMES if isinstance(value := getattr(config, name, None), int)}
            keys = values.get("num_key_value_heads")  # each stands for a group of query heads, and is one unit
            group = values.get("num_attention_heads", keys) // keys if keys else 1
            found += [(config, name, units * (1 if value == keys else group)) for name, value in values.items()]
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


def _others(model: nn.Module, plan: Plan, config: Any, families: list[Family]) -> bool:
    """Whether there are attentions of the same types under this configuration whose heads are in no family."""
    homes = {_home(plan, family) for family in families}
    types = {type(model.get_submodule(home)) for home in homes}
    return any(
        type(module) in types and name not in homes and _config(model, name) is config
        for name, module in model.named_modules()
    )


def _home(plan: Plan, family: Family) -> str:
    """The module around the layer, or the parameter, that produces the heads."""
    owner = family.roles("producer")[0].parameter.rpartition(".")[0]
    return owner.rpartition(".")[0] if owner in {layer.module for layer in plan.structure.layers} else owner


def _config(model: nn.Module, path: str) -> Any:
    """The configuration of a module, or of the nearest one around it that has one."""
    while True:
        config = getattr(model.get_submodule(path), "config", None)
        if config is not None or not path:
            return config
        path = path.rpartition(".")[0]
