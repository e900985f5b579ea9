"""Data sets: splits, digests, augmentation, and data that is damaged or wrong."""

import numpy as np
import pytest
import torch

from common import datasets
from common.datasets import Batches, DataError, load, stratified
from common.settings import AugmentationSettings, DatasetSettings


def test_digits_are_split_by_class_without_overlap():
    data = load(DatasetSettings(source="digits", train=600))
    assert {k: len(v) for k, v in data.labels.items()} == {"train": 600, "validation": 197, "test": 1000}
    assert data.image_shape == (1, 8, 8) and data.images["train"].dtype == torch.uint8
    for labels in data.labels.values():
        counts = torch.bincount(labels, minlength=10) / len(labels)
        assert (counts - 0.1).abs().max() < 0.01
    rows = np.concatenate([images.reshape(len(images), -1).numpy() for images in data.images.values()])
    from sklearn.datasets import load_digits

    everything = np.sort(load_digits().data.astype(np.uint8).view("S64").ravel())
    assert np.array_equal(np.sort(np.ascontiguousarray(rows).view("S64").ravel()), everything)


def test_the_split_is_fixed_and_follows_its_seed():
    one, same, other = (load(DatasetSettings(split_seed=seed)) for seed in (0, 0, 1))
    assert one.digest == same.digest != other.digest


def test_changed_digits_are_noticed(monkeypatch):
    monkeypatch.setattr(datasets, "DIGITS_SHA256", "0" * 64)
    with pytest.raises(DataError, match="damaged or changed"):
        load(DatasetSettings())


def test_stratified_parts_are_disjoint_and_proportional():
    labels = np.repeat([0, 1, 2], [70, 20, 10])
    first, second = stratified(labels, [50, 33], seed=1)
    assert len(first) == 50 and len(second) == 33 and not set(first) & set(second)
    assert np.bincount(labels[first]).tolist() == [35, 10, 5]
    assert abs(np.bincount(labels[second], minlength=3) - 33 * np.array([0.7, 0.2, 0.1])).max() <= 1
    with pytest.raises(DataError, match="101 images are asked for.*there are 100"):
        stratified(labels, [60, 41], seed=1)


def test_a_smaller_training_set_keeps_the_other_splits():
    data = load(DatasetSettings())
    small = data.with_train_size(200, seed=3)
    assert len(small.labels["train"]) == 200 and torch.equal(small.images["test"], data.images["test"])
    assert torch.bincount(small.labels["train"]).min() >= 19


def _ramp(count=6, size=5, channels=3):
    images = torch.arange(count * size * size * channels).reshape(count, size, size, channels).remainder(251)
    split = {"train": images.to(torch.uint8)}
    labels = {"train": torch.arange(count)}
    return datasets.Dataset("ramp", split, labels, count, 255.0, (0.5,) * channels, (0.25,) * channels)


def test_batches_normalise_and_keep_the_last_partial_batch():
    data = _ramp()
    batches = Batches(data, "train", 4)
    (x, y), (rest, _) = batches.epoch(0)
    assert len(batches) == 2 and len(rest) == 2 and y.tolist() == [0, 1, 2, 3]
    expected = (data.images["train"][:4].float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(x, expected.permute(0, 3, 1, 2))
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_is_a_pure_function_of_seed_and_number():
    data = _ramp()
    data = datasets.replace(data, augmentation=AugmentationSettings(crop_padding=2, flip=True, rotation=15))
    make = lambda seed: Batches(data, "train", 4, seed=seed, shuffle=True, augment=True)  # noqa: E731
    again = [torch.cat([x for x, _ in make(0).epoch(3)]) for _ in range(2)]
    assert torch.equal(*again)
    assert not torch.equal(again[0], torch.cat([x for x, _ in make(1).epoch(3)]))
    assert not torch.equal(again[0], torch.cat([x for x, _ in make(0).epoch(4)]))


def test_every_crop_is_a_window_of_the_padded_image():
    data = datasets.replace(_ramp(), augmentation=AugmentationSettings(crop_padding=2, flip=True), mean=(0,) * 3)
    data = datasets.replace(data, std=(1.0,) * 3)
    padded = torch.nn.functional.pad(data.images["train"].permute(0, 3, 1, 2), (2, 2, 2, 2))
    windows = padded.unfold(2, 5, 1).unfold(3, 5, 1)
    seen = set()
    for epoch in range(20):
        for x, y in Batches(data, "train", 6, seed=1, shuffle=True, augment=True).epoch(epoch):
            for image, label in zip((x * 255).round().to(torch.uint8), y):
                options = windows[label].permute(1, 2, 0, 3, 4).reshape(25, 3, 5, 5)
                matches = [(options == i).all((1, 2, 3)).nonzero() for i in (image, image.flip(2))]
                found = [(flip, int(m[0])) for flip, m in enumerate(matches) if len(m)]
                assert found
                seen |= set(found)
    assert len(seen) > 40  # of 25 windows, each mirrored or not


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": np.zeros((4, 8, 8))}, "x_train is float64"),
        ({"x_test": np.zeros((2, 9, 9), np.uint8)}, "different shapes"),
        ({"y_train": np.zeros(3, np.int64)}, "with 3 labels"),
        ({"y_test": None}, "y_test"),
    ],
)
def test_wrong_npz_is_named(tmp_path, arrays, message):
    good = {f"x_{s}": np.zeros((n, 8, 8), np.uint8) for s, n in (("train", 4), ("test", 2))}
    good |= {f"y_{s}": np.zeros(n, np.int64) for s, n in (("train", 4), ("test", 2))}
    content = {k: v for k, v in (good | arrays).items() if v is not None}
    np.savez(tmp_path / "d.npz", **content)
    with pytest.raises(DataError, match=message):
        load(DatasetSettings(source="npz", path=str(tmp_path / "d.npz"), validation=1))


def test_local_npz_is_loaded(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"x_train": rng.integers(0, 256, (40, 8, 8, 3), np.uint8), "y_train": np.arange(40) % 4}
    arrays |= {"x_test": rng.integers(0, 256, (10, 8, 8, 3), np.uint8), "y_test": np.arange(10) % 4}
    np.savez(tmp_path / "mine.npz", **arrays)
    data = load(DatasetSettings(source="npz", path=str(tmp_path / "mine.npz"), validation=8))
    assert data.name == "mine" and data.classes == 4 and data.image_shape == (3, 8, 8)
    assert [len(data.labels[s]) for s in datasets.SPLITS] == [32, 8, 10]
    assert np.array_equal(data.images["test"].numpy(), arrays["x_test"])
