from __future__ import annotations

from hap.checkpoint.card import card


def test_says_what_was_done_and_what_it_cost(plan) -> None:
    text = card(plan, {"hap": "1.2", "torch": "9.9"}, {"accuracy": ("91 %", "90 %")})
    pruned = sum(len(d.prune) for d in plan.decisions.values())
    units = sum(f.size for f in plan.structure.families)
    implanted = sum(len(i.indices) for i in plan.implants.values())
    assert f"{pruned} of {units} units pruned, {implanted} filters replaced" in text
    assert "criterion `random`, budget params 0.6." in text
    lines = text.splitlines()
    start = lines.index("| | dense | pruned |")
    assert lines[start + 1 : start + 5] == [
        "|---|---|---|",
        f"| parameters | {plan.dense.params:,} | {plan.small.params:,} |",
        f"| MACs per sample | {plan.dense.macs:,} | {plan.small.macs:,} |",
        "| accuracy | 91 % | 90 % |",
    ]
    assert "hap.load(directory, dense_model)" in text
    assert f"`{plan.structure.fingerprint[:12]}`. hap 1.2, torch 9.9." in text
    assert text.endswith("\n")
