from __future__ import annotations

import random

import pytest
import torch

from hap import zoo
from hap.errors import HapError
from hap.zoo.imagefolder import _box
from hap.zoo.splits import IMAGENET

pytest.importorskip("torchvision", reason="finds and resizes images")
Image = pytest.importorskip("PIL.Image", reason="writes images")


def write(root, part, count, classes=("ant", "bee"), size=(40, 30)):
    for number, name in enumerate(classes):
        folder = root / part / name
        folder.mkdir(parents=True)
        for i in range(count):
            noise = random.Random(f"{part} {name} {i}").randbytes(size[0] * size[1] * 3)
            Image.frombytes("RGB", size, noise).save(folder / f"{i}.png" if number else folder / f"{i}.jpg")


def load(root, **options):
    return zoo.load_data(f"imagefolder:{root}", **{"image_size": 16, "batch_size": 4, **options})


def epoch(split, number=0):
    images, labels = zip(*split.epoch(number), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_three_folders(tmp_path):
    for part, count in (("train", 5), ("val", 3), ("test", 2)):
        write(tmp_path, part, count)
    data = load(tmp_path)
    assert [s.samples for s in (data.train, data.calibration, data.validation, data.test)] == [10, 10, 6, 4]
    assert (data.name, data.classes, data.input_shape) == (tmp_path.name, ("ant", "bee"), (3, 16, 16))
    images, labels = epoch(data.test)
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.float32
    assert labels.tolist() == [0, 0, 1, 1] and labels.dtype == torch.int64
    assert not torch.equal(epoch(data.validation)[0][:4], images)


@pytest.mark.parametrize("part", ["val", "test"])
def test_two_folders_cut_validation_from_train(tmp_path, part):
    write(tmp_path, "train", 5)
    write(tmp_path, part, 3)
    data = load(tmp_path, validation=4)
    assert [s.samples for s in (data.train, data.validation, data.test)] == [6, 4, 6]
    assert sorted([*data.train.indices.tolist(), *data.validation.indices.tolist()]) == list(range(10))
    assert data.train._files is data.validation._files is not data.test._files


def test_evaluation_images_are_resized_and_cropped(tmp_path):
    write(tmp_path, "train", 2)
    write(tmp_path, "test", 1)
    from torchvision import transforms

    recipe = transforms.Compose([transforms.Resize(18), transforms.CenterCrop(16), transforms.PILToTensor()])
    expected = recipe(Image.open(tmp_path / "test" / "bee" / "0.png"))
    images, _ = epoch(load(tmp_path).test)
    assert torch.equal(images[1], IMAGENET(expected[None])[0])


def test_epochs_of_training_differ_and_come_again(tmp_path):
    write(tmp_path, "train", 6)
    write(tmp_path, "test", 1)
    state = torch.get_rng_state()
    first, second = (epoch(load(tmp_path).train, number) for number in (0, 1))
    again, other = epoch(load(tmp_path).train), epoch(load(tmp_path, seed=1).train)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[0], other[0])
    fixed = load(tmp_path).calibration
    assert torch.equal(epoch(fixed, 0)[0], epoch(fixed, 1)[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_do_not_depend_on_workers(tmp_path):
    write(tmp_path, "train", 4)
    write(tmp_path, "test", 1)
    alone, helped = (epoch(load(tmp_path, workers=workers).train) for workers in (0, 2))
    assert torch.equal(alone[0], helped[0]) and torch.equal(alone[1], helped[1])


def test_a_share_of_the_batches_is_read_alone(tmp_path):
    write(tmp_path, "train", 4)
    write(tmp_path, "test", 1)
    train = load(tmp_path, batch_size=3).train
    whole = list(train.epoch(0))
    for rank in range(2):
        share = list(train.epoch(0, rank=rank, world=2))
        expected = [whole[(turn * 2 + rank) % len(whole)] for turn in range(len(share))]
        assert len(share) == -(-len(whole) // 2)
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(share, expected, strict=True))


def test_limit(tmp_path):
    for part in ("train", "val", "test"):
        write(tmp_path, part, 5)
    data = load(tmp_path, limit=3)
    assert [s.samples for s in (data.train, data.calibration, data.validation, data.test)] == [3] * 4


def test_boxes_lie_inside_with_the_area_and_aspect_asked_for():
    chance = random.Random(0)
    boxes = [_box(60, 80, chance) for _ in range(300)]
    for top, left, height, width in boxes:
        assert 0 <= top <= top + height <= 60 and 0 <= left <= left + width <= 80
        # Rounding moves a side by up to half a pixel.
        assert 0.07 <= height * width / 4800 <= 1
        assert (width - 0.5) / (height + 0.5) <= 4 / 3 and (width + 0.5) / (height - 0.5) >= 3 / 4
    assert len(set(boxes)) > 290


def test_box_of_a_strip_is_the_square_in_its_middle():
    assert _box(1000, 10, random.Random(0)) == (495, 0, 10, 10)


def test_missing_folders(tmp_path):
    with pytest.raises(HapError, match="none of them"):
        load(tmp_path)
    write(tmp_path, "train", 2)
    with pytest.raises(HapError, match=r"val/CLASS/\* or test/CLASS/\*"):
        load(tmp_path)


def test_empty_class(tmp_path):
    write(tmp_path, "train", 2)
    write(tmp_path, "test", 2)
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(HapError, match=r"no images in .*train"):
        load(tmp_path)


def test_classes_must_agree(tmp_path):
    write(tmp_path, "train", 2)
    write(tmp_path, "test", 2, classes=("ant", "cat"))
    with pytest.raises(HapError, match=r"other classes than train[\s\S]*bee.*cat"):
        load(tmp_path)


def test_own_validation_is_not_cut(tmp_path):
    for part in ("train", "val", "test"):
        write(tmp_path, part, 2)
    with pytest.raises(HapError, match="its own validation images"):
        load(tmp_path, validation=1)


def test_damaged_image(tmp_path):
    write(tmp_path, "train", 2)
    write(tmp_path, "test", 1)
    (tmp_path / "test" / "ant" / "0.jpg").write_bytes(b"no image")
    with pytest.raises(HapError, match=r"cannot read .*0\.jpg"):
        epoch(load(tmp_path).test)


def test_the_normalisation_can_be_a_model_s(tmp_path):
    write(tmp_path, "train", 5)
    write(tmp_path, "test", 2)
    half = zoo.Normalisation(255, (0.5,) * 3, (0.25,) * 3)
    usual, other = (epoch(load(tmp_path, normalisation=chosen).test)[0] for chosen in (None, half))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET.mean, IMAGENET.std))
    torch.testing.assert_close(other, (usual * std + mean - 0.5) / 0.25)
    with pytest.raises(HapError, match="normalisation of its own"):
        zoo.load_data("digits", normalisation=half)
