"""The tables and the plot of `docs/curvature.md`, from the raw results alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median, stdev

import torch
from curvature_records import Row, read
from curvature_setting import MODEL, file

NONE = "*not measured yet*"
Cells = Sequence[str]


def tables(results: Path) -> dict[str, str]:
    """Every table by its name in the page."""
    costs = read(results / "curvature-cost.jsonl")
    truth, quality = (read(file(results, kind, MODEL)) for kind in ("truth", "quality"))
    larger = [read(file(results, kind, "resnet56")) for kind in ("truth", "quality")]
    return {
        "cost": cost(costs),
        "error": error([row for row in costs if row["what"] == "error"]),
        "truth": reliability(truth),
        "rank": rank(quality, truth),
        "accuracy": accuracy(quality),
        "truth56": reliability(larger[0]),
        "rank56": rank(larger[1], larger[0]),
        "accuracy56": accuracy(larger[1]),
        "scaling": scaling(read(results / "curvature-scaling.jsonl")),
    }


def filled(page: str, found: dict[str, str]) -> str:
    """The page with each table between its marks, ``<!-- table: NAME -->`` and ``<!-- end -->``.

    >>> print(filled("<!-- table: a -->old<!-- end -->", {"a": "new"}))
    <!-- table: a -->
    new
    <!-- end -->
    """
    for name, table in found.items():
        marks = re.compile(rf"(<!-- table: {name} -->).*?(<!-- end -->)", re.DOTALL)
        if not marks.search(page):
            raise ValueError(f"the page has no place for the table {name!r}")
        page = marks.sub(lambda match, table=table: f"{match[1]}\n{table}\n{match[2]}", page)
    return page


def _table(header: Cells, rows: Iterable[Cells]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines) if len(lines) > 2 else NONE


def cost(rows: list[Row]) -> str:
    """Medians of paired ratios."""
    times, memory = ([row for row in rows if row["what"] == what] for what in ("time", "memory"))
    extra = {row["contender"]: f"{row['extra_mib']:.0f}" for row in memory}
    cells = []
    for name in _names(times):
        mine = [row for row in times if row["contender"] == name]
        whole = median(row["seconds"] / row["unit_seconds"] for row in mine)
        count = mine[0]["count"]
        cells.append(
            [
                name,
                mine[0]["gives"],
                f"{count}",
                f"{whole:.2f}",
                f"{whole / count:.2f} a {mine[0]['per']}",
                extra.get(name, ""),
            ]
        )
    header = ["", "gives", "draws", "training steps", "training steps each", "extra memory, MiB"]
    return _table(header, cells)


def error(rows: list[Row]) -> str:
    """Relative standard errors, and the time to bring them to 10 %: time grows with the square of the accuracy."""
    cells = []
    for name, draws in dict.fromkeys((row["contender"], row["draws"]) for row in rows):
        mine = [row for row in rows if (row["contender"], row["draws"]) == (name, draws)]
        scores = torch.tensor([row["scores"] for row in mine], dtype=torch.float64)
        stderr = torch.tensor([row["stderr"] for row in mine], dtype=torch.float64)
        steps = median(row["seconds"] / row["unit_seconds"] for row in mine)
        stated = _relative(stderr.square().mean(0).sqrt(), scores)
        line = [name, str(draws), f"{steps:.1f}", f"{100 * stated:.1f} %", f"{steps * (stated / 0.1) ** 2:.1f}"]
        if len(mine) > 1:
            spread = _relative(scores.std(0), scores)
            line += [f"{100 * spread:.1f} %", f"{steps * (spread / 0.1) ** 2:.1f}"]
        cells.append([*line, *[""] * (7 - len(line))])
    header = ["", "draws", "training steps", "stated error", "steps to 10 %", "spread over seeds", "steps to 10 %"]
    return _table(header, cells)


def _relative(errors: torch.Tensor, scores: torch.Tensor) -> float:
    """The median over units: Hutchinson's estimates come near zero, where a mean of ratios means nothing.

    Dead units, whose score is exactly zero, have no relative error and are left out.
    """
    return float((errors / scores.mean(0).abs()).nanmedian())


def reliability(rows: list[Row]) -> str:
    """What the truth itself looks like, and how well it carries over to other images."""
    cells = []
    for key, name in (("calibration_rise", "calibration"), ("unseen_rise", "unseen")):
        if rows:
            rises = torch.tensor([[row[key], row[f"{key}_stderr"]] for row in rows], dtype=torch.float64)
            sure = (rises[:, 0].abs() > 2 * rises[:, 1]).double().mean()
            middle, high = rises[:, 0].quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
            images = str(rows[0]["calibration" if name == "calibration" else "unseen"])
            cells.append([name, images, str(len(rows)), f"{middle:.4f}", f"{high:.4f}", f"{100 * sure:.0f} %"])
    header = ["images", "number", "units", "median rise, nats", "95 % quantile", "beyond two standard errors"]
    return _table(header, cells)


def rank(rows: list[Row], truth: list[Row]) -> str:
    """Spearman's correlation of each contender's scores with the measured rises, best on unseen images first."""
    truth = sorted(truth, key=_place)
    places = [row.get("place", i) for i, row in enumerate(truth)]  # of the measured units among all
    rises = {
        key: torch.tensor([row[key] for row in truth], dtype=torch.float64)
        for key in ("calibration_rise", "unseen_rise")
    }
    lines = []
    for name in _names(rows):
        mine = [row for row in rows if row["contender"] == name and row.get("scores")]
        if mine and truth:
            scores = [torch.tensor(row["scores"], dtype=torch.float64)[places] for row in mine]
            both = [[spearman(score, rise) for score in scores] for rise in rises.values()]
            seconds = median(row["seconds"] for row in mine)
            lines.append((both[1], [name, *(_spread(values, "{:.2f}") for values in both), f"{seconds:.1f}"]))
    lines.sort(key=lambda line: -sum(line[0]) / len(line[0]))
    return _table(["criterion", "calibration images", "unseen images", "seconds"], [cells for _, cells in lines])


def _place(row: Row) -> tuple[list[int], int]:
    """Families in the order of the network: by the numbers in their names."""
    return [int(number) for number in re.findall(r"\d+", row["family"])], row["unit"]


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 1, ties averaged.

    >>> ranks(torch.tensor([3.0, 1.0, 3.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[places].double()


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's rank correlation."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def accuracy(rows: list[Row]) -> str:
    """Accuracies after joint removal, best recalibrated at one half first."""
    lines = []
    for row in rows:
        if row["contender"] == "dense":
            lines.append((2.0, ["dense", *[f"{100 * row['accuracy']:.1f}"] * 6]))
    for name in _names(rows):
        mine = [row for row in rows if row["contender"] == name and "removed" in row]
        if mine:
            shares = range(len(mine[0]["removed"]))
            both = [[100 * r["removed"][i][k] for r in mine] for i in shares for k in ("as_cut", "recalibrated")]
            best = sum(both[3]) / len(mine) / 100
            lines.append((best, [name, *(_spread(values, "{:.1f}") for values in both)]))
    lines.sort(key=lambda line: -line[0])
    header = ["criterion", *(f"{share} %, {kind}" for share in (30, 50, 70) for kind in ("as cut", "recalibrated"))]
    return _table(header, [cells for _, cells in lines])


def scaling(rows: list[Row]) -> str:
    """Medians of paired ratios to training steps over the same number of samples."""
    cells = []
    for row in rows:
        steps = row["samples"] // row["batch"]
        ratio = _steps(row) / steps
        name = [row["model"], f"{row['parameters'] / 1e6:.2f}", str(row["units"])]
        cells.append([*name, str(row["batch"]), str(row["samples"]), f"{ratio:.2f}", f"{row['peak_mib'] / 1024:.2f}"])
    header = ["network", "parameters, M", "units", "batch", "samples", "training steps a batch", "peak memory, GiB"]
    return _table(header, cells)


def plot(results: Path, path: Path) -> None:
    """Time against the number of samples, and time of one batch against that of a training step."""
    from hap.report.figures import new_figure, save_png

    rows = read(results / "curvature-scaling.jsonl")
    if not rows:
        return
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    first = rows[0]["model"]
    unit = median(rows[0]["unit_seconds"])
    mine = sorted((row["samples"], _steps(row)) for row in rows if row["model"] == first)
    left.plot(*zip(*mine, strict=True), "o-")
    left.set(xscale="log", yscale="log", xlabel="samples", ylabel="time, training steps", title=first)
    counts = [samples for samples, _ in mine]
    left.set_xticks(counts, [str(count) for count in counts])
    left.set_xticks([], minor=True)
    single = {row["model"]: row for row in rows if row["samples"] == row["batch"]}
    for name, row in single.items():
        right.plot(median(row["unit_seconds"]) / unit, median(row["seconds"]) / unit, "o", label=name)
    ends = [f(median(row["unit_seconds"]) / unit for row in single.values()) for f in (min, max)]
    right.plot(ends, ends, "-", color="grey", label="a training step")
    right.set(xscale="log", yscale="log", xlabel="training step, relative", ylabel="gate-fisher, relative")
    right.legend(fontsize=6)
    save_png(figure, path)


def _steps(row: Row) -> float:
    """The median of paired ratios to a training step."""
    return median(s / u for s, u in zip(row["seconds"], row["unit_seconds"], strict=True))


def _names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["contender"] for row in rows if row["contender"] != "dense"))


def _spread(values: Sequence[float], form: str) -> str:
    """Mean, and the standard deviation where there are several runs."""
    mean = form.format(sum(values) / len(values))
    return f"{mean} ± {form.format(stdev(values))}" if len(values) > 1 else mean
