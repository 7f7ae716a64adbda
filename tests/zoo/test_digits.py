from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hap import zoo

pytest.importorskip("sklearn", reason="scikit-learn holds the digits")


def test_splits_are_disjoint_and_cover():
    data = zoo.load_data("digits")
    parts = [split.indices.tolist() for split in (data.train, data.validation, data.test)]
    assert [len(part) for part in parts] == [1294, 143, 360]
    assert sorted(sum(parts, [])) == list(range(1797))
    assert data.calibration.indices.tolist() == parts[0]


def test_test_images_do_not_depend_on_the_seed():
    first, second = (zoo.load_data("digits", seed=seed) for seed in (0, 1))
    assert torch.equal(first.test.indices, second.test.indices)
    assert not torch.equal(first.validation.indices, second.validation.indices)


def test_batches():
    data = zoo.load_data("digits", batch_size=1294)
    images, labels = next(iter(data.calibration))
    assert (data.name, data.input_shape, data.classes) == ("digits", (1, 8, 8), tuple("0123456789"))
    assert images.shape == (1294, 1, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert abs(float(images.mean())) < 0.02 and abs(float(images.std()) - 1) < 0.02
    assert set(labels.tolist()) == set(range(10))


def test_limit_holds_for_every_split():
    data = zoo.load_data("digits", limit=50)
    assert [s.samples for s in (data.train, data.calibration, data.validation, data.test)] == [50] * 4


def test_training_reaches_97_percent():
    data = zoo.load_data("digits", batch_size=64)
    model = zoo.build("digits-cnn")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=6 * len(data.train))
    for _ in range(6):
        for images, labels in data.train:
            optimiser.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimiser.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in data.test)
    assert right / data.test.samples > 0.97
