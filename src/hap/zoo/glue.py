"""Tasks of the GLUE benchmark (Wang et al., ICLR 2019) from Parquet files, read, tokenised and cut into splits.

The labels of GLUE's test sets are not public. Where there is no test file with labels, the validation file serves as
the test set, as is usual in the literature, and validation is cut from the training set.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from hap.errors import HapError, unknown
from hap.types import Metric
from hap.zoo.optional import require
from hap.zoo.splits import DataSplits, Options, cut_validation, divide, in_order, root_of, shuffled
from hap.zoo.texts import Padding, Texts, TextSplit
from hap.zoo.tokens import Cache

log = logging.getLogger(__name__)
LAYOUTS = ("{task}_{split}.parquet", "{task}/{split}-*.parquet")  # one folder, or Hugging Face's
SPLITS = ("train", "validation", "test")
POOL = 64  # batches that are sorted by length together
WHOLE = 2**31  # as a pool: all batches


def f1(labels: torch.Tensor, predictions: torch.Tensor) -> float:
    """The F1 score of class 1, in [0, 1]."""
    return float(require("sklearn.metrics", "text").f1_score(labels.numpy(), predictions.numpy(), zero_division=0.0))


def matthews(labels: torch.Tensor, predictions: torch.Tensor) -> float:
    """Matthews' correlation coefficient, in [-1, 1]."""
    return float(require("sklearn.metrics", "text").matthews_corrcoef(labels.numpy(), predictions.numpy()))


@dataclass(frozen=True)
class Task:
    """A classification of texts or of pairs of texts.

    Attributes:
        title: for tables.
        columns: of the text, or of the pair's first and second.
        labels: names of the classes, by label.
        metrics: what GLUE reports beside accuracy.
    """

    title: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: Mapping[str, Metric] = field(default_factory=dict)


ENTAILMENT = ("entailment", "not_entailment")
TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "glue/cola": Task("CoLA", ("sentence",), ("unacceptable", "acceptable"), {"matthews": matthews}),
        "glue/mrpc": Task("MRPC", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), {"f1": f1}),
        "glue/qnli": Task("QNLI", ("question", "sentence"), ENTAILMENT),
        "glue/rte": Task("RTE", ("sentence1", "sentence2"), ENTAILMENT),
        "glue/sst2": Task("SST-2", ("sentence",), ("negative", "positive")),
    }
)


