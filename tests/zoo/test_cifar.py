from __future__ import annotations

import hashlib
import io
import pickle

import pytest
import torch

from hap import zoo
from hap.batches import evaluating
from hap.errors import HapError
from hap.zoo import cifar

pyarrow = pytest.importorskip("pyarrow", reason="reads Parquet")
parquet = pytest.importorskip("pyarrow.parquet", reason="reads Parquet")
pytest.importorskip("torchvision", reason="decodes images")
Image = pytest.importorskip("PIL.Image", reason="writes images")

TRAIN, TEST = 40, 12


def pixels(count, seed):
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def encode(image, form):
    stream = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(stream, form)
    return stream.getvalue()


def labels(count):
    return [i % 10 for i in range(count)]


def write(path, images, marks=None, *, struct=False, form="PNG", columns=("img", "label")):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = [encode(image, form) for image in images]
    column = pyarrow.array([{"bytes": d, "path": None} for d in data] if struct else data)
    marks = labels(len(images)) if marks is None else marks
    parquet.write_table(pyarrow.table(dict(zip(columns, (column, pyarrow.array(marks)), strict=True))), path)


def flat(root):
    write(root / "cifar10_train.parquet", pixels(TRAIN, 0))
    write(root / "cifar10_test.parquet", pixels(TEST, 1))


