"""Gates: the derivative of a scalar by a factor 1 on each unit and each filter, for every sample.

A unit's gate multiplies what its consumers read, a filter's gate what its layer puts out. With
a_p = 1 the gates need not be built: the derivative of a sum over samples is, for each sample,

    d / d a_p = sum over positions of x_p * (d / d x_p)

which hooks gather while one ordinary backward pass runs. Evaluation mode keeps samples independent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hap import batches
from hap.curvature.layout import Layout
from hap.curvature.rows import Rows
from hap.curvature.taps import Lost, Tap, input_taps, not_followed, output_taps
from hap.errors import HapError
from hap.types import Structure


class Gates:
    """The gates of a model, while `gated` has them in place.

    Attributes:
        layout: order of the gates.
        autocast: the dtype that the forward pass casts to where `torch.autocast` finds it safe; None for no casts.
        rows: see `Survey`; what is not in it has its samples on the first axis.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        autocast: torch.dtype | None = None,
        rows: Mapping[tuple[str, str], Rows | None] | None = None,
    ) -> None:
        self.model = model
        self.autocast = autocast
        self.rows = rows or {}
        self.layout = Layout.of(structure)
        self.inputs, lost = input_taps(model, structure, self.layout)
        if lost:
            raise not_followed(lost)
        self.outputs = output_taps(model, structure, self.layout)
        self._samples = 0
        self._closed = False
        self._totals = torch.empty(0)
        self._leaves: list[torch.Tensor] = []
        self._held: list[tuple[Tap, torch.Tensor, int]] = []

    def forward(self, batch: batches.Batch) -> Any:
        """The model's outputs, with a graph that `gradients` can go back through.

        Raises:
            HapError: a consumer reads something that its samples cannot be told apart in.
        """
        outputs = self._run(batch)
        overwritten = [tap for tap, values, version in self._held if values._version != version]
        self._held = []
        if overwritten:  # by an in-place operation: known for good after the first batch
            for tap in overwritten:
                tap.copied = True
            del outputs  # two graphs at once would not fit into `measure`'s max_memory
            return self.forward(batch)
        return outputs

    def outputs_of(self, batch: batches.Batch) -> Any:
        """The model's outputs alone; the graph of the last `forward` stays as it is."""
        self._closed = True
        try:
            with torch.no_grad():
                return self._forward(batch)
        finally:
            self._closed = False

    def saved_bytes(self, batch: batches.Batch) -> int:
        """What `forward` keeps for `gradients`, in bytes, the model's own tensors aside.

        Counts every storage once: what autograd saves, and the values that the gates multiply.
        """
        self.forward(batch)  # from here on it is known which values must be copied
        kept: dict[int, int] = {}

        saved: list[torch.Tensor] = []  # alive until counted, so that no storage gets another's address

        def save(tensor: torch.Tensor) -> torch.Tensor:
            saved.append(tensor.detach())  # the tensor itself would hold the graph that holds it
            return saved[-1]

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            self._run(batch)
        for tensor in (*saved, *(values for _, values, _ in self._held)):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        self._held = []
        return sum(kept.values())

    def precision(self) -> contextlib.AbstractContextManager[None]:
        """The autocast context of the forward pass, for a loss that belongs to it."""
        device = batches.device_of(self.model).type
        return torch.autocast(device, self.autocast) if self.autocast else contextlib.nullcontext()

    def _run(self, batch: batches.Batch) -> Any:
        self._samples = batches.size(batch)
        self._leaves, self._held = [], []
        return self._forward(batch)

    def _forward(self, batch: batches.Batch) -> Any:
        with self.precision():
            return batches.forward(self.model, pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, batch))

    def gradients(self, total: torch.Tensor, *, keep: bool) -> torch.Tensor:
        """The derivative of `total`, a sum over samples, by each sample's gates: (samples, gates).

        Args:
            total: a scalar computed from the outputs of `forward`.
            keep: keep the graph for another call.
        """
        if not total.requires_grad:
            raise HapError(
                "the outputs do not depend on any unit or filter",
                expected="a model that is differentiable from its layers to its outputs",
                remedy="look for torch.no_grad or .detach() in the model",
            )
        wide = torch.promote_types(total.dtype, torch.float32)
        device = batches.device_of(self.model)
        self._totals = torch.zeros(self._samples, self.layout.size, dtype=wide, device=device)
        # Not grad() by these leaves: a hook of the model's own (of gradient checkpointing) may have made others.
        torch.autograd.backward(total, retain_graph=keep)
        for leaf in self._leaves:
            leaf.grad = None
        return self._totals

    def seen(self) -> set[str]:
        """The layers whose output has been seen: a functional call, or an output without batch axis, cannot be."""
        return {tap.layer.module for tap in self.outputs if tap.called and not tap.blind}

    def watch(self, tap: Tap, values: torch.Tensor, rows: Rows) -> torch.Tensor:
        """A stand-in for `values` whose gradient counts for the gates of `tap`."""
        tap.called = True
        held = values.detach().clone() if tap.copied else values.detach()
        self._held.append((tap, held, held._version))
        if not values.requires_grad:  # nothing before it has gates: the graph starts here
            leaf = values.detach().requires_grad_()
            self._leaves.append(leaf)
            alias = leaf.clone()  # a leaf, or a view of one, must not be overwritten in place
        elif tap.copied:
            alias = values.clone()
        else:
            alias = values.view_as(values) if tap.families else values
        alias.register_hook(partial(self._add, tap, held, rows))
        return alias

    def _add(self, tap: Tap, values: torch.Tensor, rows: Rows, gradient: torch.Tensor) -> None:
        products = tap.products(values, gradient, self._samples, rows).to(self._totals)
        self._totals.index_add_(1, tap.gates, products[:, tap.channels])

    def enter(self, tap: Tap, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Forward-pre hook of a consumer."""
        if self._closed:
            return args, kwargs
        name = "" if args else next(iter(kwargs))
        values = args[0] if args else kwargs[name]
        rows = self._where(tap, "in", values)
        if rows is None:
            got = f"shape {tuple(values.shape)} for a batch of {self._samples}"
            problem, expected = "has an input without a batch axis", "as many rows for each sample"
            raise not_followed([Lost(name, tap.module, problem, expected, got) for name in tap.families])
        alias = self.watch(tap, values, rows)
        return ((alias, *args[1:]), kwargs) if args else (args, {**kwargs, name: alias})

    def leave(self, tap: Tap, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of a layer."""
        if self._closed:
            return output
        rows = self._where(tap, "out", output) if isinstance(output, torch.Tensor) else None
        if rows is not None:
            return self.watch(tap, output, rows)
        tap.blind = True
        return output

    def _where(self, tap: Tap, side: str, values: torch.Tensor) -> Rows | None:
        """Where the samples are, if they can be there."""
        rows = self.rows.get((tap.module, side), Rows())
        least = max(2, len(tap.layer.kernel) + 2)
        return rows if rows is not None and values.ndim >= least and rows.fit(values, self._samples) else None


@contextlib.contextmanager
def gated(
    model: nn.Module,
    structure: Structure,
    *,
    autocast: torch.dtype | None = None,
    rows: Mapping[tuple[str, str], Rows | None] | None = None,
) -> Iterator[Gates]:
    """Puts the gates of `structure` into the model, and takes them out.

    No parameter requires gradients meanwhile (the caller restores that): only activations' are computed.

    Raises:
        HapError: a family's consumer is not the weight of a convolution or linear module.
    """
    gates = Gates(model, structure, autocast, rows)
    modules = dict(model.named_modules(remove_duplicate=False))
    handles = []
    try:
        model.requires_grad_(False)
        for tap in gates.inputs:
            hook = partial(gates.enter, tap)
            handles.append(modules[tap.module].register_forward_pre_hook(hook, with_kwargs=True))
        for tap in gates.outputs:
            handles.append(modules[tap.module].register_forward_hook(partial(gates.leave, tap)))
        yield gates
    finally:
        for handle in handles:
            handle.remove()
