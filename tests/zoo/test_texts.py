from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hap.errors import HapError
from hap.zoo.texts import Padding, Texts, TextSplit

LENGTHS = torch.tensor([3, 1, 7, 2, 5, 5, 1, 4, 6, 2])


@pytest.fixture
def texts() -> Texts:
    """Ten texts; the tokens of text i are 10 i, 10 i + 1, ..."""
    ids = torch.cat([10 * i + torch.arange(int(n), dtype=torch.int32) for i, n in enumerate(LENGTHS)])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0)])
    return Texts({"input_ids": ids, "token_type_ids": ids % 2}, starts, torch.arange(10))


def split(texts: Texts, **options) -> TextSplit:
    settings = {"padding": Padding({"input_ids": -1, "token_type_ids": 7}, left=False), "batch_size": 2, "seed": 0}
    return TextSplit(texts, torch.arange(10), **{**settings, **options})


@pytest.mark.parametrize("left", [False, True])
def test_padding_by_hand(texts: Texts, left: bool) -> None:
    batch = Padding({"input_ids": -1, "token_type_ids": 7}, left=left)(texts, torch.tensor([3, 0]))
    short = [[-1, 30, 31], [0, 1, 1]] if left else [[30, 31, -1], [1, 1, 0]]
    assert batch["input_ids"].tolist() == [short[0], [0, 1, 2]]
    assert batch["attention_mask"].tolist() == [short[1], [1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[7, 0, 1] if left else [0, 1, 7], [0, 1, 0]]
    assert batch["labels"].tolist() == [3, 0]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize("pool", [1, 2, 100])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_text_comes_once(texts: Texts, pool: int, shuffle: bool) -> None:
    batches = list(split(texts, pool=pool, shuffle=shuffle))
    assert len(batches) == len(split(texts, pool=pool, shuffle=shuffle)) == 5
    assert sorted(i for batch in batches for i in batch["labels"].tolist()) == list(range(10))
    for batch in batches:
        real = batch["attention_mask"].sum(1)
        assert torch.equal(real, LENGTHS[batch["labels"]])
        assert int(real.max()) == batch["input_ids"].shape[1]  # padded to the longest of the batch alone


def test_pools_are_sorted_by_length(texts: Texts) -> None:
    lengths = [LENGTHS[batch["labels"]].tolist() for batch in split(texts, pool=100)]
    assert [n for batch in lengths for n in batch] == sorted(LENGTHS.tolist(), reverse=True)
    assert [batch["labels"].tolist() for batch in split(texts, pool=1)] == [[0, 1], [2, 3], [4, 5], [7, 6], [8, 9]]


def test_shuffled_epochs_differ_and_can_be_had_again(texts: Texts) -> None:
    data = split(texts, pool=2, shuffle=True)
    first, second = ([batch["labels"].tolist() for batch in data] for _ in range(2))
    assert first != second
    assert [batch["labels"].tolist() for batch in data.epoch(0)] == first


def test_a_tokenizer_that_cannot_pad_is_refused() -> None:
    with pytest.raises(HapError, match="no token to pad with"):
        Padding.of(SimpleNamespace(pad_token_id=None))
