"""What a result is held against: published numbers, and how far from them it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from hap.errors import unknown

Aim = Literal["accuracy", "lost", "gain", "kept_params", "kept_macs", "kept_heads"]

_WORDS: dict[Aim, str] = {
    "accuracy": "accuracy",
    "lost": "accuracy lost",
    "gain": "ahead of the rival",
    "kept_params": "parameters kept",
    "kept_macs": "MACs kept",
    "kept_heads": "heads kept",
}
_AT_LEAST: tuple[Aim, ...] = ("accuracy", "gain")
_SLACK = 1e-9  # 0.944 - 0.943 is a little more than 0.001 in floating point


@dataclass(frozen=True)
class Target:
    """A number that a result should reach.

    Attributes:
        of: ``accuracy`` of the small model and its ``gain`` over a rival's, which should be so much at least;
            accuracy ``lost`` by pruning, and fractions of the dense model that are ``kept``, at most.
        value: a fraction: 0.943 is 94.3 %.
        source: where it is published.

    Raises:
        HapError: there is no such quantity.
    """

    of: Aim
    value: float
    source: str

    def __post_init__(self) -> None:
        if self.of not in get_args(Aim):
            raise unknown("target", self.of, get_args(Aim))


@dataclass(frozen=True)
class Reached:
    """A target and what came out.

    Attributes:
        target: the target.
        value: what was reached, a fraction; None where it was not measured.
    """

    target: Target
    value: float | None

    @property
    def difference(self) -> float | None:
        """What was reached less the target."""
        return None if self.value is None else self.value - self.target.value

    @property
    def met(self) -> bool | None:
        """Whether it is as good as the target, or better."""
        if self.difference is None:
            return None
        return self.difference >= -_SLACK if self.target.of in _AT_LEAST else self.difference <= _SLACK

    def cells(self) -> tuple[str, str, str, str, str]:
        """What it is, target, reached and difference as text, and the source.

        >>> Reached(Target("lost", 0.005, "table 1"), 0.0061).cells()
        ('accuracy lost', '<= 0.50 %', '0.61 %', '+0.11 points', 'table 1')
        """
        sign = ">=" if self.target.of in _AT_LEAST else "<="
        found = ("not measured", "") if self.value is None else (f"{100 * self.value:.2f} %", self._points())
        return _WORDS[self.target.of], f"{sign} {100 * self.target.value:.2f} %", *found, self.target.source

    def _points(self) -> str:
        return f"{round(100 * (self.difference or 0.0), 2) + 0.0:+.2f} points"  # + 0.0 turns -0.0 into 0.0


def reached(
    targets: Sequence[Target],
    accuracy: tuple[float | None, float | None],
    kept: Mapping[str, float],
    *,
    rival: float | None = None,
) -> tuple[Reached, ...]:
    """How far a result is from its targets.

    Args:
        targets: what it is held against.
        accuracy: of the dense and the small model, on the test set.
        kept: ``params``, ``macs`` and ``heads``: fractions of the dense model that are left.
        rival: the accuracy of another small model, for ``gain``.

    >>> targets = [Target("accuracy", 0.9, "table 1"), Target("kept_params", 0.3, "table 1")]
    >>> [found.met for found in reached(targets, (0.93, 0.91), {"params": 0.4})]
    [True, False]
    """
    dense, small = accuracy
    found: dict[Aim, float | None] = {
        "accuracy": small,
        "lost": None if dense is None or small is None else dense - small,
        "gain": None if rival is None or small is None else small - rival,
        "kept_params": kept.get("params"),
        "kept_macs": kept.get("macs"),
        "kept_heads": kept.get("heads"),
    }
    return tuple(Reached(target, found[target.of]) for target in targets)
