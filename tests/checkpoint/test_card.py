from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import hap
from hap.checkpoint import Origin
from hap.checkpoint.card import card

HERE = Path(__file__).parent
VERSIONS = {"hap": "1.2", "torch": "9.9"}


def snippet(text: str) -> str:
    """The card's Python."""
    (found,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return found


def test_says_what_was_done_and_what_it_cost(plan: hap.Plan) -> None:
    plan = dataclasses.replace(plan, options={**plan.options, "mode": "optimal", "seed": 3, "samples": 1024})
    origin = Origin(about={"model": "`zoo:net`", "data": "Digits"}, notes=["of little data"])
    text = card(plan, VERSIONS, {"accuracy": ("91 %", "90 %")}, origin=origin)
    pruned = sum(len(d.prune) for d in plan.decisions.values())
    units = sum(f.size for f in plan.structure.families)
    implanted = sum(len(i.indices) for i in plan.implants.values())
    lines = text.splitlines()
    first, second = lines.index("| | |"), lines.index("| | dense | pruned |")
    assert lines[first + 2 : first + 10] == [
        "| model | `zoo:net` |",
        "| data | Digits |",
        "| may remain | 60 % of parameters |",
        f"| pruned | {pruned} of {units} units |",
        f"| implanted | {implanted} filters replaced by smaller ones |",
        "| criterion | `random`, 1,024 calibration examples |",
        "| mode | `optimal` |",
        "| seed | 3 |",
    ]
    assert lines[second + 1 : second + 5] == [
        "|---|---|---|",
        f"| parameters | {plan.dense.params:,} | {plan.small.params:,} |",
        f"| MACs per sample | {plan.dense.macs:,} | {plan.small.macs:,} |",
        "| accuracy | 91 % | 90 % |",
    ]
    assert "Note: of little data." in lines
    assert f"`{plan.structure.fingerprint[:12]}`. hap 1.2, torch 9.9." in text
    assert text.endswith("\n")


def test_the_code_in_the_card_runs(
    small, plan: hap.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the lines that the caller gives for the dense model, in the checkpoint's directory."""
    build = "from tests_own_net import make_net\n\ndense = make_net(0)"
    origin = Origin(build=build, call="print(small(torch.zeros(1, 3, 6, 6)).shape)")
    (tmp_path / "tests_own_net.py").write_text((HERE / "conftest.py").read_text())
    monkeypatch.syspath_prepend(tmp_path)
    out = hap.save(small, plan, tmp_path / "out", origin=origin)
    monkeypatch.chdir(out)
    exec(snippet((out / "README.md").read_text()), {})
    assert capsys.readouterr().out == "torch.Size([1, 3])\n"


def test_the_code_of_a_model_without_a_head_runs(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its tokenizer the directory opens alone; there are no class scores to print."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(tiny_bert).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    structure = hap.trace(model, (), dict(tokenizer("A text.", return_tensors="pt")))
    sensitivity = hap.measure(model, None, None, structure, criterion="random")
    plan = hap.decide(structure, sensitivity, hap.Budget(params=0.9), implant_ratio=0)
    out = hap.save(hap.apply(model, plan), plan, tmp_path / "out", tokenizer=tokenizer)
    monkeypatch.chdir(out)
    capsys.readouterr()
    exec(snippet((out / "README.md").read_text()), {})
    assert capsys.readouterr().out.startswith("tensor([[[")  # (1, tokens, width)


def test_where_nobody_knows_how_the_dense_model_is_made_its_class_is_named(plan: hap.Plan) -> None:
    assert "dense = ...  # the dense Net, made by the code that defines it" in snippet(card(plan, VERSIONS, {}))
