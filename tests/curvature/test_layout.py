from __future__ import annotations

import torch

from hap.curvature.layout import Layout


def test_split_takes_apart_what_the_offsets_say(conv):
    layout = Layout.of(conv.structure)
    flat = torch.arange(layout.size, dtype=torch.float32)
    units, filters = layout.split(flat)
    for family, offset in layout.unit_offsets():
        assert units[family.name].tolist() == list(range(offset, offset + family.size))
    for layer, offset in layout.filter_offsets():
        assert filters[layer.module].tolist() == list(range(offset, offset + layer.filters))
    assert {v.dtype for v in (*units.values(), *filters.values())} == {torch.float64}
    assert sum(len(v) for v in (*units.values(), *filters.values())) == layout.size


def test_parts_do_not_share_memory(conv):
    layout = Layout.of(conv.structure)
    flat = torch.zeros(layout.size, dtype=torch.float64)
    layout.split(flat)[0]["stem"].fill_(1)
    assert not flat.any()


def test_no_layers(mlp):
    layout = Layout(mlp.structure.families, ())
    assert layout.split(torch.zeros(6))[1] == {}
    assert layout.filter_offsets() == []
