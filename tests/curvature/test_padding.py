"""Padding and ignored labels count for nothing, whatever the criterion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import hap
from hap.curvature import CRITERIA
from hap.types import Structure

transformers = pytest.importorskip("transformers")

SKIPPED = {"bn-scale"}  # there is no batch norm
SAMPLED = {"gate-fisher", "ggn-trace", "ggn-quadratic"}  # draw for every position: another length, other draws
WHOLE = {"gate-ggn"}  # one set of class scores for each sample

Batch = dict[str, torch.Tensor]


def padded(batch: Batch, count: int) -> Batch:
    """The batch with `count` more padding positions; labels of positions are ignored there."""
    fill = {"labels": -100}
    return {name: F.pad(t, (0, count), value=fill.get(name, 0)) if t.ndim == 2 else t for name, t in batch.items()}


def opened(auto: Any, path: Path) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return getattr(transformers, auto).from_pretrained(path, num_labels=3).double().eval()


@pytest.fixture(scope="module")
def texts(tiny_bert: Path) -> tuple[Any, Structure, list[Batch]]:
    """A classifier of texts, and two batches that are padded as they are."""
    model = opened("AutoModelForSequenceClassification", tiny_bert)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    lines = ["a very good film", "the plot was long and dull but short", "bad", "the cast is not good"]
    batches = [dict(tokenizer(lines[i : i + 2], padding=True, return_tensors="pt")) for i in (0, 2)]
    for i, batch in enumerate(batches):
        batch["labels"] = torch.tensor([i, 2])
    return model, hap.trace(model, (), batches[0]), batches


@pytest.fixture(scope="module")
def tokens(tiny_bert: Path, texts) -> tuple[Any, Structure, list[Batch]]:
    """A classifier of tokens; padding and the first token have the label to ignore."""
    model = opened("AutoModelForTokenClassification", tiny_bert)
    batches = [{**batch, "labels": (batch["input_ids"] % 3).where(batch["input_ids"] > 2, -100)} for batch in texts[2]]
    return model, hap.trace(model, (), batches[0]), batches


def scores(case: tuple[Any, Structure, list[Batch]], batches: list[Batch], criterion: str) -> torch.Tensor:
    model, structure, _ = case
    found = hap.measure(model, batches, None, structure, criterion=criterion)
    return torch.cat([found.scores[family.name] for family in structure.families])


@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - SKIPPED))
def test_padding_of_texts(texts, criterion: str) -> None:
    batches = texts[2]
    longer = [padded(batch, 7) for batch in batches]
    torch.testing.assert_close(
        scores(texts, longer, criterion), scores(texts, batches, criterion), rtol=1e-9, atol=1e-15
    )


@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - SKIPPED - SAMPLED - WHOLE))
def test_padding_of_tokens(tokens, criterion: str) -> None:
    batches = tokens[2]
    longer = [padded(batch, 7) for batch in batches]
    torch.testing.assert_close(
        scores(tokens, longer, criterion), scores(tokens, batches, criterion), rtol=1e-9, atol=1e-15
    )


@pytest.mark.parametrize("criterion", ["gate-fisher", "gate-ggn", "head-gradient", "hessian-trace", "taylor"])
def test_texts_with_an_ignored_label_count_for_nothing(texts, criterion: str) -> None:
    """The mean is over the texts whose label counts, so without the others it is the same."""
    first = {name: t[:1] for name, t in texts[2][0].items()}
    ignored = {**texts[2][0], "labels": torch.tensor([0, -100])}
    with_it, alone = (scores(texts, [batch], criterion) for batch in (ignored, first))
    torch.testing.assert_close(with_it, alone, rtol=1e-9, atol=1e-15)
