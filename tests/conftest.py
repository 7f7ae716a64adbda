"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# Examples are the same in every run, and a busy machine fails no test.
settings.register_profile("hap", derandomize=True, deadline=None)
settings.load_profile("hap")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # several workers share the cores already


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of data sets and trained weights: $HAP_DATA, or shared/data beside the repository."""
    path = Path(os.environ.get("HAP_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"there is no data at {path}; name another folder with HAP_DATA")
    return path


WORDS = (
    "a",
    "the",
    "film",
    "plot",
    "cast",
    "is",
    "was",
    "good",
    "bad",
    "very",
    "not",
    "and",
    "but",
    "long",
    "short",
    "dull",
)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT encoder of random weights, 2 layers of 4 heads, and its tokenizer, as `save_pretrained` writes them."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS))}
    inside = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inside.pre_tokenizer = pre_tokenizers.Whitespace()
    inside.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inside,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
    )
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = transformers.BertModel(config)
    path = tmp_path_factory.mktemp("tiny-bert")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def glue_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny files in the layout of GLUE: MRPC with a labelled test set, SST-2 without one."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path_factory.mktemp("glue")
    order = torch.Generator().manual_seed(0)

    def texts(count: int) -> tuple[list[str], list[int]]:
        lengths = torch.randint(2, 20, (count,), generator=order).tolist()
        words = [[WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=order).tolist()] for n in lengths]
        return [" ".join(text) for text in words], [int("good" in text) for text in words]

    for name, count in {"mrpc_train": 60, "mrpc_validation": 20, "mrpc_test": 24, "sst2_train": 50}.items():
        (first, labels), (second, _) = texts(count), texts(count)
        columns = ("sentence1", "sentence2") if name.startswith("mrpc") else ("sentence",)
        table = {**dict(zip(columns, (first, second), strict=False)), "label": labels, "idx": list(range(count))}
        parquet.write_table(pyarrow.table(table), path / f"{name}.parquet")
    (path / "sst2").mkdir()
    for name, count, hidden in (("validation", 16, False), ("test", 12, True)):
        sentences, labels = texts(count)
        table = {"sentence": sentences, "label": [-1] * count if hidden else labels}
        parquet.write_table(pyarrow.table(table), path / "sst2" / f"{name}-00000-of-00001.parquet")
    return path
