"""How well ``samples="auto"`` keeps its promise: the fraction of units that really are on the wrong side of the cut.

    python benchmarks/sampling.py

repeats measurements that stop by themselves, on noise whose truth is known and on a small trained network, writes
`benchmarks/results/sampling.json` and fills the table of `docs/curvature.md`. A minute or two on one core.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import hap
from hap import batches, zoo
from hap.curvature import CRITERIA, Criterion, Problem, Scores
from hap.curvature.moments import Moments
from hap.curvature.sampling import MARGIN, misplaced, until_settled
from hap.types import Structure

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- table: sampling -->\n", "<!-- end -->"
CAP = 8192
Row = dict[str, Any]
Network = tuple[nn.Module, list[batches.Batch], Structure]


class Rows(Criterion):
    """Scores whose terms for each example are the batches themselves: (examples, units)."""

    name = "rows"
    additive = True
    covers_data = True

    def score(self, problem: Problem) -> Scores:
        moments = Moments()
        for rows, _ in problem.batches(self.name):
            moments.add(rows)
        return Scores(moments.count, 0, {"units": moments.mean}, {"units": moments.stderr()})


def log_normal(means: torch.Tensor, sigma: float, generator: torch.Generator) -> Iterator[batches.Batch]:
    """Independent terms of log-normal size: the larger sigma, the more of the sum is in few terms."""
    while True:
        noise = torch.randn(128, len(means), generator=generator, dtype=torch.float64)
        rows = means * torch.exp(sigma * noise - sigma**2 / 2)
        yield rows, rows


def shared(means: torch.Tensor, rate: float, generator: torch.Generator) -> Iterator[batches.Batch]:
    """As squared gradients come: a few hard examples carry most, for all units at once; a unit has a part in some."""
    while True:
        hard = torch.exp(1.5 * torch.randn(128, 1, generator=generator, dtype=torch.float64) - 1.125)
        part = torch.rand(128, len(means), generator=generator) < rate
        rows = means * hard * part / rate * torch.randn(128, len(means), generator=generator).double().square()
        yield rows, rows


NOISES = {
    "log-normal, sigma 1": (log_normal, 1.0),
    "log-normal, sigma 2": (log_normal, 2.0),
    "log-normal, sigma 2.5": (log_normal, 2.5),
    "hard examples": (shared, 0.3),
}


def simulated(noise: str, units: int, keep: float, risk: float, runs: int) -> Row:
    """Repeated runs on units whose true scores are spread like exp(1.5 z), anew in each run."""
    make, tail = NOISES[noise]
    found = []
    for seed in range(runs):
        generator = torch.Generator().manual_seed(seed)
        truth = torch.exp(1.5 * torch.randn(units, generator=generator, dtype=torch.float64))
        problem = Problem(nn.Identity(), make(truth, tail, generator), None, Structure((), (), (), {}, {}), CAP)
        found.append(_judged(until_settled(Rows(), problem, keep=keep, risk=risk), truth, keep))
    return _row(noise, units, keep, risk, found)


def trained() -> Network:
    """The digits network after a few epochs, its training images, and what can leave."""
    data = zoo.load_data("digits", batch_size=64)
    model = zoo.build("digits-cnn")
    hap.finetune(model, data.train, epochs=4, lr=0.05)
    images = list(data.calibration)
    return model, images, hap.trace(model, (images[0][0][:2],))


def drawn(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> Iterator[batches.Batch]:
    """Examples drawn with replacement, so that the mean over all of them is the truth."""
    while True:
        chosen = torch.randint(len(images), (128,), generator=generator)
        yield images[chosen], labels[chosen]


def measured(
    network: Network, criterion: str, truth: torch.Tensor, draws: int, keep: float, risk: float, runs: int
) -> Row:
    """Repeated runs on the digits network, against what all training images give."""
    model, data, structure = network
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    found = []
    for seed in range(runs):
        stream = drawn(images, labels, torch.Generator().manual_seed(seed))
        problem = Problem(model, stream, None, structure, CAP, draws, seed)
        with batches.evaluating(model):
            found.append(_judged(until_settled(CRITERIA[criterion](), problem, keep=keep, risk=risk), truth, keep))
    return _row(f"digits, {criterion}", len(truth), keep, risk, found)


def whole(network: Network, criterion: str, draws: int | None) -> torch.Tensor:
    """The scores over all training images."""
    model, data, structure = network
    found = hap.measure(model, data, None, structure, criterion=criterion, samples=10**6, draws=draws)
    return torch.cat(list(found.scores.values()))


def _judged(found: Scores, truth: torch.Tensor, keep: float) -> Row:
    leave = round((1 - keep) * len(truth))
    scores, stderr = (torch.cat(list(values.values())) for values in (found.scores, found.stderr))
    gone, right = (set(values.argsort()[:leave].tolist()) for values in (scores, truth))
    stated = misplaced(scores, stderr, keep)
    return {"samples": found.samples, "stated": stated, "misplaced": len(gone ^ right) / len(truth)}


def _row(noise: str, units: int, keep: float, risk: float, runs: list[Row]) -> Row:
    row = {"setting": noise, "units": units, "keep": keep, "risk": risk, "runs": runs}
    print(line(row), file=sys.stderr, flush=True)
    return row


def settled_runs(row: Row) -> list[Row]:
    """The runs that were not ended by the cap."""
    return [run for run in row["runs"] if run["samples"] < CAP or run["stated"] <= MARGIN * row["risk"]]


def line(row: Row) -> str:
    """One row of the table; misplaced units are those of the runs that settled."""
    settled = settled_runs(row)
    wrong = torch.tensor([run["misplaced"] for run in settled], dtype=torch.float64) * 100
    samples = sorted(run["samples"] for run in row["runs"])
    cells = [row["setting"], row["units"], f"{row['keep']:g}", f"{100 * row['risk']:g} %"]
    cells += [samples[len(samples) // 2], f"{len(settled)} of {len(samples)}"]
    if len(settled) > 1:
        error = wrong.std() / len(wrong) ** 0.5
        stated = 100 * sum(run["stated"] for run in settled) / len(settled)
        cells += [f"{stated:.1f} %", f"{wrong.mean():.1f} ± {error:.1f} %", f"{wrong.quantile(0.9):.1f} %"]
    else:
        cells += ["", "", ""]
    return f"| {' | '.join(map(str, cells))} |"


def table(rows: list[Row]) -> str:
    """The table of the page."""
    head = "| scores | units | keep | risk | examples, median | settled | stated | really misplaced | in 9 of 10 runs |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|---|", *map(line, rows)]) + "\n"


def filled(page: str, rows: list[Row]) -> str:
    """The page with its table."""
    before, rest = page.split(BEGIN, 1)
    return before + BEGIN + table(rows) + END + rest.split(END, 1)[1]


def main(
    results: Annotated[Path, typer.Option(help="The raw results.")] = ROOT / "benchmarks/results/sampling.json",
    page: Annotated[Path, typer.Option(help="The page to fill.")] = ROOT / "docs/curvature.md",
) -> None:
    """Runs everything and fills the page."""
    rows = [simulated(noise, 64, 0.5, 0.05, 60) for noise in NOISES]
    rows += [simulated("log-normal, sigma 2", 512, 0.5, 0.05, 40), simulated("log-normal, sigma 2", 64, 0.8, 0.05, 60)]
    rows += [simulated("log-normal, sigma 2", 64, 0.5, 0.1, 60)]
    network = trained()
    exact, traces = whole(network, "gate-ggn", None), whole(network, "ggn-trace", 64)
    rows += [measured(network, "gate-fisher", exact, 1, 0.5, risk, 50) for risk in (0.05, 0.1)]
    rows.append(measured(network, "ggn-trace", traces, 2, 0.5, 0.1, 20))
    results.write_text(json.dumps({"torch": str(torch.__version__), "rows": rows}) + "\n")
    page.write_text(filled(page.read_text(), rows))


if __name__ == "__main__":
    typer.run(main)
