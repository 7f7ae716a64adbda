"""One of several processes that measure together; run by test_distributed.py, and by test_resume.py to be killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import distributed as dist
from torch import nn

from conftest import Case, make_conv
from hap.curvature import CRITERIA, measure, sampling
from hap.errors import HapError
from hap.types import Sensitivity

SIZES = (3, 4, 2, 5, 1)
GRAM = [name for name, criterion in CRITERIA.items() if criterion.has_gram]
FIT = sorted(set(CRITERIA) - {"bn-scale"})
STATE = "gate-fisher.state"


def flat(found: Sensitivity) -> torch.Tensor:
    """Everything in a result."""
    parts = [*found.scores.values(), *found.stderr.values(), *found.filters.values(), *found.filters_stderr.values()]
    gram = [] if found.gram is None else [found.gram.flatten()]
    return torch.cat([*parts, *gram, torch.tensor([float(found.samples)])])


def everything(case: Case, model: nn.Module) -> dict[str, torch.Tensor]:
    """Every criterion's result; memory is limited once, so that batches are cut."""
    runs = {name: flat(measure(model, case.batches, None, case.structure, criterion=name)) for name in FIT}
    for name in GRAM:
        runs[f"{name} gram"] = flat(measure(model, case.batches, None, case.structure, criterion=name, gram=True))
    return runs | {
        "draws": flat(measure(model, case.batches, None, case.structure, draws=3, max_memory=20_000)),
        "samples": flat(measure(model, case.batches, None, case.structure, samples=8)),
        "auto": flat(measure(model, case.batches, None, case.structure, samples="auto", cap=12, risk=0.01)),
        "one batch": flat(measure(model, case.batches[:1], None, case.structure)),
    }


def error(run: Callable[[], object]) -> str:
    """The message of the error that a run ends with."""
    try:
        run()
    except (HapError, ZeroDivisionError) as found:
        return str(found)
    return "no error"


def stopping(case: Case, at: int, stop: Callable[[], object]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches, the walk over which is stopped before batch `at`."""
    for number, batch in enumerate(case.batches):
        if number == at:
            stop()
        yield batch


def failing(case: Case, rank: int, state: Path | None = None, at: int = 3, **options: Any) -> str:
    """What each rank says when rank 1 divides by zero before a batch."""
    stopped = stopping(case, at, lambda: rank == 1 and 1 / 0)
    return error(lambda: measure(case.model, stopped, None, case.structure, state=state, save_every=0, **options))


def chunks(case: Case, rank: int, folder: Path) -> dict[str, object]:
    """Reading until it is settled, in chunks: rank 1 fails at the first batch of the second, which rank 0 has saved."""
    options: dict[str, Any] = {"samples": "auto", "risk": 1e-9, "cap": 12}
    usual, sampling.FIRST = sampling.FIRST, 3
    path = folder / "auto.state"
    failed = failing(case, rank, path, 1, **options)
    dist.barrier()
    files = sorted(folder.glob("auto.state*"))
    saved = [safetensors.safe_open(file, "pt").metadata()["chunk"] for file in files]
    resumed = flat(measure(case.model, case.batches, None, case.structure, state=path, **options))
    undisturbed = flat(measure(case.model, case.batches, None, case.structure, **options))
    sampling.FIRST = usual
    return {"failed": failed, "saved": saved, "resumed": resumed, "undisturbed": undisturbed}


def main(rank: int, size: int, folder: Path) -> None:
    case = make_conv(SIZES)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder / 'init'}", rank=rank, world_size=size, timeout=limit)
    results: dict[str, object] = {"together": everything(case, case.model)}
    wrapped = nn.parallel.DistributedDataParallel(case.model)
    results["wrapped"] = {"gate-fisher": flat(measure(wrapped, case.batches, None, case.structure))}
    results["failed"] = failing(case, rank)
    results["interrupted"] = failing(case, rank, folder / STATE)
    results["kept"] = sorted(path.name for path in folder.glob(f"{STATE}*"))
    dist.barrier()
    resumed = measure(case.model, case.batches, None, case.structure, state=folder / STATE)
    results["resumed"] = {"gate-fisher": flat(resumed)}
    results["chunks"] = chunks(case, rank, folder)
    own = case.batches[rank:]
    results["other data"] = error(lambda: measure(case.model, own, None, case.structure))
    alone = [dist.new_group([r]) for r in range(size)]
    results["alone"] = {"gate-fisher": flat(measure(case.model, own, None, case.structure, group=alone[rank]))}
    stranger = error(lambda: measure(case.model, own, None, case.structure, group=alone[1 - rank]))
    results["stranger"] = stranger
    dist.destroy_process_group()
    if not rank:
        results["one process"] = everything(case, case.model)
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "killed":
        case = make_conv(SIZES)
        batches = stopping(case, 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
        measure(case.model, batches, None, case.structure, state=sys.argv[2], save_every=0)
    else:
        main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
