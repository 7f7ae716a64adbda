"""Fits to moments that say little, or that no data have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hap import HapError
from hap.implants import Geometry, Moments, Sums, depthwise, flat, form_of, regression
from hap.implants.form import Form

CHANNELS, ROWS = 5, 4
SCALES = 10.0 ** torch.arange(-12, 13, 6, dtype=torch.float64)
GEOMETRY = Geometry.of(nn.Conv2d(CHANNELS, ROWS, 3, padding=1))
RULES = [
    ("pointwise", None),
    *((name, rank) for name in ("low-rank", "depthwise", "spatial", "tucker") for rank in (1, 3)),
]


def inputs(case: str) -> torch.Tensor:
    """What the filters read, float64: (samples, channels, taps)."""
    x = torch.randn(100, CHANNELS, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if case == "zeros":
        return torch.zeros_like(x)
    if case in ("one sample", "three samples"):
        return x[: 1 if case == "one sample" else 3]
    if case == "duplicate channels":
        x[:, 1:4] = x[:, :1]
    elif case == "duplicate taps":
        x = x[:, :, :1].expand(x.shape).clone()
    elif case == "constant channels":
        x[:, 1:4] = torch.tensor([3.0, 0.0, 1e4])[:, None]
    elif case == "all constant":
        x[:] = x[:1] * 1e3
    elif case == "dead taps":
        x[:, :, :5] = 0
    elif case == "unlike channels":
        x = x * SCALES[:, None]
    elif case == "unlike taps":
        x = x * 10.0 ** torch.arange(-12, 13, 3, dtype=torch.float64)
    elif case != "usual":
        x = x * float(case)
    return x


CASES = (
    "usual", "zeros", "one sample", "three samples", "duplicate channels", "duplicate taps", "constant channels",
    "all constant", "dead taps", "unlike channels", "unlike taps", "1e-12", "1e12", "1e-80",
)  # fmt: skip


def filters() -> torch.Tensor:
    return torch.randn(1, ROWS, CHANNELS * 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def moments(x: torch.Tensor, dtype: torch.dtype) -> Moments:
    """Those of products in this precision."""
    u = x.flatten(1).to(dtype)
    v = u @ filters()[0].T.to(dtype)
    means = (total / len(u) for total in (u.T @ u, u.T @ v, v.square().sum(0), u.sum(0), v.sum(0)))
    return Moments(*(mean.double()[None] for mean in means))


def energies(form: Form, rank: int | None, found: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """The error of the fit, and that of zeros."""
    taps = slice(GEOMETRY.centre, None, 9) if form.centre else slice(None)
    found = found.at(taps)
    dense = form.dense(form.fit(found, GEOMETRY, rank), GEOMETRY, rank)
    assert dense.isfinite().all()
    return found.error(flat(dense, GEOMETRY, 1, centre=form.centre)).sum(), found.yy.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "rank"), RULES)
def test_no_fit_is_worse_than_zeros(name, rank, case, dtype) -> None:
    """Of the moments as they are or about the means, with a pull and without."""
    found = moments(inputs(case), dtype)
    for about in (found, found.centred()):
        for given in (about, about.pulled(filters())):
            missed, zeros = energies(form_of(name), rank, given)
            size = given.xx.abs().amax() * filters().square().sum()
            assert missed <= zeros + 1e-9 * (zeros.abs() + size)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("name", "rank"), RULES)
def test_moments_that_no_data_have(name, rank, seed) -> None:
    """Any finite symmetric matrix, of columns of any scale: the fit is finite, and no worse than zeros."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator, dtype=torch.float64)

    width = CHANNELS * 9
    scale = 10 ** (seed * random(width))
    half = random(width, width)
    xx, xy = (half + half.mT) * scale[:, None] * scale[:, :, None], random(width, ROWS) * scale[:, :, None]
    found = Moments(xx, xy, random(ROWS).square(), torch.zeros_like(scale), random(ROWS))
    for given in (found, found.pulled(filters())):
        missed, zeros = energies(form_of(name), rank, given)
        assert missed <= zeros + 1e-9 * (zeros.abs() + missed.abs())


