"""The library's errors in the words of the command line: its options, and not Python's names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from hap.errors import HapError

PART = "(params|macs|latency|heads)"

# Patterns and what takes their place, one after the other. Names of single options: see `_named`.
PHRASES = (
    (rf"(?:hap\.)?Budget\({PART}=([^()]*)\)", r"--keep-\1 \2"),
    ("params, macs, latency or heads, as", "--keep-params, --keep-macs, --keep-latency or --keep-heads, as"),
    ("or budget params or macs", "or give --keep-params or --keep-macs"),
    (rf"\bbudget {PART}\b", r"--keep-\1"),
    (rf"\b{PART} kept >= ", r"--keep-\1 >= "),
    (rf"(^|, ){PART} (?=[\d.])", r"\1--keep-\2 "),
    ("allow implants", "allow implants (--implant-ratio, --any-latency)"),
    ("loosen floor, minimum, protect or", "loosen --floor, --min-width, --protect or"),
    ("include inexact families", "give --inexact"),
    (r"\(floor, minimum\) not above the largest \(maximum\)", "(--floor, --min-width) not above --max-width"),
    ("raise maximum, or lower minimum, floor or", "raise --max-width, or lower --min-width, --floor or"),
    (r"\bhap\.trace\(\.\.\., ignore=\[([^\]]*)\]\)", r"--ignore \1"),
    (r"\btrace\(ignore=\)|\bignore=(?= )", "--ignore"),
    (r"hap\.measure\(\.\.\., gram=True\) with ", "--criterion "),
    (r" \((overwrite|restart)=True\)", ""),
    (", or None for all", ""),
    (r"\bStructure\.frozen\b", "`hap inspect --frozen`"),
)
OTHERWISE = {"minimum": "min_width", "maximum": "max_width"}  # options of another name than the library's
BEFORE = r"(?<![\w./'-])"  # not inside a path, nor a name in quotes, which is the user's
NAMES = (
    r"^(\w+)(?= (?:of .* )?is (?:out of range|too small))()",
    rf"{BEFORE}(\w+)=('[^']*'|[\w.]*)",
    rf"{BEFORE}([a-z]+(?:_[a-z]+)+)(?![\w(.:])()",
)


def in_options(error: HapError, verb: Callable[..., Any]) -> HapError:
    """The error as whoever gave the options of `verb` understands it."""
    options = set(inspect.signature(verb).parameters)

    def said(text: str) -> str:
        for pattern, words in PHRASES:
            text = re.sub(pattern, words, text)
        for pattern in NAMES:
            text = re.sub(pattern, lambda found: _named(found, options), text)
        return text

    return HapError(said(error.what), expected=said(error.expected), got=said(error.got), remedy=said(error.remedy))


def _named(found: re.Match[str], options: set[str]) -> str:
    """The option in place of the argument of that name, and its value, if the verb has one."""
    name, value = found[1], found[2].strip("'")
    if OTHERWISE.get(name, name) not in options:
        return found[0]
    if value in ("True", "False"):
        return _option(name if value == "True" else f"no_{name}")
    return f"{_option(name)} {value}".rstrip()


def _option(name: str) -> str:
    return "--" + OTHERWISE.get(name, name).replace("_", "-")
