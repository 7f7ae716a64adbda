"""Hugging Face models as `from_pretrained` gives them: opened for a task, and written so that they open again."""

from hap.pretrained.load import (
    image_size,
    image_statistics,
    is_classifier,
    load_image_classifier,
    load_text_classifier,
    load_tokenizer,
    name_labels_,
)
from hap.pretrained.package import transformers
from hap.pretrained.record import CONFIG, PROCESSOR, is_pretrained, rebuild, save_dense, tokenizer_of, write

__all__ = [
    "CONFIG",
    "PROCESSOR",
    "image_size",
    "image_statistics",
    "is_classifier",
    "is_pretrained",
    "load_image_classifier",
    "load_text_classifier",
    "load_tokenizer",
    "name_labels_",
    "rebuild",
    "save_dense",
    "tokenizer_of",
    "transformers",
    "write",
]
