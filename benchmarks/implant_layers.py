"""The time of one convolution: dense, with half of its filters gone, and with implants of each form and rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from curvature_records import Records, Row
from curvature_setting import Clock
from curvature_tables import NONE
from implant_turns import ratios
from torch import nn

from hap.implants import FORMS, Fitted, Form, Target, build
from hap.types import Layer

SIZES = {
    "CIFAR ResNet": ((16, 32), (32, 16), (64, 8)),
    "ResNet-50": ((64, 56), (128, 28), (256, 14), (512, 7)),
}
BATCHES = {"CIFAR ResNet": (1, 64), "ResNet-50": (1, 8)}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
COMPILED = ((16, 32, 64), (64, 8, 1), (256, 14, 1))  # channels, pixels and batch: compiling takes long
SHARES = (0.5, 1.0)  # of the filters that are implanted


@dataclass(frozen=True)
class Variant:
    """One way to make a 3 x 3 convolution smaller.

    Attributes:
        name: of the form, or "pruned".
        part: the rank as a share of the implanted filters, or kernels for each channel.
        share: of the filters that are implanted (or gone).
        module: the layer.
        macs: multiply-accumulates as a share of the dense layer's.
    """

    name: str
    part: str
    share: float
    module: nn.Module
    macs: float


def measure(records: Records, clock: Clock, *, seconds: float, compiled: bool) -> None:
    """A row for each size, batch and format, with the ratios of all variants to the dense layer."""
    for case in _cases(compiled):
        if clock.over():
            return
        if not records.has(what="layer", **case):
            row = {"what": "layer", **case, "variants": _timed(case, seconds)}
            slowest = max(row["variants"], key=lambda found: found["time"])
            records.add(row, f"{case}: slowest {slowest}")


def _cases(compiled: bool) -> Iterator[Row]:
    for network, sizes in SIZES.items():
        for channels, pixels in sizes:
            for batch in BATCHES[network]:
                for layout in FORMATS:
                    case = {"network": network, "channels": channels, "pixels": pixels, "batch": batch}
                    yield {**case, "format": layout, "compiled": False}
                    if compiled and layout == "contiguous" and (channels, pixels, batch) in COMPILED:
                        yield {**case, "format": layout, "compiled": True}


def _timed(case: Row, seconds: float) -> list[Row]:
    """Every variant and the dense layer in turns, on one input."""
    channels, pixels, layout = case["channels"], case["pixels"], FORMATS[case["format"]]
    generator = torch.Generator().manual_seed(0)
    dense = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    dense.weight.data = torch.randn(dense.weight.shape, generator=generator)
    dense = dense.to(memory_format=layout).eval()
    x = torch.randn(case["batch"], channels, pixels, pixels, generator=generator).contiguous(memory_format=layout)
    variants = list(_variants(dense, few=case["compiled"]))
    models: dict[str, nn.Module] = {"dense": dense} | {str(i): v.module for i, v in enumerate(variants)}
    if case["compiled"]:
        torch._dynamo.reset()
        models = {name: torch.compile(model, dynamic=False) for name, model in models.items()}
    found = ratios(models, x, seconds=seconds)
    return [
        {"form": v.name, "part": v.part, "share": v.share, "macs": v.macs, "time": found[str(i)]}
        for i, v in enumerate(variants)
    ]


def _variants(dense: nn.Conv2d, *, few: bool) -> Iterator[Variant]:
    channels = dense.out_channels
    layer = Layer("", "weight", None, channels, 0, (3, 3), 1, False, 1)
    half = nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False)
    yield Variant("pruned", "", 0.5, half.to(memory_format=_format(dense)), 0.5)
    for share in SHARES[1:] if few else SHARES:
        rows = round(share * channels)
        for form in FORMS.values():
            ranks = form.ranks(layer, rows, channels) if form.applies(layer) else ()
            for rank in ranks[:1] if few else ranks:
                macs = 1 - share + form.weights(layer, rows, channels, rank) / dense.weight.numel()
                yield Variant(
                    form.name, _part(form, rows, rank), share, _implanted(dense, layer, form, rows, rank), macs
                )


def _part(form: Form, rows: int, rank: int | None) -> str:
    """The rank as it is comparable between layers: a share of the filters, or kernels for each channel."""
    return f"{rank / rows:.3g}" if rank and form.name != "depthwise" else str(rank or "")


def _implanted(dense: nn.Conv2d, layer: Layer, form: Form, rows: int, rank: int | None) -> nn.Module:
    """The layer as `hap.apply` makes it, its last filters implanted by random factors."""
    channels = dense.out_channels
    factors = tuple(torch.randn(shape) for shape in form.shapes(layer, rows, channels, rank))
    target = Target(range(channels - rows, channels), range(channels), form, rank)
    flags = [i >= channels - rows for i in range(channels)]
    return build(dense, dense.weight.detach(), None, flags, Fitted(target, factors, None))


def _format(dense: nn.Conv2d) -> torch.memory_format:
    last = dense.weight.is_contiguous(memory_format=torch.channels_last) and not dense.weight.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def table(rows: Sequence[Row], *, network: str | None = None, compiled: bool = False) -> str:
    """Time / dense by variant and case: in contiguous format, and in channels_last."""
    rows = [r for r in rows if r["what"] == "layer" and r["compiled"] == compiled and network in (None, r["network"])]
    if not rows:
        return NONE
    cases = list(dict.fromkeys((row["channels"], row["pixels"], row["batch"]) for row in rows))
    times: dict[tuple[float, str, str], dict[Any, list[float]]] = {}
    macs: dict[tuple[float, str, str], list[float]] = {}
    for row in sorted(rows, key=lambda r: list(FORMATS).index(r["format"])):
        for v in row["variants"]:
            key = v["share"], v["form"], v["part"]
            macs.setdefault(key, []).append(v["macs"])
            by_case = times.setdefault(key, {})
            by_case.setdefault((row["channels"], row["pixels"], row["batch"]), []).append(v["time"])
    header = ["filters", "become", "rank", "MACs", *(f"{c} ch, {p} px, batch {b}" for c, p, b in cases)]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for key in sorted(times, key=lambda key: (key[0], mean(macs[key]))):
        share, form, part = key
        cells = ["half" if share < 1 else "all", form, part, f"{mean(macs[key]):.2f}"]
        cells += [" / ".join(f"{time:.2f}" for time in times[key].get(case, [])) for case in cases]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