def task_of(name: str) -> Task:
    """The task of that name.

    Raises:
        HapError: there is none.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def directory_of(task: str, directory: str | Path | None) -> Path:
    """Where a task's files are: in the directory, or in the folder ``glue`` in it; None: of what HAP_DATA says.

    Raises:
        HapError: there are none, or nothing says where.
    """
    root = root_of(task, directory, expected="the directory of its files (--data)", got="neither: ")
    for place in (root, root / task.partition("/")[0]):
        if any(_find(place, task, split) for split in SPLITS):
            return place
    raise _missing(task, root)


def load_texts(
    task: str,
    directory: str | Path | None,
    tokenizer: Any,
    *,
    batch_size: int = 32,
    seed: int = 0,
    validation: int | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    cache: str | Path | None = None,
) -> DataSplits:
    """A task's texts, tokenised once, in batches as Hugging Face models read them.

    Args:
        task: a key of `TASKS`.
        directory: holds ``mrpc_train.parquet`` and so on, or ``mrpc/train-*.parquet`` as on the Hugging Face hub; or a
            folder ``glue`` that does. None: what the environment variable HAP_DATA says.
        tokenizer: the model's, from `transformers`.
        batch_size: texts in a batch.
        seed: of the validation split and the order of training, as in `load_data`.
        validation: texts cut from the training set where the validation file serves as test; None: a tenth of it.
        limit: at most so many texts in each split, a random part of it.
        max_length: the most tokens of a text or pair; what is longer is cut. None: 128, or what the tokenizer allows.
        cache: a directory where the tokens are kept, so that the next run need not make them; None keeps none.

    Returns:
        Splits of dict batches. With labelled training, validation and test files these are the splits. Without a test
        file, see the module. With one file alone, a fifth of it is the test set, the same whatever the seed.

    Raises:
        HapError: unknown task, files or columns that miss or are damaged, labels out of range, or a tokenizer that
            cannot pad or reads no texts of this length.
    """
    what, root = task_of(task), directory_of(task, directory)
    longest = _longest(tokenizer, max_length)
    options = Options(batch_size, seed, validation, limit, None, 0)
    padding = Padding.of(tokenizer)
    tokens = Cache(Path(cache) if cache is not None else None, tokenizer, longest)

    def read(split: str) -> Texts | None:
        files = _find(root, task, split)
        return tokens(files, f"{task}-{split}", lambda: _read(files, what)) if files else None

    parts = _parts(task, root, options, read)

    def split(name: str, *, pool: int, shuffle: bool = False) -> TextSplit:
        texts, indices = parts[name]
        return TextSplit(texts, indices, padding=padding, batch_size=batch_size, seed=seed, pool=pool, shuffle=shuffle)

    return DataSplits(
        name=what.title,
        classes=what.labels,
        input_shape=(longest,),
        train=split("train", pool=POOL, shuffle=True),
        calibration=split("train", pool=1),  # a part of it that is read must not be that of the short texts
        validation=split("validation", pool=WHOLE),
        test=split("test", pool=WHOLE),
        metrics=what.metrics,
    )


Part = tuple[Texts, torch.Tensor]  # and which of them


def _parts(task: str, root: Path, options: Options, read: Callable[[str], Texts | None]) -> dict[str, Part]:
    train, validation, test = (_labelled(read(split)) for split in SPLITS)
    if train is not None and validation is not None and test is not None:
        if options.validation is not None:
            raise HapError(
                f"{task} has a validation file of its own", expected="no validation=", got=str(options.validation)
            )
        return {
            "train": (train, shuffled(len(train.labels), options)),
            "validation": (validation, in_order(len(validation.labels), options.limit)),
            "test": (test, in_order(len(test.labels), options.limit)),
        }
    reported = test or validation
    if train is not None and reported is not None:
        indices = cut_validation(len(train.labels), options)
        return {
            "train": (train, indices[0]),
            "validation": (train, indices[1]),
            "test": (reported, in_order(len(reported.labels), options.limit)),
        }
    only = train or reported
    if only is None:
        raise _missing(task, root)  # the only files have hidden labels
    name = "training" if only is train else "validation or test"
    log.warning("%s has a %s file alone: training, validation and test are parts of it", task, name)
    rest, held_out = divide(len(only.labels), max(1, len(only.labels) // 5), seed=0)
    indices = cut_validation(len(rest), options)
    return {
        "train": (only, rest[indices[0]]),
        "validation": (only, rest[indices[1]]),
        "test": (only, held_out[: options.limit]),
    }


def _labelled(texts: Texts | None) -> Texts | None:
    """None for a test set whose labels are not public: all are -1."""
    return None if texts is None or bool((texts.labels == -1).all()) else texts


def _missing(task: str, root: Path) -> HapError:
    names = [layout.format(task=_short(task), split="train") for layout in LAYOUTS]
    return HapError(
        f"there is no {task} in {root}",
        expected=f"{' or '.join(names)}, and the same for validation, or one of them",
        got="neither, with labels" if root.is_dir() else "no such directory",
        remedy="give the directory of the Parquet files with --data",
    )


def _short(task: str) -> str:
    return task.rpartition("/")[2]


def _find(root: Path, task: str, split: str) -> list[Path]:
    for layout in LAYOUTS:
        if found := sorted(root.glob(layout.format(task=_short(task), split=split))):
            return found
    return []


def _read(files: Sequence[Path], task: Task) -> tuple[list[list[str]], torch.Tensor]:
    """The columns of texts, and the labels."""
    tables = [_table(path, task) for path in files]
    columns = [[text for table in tables for text in table[name].to_pylist()] for name in task.columns]
    source = ", ".join(map(str, files))
    labels = [label for table in tables for label in table["label"].to_pylist()]
    if any(text is None for column in columns for text in column):
        raise _damaged(source, "a text in every row", "an empty one")
    hidden = set(labels) == {-1}
    wrong = {str(label) for label in labels if label is None or not 0 <= label < len(task.labels)}
    if wrong and not hidden:
        names = ", ".join(f"{i} ({name})" for i, name in enumerate(task.labels))
        raise _damaged(source, f"labels {names}", f"labels {', '.join(sorted(wrong)[:5])}")
    if not labels:
        raise _damaged(source, "at least one row", "none")
    return columns, torch.tensor(labels, dtype=torch.int64)


def _table(path: Path, task: Task) -> Any:
    pyarrow, parquet = require("pyarrow", "text"), require("pyarrow.parquet", "text")
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(str(path), "a Parquet file", " ".join(str(error).split())[:120]) from error
    wanted = [*task.columns, "label"]
    if missing := [name for name in wanted if name not in table.column_names]:
        raise HapError(
            f"{path} does not hold {task.title}: the columns {', '.join(missing)} are missing",
            expected=f"columns {', '.join(wanted)}",
            got=f"columns {', '.join(table.column_names)}",
            remedy="check that --task fits the file",
        )
    return table


def _longest(tokenizer: Any, max_length: int | None) -> int:
    most = tokenizer.model_max_length
    if max_length is None:
        return min(128, most)
    if not 8 <= max_length <= most:
        bounded = most < 10**9  # else nobody has told the tokenizer
        raise HapError(
            "max_length is out of range",
            expected=f"8 to {most} tokens, the most that the model's tokenizer gives"
            if bounded
            else "at least 8 tokens",
            got=str(max_length),
            remedy="longer texts are cut" if max_length > most else "",
        )
    return max_length


def _damaged(source: str, expected: str, got: str) -> HapError:
    return HapError(f"cannot read {source}", expected=expected, got=got, remedy="fetch the file again")
