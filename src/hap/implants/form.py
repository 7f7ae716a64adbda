"""What an implant form is, and the list of those that are known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import ClassVar, TypeVar

import torch
from torch import nn

from hap.errors import HapError, unknown
from hap.implants.geometry import Geometry
from hap.implants.moments import Moments
from hap.types import Layer

Factors = tuple[torch.Tensor, ...]
Shapes = tuple[tuple[int, ...], ...]


class Form(ABC):
    """One way to replace filters of a layer by something smaller.

    A form is a chain of small convolutions (or linear layers) that has a dense equivalent: weights of the shape of
    the filters that it replaces. All that a form says follows from its *factors*, the weights of the chain.

    Attributes:
        name: what `Plan.implants` calls it.
        ranked: whether it has a rank, 1 or more.
        centre: whether it reads nothing but the centre taps; its fit then needs no other moments.

    `register` makes a form known by its name.
    """

    name: ClassVar[str]
    ranked: ClassVar[bool] = False
    centre: ClassVar[bool] = False

    @abstractmethod
    def applies(self, layer: Layer) -> bool:
        """Whether filters of `layer` can have this form."""

    def suits(self, geometry: Geometry) -> bool:
        """Whether each of its weights is multiplied once for each output position, so that MACs can be counted so."""
        return True

    def offered(self, geometry: Geometry) -> bool:
        """Whether `options` looks at it where it is not asked for by name."""
        return True

    def ranks(self, layer: Layer, rows: int, columns: int) -> tuple[int | None, ...]:
        """The ranks worth a try for `rows` filters that read `columns` inputs each; ``(None,)`` without ranks."""
        return (None,)

    @abstractmethod
    def shapes(self, layer: Layer, rows: int, columns: int, rank: int | None) -> Shapes:
        """The shapes of the factors that replace `rows` filters.

        Args:
            layer: the layer.
            rows: how many of its filters are replaced.
            columns: how many inputs each filter reads, those of its group.
            rank: of forms that have one.
        """

    def weights(self, layer: Layer, rows: int, columns: int, rank: int | None) -> int:
        """The exact number of weights, biases not counted, that replace `rows` filters; see `shapes`."""
        return sum(map(prod, self.shapes(layer, rows, columns, rank)))

    @abstractmethod
    def fit(self, moments: Moments, geometry: Geometry, rank: int | None) -> Factors:
        """The factors whose outputs are closest, in the mean square, to those of the filters.

        The moments are float64; of the centre taps only where the form reads nothing else.
        """

    @abstractmethod
    def build(self, factors: Factors, bias: torch.Tensor | None, geometry: Geometry, rank: int | None) -> nn.Module:
        """The chain: reads what the layer reads, gives the replaced filters' outputs."""

    @abstractmethod
    def dense(self, factors: Factors, geometry: Geometry, rank: int | None) -> torch.Tensor:
        """The weights ``(rows, columns, *kernel)`` of the layer that computes the same in one step."""


FORMS: dict[str, Form] = {}

F = TypeVar("F", bound=type[Form])


def register(form: F) -> F:
    """Class decorator: makes a form known by its name.

    Raises:
        HapError: another form has this name.
    """
    if form.name in FORMS:
        raise HapError(
            f"there is an implant form {form.name!r} already",
            expected="a name of its own for each form",
            got=f"{type(FORMS[form.name]).__qualname__} and {form.__qualname__}",
            remedy="choose another name",
        )
    FORMS[form.name] = form()
    return form


def form_of(name: str) -> Form:
    """The form called `name`.

    Raises:
        HapError: there is none.
    """
    if name not in FORMS:
        raise unknown("implant form", name, FORMS)
    return FORMS[name]
