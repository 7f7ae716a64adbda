"""How good the scores are: every registered criterion and the peers, on the same images."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from curvature_peers import PEERS
from curvature_records import Records, read, rounded, say
from curvature_setting import DATA, MODEL, RESULTS, Clock, Data, Minutes, Network, Results, Setting, close_, file, load

import hap
from hap import batches
from hap.curvature import CRITERIA, Criterion, GateFisher, GateGGN
from hap.errors import HapError

SHARES = (0.3, 0.5, 0.7)
MEASURED = "the measured rise itself"
MANY = 4
MORE = 16_384  # images, for what takes one backward pass a batch
TAYLOR = "torch-pruning Taylor"
HELD_OUT = 4_096  # images that the dense network was not trained on

Batches = list[batches.Batch]


@dataclass(frozen=True)
class Found:
    """What a contender says: a score for each inner unit, and the order in which they should go."""

    scores: list[float]
    order: list[int]


Find = Callable[[Setting, Batches, int], Found]


@dataclass(frozen=True)
class Contender:
    """A way to choose units.

    Attributes:
        name: in the tables.
        find: from the setting, the calibration batches and a seed.
        random: draws at random, so that it runs for several seeds.
    """

    name: str
    find: Find
    random: bool = False


def contenders(truth: Sequence[float] | None, test: int = 0) -> Iterator[Contender]:
    """All criteria that are registered, variants of the gate criteria, the peers, and the truth where it is known."""
    for name, criterion in sorted(CRITERIA.items()):
        yield Contender(name, _criterion(name), bool(criterion.default_draws) or name == "random")
    yield Contender(f"gate-fisher, {MANY} draws", _criterion("gate-fisher", draws=MANY), random=True)
    yield Contender("gate-fisher + first order", _criterion(GateFisher(first_order=True)), random=True)
    yield Contender("gate-ggn + first order", _criterion(GateGGN(first_order=True)))
    yield Contender("gate-fisher, joint choice", _joint("gate-fisher"), random=True)
    for name, find in (
        ("gate-fisher", _criterion("gate-fisher")),
        ("gate-fisher, joint choice", _joint("gate-fisher")),
    ):
        yield Contender(f"{name}, {MORE:,} images", _on(lambda s: s.calibration(MORE), find), random=True)
    yield Contender("gate-ggn, joint choice", _joint("gate-ggn"))
    first_order = GateFisher(first_order=True)
    for name, find in (
        ("gate-fisher", _criterion("gate-fisher")),
        ("gate-fisher + first order", _criterion(first_order)),
        ("gate-fisher, joint choice", _joint("gate-fisher")),
        ("gate-fisher + first order, joint choice", _joint(first_order)),
        (TAYLOR, _peer(PEERS[TAYLOR])),
    ):
        held_out = _on(lambda setting: setting.held_out(test, HELD_OUT), find)
        yield Contender(f"{name}, held-out images", held_out, random=name != TAYLOR)
    for name, peer in PEERS.items():
        yield Contender(name, _peer(peer), random="OBDC" in name)
    if truth is not None:
        yield Contender(MEASURED, lambda setting, data, seed: _by_score(torch.tensor(truth, dtype=torch.float64)))


def quality(
    data: Data = DATA,
    results: Results = RESULTS,
    minutes: Minutes = 120.0,
    samples: Annotated[int, typer.Option(help="Calibration images of every contender, and of recalibration.")] = 1024,
    test: Annotated[int, typer.Option(help="Test images of the accuracies.")] = 2000,
    seeds: Annotated[int, typer.Option(help="Runs of contenders that draw at random.")] = 3,
    model: Network = MODEL,
    only: Annotated[str, typer.Option(help="Contenders whose name holds this; all if empty.")] = "",
) -> None:
    """Scores of every contender, and the accuracy after the lowest 30, 50 and 70 % have left together."""
    clock, setting = Clock(minutes), load(data, model=model)
    records = Records(file(results, "quality", model), samples=samples, test=test)
    calibration = setting.calibration(samples)
    if not records.has(contender="dense"):
        found = hap.evaluate(setting.model, setting.splits.test, samples=test)
        row = {"contender": "dense", "seed": 0, "accuracy": found.accuracy, "loss": found.loss}
        records.add(row, f"dense: {found.accuracy}")
    for contender in contenders(_truth(setting, file(results, "truth", model)), test):
        for seed in range(seeds if contender.random else 1):
            if clock.over() or only not in contender.name or records.has(contender=contender.name, seed=seed):
                continue
            start = time.perf_counter()
            row: dict[str, Any] = {"contender": contender.name, "seed": seed}
            try:
                found = contender.find(setting, calibration, seed)
            except HapError as error:
                records.add({**row, "refused": error.what}, f"{contender.name}: {error.what}")
                continue
            row["seconds"] = time.perf_counter() - start
            row |= {"scores": found.scores, "removed": _accuracies(setting, found.order, calibration, test)}
            records.add(row, f"{contender.name}, seed {seed}: {row['removed']}")
    if clock.over():
        say("out of time: the same command goes on")


def _truth(setting: Setting, path: Path) -> list[float] | None:
    """The measured rises on the calibration images, if every unit has been measured."""
    rows = read(path)
    rises = {(row["family"], row["unit"]): row["calibration_rise"] for row in rows}
    return [rises[unit] for unit in setting.units] if set(setting.units) <= set(rises) else None


def _on(data: Callable[[Setting], Batches], find: Find) -> Find:
    """The same on other images than the rest."""
    return lambda setting, _, seed: find(setting, data(setting), seed)


def _criterion(criterion: str | Criterion, draws: int | None = None) -> Find:
    def find(setting: Setting, data: Batches, seed: int) -> Found:
        samples = sum(map(batches.size, data))
        found = hap.measure(
            setting.model, data, None, setting.structure, criterion=criterion, samples=samples, draws=draws, seed=seed
        )
        return _by_score(setting.flat(found.scores))

    return find


def _peer(peer: Callable[[Setting, Batches, int], torch.Tensor]) -> Find:
    return lambda setting, data, seed: _by_score(peer(setting, data, seed))


def _by_score(scores: torch.Tensor) -> Found:
    return Found(rounded(scores), scores.argsort(stable=True).tolist())


def _joint(criterion: str | Criterion) -> Find:
    def find(setting: Setting, data: Batches, seed: int) -> Found:
        samples = sum(map(batches.size, data))
        found = hap.measure(
            setting.model, data, None, setting.structure, criterion=criterion, samples=samples, seed=seed, gram=True
        )
        inner = {family.name for family in setting.inner}
        places = torch.cat([torch.full((f.size,), f.name in inner) for f in setting.structure.families])
        assert found.gram is not None
        return Found([], greedy(found.gram[places][:, places], setting.flat(found.scores)))

    return find


def greedy(gram: torch.Tensor, scores: torch.Tensor) -> list[int]:
    """The order of removal: next goes the unit p with the smallest ``score_p + sum over those gone F_pq``.

    >>> gram = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.2, 0.0], [0.0, 0.0, 1.4]])
    >>> greedy(gram, gram.diagonal() / 2)
    [0, 2, 1]
    """
    rise, order = scores.clone(), []
    for _ in range(len(gram)):
        unit = int(rise.argmin())
        order.append(unit)
        rise = rise + gram[:, unit]
        rise[order] = torch.inf
    return order


def lowest(order: Sequence[int], families: Sequence[str], count: int) -> list[int]:
    """The first `count` units of the order that leave each family at least one unit.

    >>> lowest([1, 0, 2, 3], ["a", "a", "b", "b"], 2)
    [1, 2]
    """
    left = {name: families.count(name) for name in families}
    gone: list[int] = []
    for unit in order:
        if len(gone) < count and left[families[unit]] > 1:
            left[families[unit]] -= 1
            gone.append(unit)
    return gone


def _accuracies(setting: Setting, order: Sequence[int], calibration: Batches, test: int) -> list[dict[str, float]]:
    """As cut and with batch-norm statistics recalibrated on the calibration images, which are training images."""
    found = []
    for share in SHARES:
        gone = lowest(order, [name for name, _ in setting.units], round(share * len(order)))
        small = copy.deepcopy(setting.model)
        close_(small, setting.inner, [setting.units[i] for i in gone])
        as_cut = hap.evaluate(small, setting.splits.test, samples=test)
        hap.recalibrate_(small, calibration)
        again = hap.evaluate(small, setting.splits.test, samples=test)
        row = {"share": share, "as_cut": as_cut.accuracy, "as_cut_loss": as_cut.loss}
        found.append({**row, "recalibrated": again.accuracy, "recalibrated_loss": again.loss})
    return found
