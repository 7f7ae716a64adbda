"""Who is compared on GLUE: how each chooses the heads that go, and what it does to the rest."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from curvature_records import Row, rounded
from glue_setting import CALIBRATION, TRAINING, Setting
from torch import nn

import hap
from hap.implants import Option, head_options
from hap.types import Sensitivity


@dataclass(frozen=True)
class Contender:
    """A way to prune.

    Attributes:
        criterion: of `hap.measure`.
        joint: choose with the full matrix of the gates; else by the paper's global ranking.
        implants: the share of what does not stay that is replaced by smaller heads, in place of removed; chosen
            together, any share but 0 lets as many be replaced as pays.
        refit: solve the output projections anew, in closed form.
        draws: probes, where the criterion's default would take longer than the fine-tuning.
        samples: training texts to measure on; None for those that implants are fitted on.
    """

    criterion: str
    joint: bool = False
    implants: float = 0.0
    refit: bool = False
    draws: int | None = None
    samples: int | None = None


CONTENDERS = {
    "random": Contender("random"),
    "magnitude": Contender("magnitude"),
    "head-gradient": Contender("head-gradient"),
    "hessian-trace": Contender("hessian-trace", draws=4),
    "gate-fisher": Contender("gate-fisher"),
    "hessian-trace + implants": Contender("hessian-trace", implants=0.25, draws=4),
    "gate-fisher + implants": Contender("gate-fisher", implants=0.25),
    "head-gradient + refit": Contender("head-gradient", refit=True),
    "gate-ggn, joint": Contender("gate-ggn", joint=True),
    "gate-ggn, joint + refit": Contender("gate-ggn", joint=True, refit=True),
    "gate-ggn, joint + implants": Contender("gate-ggn", joint=True, implants=0.25),
    "gate-fisher, joint + implants": Contender("gate-fisher", joint=True, implants=0.25, samples=2048),
    "gate-fisher, joint + implants + refit": Contender(  # as `hap prune` does it unasked
        "gate-fisher", joint=True, implants=0.25, refit=True, samples=2048
    ),
}


class Measured:
    """The sensitivities of a setting, and what narrow heads leave undone, each measured once."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._found: dict[tuple[str, bool, int | None], tuple[Sensitivity, float]] = {}
        self._options: dict[str, tuple[Option, ...]] | None = None

    def __call__(self, who: Contender) -> tuple[Sensitivity, float]:
        """The sensitivity, and the seconds that it took."""
        key = (who.criterion, who.joint, who.samples)
        if key not in self._found:
            setting, start = self.setting, time.perf_counter()
            found = hap.measure(
                setting.model,
                setting.calibration if who.samples is None else setting.texts(who.samples),
                None,
                setting.structure,
                criterion=who.criterion,
                samples=who.samples or CALIBRATION,
                draws=who.draws,
                seed=setting.seed,
                gram=who.joint,
            )
            self._found[key] = (found, time.perf_counter() - start)
        return self._found[key]

    def options(self) -> dict[str, tuple[Option, ...]]:
        """The ranks of narrow heads to choose from."""
        if self._options is None:
            self._options = head_options(self.setting.model, self.setting.structure, self.setting.calibration)
        return self._options


def pruned(setting: Setting, measured: Measured, who: Contender, keep: float) -> tuple[nn.Module, hap.Plan, Row]:
    """The small model before fine-tuning, its plan, and what the record says about them."""
    sensitivity, seconds = measured(who)
    plan = hap.decide(
        setting.structure,
        sensitivity,
        hap.Budget(heads=keep),
        mode="optimal" if who.joint else "paper",
        implant_ratio=who.implants,
        options=measured.options() if who.implants else None,
    )
    small = hap.apply(setting.model, plan, setting.calibration)
    if who.refit:
        hap.refit_(small, setting.model, plan, setting.calibration)
    kept = {name: len(decision.keep) for name, decision in plan.decisions.items()}
    facts = {
        "kept_heads": list(kept.values()),
        "implanted": sum(len(implant.indices) for implant in plan.implants.values()),
        "params": plan.small.params,
        "macs": plan.small.macs,
        "dense_params": plan.dense.params,
        "dense_macs": plan.dense.macs,
        "measure_seconds": rounded([seconds])[0],
    }
    return small, plan, facts


def outcome(setting: Setting, small: nn.Module, epochs: int) -> Row:
    """Test results before and, with `epochs`, after fine-tuning; the last weights are taken: nothing is chosen."""
    data, start = setting.data, time.perf_counter()
    found: Row = {"epochs": epochs, "before": vars(hap.evaluate(small, data.test, metrics=data.metrics))}
    if epochs:
        options: dict[str, Any] = {**TRAINING, "epochs": epochs, "seed": setting.seed, "select": "last"}
        data.train.load_state_dict({"epochs": 0})  # in the same order for every contender
        hap.finetune(small, data.train, accelerator=setting.accelerator(), **options)
        found["after"] = vars(hap.evaluate(small, data.test, metrics=data.metrics))
    return {**found, "seconds": rounded([time.perf_counter() - start])[0]}


def speed(setting: Setting, small: nn.Module, plan: hap.Plan, *, texts: int, tokens: int) -> Row:
    """How much faster the small model is than the dense one, in paired runs, and what its MACs promise."""
    generator = torch.Generator().manual_seed(0)
    device = next(small.parameters()).device
    ids = torch.randint(1_000, 2_000, (texts, tokens), generator=generator).to(device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = hap.planning.measure_latency({"dense": setting.model, "small": small}, (), batch, runs=40, seconds=20)
    ratio = found["small"].ratio
    promised = plan.dense.macs / plan.small.macs
    return {"texts": texts, "tokens": tokens, "speedup": 1 / ratio, "promised": promised, "runs": found["small"].runs}
