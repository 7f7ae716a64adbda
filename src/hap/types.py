"""The frozen records that pass between the layers.

A *unit* is what can leave a network as a whole: a convolution channel, an MLP neuron, an attention
head. Units whose slices lie on the same axes of the same tensors form a *family*. Data flows
``model -> Structure -> Sensitivity -> Plan -> smaller model``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import nn

from hap.errors import HapError

Role = Literal["producer", "follower", "consumer"]
Kind = Literal["channel", "neuron", "head"]

T = TypeVar("T")

Metric = Callable[[torch.Tensor, torch.Tensor], float]  # of labels and predictions, int64 (N,) on the CPU

Log = Callable[[Mapping[str, float], int], Any]  # takes numbers by name, and the step; `Accelerator.log` is one

IGNORED = "ignored by the caller"  # the reason of a `Frozen` axis of a module that is to be left alone


class Progress(Protocol):
    """Wraps an iterable to show how far it is; the library's default shows nothing."""

    def __call__(self, items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]: ...


def silent(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """The default `Progress`: passes the items through."""
    return items


@dataclass(frozen=True)
class Member:
    """One axis of one parameter or buffer that carries a family's units.

    Attributes:
        parameter: name of the tensor, as in ``model.state_dict()``.
        axis: the axis that shrinks when a unit leaves.
        indices: for each unit, its positions along that axis.
        role: ``producer`` (its rows compute the unit), ``follower`` (scales or shifts it),
            ``consumer`` (reads it). The unit's gate stands before the consumers.
    """

    parameter: str
    axis: int
    indices: tuple[tuple[int, ...], ...]
    role: Role


@dataclass(frozen=True)
class Family:
    """Units that share their axes; each can leave on its own.

    Attributes:
        name: the first producer's module, unique in a `Structure`.
        kind: ``channel``, ``neuron`` or ``head``.
        size: the number of units.
        exact: removing a unit equals closing its gate. False where a normalisation mixes units.
        members: every axis that carries the units.
    """

    name: str
    kind: Kind
    size: int
    exact: bool
    members: tuple[Member, ...]

    def roles(self, role: Role) -> tuple[Member, ...]:
        """The members that play `role`."""
        return tuple(m for m in self.members if m.role == role)


@dataclass(frozen=True)
class Frozen:
    """Positions along an axis that cannot be pruned, and why."""

    parameter: str
    axis: int
    indices: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer: a weight whose rows (filters) multiply what it reads.

    Attributes:
        module: the module's name.
        weight: the weight's name.
        bias: the bias's name, if it has one.
        filters: number of output channels or features.
        output_axis: the weight's axis that holds the filters.
        kernel: kernel size; empty for a linear layer.
        groups: number of convolution groups.
        transposed: a transposed convolution.
        positions: how often each weight element is multiplied for one sample, so that the layer
            costs ``positions * weight.numel()`` multiply-accumulates (MACs) whatever its width;
            0 for a layer of auxiliary parts that only training mode calls.
    """

    module: str
    weight: str
    bias: str | None
    filters: int
    output_axis: int
    kernel: tuple[int, ...]
    groups: int
    transposed: bool
    positions: int


@dataclass(frozen=True)
class Attribute:
    """A number on a module, such as ``num_heads``, that grows and shrinks with an axis of a tensor.

    Attributes:
        module: the module's name.
        name: the attribute's name.
        tensor, axis: the axis whose length it is in proportion to.
    """

    module: str
    name: str
    tensor: str
    axis: int


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a parameter or buffer of the dense model."""

    shape: tuple[int, ...]
    dtype: str
    is_parameter: bool


def describe(model: nn.Module) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """The tensors (tied ones once, under their first name) and the module types of a model."""
    parameters = {name: (p, True) for name, p in model.named_parameters()}
    buffers = {name: (b, False) for name, b in model.named_buffers()}
    tensors = {
        name: TensorSpec(tuple(t.shape), str(t.dtype).removeprefix("torch."), is_parameter)
        for name, (t, is_parameter) in {**parameters, **buffers}.items()
    }
    return tensors, {name: type(module).__name__ for name, module in model.named_modules()}


@dataclass(frozen=True)
class Structure:
    """What can leave a model, what cannot and why, and what each layer costs.

    Attributes:
        families: the prunable families, in the order of the forward pass.
        frozen: every axis (or part of one) that cannot be pruned, with its reason.
        layers: the convolution and linear layers, in the order of the forward pass.
        tensors: every parameter and buffer; tied ones once.
        modules: class name of every module.
        attributes: numbers on modules that must follow when units leave, besides those that ``torch.nn``'s own
            modules have.
    """

    families: tuple[Family, ...]
    frozen: tuple[Frozen, ...]
    layers: tuple[Layer, ...]
    tensors: Mapping[str, TensorSpec]
    modules: Mapping[str, str]
    attributes: tuple[Attribute, ...] = ()

    def __repr__(self) -> str:
        units = sum(family.size for family in self.families)
        counts = f"{len(self.layers):,} layers, {len(self.frozen):,} frozen axes"
        return f"Structure({units:,} units in {len(self.families):,} families, {counts})"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the dense model's tensor names, shapes and dtypes and its module types."""
        tensors = {name: [list(s.shape), s.dtype] for name, s in self.tensors.items()}
        text = json.dumps([tensors, dict(self.modules)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def family(self, name: str) -> Family:
        """The family called `name`."""
        for family in self.families:
            if family.name == name:
                return family
        raise KeyError(name)

    @cached_property
    def by_module(self) -> dict[str, Layer]:
        """The layer of each module; of one that holds several weights the first."""
        found: dict[str, Layer] = {}
        for layer in self.layers:
            found.setdefault(layer.module, layer)
        return found

    def layer(self, module: str) -> Layer:
        """The layer of the module called `module`."""
        return self.by_module[module]


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The estimated rise of the loss when a unit, or a layer's filter, is removed.

    Only the order of the values need mean something; the second-order criteria give nats.

    Attributes:
        criterion: name of the criterion.
        samples: calibration examples used; 0 for criteria that need no data.
        draws: random draws per example or batch (Hutchinson probes, sampled labels); 0 if none.
        scores: for each family, float64 of shape ``(size,)``.
        stderr: standard errors of `scores`, same shapes; zeros where the score is exact.
        filters: for each layer (by module name), float64 of shape ``(filters,)``: the sensitivity
            to that filter alone, whatever else writes to its channel.
        filters_stderr: standard errors of `filters`.
        gram: the second derivatives of the loss by all pairs of gates, float64 of shape ``(units, units)``, with the
            units in the order of ``structure.families``, one family after the other; None unless asked for. Closing
            the gates of a set of units together raises the loss by half the sum over all pairs in it.
        skipped: families without scores, because the criterion cannot follow what reads them, each with the reason;
            they stay. Zeros stand for them in `gram`.
    """

    criterion: str
    samples: int
    draws: int
    scores: Mapping[str, torch.Tensor]
    stderr: Mapping[str, torch.Tensor]
    filters: Mapping[str, torch.Tensor] = field(default_factory=dict)
    filters_stderr: Mapping[str, torch.Tensor] = field(default_factory=dict)
    gram: torch.Tensor | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        units = f"{sum(map(len, self.scores.values())):,} units in {len(self.scores):,} families"
        data = f"{self.samples:,} samples" if self.samples else "no data"
        return f"Sensitivity({self.criterion} of {units}, {data}{'' if self.gram is None else ', with pairs'})"


@dataclass(frozen=True)
class Cost:
    """Size of a model: parameters, and multiply-accumulates for one sample.

    Attributes:
        params: exact.
        macs: of the convolution and linear layers, exact; products of attention and recurrent layers do not count.
        latency: milliseconds of a forward pass, by a table measured on the user's device; None without one.
        heads: of the parameters, the weights of attention heads that can be pruned (W_Q, W_K, W_V, W_O; no biases).
    """

    params: int
    macs: int
    latency: float | None = None
    heads: int = 0


@dataclass(frozen=True)
class Budget:
    """The fraction of the dense model that may remain, each in (0, 1]; None leaves it free.

    `latency` may be over 1, as implants save parameters and not always time: 1.2 lets the model take a fifth longer
    than the dense one. `heads` counts the parameters of attention heads, which is their number where all are alike; an
    implanted head counts for what is left of it.

    >>> Budget(params=0.5)
    Budget(params=0.5, macs=None, latency=None, heads=None)
    """

    params: float | None = None
    macs: float | None = None
    latency: float | None = None
    heads: float | None = None

    def __post_init__(self) -> None:
        for name in ("params", "macs", "latency", "heads"):
            value, most = getattr(self, name), math.inf if name == "latency" else 1.0
            if value is not None and not (0 < value <= most and math.isfinite(value)):
                raise HapError(
                    f"budget {name} is out of range",
                    expected="a fraction of the dense model " + ("over 0" if most > 1 else "in (0, 1]"),
                    got=repr(value),
                    remedy="0.5 keeps one half",
                )
        if not self.limits:
            raise HapError(
                "the budget is empty",
                expected="params, macs, latency or heads, as the fraction that may remain",
                remedy="for example hap.Budget(params=0.5)",
            )

    @property
    def limits(self) -> dict[str, float]:
        """The parts that are limited, with their fractions."""
        parts = {"params": self.params, "macs": self.macs, "heads": self.heads, "latency": self.latency}
        return {name: value for name, value in parts.items() if value is not None}


@dataclass(frozen=True)
class Verification:
    """Whether a pruned model computes what the plan promised.

    Attributes:
        ok: the error is below the tolerance and the parameter count is the promised one.
        max_relative_error: max |small - gated dense| / max |gated dense| over all outputs, float64.
        params: parameters of the small model.
        promised_params: parameters that the plan promised.
        exact: every unit that left equals a closed gate. False where a normalisation mixes units that left with others
            (``inexact=True``): the error is then no flaw and not held to the tolerance, nothing says what the outputs
            should be, and `ok` says only that the small model runs, gives finite outputs of the right shapes, and has
            the promised parameters.
    """

    ok: bool
    max_relative_error: float
    params: int
    promised_params: int
    exact: bool = True


@dataclass(frozen=True)
class Evaluation:
    """What a model does on a data set.

    Attributes:
        loss: the mean over the examples.
        accuracy: None where outputs are not class logits.
        samples: the number of examples.
        metrics: what else was asked for, by name, such as ``f1``.
    """

    loss: float
    accuracy: float | None
    samples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
