"""The model card that every checkpoint carries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hap.planning import Plan

Opens = Literal["text", "alone", "code"]
_COUNTED = {"params": "parameters", "macs": "MACs"}


@dataclass(frozen=True)
class Origin:
    """Where a pruned model is from, as far as its plan does not know.

    Attributes:
        about: rows of the card, name -> text, such as ``model``, ``data`` and ``task``.
        build: Python that makes the dense model, called ``dense``; "" where nobody knows. Models of `transformers`
            open without.
        call: Python that calls the model, ``small``; `torch` is imported, and of texts there is a ``tokenizer``.
        notes: what a reader must know of the numbers.
    """

    about: Mapping[str, str] = field(default_factory=dict)
    build: str = ""
    call: str = ""
    notes: Sequence[str] = ()


def card(
    plan: Plan,
    versions: Mapping[str, str],
    results: Mapping[str, tuple[Any, Any]],
    *,
    origin: Origin | None = None,
    opens: Opens = "code",
) -> str:
    """Markdown: where the model is from, what was done, what it cost before and after, and Python that loads it.

    Args:
        plan: the plan.
        versions: name -> version of what made the checkpoint.
        results: more rows of the table: name -> (dense, pruned).
        origin: where the model is from; None where nobody has said.
        opens: what opens the directory: itself, with a tokenizer (``text``) or without (``alone``), or only the
            ``code`` of the dense model.
    """
    origin = origin or Origin()
    costs = {
        "parameters": (f"{plan.dense.params:,}", f"{plan.small.params:,}"),
        "MACs per sample": (f"{plan.dense.macs:,}", f"{plan.small.macs:,}"),
    }
    rows = [f"| {name} | {dense} | {small} |" for name, (dense, small) in {**costs, **results}.items()]
    facts = {**origin.about, **dict(_facts(plan))}
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "\n".join(
        [
            "# Pruned model",
            "",
            "Made smaller by hap (Hessian-aware pruning with neural implants).",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {text} |" for name, text in facts.items()),
            "",
            "| | dense | pruned |",
            "|---|---|---|",
            *rows,
            "",
            *(line for note in origin.notes for line in (f"Note: {note}.", "")),
            "It is loaded by this Python, in the directory of this file:",
            "",
            "```python",
            *_snippet(plan, origin, opens),
            "```",
            "",
            f"Dense structure: `{plan.structure.fingerprint[:12]}`. {made_with}.",
            "",
        ]
    )


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    """What the plan knows of itself, by name."""
    options = plan.options
    yield "may remain", ", ".join(f"{100 * v:g} % of {_COUNTED.get(k, k)}" for k, v in plan.budget.limits.items())
    pruned = sum(len(d.prune) for d in plan.decisions.values())
    units = pruned + sum(len(d.keep) for d in plan.decisions.values())
    implanted = sum(len(i.indices) for i in plan.filters.values())
    narrow = sum(len(i.indices) for _, i in plan.narrowed.values())
    yield "pruned", f"{pruned:,} of {units:,} units"
    smaller = {"filters replaced by smaller ones": implanted, "heads replaced by narrow ones": narrow}
    yield "implanted", ", ".join(f"{count:,} {what}" for what, count in smaller.items() if count) or "nothing"
    samples = options.get("samples")
    yield "criterion", f"`{plan.criterion}`" + (f", {samples:,} calibration examples" if samples else "")
    if "mode" in options:
        rounds = options.get("iterations", 1)
        yield "mode", f"`{options['mode']}`" + (f", {rounds} rounds" if rounds > 1 else "")
    if "seed" in options:
        yield "seed", str(options["seed"])


def _snippet(plan: Plan, origin: Origin, opens: Opens) -> list[str]:
    """Python that loads the model, and calls it where anyone knows how."""
    if opens == "text":
        lines = ["from transformers import AutoTokenizer", "", "import hap", "", 'small, plan = hap.load(".")']
        # The first output: a classifier's scores, the states of a model without a head.
        use = origin.call or 'print(small(**tokenizer("A text.", return_tensors="pt"))[0])'
        return [*lines, 'tokenizer = AutoTokenizer.from_pretrained(".")', *use.splitlines()]
    head = ["import torch", "", "import hap"] if origin.call else ["import hap"]
    call = origin.call.splitlines()
    if opens == "alone":
        return [*head, "", 'small, plan = hap.load(".")', *call]
    kind = plan.structure.modules[""]
    unknown = f"\ndense = ...  # the dense {kind}, made by the code that defines it; its weights do not matter"
    return [*head, *(origin.build or unknown).splitlines(), 'small, plan = hap.load(".", dense)', *call]
