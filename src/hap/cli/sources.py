"""What the words behind --model, --weights and --device stand for."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from hap import pretrained, zoo
from hap.errors import HapError, missing, unknown
from hap.pipeline.origin import parts
from hap.zoo.weights import load_weights_

log = logging.getLogger(__name__)
SPECS = "zoo:NAME, torchvision:NAME, timm:NAME, hf:PATH or FILE.py:FUNCTION"


def load_model(spec: str, weights: Path | None, classes: int, *, seed: int = 0) -> nn.Module:
    """A classifier of images from a spec, one of `SPECS`, with its weights.

    PATH is a directory or a name on the Hugging Face hub, which has weights of its own. A FUNCTION takes no arguments
    and returns the model; `weights` may be None if it loads its own.

    Args:
        seed: of weights that come from nowhere else.

    Raises:
        HapError: the spec is malformed, the name unknown, a package missing, or the weights do not fit.
    """
    source, name = parts(spec)
    if source == "zoo":
        return zoo.build(name, weights=weights, classes=classes, seed=seed)
    if source == "hf":
        model = pretrained.load_image_classifier(name, classes, seed=seed)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = _built(spec, source, name, classes)
    if weights is not None:
        load_weights_(model, weights)
    return model


def image_size(spec: str) -> int | None:
    """Height and width of the images that a model from a spec was made for, where it says so and they are equal."""
    source, name = parts(spec)
    found: Any = None
    if source == "hf":
        found = pretrained.image_size(name)
    elif source == "timm" and (settings := _timm_settings(name)) is not None:
        found = settings.input_size[-2:]
    sides = {*found} if isinstance(found, Sequence) else {found}
    return sides.pop() if len(sides) == 1 else None


def normalisation(spec: str) -> zoo.Normalisation | None:
    """Of the images that a model from a spec was trained with, where its files say so."""
    source, name = parts(spec)
    found: Any = None
    if source == "hf":
        found = pretrained.image_statistics(name)
        if found is None:
            log.warning("no file of %s says how its images are normalised: they are by ImageNet's constants", name)
    elif source == "timm" and (settings := _timm_settings(name)) is not None:
        found = 255, settings.mean, settings.std
    return None if found is None else zoo.Normalisation(*found)


def _built(spec: str, source: str, name: str, classes: int) -> nn.Module:
    if source == "torchvision":
        return _torchvision(name, classes)
    if source == "timm":
        return _of_timm(name, classes)
    if source.endswith(".py"):
        return _from_file(Path(source), name)
    raise HapError(
        f"{spec!r} names no model",
        expected=SPECS,
        got=spec,
        remedy=f"for example zoo:resnet20; the zoo has {', '.join(zoo.MODELS)}",
    )


def _torchvision(name: str, classes: int) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise missing("torchvision:NAME needs", "torchvision", "vision", error) from error
    if name not in models.list_models():
        raise unknown("torchvision model", name, models.list_models())
    return models.get_model(name, weights=None, num_classes=classes)


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise missing("timm:NAME needs", "timm", "models", error) from error


def _timm_settings(name: str) -> Any:
    """What timm knows of a model's images.

    Raises:
        HapError: it has no such model.
    """
    timm = _timm()
    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        kind = name.partition(".")[0]
        raise unknown("timm model", name, timm.list_pretrained(f"{kind}*")) from error


def _of_timm(name: str, classes: int) -> nn.Module:
    timm = _timm()
    _timm_settings(name)
    model: nn.Module = timm.create_model(name, num_classes=classes)
    return model


def _from_file(path: Path, function: str) -> nn.Module:
    if not path.is_file():
        raise HapError(f"there is no file {path}", expected="a Python file that defines the model")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _importable(spec.name, module, path.parent.absolute()):
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise _failed(path, "it", error) from error
        build = getattr(module, function, None)
        if not callable(build):
            raise HapError(f"{path} has no function {function!r}", expected="a function that returns the model")
        try:
            model = build()
        except Exception as error:
            raise _failed(path, function, error) from error
    if not isinstance(model, nn.Module):
        raise HapError(f"{function} in {path} returned no model", expected="nn.Module", got=type(model).__name__)
    return model


@contextlib.contextmanager
def _importable(name: str, module: ModuleType, folder: Path) -> Iterator[None]:
    """As where it is run as a script: known by its name, as dataclasses need it, beside what lies in its folder.

    The name stays known, unless it was taken: classes of the model are looked up by it.
    """
    known = sys.modules.setdefault(name, module) is module
    sys.path.insert(0, str(folder))
    try:
        yield
    except BaseException:
        if known:
            del sys.modules[name]
        raise
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _failed(path: Path, what: str, error: Exception) -> HapError:
    """The error for the user's own code, with the place in it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    place = f" in line {lines[-1]}" if lines else ""
    return HapError(
        f"{path} does not make a model: {what} failed{place}",
        expected="a function without arguments that returns the model",
        got=f"{type(error).__name__}: {error}",
    )


def device(name: str) -> torch.device:
    """``auto`` is the first GPU, or the CPU without one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise HapError(
            f"there is no device {name!r}",
            expected="auto, cpu, cuda or cuda:N",
            got=str(error).splitlines()[0],
            remedy="--device cpu always works",
        ) from error
    if found.type not in ("cpu", "cuda"):
        raise HapError(
            f"{found.type} devices are not supported",
            expected="auto, cpu, cuda or cuda:N",
            got=repr(name),
            remedy="--device cpu: sums are taken in float64, which some devices lack",
        )
    return found
