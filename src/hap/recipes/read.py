"""Recipes from YAML files, with values set on the command line."""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from hap.errors import HapError
from hap.pipeline.training import usual_of_texts
from hap.recipes.recipe import Recipe
from hap.recipes.scale import scaled
from hap.recipes.typed import placed, typed
from hap.zoo import TASKS


class _Loader(yaml.SafeLoader):
    """YAML as its version 1.2 reads it: ``no`` is a text, ``1e-3`` a number; and no key twice."""


_Loader.yaml_implicit_resolvers = {}  # the core schema's follow: YAML 1.1 takes 1:30 for a number, and knows dates
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|false|True|False)$"), list("tfTF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile("^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in node.value:
        name = loader.construct_object(key, deep=True)
        if not isinstance(name, Hashable):
            raise yaml.constructor.ConstructorError(None, None, f"{name!r} cannot be a key", key.start_mark)
        if name in found:
            raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is there twice", key.start_mark)
        found[name] = loader.construct_object(value, deep=True)
    return found


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(node.value)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole)


def read(path: str | Path, settings: Iterable[str] = (), *, limit: int | None = None) -> Recipe:
    """The recipe in a file.

    Args:
        path: a YAML file with the fields of `Recipe`.
        settings: ``section.key=value``, the value in YAML; they take the place of what the file says.
        limit: scale the file's recipe down, see `hap.recipes.scale`; `settings` still win.

    Raises:
        HapError: the file cannot be read, or a key or a value is wrong; it names the place and the nearest right name.
    """
    raw = _loaded(Path(path))
    try:
        if limit is not None:
            raw = _with(raw, scaled(_recipe(_with(raw, _settings(settings))), limit))
        return _recipe(_with(raw, _settings(settings)))
    except HapError as error:
        raise placed(error, str(path)) from error


def _recipe(raw: dict[str, Any]) -> Recipe:
    """Texts are trained on as usual for texts, but for what is said."""
    data, dense = (raw.get(name) for name in ("data", "dense"))
    if isinstance(data, Mapping) and data.get("name") in TASKS:
        places = {"finetune": raw.get("finetune") or {}}
        if isinstance(dense, Mapping):
            places["dense.train"] = dense.get("train")
        for place, given in places.items():
            if isinstance(given, Mapping):  # what is none, its check refuses
                said = {name: value for name, value in given.items() if value is not None}  # null is for what is usual
                raw = _with(raw, {place: {**given, **usual_of_texts(said.get("optimizer")), **said}})
    return typed(Recipe, raw, "")


def _loaded(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise HapError(
            f"the recipe {path} cannot be read",
            expected="a YAML file; those that come with hap are in configs/",
            got=" ".join(str(error).split()),
        ) from error
    if not isinstance(raw, dict):
        raise HapError(f"{path} is no recipe", expected="keys and values", got=type(raw).__name__)
    return raw


def _settings(settings: Iterable[str]) -> dict[str, Any]:
    """The values by dotted key."""
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not all(key.split(".")):
            raise HapError("this sets nothing", expected="section.key=value", got=setting)
        try:
            found[key] = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise HapError(
                f"the value of {key} cannot be read", expected="YAML, such as 0.5, null or [a, b]", got=text
            ) from error
    return found


def _with(raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with the values at dotted keys; what is missing on the way is made."""
    made: dict[str, Any] = copy.deepcopy(dict(raw))
    for key, value in values.items():
        *way, last = key.split(".")
        inner = made
        for name in way:
            if not isinstance(inner.get(name), dict):
                inner[name] = {}
            inner = inner[name]
        inner[last] = value
    return made
