"""Tokens on disk: what a tokenizer made of a file, kept as safetensors for the next run."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hap.errors import unwritable
from hap.zoo.texts import Texts, tokenised

Source = Callable[[], tuple[Sequence[Sequence[str]], torch.Tensor]]
OWN = ("starts", "labels")  # the columns have the tokenizer's names for them


@dataclass(frozen=True)
class Cache:
    """Makes tokens, or finds those that were made before by the same tokenizer from the same files.

    Attributes:
        directory: where they are kept; None keeps none.
        tokenizer: of Hugging Face.
        max_length: the most tokens of a text.
    """

    directory: Path | None
    tokenizer: Any
    max_length: int

    def __call__(self, files: Sequence[Path], name: str, read: Source) -> Texts:
        """The texts of `files`, which `read` reads; `name` goes into the cache file's name.

        A cache file that cannot be read is written anew.

        Raises:
            HapError: the cache cannot be written, or `read` fails.
        """
        path = self._path(files, name)
        if path is not None and (found := _stored(path)) is not None:
            return found
        columns, labels = read()
        texts = tokenised(self.tokenizer, columns, labels, self.max_length)
        if path is not None:
            _store(texts, path)
        return texts

    def _path(self, files: Sequence[Path], name: str) -> Path | None:
        if self.directory is None:
            return None
        digest = hashlib.sha256(self._identity)
        for file in files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return self.directory / f"{name.replace('/', '-')}-{digest.hexdigest()[:16]}.safetensors"

    @cached_property
    def _identity(self) -> bytes:
        """What the tokens depend on, beside the texts."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)  # absent in tokenizers written in Python
        inside = json.loads(backend.to_str()) if backend is not None else self.tokenizer.get_vocab()
        for state in ("truncation", "padding"):  # of the last call
            inside.pop(state, None)
        sides = [self.tokenizer.truncation_side, self.tokenizer.model_input_names]
        kind = type(self.tokenizer).__name__
        return json.dumps([kind, inside, sides, self.max_length], sort_keys=True).encode()


def _stored(path: Path) -> Texts | None:
    try:
        tensors = load_file(path)
        starts, labels = (tensors.pop(name) for name in OWN)
    except (OSError, SafetensorError, KeyError):
        return None
    return Texts(tensors, starts, labels)


def _store(texts: Texts, path: Path) -> None:
    """Whole or not at all, also when two processes write at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fresh = Path(folder) / path.name
            save_file({**texts.columns, "starts": texts.starts, "labels": texts.labels}, fresh)
            os.replace(fresh, path)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error
