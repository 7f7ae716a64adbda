from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hap.errors import HapError
from hap.zoo.tokens import Cache

transformers = pytest.importorskip("transformers")


@pytest.fixture
def tokenizer(tiny_bert: Path):
    return transformers.AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_text("good film\nbad")
    return path


class Reader:
    """Reads the source, and counts how often."""

    def __init__(self, source: Path) -> None:
        self.source, self.times = source, 0

    def __call__(self):
        self.times += 1
        lines = self.source.read_text().splitlines()
        return [lines], torch.arange(len(lines))


def test_tokens_are_made_once(tokenizer, source: Path, tmp_path: Path) -> None:
    read = Reader(source)
    first = Cache(tmp_path / "kept", tokenizer, 16)([source], "glue/x", read)
    tokenizer(["a film", "bad"], padding=True, truncation=True, max_length=9)  # changes what the tokenizer holds
    again = Cache(tmp_path / "kept", tokenizer, 16)([source], "glue/x", read)
    assert read.times == 1
    assert all(torch.equal(first.columns[name], again.columns[name]) for name in first.columns)
    assert torch.equal(first.starts, again.starts) and torch.equal(first.labels, again.labels)
    assert again.lengths.tolist() == [4, 3]


def test_another_length_tokenizer_or_text_is_another_file(tokenizer, source: Path, tmp_path: Path) -> None:
    read = Reader(source)
    Cache(tmp_path / "kept", tokenizer, 16)([source], "x", read)
    Cache(tmp_path / "kept", tokenizer, 8)([source], "x", read)
    assert read.times == 2
    tokenizer.add_tokens(["splendid"])
    Cache(tmp_path / "kept", tokenizer, 16)([source], "x", read)
    assert read.times == 3
    source.write_text("good film\ndull")
    Cache(tmp_path / "kept", tokenizer, 16)([source], "x", read)
    assert read.times == 4
    tokenizer.truncation_side = "left"
    Cache(tmp_path / "kept", tokenizer, 16)([source], "x", read)
    assert read.times == 5
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    columns = Cache(tmp_path / "kept", tokenizer, 16)([source], "x", read).columns
    assert read.times == 6 and list(columns) == ["input_ids"]


def test_a_damaged_cache_is_written_anew(tokenizer, source: Path, tmp_path: Path) -> None:
    read = Reader(source)
    cache = Cache(tmp_path / "kept", tokenizer, 16)
    cache([source], "x", read)
    (kept,) = (tmp_path / "kept").iterdir()
    kept.write_bytes(b"cut short")
    cache([source], "x", read)
    assert read.times == 2
    cache([source], "x", read)
    assert read.times == 2


def test_a_place_that_cannot_be_written(tokenizer, source: Path) -> None:
    with pytest.raises(HapError, match="could not write"):
        Cache(source / "under-a-file", tokenizer, 16)([source], "x", Reader(source))


def test_nothing_is_kept_unless_asked_for(tokenizer, source: Path, tmp_path: Path) -> None:
    Cache(None, tokenizer, 16)([source], "x", Reader(source))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
