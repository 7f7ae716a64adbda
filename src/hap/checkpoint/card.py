"""The model card that every checkpoint carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hap.planning import Plan


def card(
    plan: Plan, versions: Mapping[str, str], results: Mapping[str, tuple[Any, Any]], *, alone: bool = False
) -> str:
    """Markdown: what was done, what it cost before and after, and how to load it.

    Args:
        plan: the plan.
        versions: name -> version of what made the checkpoint.
        results: more rows of the table: name -> (dense, pruned).
        alone: the directory says how the dense model is built.
    """
    pruned = sum(len(d.prune) for d in plan.decisions.values())
    units = pruned + sum(len(d.keep) for d in plan.decisions.values())
    implanted = sum(len(i.indices) for i in plan.filters.values())
    narrow = sum(len(i.indices) for _, i in plan.narrowed.values())
    costs = {
        "parameters": (f"{plan.dense.params:,}", f"{plan.small.params:,}"),
        "MACs per sample": (f"{plan.dense.macs:,}", f"{plan.small.macs:,}"),
    }
    rows = [f"| {name} | {dense} | {small} |" for name, (dense, small) in {**costs, **results}.items()]
    budget = ", ".join(f"{k} {v:g}" for k, v in vars(plan.budget).items() if v is not None)
    return "\n".join(
        [
            "# Pruned model",
            "",
            f"Made by hap (Hessian-aware pruning with neural implants): criterion `{plan.criterion}`, budget {budget}.",
            f"{pruned} of {units} units pruned, {implanted} filters replaced by smaller ones (implants)"
            + (f", {narrow} heads by narrow ones." if narrow else "."),
            "",
            "| | dense | pruned |",
            "|---|---|---|",
            *rows,
            "",
            "```python",
            f"small, plan = hap.load({'directory' if alone else 'directory, dense_model'})",
            "```",
            "",
            f"Dense structure: `{plan.structure.fingerprint[:12]}`. "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
            + ".",
            "",
        ]
    )
