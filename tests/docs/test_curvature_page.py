"""The curvature page shows what the raw results give, and its benchmark measures what it says."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from scipy.stats import spearmanr

import hap
from hap import zoo

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of the benchmark as running its script does; none of them imports a peer by itself."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_page_shows_the_raw_results(load) -> None:
    tables: ModuleType = load("curvature_tables")
    page = (ROOT / "docs" / "curvature.md").read_text()
    assert tables.filled(page, tables.tables(BENCHMARKS / "results")) == page


def test_page_without_a_place_is_refused(load) -> None:
    with pytest.raises(ValueError, match="no place for the table 'rank'"):
        load("curvature_tables").filled("# A page", {"rank": "| a |"})


def test_spearman_averages_ties(load) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(6, (2, 40), generator=generator).double()
    assert load("curvature_tables").spearman(a, b) == pytest.approx(float(spearmanr(a, b).statistic))


def test_rank_table_pairs_scores_with_their_units(load) -> None:
    """Truth is resumable, so its rows may come in any order; scores come in the order of the network."""
    units = [("layer1.0.conv1", 0), ("layer1.0.conv1", 1), ("layer2.10.conv1", 0), ("layer10.2.conv1", 0)]
    rises = [0.1, 0.2, 0.3, 0.4]
    truth = [
        {"family": f, "unit": u, "calibration_rise": r, "unseen_rise": -r}
        for (f, u), r in zip(units, rises, strict=True)
    ]
    quality = [{"contender": "mine", "scores": rises, "seconds": 1.0}]
    assert "| mine | 1.00 | -1.00 | 1.0 |" in load("curvature_tables").rank(quality, truth[::-1])


def test_time_to_ten_per_cent(load) -> None:
    rows = [
        {
            "contender": "c",
            "draws": 1,
            "seconds": 8.0,
            "unit_seconds": 2.0,
            "scores": [s, s, 0],
            "stderr": [0.2, 0.2, 0],
        }
        for s in (0.9, 1.1)
    ]
    # The last unit is dead. Stated: 0.2 of the score in 4 steps, so 16 steps. Spread: sqrt(0.02) in 4 steps, so 8.
    assert "| c | 1 | 4.0 | 20.0 % | 16.0 | 14.1 % | 8.0 |" in load("curvature_tables").error(rows)


def test_greedy_takes_the_smallest_rise_each_time(load) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    gram = rows.T @ rows
    order = load("curvature_quality").greedy(gram, gram.diagonal() / 2)
    assert sorted(order) == list(range(6))
    for count in range(6):
        gone = order[:count]
        rise = {p: float(gram[[*gone, p]][:, [*gone, p]].sum()) / 2 for p in range(6) if p not in gone}
        assert order[count] == min(rise, key=rise.__getitem__)


def test_lowest_leaves_a_unit_in_each_family(load) -> None:
    lowest = load("curvature_quality").lowest
    for order in itertools.permutations(range(4)):
        gone = lowest(list(order), ["a", "a", "b", "b"], 3)
        assert len(gone) == 2
        assert {gone[0] // 2, gone[1] // 2} == {0, 1}


def test_losses_of_the_cut_network_are_those_of_the_closed_one(load) -> None:
    truth, setting = load("curvature_truth"), load("curvature_setting")
    model = zoo.build("resnet20", seed=1).eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3])
    structure = hap.trace(model, (images[:2],))
    inner = tuple(f for f in structure.families if len(f.roles("producer")) == 1)
    assert sum(family.size for family in inner) == 336
    for name in ("layer1.0.conv1", "layer2.1.conv1", "layer3.2.conv1"):
        with torch.no_grad():
            reads = [truth._cut(model, name)[0](images)]
        found = truth._without(model, SimpleNamespace(inner=inner), name, 3, reads, labels)
        closed = zoo.build("resnet20", seed=1).eval()
        setting.close_(closed, inner, [(name, 3)])
        plain = float(hap.evaluate(model, [(images, labels)]).loss)
        expected = hap.evaluate(closed, [(images, labels)]).loss
        assert float(found.mean()) == pytest.approx(expected, rel=1e-5)
        assert abs(expected - plain) > 1e-4


def test_records_go_on_after_a_crash(load, tmp_path: Path) -> None:
    records = load("curvature_records")
    path = tmp_path / "rows.jsonl"
    records.Records(path, batch=1).add({"unit": 0}, "")
    with path.open("a") as file:
        file.write('{"batch": 1, "un')
    again = records.Records(path, batch=1)
    again.add({"unit": 1}, "")
    assert [row["unit"] for row in records.read(path)] == [0, 1]
    assert again.has(unit=0) and not again.has(unit=2)
    assert not records.Records(path, batch=2).rows
