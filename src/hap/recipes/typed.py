"""Frozen dataclasses from the mappings of a file: every key and every value checked against the annotations."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from hap.errors import HapError, unknown

T = TypeVar("T")
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def typed(kind: type[T], value: Any, place: str) -> T:
    """The dataclass `kind` from a mapping of its fields; those that are left out have their defaults.

    Fields may be bool, int, float, str, Path, Literal, dataclasses, ``tuple[X, ...]``, mappings from names, and unions
    of these; a None that a field does not take stands for its default.

    Args:
        kind: the dataclass.
        value: what a file says.
        place: where it says so, for errors: ``finetune``, or "" for the whole.

    Raises:
        HapError: an unknown key, a value of another type, or one that the dataclass refuses; with the place.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Oven:
    ...     degrees: float
    ...     fan: bool = False
    >>> typed(Oven, {"degrees": 200}, "oven")
    Oven(degrees=200.0, fan=False)
    >>> typed(Oven, {"degres": 200}, "oven")
    Traceback (most recent call last):
    hap.errors.HapError: unknown key 'degres' of oven
      expected: one of: degrees, fan
      remedy:   did you mean 'degrees'?
    """
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        raise _wrong(place or "the recipe", "keys and values", value)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in value:
        if key not in fields:
            raise _unknown_key(str(key), place, fields)
    hints = typing.get_type_hints(kind)
    given: dict[str, Any] = {}
    for name, field in fields.items():
        inner = f"{place}.{name}".lstrip(".")
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name in value and (value[name] is not None or _takes_none(hints[name])):
            given[name] = _converted(hints[name], value[name], inner)
        elif needed:
            raise HapError(f"{inner} is missing", expected=_words(hints[name]), remedy=f"give it, or --set {inner}=...")
    try:
        return kind(**given)
    except HapError as error:
        raise placed(error, place) from error


def placed(error: HapError, place: str) -> HapError:
    """The error, with the place in front."""
    what = f"{place}: {error.what}" if place else error.what
    return HapError(what, expected=error.expected, got=error.got, remedy=error.remedy)


def _converted(hint: Any, value: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _one_of(arguments, value, place)
    if origin is Literal:
        if value in arguments and type(value) in {type(known) for known in arguments}:
            return value
        raise placed(unknown("value", str(value), map(str, arguments)), place)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _wrong(place, "a list", value)
        return tuple(_converted(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(place, "names and values", value)
        return {str(key): _converted(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return typed(hint, value, place)  # type: ignore[arg-type]
    return _scalar(hint, value, place)


def _one_of(hints: tuple[Any, ...], value: Any, place: str) -> Any:
    """The first that fits. Where there is only one, and None, its own error says what is wrong."""
    if value is None and type(None) in hints:
        return None
    real = [hint for hint in hints if hint is not type(None)]
    for hint in real[:-1]:
        try:
            return _converted(hint, value, place)
        except HapError:
            continue
    try:
        return _converted(real[-1], value, place)
    except HapError as error:
        expected = " or ".join(map(_words, real))
        raise (error if len(real) == 1 else _wrong(place, expected, value)) from error


def _scalar(hint: Any, value: Any, place: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value).expanduser()
    fits = hint is Any or (isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool))
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        raise _wrong(place, _words(hint), value)
    return value


def _takes_none(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _words(hint: Any) -> str:
    """What an annotation takes, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if part is type(None) else _words(part) for part in arguments)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a list, each {_words(arguments[0])}"
    if origin is not None:
        return f"names, each with {_words(arguments[1])}"
    return _WORDS.get(hint, "keys and values")


def _unknown_key(key: str, place: str, known: Mapping[str, Any]) -> HapError:
    error = unknown("key", key, known)
    return HapError(f"{error.what} of {place or 'a recipe'}", expected=error.expected, remedy=error.remedy)


def _wrong(place: str, expected: str, value: Any) -> HapError:
    return HapError(f"{place} has a wrong value", expected=expected, got=repr(value))
