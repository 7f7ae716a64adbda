"""Classifiers and tokenizers from a directory or the Hugging Face hub."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hap.errors import HapError
from hap.pretrained.package import quiet, transformers

log = logging.getLogger(__name__)
HEAD = "ForSequenceClassification"
HEADS = (HEAD, "ForImageClassification")


def load_text_classifier(path: str | Path, labels: Sequence[str], *, seed: int = 0) -> tuple[nn.Module, Any]:
    """A model that puts texts into classes, float32, on the CPU, in evaluation mode; and its tokenizer.

    Args:
        path: a directory as `save_pretrained` writes it, or a name on the hub: of a classifier with as many classes as
            there are labels, or of an encoder, which gets a classification head of random weights.
        labels: names of the classes, by label; kept in the model's configuration.
        seed: of the weights that `path` does not hold; the global generators are neither read nor moved.

    Raises:
        HapError: `transformers` is not installed, nothing is at `path`, it holds no such model, one of other classes,
            or a tokenizer with more tokens than the model has embeddings.
    """
    auto = transformers()
    config = _config(path)
    _check_labels(config, labels, path)
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    model = _model(auto.AutoModelForSequenceClassification, path, {"num_labels": len(labels), **names}, seed)
    tokenizer = load_tokenizer(path)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:  # as in models of the GPT type
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    _check_vocabulary(model, tokenizer, path)
    return model, tokenizer


def load_image_classifier(path: str | Path, classes: int, *, seed: int = 0) -> nn.Module:
    """As `load_text_classifier`, of images (N, C, H, W), without a tokenizer.

    A head for another number of classes is replaced by one of random weights, as is usual for images.
    """
    auto = transformers()
    kind = str(_config(path).model_type)
    if kind not in auto.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        raise HapError(
            f"{path} is no model of images",
            expected="one that AutoModelForImageClassification opens",
            got=kind,
            remedy="for a model of texts name the task, such as --task glue/mrpc",
        )
    return _model(
        auto.AutoModelForImageClassification, path, {"num_labels": classes, "ignore_mismatched_sizes": True}, seed
    )


def image_processor(path: str | Path, *, local: bool = False) -> dict[str, Any] | None:
    """What a model's files say of how its images are prepared; None where none says so. `local` asks no hub."""
    reader = transformers().image_processing_utils.BaseImageProcessor
    with quiet():
        try:
            found, _ = reader.get_image_processor_dict(os.path.expanduser(path), local_files_only=local)
        except (OSError, ValueError):
            return None
    return dict(found)


def image_size(path: str | Path) -> int | tuple[int, int] | None:
    """The size of the images that a model was made for, by its configuration; None where that does not say."""
    found = getattr(_config(path), "image_size", None)
    return tuple(found) if isinstance(found, (list, tuple)) else found


def name_labels_(model: Any, labels: Sequence[str], path: str | Path) -> None:
    """Writes the names of the classes into the configuration of a model of images, if it has none yet.

    Raises:
        HapError: it has these names in another order.
    """
    own = _names(model.config)
    _need_same_order(own, labels, path)
    if all(name.startswith("LABEL_") for name in own):
        model.config.id2label, model.config.label2id = dict(enumerate(labels)), {n: i for i, n in enumerate(labels)}


def image_statistics(path: str | Path) -> tuple[float, tuple[float, ...], tuple[float, ...]] | None:
    """What the pixels, 0 to 255, of a model's images are divided by, and the mean and deviation that normalise them.

    None where no file says so.

    Raises:
        HapError: its files ask for channels in another order than RGB.
    """
    found = image_processor(path)
    if found is None:
        return None
    if found.get("do_flip_channel_order"):
        raise HapError(
            f"the images of {path} have their channels as BGR",
            expected="a model of RGB images",
            remedy="prune it from Python, with batches of your own",
        )
    scale = round(1 / found.get("rescale_factor", 1 / 255), 6) if found.get("do_rescale", True) else 1.0
    shift = 1.0 if found.get("rescale_offset") else 0.0  # of what has been divided: from -1 to 1
    if not found.get("do_normalize", True):
        return scale, (shift,) * 3, (1.0,) * 3
    if "image_mean" not in found or "image_std" not in found:
        return None
    return scale, tuple(mean + shift for mean in found["image_mean"]), tuple(found["image_std"])


