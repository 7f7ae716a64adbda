"""What a checkpoint must hold, beside tensors and plan, so that a Hugging Face model opens from it alone."""

from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hap.errors import HapError
from hap.files import write_json
from hap.pretrained.load import image_processor
from hap.pretrained.package import quiet, transformers

log = logging.getLogger(__name__)
CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
GENERATION = "generation_config.json"


def is_pretrained(model: nn.Module) -> bool:
    """Whether the model is one of `transformers`, with a configuration that it can be built from."""
    package = sys.modules.get("transformers")  # who has such a model has imported it
    return package is not None and isinstance(model, package.PreTrainedModel)


def write(model: nn.Module, directory: Path, tokenizer: Any = None) -> None:
    """Writes the configuration of the dense model, with its label names, and the tokenizer's files, if there is one.

    Args:
        model: the pruned model.
        directory: exists.
        tokenizer: the model's.
    """
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = next(model.parameters()).dtype
    config.save_pretrained(directory)
    generating: Any = model
    if generating.can_generate():
        generating.generation_config.save_pretrained(directory)
    _write_preparation(model, directory, tokenizer)


def save_dense(model: nn.Module, directory: Path, tokenizer: Any = None) -> None:
    """Writes a model that is as its configuration says, so that `from_pretrained` opens it; and its tokenizer."""
    saved: Any = model
    with quiet():
        saved.save_pretrained(directory)
    _write_preparation(model, directory, tokenizer)


def _write_preparation(model: nn.Module, directory: Path, tokenizer: Any) -> None:
    """What makes a model's inputs: the tokenizer, or how images are prepared, by the files that the model came from."""
    if tokenizer is not None:
        with quiet():
            tokenizer.save_pretrained(directory)
        return
    name = getattr(model, "name_or_path", "")
    prepared = image_processor(name, local=True) if name else None
    if prepared is not None:
        write_json(directory / PROCESSOR, prepared)


def rebuild(directory: Path) -> nn.Module:
    """The dense model of the configuration in `directory`, in evaluation mode, with weights that mean nothing.

    Raises:
        HapError: there is no configuration, it is damaged, or `transformers` is not installed or lacks the model.
    """
    if not (directory / CONFIG).is_file():
        raise HapError(
            f"{directory} does not say how its dense model is built",
            expected=f"{CONFIG}, which hap.save writes for models of transformers",
            got=f"no {CONFIG}",
            remedy="pass the dense model: hap.load(directory, model)",
        )
    package = transformers()
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            config = package.AutoConfig.from_pretrained(directory)
            model = getattr(package, config.architectures[0])._from_config(config)
            if model.can_generate() and (directory / GENERATION).is_file():
                model.generation_config = package.GenerationConfig.from_pretrained(directory)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise HapError(
            f"{directory / CONFIG} cannot be read",
            expected="the configuration of a model of transformers, as hap.save writes it",
            got=" ".join(str(error).split())[:200],
            remedy="fetch the directory again, or pass the dense model: hap.load(directory, model)",
        ) from error
    return model.eval()


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer in the directory, or of the cached name on the hub, that the model came from; None without one."""
    name = getattr(model, "name_or_path", "")
    if not name or not is_pretrained(model):
        return None
    try:
        with quiet():
            return transformers().AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError):  # a model of images, say
        log.info("no tokenizer for %s", name)
        return None
