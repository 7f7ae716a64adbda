"""Tokenised texts, held in memory as flat tensors; batches are padded to their longest text alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hap.errors import HapError
from hap.zoo.splits import Split

TextBatch = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts as tokens, one after the other.

    Attributes:
        columns: what the tokenizer gives for each token, by name: int32 (tokens,). No attention mask: all are real.
        starts: where each text starts in them, and where the last ends: int64 (texts + 1,).
        labels: int64 (texts,).
    """

    columns: Mapping[str, torch.Tensor]
    starts: torch.Tensor
    labels: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """The number of tokens in each text."""
        return self.starts.diff()


@dataclass(frozen=True)
class Padding:
    """How a tokenizer fills up the shorter texts of a batch: with which value in each column, and on which side."""

    values: Mapping[str, int]
    left: bool

    @staticmethod
    def of(tokenizer: Any) -> Padding:
        """The padding of a Hugging Face tokenizer.

        Raises:
            HapError: the tokenizer has no token to pad with.
        """
        if tokenizer.pad_token_id is None:
            raise HapError(
                "the tokenizer has no token to pad with",
                expected="a padding token: texts in a batch have different lengths",
                got=f"{type(tokenizer).__name__} with pad_token None",
                remedy="tokenizer.pad_token = tokenizer.eos_token, and the same in model.config.pad_token_id",
            )
        values = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        return Padding(values, tokenizer.padding_side == "left")

    def __call__(self, texts: Texts, index: torch.Tensor) -> TextBatch:
        """The texts at `index`, padded to the longest of them: int64 (texts, tokens), and their labels.

        >>> texts = Texts({"input_ids": torch.tensor([5, 6, 7])}, torch.tensor([0, 1, 3]), torch.tensor([0, 1]))
        >>> batch = Padding({"input_ids": 0}, left=False)(texts, torch.tensor([0, 1]))
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
        ([[5, 0], [6, 7]], [[1, 0], [1, 1]])
        """
        starts, lengths = texts.starts[index, None], texts.lengths[index, None]
        width = int(lengths.max())
        offset = torch.arange(width) - (width - lengths if self.left else 0)
        real = (offset >= 0) & (offset < lengths)
        source = torch.where(real, starts + offset, 0)
        batch = {
            name: torch.where(real, column[source].long(), self.values.get(name, 0))
            for name, column in texts.columns.items()
        }
        return {**batch, "attention_mask": real.long(), "labels": texts.labels[index]}


class TextSplit(Split):
    """A part of `texts`, in batches as Hugging Face models read them.

    Texts of like length go into one batch, so that little is padded: `pool` batches at a time are sorted by length,
    and where `shuffle` is set given out in random order.
    """

    def __init__(
        self,
        texts: Texts,
        indices: torch.Tensor,
        *,
        padding: Padding,
        batch_size: int,
        seed: int,
        pool: int = 1,
        shuffle: bool = False,
    ) -> None:
        super().__init__(indices, batch_size=batch_size, seed=seed, shuffle=shuffle)
        self._texts = texts
        self._padding = padding
        self._pool = pool

    def _batches(self, order: torch.Tensor, generator: torch.Generator, mine: Sequence[int]) -> Iterator[TextBatch]:
        batches: list[torch.Tensor] = []
        for part in order.split(self.batch_size * self._pool):
            lengths = self._texts.lengths[part]
            alike = part[lengths.argsort(descending=True, stable=True)].split(self.batch_size)
            places = torch.randperm(len(alike), generator=generator) if self._shuffle else torch.arange(len(alike))
            batches += [alike[place] for place in places.tolist()]
        for number in mine:
            yield self._padding(self._texts, batches[number])


def tokenised(tokenizer: Any, columns: Sequence[Sequence[str]], labels: torch.Tensor, max_length: int) -> Texts:
    """The texts, or pairs of texts, as the tokenizer cuts them, the longer of a pair shortened first.

    Args:
        tokenizer: of Hugging Face.
        columns: the texts; or the first and the second of each pair.
        labels: int64 (texts,).
        max_length: the most tokens of a text or pair.
    """
    found = tokenizer(*columns, truncation=True, max_length=max_length, return_attention_mask=False)
    lengths = torch.tensor([0, *map(len, found["input_ids"])])
    flat = {
        name: torch.tensor([value for text in found[name] for value in text], dtype=torch.int32)
        for name in tokenizer.model_input_names
        if name in found
    }
    return Texts(flat, lengths.cumsum(0), labels)