def is_classifier(path: str | Path, classes: int) -> bool:
    """Whether what is in a directory, or has a name on the hub, was trained to tell so many classes apart.

    Raises:
        HapError: nothing is there.
    """
    config = _config(path)
    # Anywhere in the name: some go on, as in LevitForImageClassificationWithTeacher.
    trained = any(head in name for name in config.architectures or () for head in HEADS)
    return bool(config.num_labels == classes and trained)


def _config(path: str | Path) -> Any:
    place = Path(path).expanduser()
    local = place.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1
    if local and not (place / "config.json").is_file():
        raise HapError(
            f"there is no model in {place}",
            expected="a directory with config.json, as save_pretrained writes it, or a name on the hub",
            got="a directory without config.json" if place.is_dir() else "no such directory",
            remedy="check the path",
        )
    with quiet():
        return _opened(path, lambda name: transformers().AutoConfig.from_pretrained(name))


def _opened(path: str | Path, read: Any) -> Any:
    name = os.path.expanduser(path)
    try:
        return read(name)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise HapError(
            f"{path} cannot be opened",
            expected="a directory as save_pretrained writes it, or a name on the Hugging Face hub",
            got=" ".join(str(error).split())[:200],
            remedy="check the name; what is not in the local cache needs a connection",
        ) from error


def _model(auto: Any, path: str | Path, settings: dict[str, Any], seed: int) -> Any:
    if Path(path).expanduser().joinpath("plan.json").is_file():
        raise HapError(
            f"{path} is a pruned model",
            expected="a dense one",
            got=f"{Path(path, 'plan.json')}",
            remedy=f"hap:{path} on the command line, hap.load in Python",
        )
    # The weights that are missing are drawn from the global generator: fork it.
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model, info = _opened(
            path, lambda name: auto.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **settings)
        )
    prefix = f"{model.base_model_prefix}."
    body = sorted(key for key in info["missing_keys"] if key.startswith(prefix))
    total = sum(name.startswith(prefix) for name, _ in model.named_parameters())
    if total and len(body) > total / 2:
        raise HapError(
            f"the weights in {path} are not those of {type(model).__name__}",
            expected="a file with the tensors of the configuration beside it",
            got=f"{len(body)} of {total} tensors missing, such as {body[0]}",
            remedy="fetch the directory again, or check its config.json",
        )
    if body:  # a pooler, say, that the pretraining had no use for
        log.warning("%s: %d tensors are not in %s and start at random: %s", prefix, len(body), path, ", ".join(body))
    return model.eval()


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer in a directory, or of a name on the hub.

    Raises:
        HapError: there is none.
    """
    with quiet():
        return _opened(path, lambda name: transformers().AutoTokenizer.from_pretrained(name))


def _check_labels(config: Any, labels: Sequence[str], path: str | Path) -> None:
    """Refuses a trained head of other classes; an encoder has none."""
    if not any(name.endswith(HEAD) for name in config.architectures or ()):
        return
    own = _names(config)
    if len(own) != len(labels):
        raise HapError(
            f"{path} was trained for other labels",
            expected=f"{len(labels)} classes: {', '.join(labels)}",
            got=f"{len(own)} classes: {', '.join(own[:8])}",
            remedy="choose the task that it was trained for, or start from the pretrained encoder",
        )
    _need_same_order(own, labels, path)


def _names(config: Any) -> list[str]:
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def _need_same_order(own: Sequence[str], labels: Sequence[str], path: str | Path) -> None:
    plain = [name.lower() for name in own]
    if plain != [name.lower() for name in labels] and set(plain) == {name.lower() for name in labels}:
        raise HapError(
            f"{path} has the data's labels in another order",
            expected=", ".join(labels),
            got=", ".join(own),
            remedy="map the data's labels to the model's",
        )


def _check_vocabulary(model: Any, tokenizer: Any, path: str | Path) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise HapError(
            f"the tokenizer in {path} does not fit the model",
            expected=f"at most {rows:,} tokens, the rows of the model's embedding",
            got=f"{len(tokenizer):,} tokens",
            remedy="take the tokenizer that the model was trained with, or model.resize_token_embeddings",
        )
