"""The module that stands for a layer some of whose filters are implanted."""

from __future__ import annotations

import torch
from torch import nn

from hap.implants.form import Factors, form_of
from hap.implants.geometry import Dense, Geometry


class Implanted(nn.Module):
    """A convolution or linear layer of which some filters are as they were (`dense`) and the others an `implant`.

    The output is ``cat([dense(x), implant(x)])`` over the channels, or the other way round; the surgery orders the
    channels so that this is the order that the consumers expect. Where it cannot (producers of one stream that
    disagree), `order` puts the channels right with one gather. In a grouped convolution each part reads its own groups.

    Attributes:
        dense: the filters that were kept, or None if every filter is implanted.
        implant: what replaces the others.
        form, rank: of the implant.
        geometry: of the layer that both together stand for.
        implant_first: whether the implant's channels come first.
        split: how many input channels the first part reads; None if both read all (one group).
        order: for each output channel, its place in the concatenation; None where it is the identity.
        input_order: for each input channel read by the two parts (grouped convolutions), its place in the input; None
            where it is the identity.
    """

    order: torch.Tensor | None
    input_order: torch.Tensor | None

    def __init__(
        self,
        dense: Dense | None,
        implant: nn.Module,
        *,
        form: str,
        rank: int | None,
        geometry: Geometry,
        implant_first: bool = False,
        split: int | None = None,
        order: torch.Tensor | None = None,
        input_order: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.dense = dense
        self.implant = implant
        self.form = form
        self.rank = rank
        self.geometry = geometry
        self.implant_first = implant_first
        self.split = split
        if dense is None:  # now, and not where it is asked for, in forward passes that are exported
            sizes = tuple(torch.empty_like(factor, device="meta") for factor in self.factors())
            self._read = form_of(form).dense(sizes, geometry, rank).shape[1]
        self.register_buffer("order", order)
        self.register_buffer("input_order", input_order)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # named as the layers' own, for calls by keyword
        """Maps what the dense layer read to what it gave."""
        y = self._both(input)
        return y if self.order is None else y.index_select(self.geometry.channel_axis, self.order)

    def _both(self, x: torch.Tensor) -> torch.Tensor:
        if self.dense is None:
            return self.implant(x)
        first, second = (self.implant, self.dense) if self.implant_first else (self.dense, self.implant)
        one = two = x
        if self.split is not None:
            x = x if self.input_order is None else x.index_select(1, self.input_order)
            one, two = x.tensor_split([self.split], dim=1)
        return torch.cat([first(one), second(two)], dim=self.geometry.channel_axis)

    # Code around a layer asks it for these: sizes, the weight's dtype and device, whether there is a bias.

    @property
    def weight(self) -> torch.Tensor:
        """NaN of the shape, dtype and device of the whole layer's weight: no tensor holds its values."""
        return self._nan(self._rows(), self._columns(), *self.geometry.kernel)

    @property
    def bias(self) -> torch.Tensor | None:
        """NaN of the shape, dtype and device of the whole layer's bias; None where it has none."""
        return None if self.layers()[-1].bias is None else self._nan(self._rows())

    @property
    def in_channels(self) -> int:
        """Of a convolution, as `torch.nn.Conv2d`; a linear layer has no such attribute."""
        self._only(True, "in_channels")
        return self._columns() * self.geometry.groups

    @property
    def out_channels(self) -> int:
        """See `in_channels`."""
        self._only(True, "out_channels")
        return self._rows()

    @property
    def in_features(self) -> int:
        """Of a linear layer, as `torch.nn.Linear`; a convolution has no such attribute."""
        self._only(False, "in_features")
        return self._columns()

    @property
    def out_features(self) -> int:
        """See `in_features`."""
        self._only(False, "out_features")
        return self._rows()

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """That of the layer which both together stand for, as are those below."""
        return self.geometry.kernel

    @property
    def stride(self) -> tuple[int, ...]:
        """See `kernel_size`."""
        return self.geometry.stride

    @property
    def padding(self) -> tuple[int, ...] | str:
        """See `kernel_size`."""
        return self.geometry.padding

    @property
    def dilation(self) -> tuple[int, ...]:
        """See `kernel_size`."""
        return self.geometry.dilation

    @property
    def groups(self) -> int:
        """See `kernel_size`."""
        return self.geometry.groups

    def _only(self, convolution: bool, name: str) -> None:
        if bool(self.geometry.kernel) != convolution:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _rows(self) -> int:
        return len(self.layers()[-1].weight) + (0 if self.dense is None else len(self.dense.weight))

    def _columns(self) -> int:
        """How many inputs each filter reads."""
        return self._read if self.dense is None else self.dense.weight.shape[1]

    def _nan(self, *shape: int) -> torch.Tensor:
        return self.layers()[-1].weight.new_full((), torch.nan).expand(shape)

    def layers(self) -> list[Dense]:
        """The layers of the implant, in their order."""
        return [m for m in self.implant.modules() if isinstance(m, Dense)]

    def factors(self) -> Factors:
        """The weights of the implant's layers."""
        return tuple(m.weight for m in self.layers())

    def equivalent(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight ``(rows, columns, *kernel)`` and bias of the dense filters that compute what the implant does."""
        bias = self.layers()[-1].bias
        weight = form_of(self.form).dense(tuple(f.detach() for f in self.factors()), self.geometry, self.rank)
        return weight, None if bias is None else bias.detach()

    def merged(self) -> Dense:
        """One ordinary layer that computes the same."""
        weight, bias = self.equivalent()
        if self.dense is not None:
            pair = [self.dense.weight.detach(), weight]
            weight = torch.cat(pair[::-1] if self.implant_first else pair)
            if bias is not None:
                assert self.dense.bias is not None
                biases = [self.dense.bias.detach(), bias]
                bias = torch.cat(biases[::-1] if self.implant_first else biases)
        if self.order is not None:
            weight, bias = weight[self.order], None if bias is None else bias[self.order]
        return self.geometry.layer(weight, bias)

    def extra_repr(self) -> str:
        """The form, and whether a gather is left."""
        return f"form={self.form!r}" + ("" if self.order is None else ", reordered=True")