@pytest.mark.parametrize("name", ["depthwise", "spatial", "tucker"])
def test_a_sweep_that_loses_is_undone(name, monkeypatch) -> None:
    """A step of conjugate gradients goes astray where rounding makes its system indefinite."""
    found = moments(inputs("usual"), torch.float64)
    module = depthwise if name == "depthwise" else regression
    monkeypatch.setattr(module, "SWEEPS", 0)
    start = energies(form_of(name), 1, found)
    monkeypatch.setattr(module, "SWEEPS", 5)
    monkeypatch.setattr(module, "descended", lambda start, *_: start.flip(0).roll(1, -1))
    assert energies(form_of(name), 1, found) == start


@pytest.mark.parametrize("least", [1.0, 0.0, -1e-12, -1e-3, -10.0])
def test_no_more_is_added_than_makes_a_matrix_definite(least) -> None:
    basis = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    values = torch.tensor([least, 1, 2, 3, 4, 100], dtype=torch.float64)
    system = (basis * values) @ basis.T
    systems = torch.stack([system, torch.eye(6).double(), torch.zeros(6, 6).double()])
    factor, added = regression.definite(systems, 1e-10)
    want = systems + added[:, None, None] * torch.eye(6)
    torch.testing.assert_close(factor @ factor.mT, want, rtol=1e-12, atol=1e-12)
    mean = float(system.trace() / 6)
    if least > -1e-10 * mean:
        assert float(added[0]) == pytest.approx(1e-10 * mean)
    else:
        assert -2 * least < added[0] < -20 * least
    torch.testing.assert_close(added[1:], torch.full((2,), 1e-10, dtype=torch.float64))  # another's are its own


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused(value) -> None:
    with pytest.raises(HapError, match="second moments are not finite"):
        regression.cholesky(torch.full((3, 3), value, dtype=torch.float64))


def test_sums_keep_what_varies_little() -> None:
    """In float32, with a mean that is 1e4 times as large: the moments about the means are those of float64."""
    conv = nn.Conv2d(3, 4, 3, bias=False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 5, 5, generator=generator) + 1e4
    sums = {
        dtype: Sums("0", Geometry.of(conv), 4, range(4), range(3), centre=False, device=x.device)
        for dtype in (torch.float32, torch.float64)
    }
    for part in x.split(2):
        y = conv(part).detach()  # of the same values for both
        for dtype, total in sums.items():
            total._add(part.to(dtype), y.to(dtype), None)
    got, want = (total.moments() for total in sums.values())
    for name in ("xx", "xy", "yy", "x", "y"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-9, atol=0)
    got, want = got.centred(), want.centred()
    for name in ("xx", "xy", "yy"):
        scale = float(getattr(want, name).abs().max())
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=0, atol=1e-6 * scale)


def test_sums_of_many_positions_read_some() -> None:
    """Others at each call, and inputs with the outputs that they make: filters are solved for to the last bits."""
    conv = nn.Conv2d(3, 4, 3, padding=1, stride=2).double()
    x = torch.randn(4, 3, 40, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = Sums("0", Geometry.of(conv), 4, range(4), range(3), centre=False, device=x.device)
    places = [total._some(torch.Size([20, 25])) for total.count in (0, 1)]
    assert not all(map(torch.equal, *(place[1:] for place in places))) and total._some(torch.Size([8, 8])) is None
    total.count = 0
    for part in x.split(2):
        total.add(part, conv(part))
    assert total.count == 4 * 64
    found = total.moments().centred()
    weight = conv.weight.detach().flatten(1)[None]
    torch.testing.assert_close(found.solution(), weight, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.xx[0].diagonal(), torch.ones(27, dtype=torch.float64), rtol=0, atol=0.3)


def test_a_pull_is_stronger_where_rounding_is() -> None:
    """Fewer samples than inputs, in float32: what is left open keeps the dense weights, not zeros."""
    x = torch.randn(3, CHANNELS * 9, generator=torch.Generator().manual_seed(0)) + 100
    found = moments(x.double().reshape(3, CHANNELS, 9), torch.float32).centred()
    assert torch.linalg.eigvalsh(found.xx)[0, 0] < -1e-6 * found.xx[0].diagonal().mean()
    weight = filters()
    pulled = found.pulled(weight)
    assert torch.linalg.eigvalsh(pulled.xx).min() > 0.4 * (pulled.xx - found.xx).amax()
    torch.testing.assert_close(pulled.solution(), weight, rtol=0, atol=0.2)
