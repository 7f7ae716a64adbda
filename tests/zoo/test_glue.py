from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from hap import zoo
from hap.errors import HapError
from hap.zoo.glue import TASKS, directory_of, f1, matthews, task_of

transformers = pytest.importorskip("transformers")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path):
    return transformers.AutoTokenizer.from_pretrained(tiny_bert)


def texts_of(split, tokenizer) -> list[str]:
    return [tokenizer.decode(row[row != 0]) for batch in split for row in batch["input_ids"]]


def test_three_labelled_files_are_the_splits(glue_dir: Path, tokenizer) -> None:
    data = zoo.load_texts("glue/mrpc", glue_dir, tokenizer, batch_size=8, max_length=32)
    assert (data.name, data.classes, data.input_shape) == ("MRPC", ("not_equivalent", "equivalent"), (32,))
    assert [s.samples for s in (data.train, data.calibration, data.validation, data.test)] == [60, 60, 20, 24]
    assert list(data.metrics) == ["f1"]
    source = parquet.read_table(glue_dir / "mrpc_test.parquet").to_pylist()
    pairs = {
        tokenizer(row["sentence1"], row["sentence2"], truncation=True, max_length=32).input_ids[1]: row
        for row in source
    }
    assert len(pairs) > 1
    expected = {
        tokenizer.decode(tokenizer(r["sentence1"], r["sentence2"], truncation=True, max_length=32).input_ids): r[
            "label"
        ]
        for r in source
    }
    found = {
        text: label
        for batch in data.test
        for text, label in zip(texts_of([batch], tokenizer), batch["labels"].tolist(), strict=True)
    }
    assert found == expected


def test_without_labelled_test_files_validation_is_cut_from_training(glue_dir: Path, tokenizer) -> None:
    data = zoo.load_texts("glue/sst2", glue_dir, tokenizer, batch_size=8)
    assert [s.samples for s in (data.train, data.validation, data.test)] == [45, 5, 16]
    assert set(data.train.indices.tolist()).isdisjoint(data.validation.indices.tolist())
    assert set(data.train.indices.tolist()) == set(data.calibration.indices.tolist())
    other = zoo.load_texts("glue/sst2", glue_dir, tokenizer, seed=1, validation=9)
    assert other.validation.samples == 9
    assert torch.equal(data.test.indices, other.test.indices)


def test_one_file_alone_is_divided(glue_dir: Path, tokenizer, tmp_path: Path, caplog) -> None:
    (tmp_path / "mrpc_validation.parquet").symlink_to(glue_dir / "mrpc_train.parquet")
    first, second = (zoo.load_texts("glue/mrpc", tmp_path, tokenizer, seed=seed) for seed in range(2))
    parts = [set(split.indices.tolist()) for split in (first.train, first.validation, first.test)]
    assert [len(part) for part in parts] == [44, 4, 12]
    assert len(set.union(*parts)) == 60
    assert torch.equal(first.test.indices, second.test.indices)
    assert not torch.equal(first.validation.indices, second.validation.indices)
    assert "a validation or test file alone" in caplog.text


def test_limit_and_length(glue_dir: Path, tokenizer) -> None:
    data = zoo.load_texts("glue/mrpc", glue_dir, tokenizer, limit=10, max_length=9)
    assert [s.samples for s in (data.train, data.validation, data.test)] == [10, 10, 10]
    assert max(batch["input_ids"].shape[1] for batch in data.train) == 9


def test_metrics_against_scikit_learn_by_hand() -> None:
    labels, predictions = torch.tensor([1, 1, 1, 0, 0]), torch.tensor([1, 1, 0, 1, 0])
    assert f1(labels, predictions) == pytest.approx(2 / 3)  # precision and recall are 2 / 3
    assert matthews(labels, predictions) == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    assert f1(labels, torch.zeros(5, dtype=torch.int64)) == 0.0


@pytest.mark.parametrize("name", TASKS)
def test_every_task_reads_its_columns(name: str, tokenizer, tmp_path: Path) -> None:
    task = task_of(name)
    table = {**dict.fromkeys(task.columns, ["a good film"] * 20), "label": [0, 1] * 10}
    parquet.write_table(pyarrow.table(table), tmp_path / f"{name.removeprefix('glue/')}_train.parquet")
    assert zoo.load_texts(name, tmp_path, tokenizer).classes == task.labels


def write(path: Path, **columns) -> None:
    parquet.write_table(pyarrow.table({"sentence": ["good", "bad"], "label": [1, 0], **columns}), path)


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"label": [0, 2]}, "labels 2"),
        ({"label": [0, None]}, "labels None"),
        ({"label": [0, -1]}, "labels -1"),
        ({"sentence": ["good", None]}, "an empty one"),
    ],
)
def test_damaged_rows_are_named(columns, text: str, tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "sst2_train.parquet", **columns)
    with pytest.raises(HapError, match=text) as error:
        zoo.load_texts("glue/sst2", tmp_path, tokenizer)
    assert "sst2_train.parquet" in str(error.value)


def test_a_file_of_another_task(tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "mrpc_train.parquet")
    with pytest.raises(HapError, match="columns sentence1, sentence2 are missing") as error:
        zoo.load_texts("glue/mrpc", tmp_path, tokenizer)
    assert "columns sentence, label" in error.value.got


def test_bad_input(glue_dir: Path, tokenizer, tmp_path: Path) -> None:
    (tmp_path / "mrpc_train.parquet").write_text("no Parquet")
    for task, root, options, text in (
        ("glue/mrcp", glue_dir, {}, "did you mean 'glue/mrpc'"),
        ("glue/rte", glue_dir, {}, "there is no glue/rte"),
        ("glue/mrpc", tmp_path / "none", {}, "no such directory"),
        ("glue/mrpc", tmp_path, {}, "a Parquet file"),
        ("glue/mrpc", glue_dir, {"validation": 3}, "a validation file of its own"),
        ("glue/mrpc", glue_dir, {"max_length": 65}, "longer texts are cut"),
        ("glue/sst2", glue_dir, {"validation": 50}, "cannot be divided"),
    ):
        with pytest.raises(HapError) as error:
            zoo.load_texts(task, root, tokenizer, **options)
        assert text in str(error.value)


def test_real_files(data_dir: Path, tokenizer) -> None:
    if not (data_dir / "glue" / "mrpc_test.parquet").is_file():
        pytest.skip("there is no GLUE in the data directory")
    data = zoo.load_texts("glue/mrpc", data_dir / "glue", tokenizer, limit=50)
    assert [s.samples for s in (data.train, data.validation, data.test)] == [50, 50, 50]


def test_the_folder_of_the_benchmark_is_found(
    glue_dir: Path, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the directory that is given, or in that of the environment; the directory's own files come first."""
    (tmp_path / "glue").symlink_to(glue_dir)
    whole = zoo.load_texts("glue/mrpc", glue_dir, tokenizer)
    assert texts_of(zoo.load_texts("glue/mrpc", tmp_path, tokenizer).test, tokenizer) == texts_of(whole.test, tokenizer)
    monkeypatch.setenv("HAP_DATA", str(tmp_path))
    assert directory_of("glue/sst2", None) == tmp_path / "glue"
    (tmp_path / "mrpc_test.parquet").touch()
    assert directory_of("glue/mrpc", None) == tmp_path
    monkeypatch.delenv("HAP_DATA")
    with pytest.raises(HapError, match=r"where is glue/sst2\?[\s\S]*HAP_DATA"):
        zoo.load_texts("glue/sst2", None, tokenizer)