def hugging_face(root):
    train = pixels(TRAIN, 0)
    for i, part in enumerate(train.split(TRAIN // 2)):
        write(root / "plain_text" / f"train-0000{i}-of-00002.parquet", part, struct=True)
    write(root / "plain_text" / "test-00000-of-00001.parquet", pixels(TEST, 1), struct=True)


def pickled(root, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = root / "cifar-10-batches-py"
    folder.mkdir()

    def dump(name, data):
        content = pickle.dumps(data)
        (folder / name).write_bytes(content)
        return [name, hashlib.md5(content).hexdigest()]

    def batch(images):
        return {"data": images.flatten(1).numpy(), "labels": labels(len(images))}

    # torchvision compares checksums: give it those of the small files.
    monkeypatch.setattr(CIFAR10, "train_list", [dump("data_batch_1", batch(pixels(TRAIN, 0)))])
    monkeypatch.setattr(CIFAR10, "test_list", [dump("test_batch", batch(pixels(TEST, 1)))])
    name, digest = dump("batches.meta", {"label_names": list(cifar.CLASSES)})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": digest})


@pytest.mark.parametrize("layout", ["flat", "hugging face", "pickled"])
def test_every_layout_gives_the_same_images(tmp_path, monkeypatch, layout):
    if layout == "pickled":
        pickled(tmp_path, monkeypatch)
    else:
        {"flat": flat, "hugging face": hugging_face}[layout](tmp_path)
    data = zoo.load_data(f"cifar10:{tmp_path}", batch_size=TRAIN)
    assert (data.name, data.classes, data.input_shape) == ("CIFAR-10", cifar.CLASSES, (3, 32, 32))
    assert [s.samples for s in (data.train, data.calibration, data.validation, data.test)] == [36, 36, 4, 12]
    for split, source in ((data.calibration, pixels(TRAIN, 0)), (data.test, pixels(TEST, 1))):
        images, marks = next(iter(split))
        torch.testing.assert_close(images, cifar.IMAGENET(source[split.indices]))
        expected = labels(TRAIN // 2) * 2 if layout == "hugging face" and len(source) == TRAIN else labels(len(source))
        assert marks.tolist() == [expected[i] for i in split.indices.tolist()]


def test_splits_are_disjoint_and_cover(tmp_path):
    flat(tmp_path)
    data = zoo.load_data(f"cifar10:{tmp_path}", validation=7)
    assert data.validation.samples == 7
    assert sorted([*data.train.indices.tolist(), *data.validation.indices.tolist()]) == list(range(TRAIN))
    assert torch.equal(data.train.indices, data.calibration.indices)
    assert data.test.indices.tolist() == list(range(TEST))


def test_only_training_is_shuffled_and_augmented(tmp_path):
    flat(tmp_path)
    data = zoo.load_data(f"cifar10:{tmp_path}", batch_size=TRAIN)
    for split in (data.calibration, data.validation, data.test):
        assert torch.equal(next(iter(split))[0], next(iter(split))[0])
    (first, first_labels), (second, second_labels) = next(iter(data.train)), next(iter(data.train))
    assert not torch.equal(first_labels, second_labels)
    again = zoo.load_data(f"cifar10:{tmp_path}", batch_size=TRAIN).train
    assert torch.equal(next(iter(again))[0], first) and torch.equal(next(iter(again))[0], second)
    # Black pixels come in at the edges, which random images have nowhere.
    black = cifar.IMAGENET(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))
    blank = lambda images: int((images == black).all(1).all(2).sum())  # noqa: E731
    assert blank(first) > 0 and blank(next(iter(data.calibration))[0]) == 0


def test_only_the_images_that_are_read_are_decoded(tmp_path, monkeypatch):
    flat(tmp_path)
    decoded = []
    original = cifar._DecodedOnce._image
    monkeypatch.setattr(cifar._DecodedOnce, "_image", lambda self, i: decoded.append(i) or original(self, i))
    data = zoo.load_data(f"cifar10:{tmp_path}", batch_size=5)
    decoded.clear()
    for _ in range(2):
        next(iter(data.calibration))
    assert sorted(decoded) == sorted(i for i in data.calibration.indices[:5].tolist() if i != 0)


def test_jpeg_is_named(tmp_path):
    write(tmp_path / "cifar10_train.parquet", pixels(TRAIN, 0), form="JPEG")
    write(tmp_path / "cifar10_test.parquet", pixels(TEST, 1), form="JPEG")
    assert zoo.load_data(f"cifar10:{tmp_path}").name == "CIFAR-10 (JPEG)"


def test_missing_directory_and_files(tmp_path):
    with pytest.raises(HapError, match="no such directory"):
        zoo.load_data(f"cifar10:{tmp_path / 'nowhere'}")
    write(tmp_path / "cifar10_train.parquet", pixels(TRAIN, 0))
    with pytest.raises(
        HapError, match=r"cifar10_test\.parquet; plain_text/train-\*\.parquet[\s\S]*cifar-10-batches-py"
    ):
        zoo.load_data(f"cifar10:{tmp_path}")


def test_damaged_parquet(tmp_path):
    flat(tmp_path)
    path = tmp_path / "cifar10_test.parquet"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(HapError, match=r"cannot read .*cifar10_test\.parquet"):
        zoo.load_data(f"cifar10:{tmp_path}")


def test_damaged_pickles(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(HapError, match="the files that torchvision downloads"):
        zoo.load_data(f"cifar10:{tmp_path}")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": pixels(0, 0)}, "at least one image"),
        ({"columns": ("picture", "label")}, "columns 'img'"),
        ({"marks": [10] * TRAIN}, "labels from 0 to 9"),
        ({"marks": [None] * TRAIN}, "labels from 0 to 9"),
        ({"marks": ["cat"] * TRAIN}, "a Parquet file of images and labels"),
        ({"images": pixels(TRAIN, 0)[:, :, :16]}, r"shape \(3, 32, 32\)"),
    ],
)
def test_unfit_contents(tmp_path, change, message):
    flat(tmp_path)
    change = dict(change)
    write(tmp_path / "cifar10_train.parquet", change.pop("images", pixels(TRAIN, 0)), **change)
    with pytest.raises(HapError, match=message):
        zoo.load_data(f"cifar10:{tmp_path}")


@pytest.mark.parametrize("content", [b"no image", b"", None])
def test_damaged_image(tmp_path, content):
    flat(tmp_path)
    images = [encode(image, "PNG") for image in pixels(TRAIN, 0)]
    images[3] = content
    table = pyarrow.table({"img": pyarrow.array(images, pyarrow.binary()), "label": labels(TRAIN)})
    parquet.write_table(table, tmp_path / "cifar10_train.parquet")
    data = zoo.load_data(f"cifar10:{tmp_path}")
    with pytest.raises(HapError, match="cannot read image 3 of"):
        list(data.train), list(data.validation)


def test_real_weights_on_real_images(real_data):
    data = zoo.load_data(f"cifar10:{real_data}", batch_size=250)
    assert data.name == "CIFAR-10 (JPEG)"
    assert [s.samples for s in (data.train, data.validation, data.test)] == [45_000, 5_000, 10_000]
    model = zoo.build("resnet20", weights=real_data / "resnet20.safetensors")
    batches = data.test.epoch(0)
    with evaluating(model), torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in (next(batches) for _ in range(4)))
    assert right / 1000 > 0.84
