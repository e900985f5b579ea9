"""Data sets: splits, digests, augmentation, and data that is damaged or wrong."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from common import datasets
from common.datasets import Batches, DataError, load, stratified
from common.prepare import prepare, write
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
    data = datasets.replace(
        _ramp(), augmentation=AugmentationSettings(crop_padding=2, flip=True), mean=(0,) * 3
    )
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


def _arrays(**changes):
    rng = np.random.default_rng(0)
    arrays = {"x_train": rng.integers(0, 256, (40, 8, 8, 3), np.uint8), "y_train": np.arange(40) % 4}
    arrays |= {"x_test": rng.integers(0, 256, (10, 8, 8, 3), np.uint8), "y_test": np.arange(10) % 4}
    return {key: value for key, value in (arrays | changes).items() if value is not None}


@pytest.fixture
def npz(tmp_path, monkeypatch):
    """Settings for a local .npz with the given arrays, in an otherwise empty working folder."""
    monkeypatch.chdir(tmp_path)
    datasets.fingerprint.cache_clear()

    def make(**changes):
        np.savez("mine.npz", **_arrays(**changes))
        return DatasetSettings(source="npz", path="mine.npz", validation=8)

    return make


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((40, 8, 8, 3))}, "mine.npz: x_train is float64"),
        ({"x_test": np.zeros((10, 9, 9, 3), np.uint8)}, r"different shapes, \(8, 8, 3\) and \(9, 9, 3\)"),
        ({"y_train": np.zeros(3, np.int64)}, r"y_train is int64 \(3,\) for 40 images"),
        ({"y_test": np.full(10, 7)}, r"y_test\[0\] = 7, but there are 4 classes"),
        (
            {"y_train": np.zeros(40, np.int64), "classes": np.array(list("abcd"))},
            "no training image of class b",
        ),
        ({"y_test": None}, "y_test is missing"),
    ],
)
def test_wrong_npz_is_named(npz, changes, message):
    with pytest.raises(DataError, match=message):
        load(npz(**changes))


def test_local_npz_is_loaded(npz):
    settings = npz()
    data = load(settings)
    assert data.classes == 4 and data.image_shape == (3, 8, 8)
    assert [len(data.labels[s]) for s in datasets.SPLITS] == [32, 8, 10]
    assert np.array_equal(data.images["test"].numpy(), _arrays()["x_test"])
    assert datasets.fingerprint(settings) == hashlib.sha256(open("mine.npz", "rb").read()).hexdigest()
    with pytest.raises(DataError, match="nowhere.npz: the array file of nowhere.npz is not there"):
        load(DatasetSettings(source="npz", path="nowhere.npz"))


def test_a_missing_or_damaged_prepared_file_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = DatasetSettings(source="cifar10", validation=8)
    write(settings.prepared, datasets.checked(_arrays(), "cifar10"))
    assert [len(load(settings).labels[s]) for s in datasets.SPLITS] == [32, 8, 10]
    content = bytearray(settings.prepared.read_bytes())
    for change, message in ((1, "digest does not match|damaged"), (-900, "damaged")):
        broken = (
            bytes(content[:change]) if change < 0 else bytes(content[:2000]) + b"?" + bytes(content[2001:])
        )
        settings.prepared.write_bytes(broken)
        with pytest.raises(DataError, match=message):
            load(settings)
    settings.prepared.unlink()
    with pytest.raises(DataError, match="cifar10 is not there.*common.prepare"):
        load(settings)


def _write_images(root, classes, per_class, size=(20, 12)):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            Image.new("RGB", size, (number * 50, i, 0)).save(root / name / f"{i}.png")


def test_image_folders_are_prepared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _write_images(tmp_path / "one", ["cat", "dog", "eel"], 10)
    arrays = prepare(DatasetSettings(source="folder", path="one", size=6, test=9))
    assert arrays["x_train"].shape == (21, 6, 6, 3) and arrays["classes"].tolist() == ["cat", "dog", "eel"]
    assert np.bincount(arrays["y_test"]).tolist() == [3, 3, 3]
    assert set(arrays["x_train"][arrays["y_train"] == 2][..., 0].ravel()) == {100}
    per_class = prepare(DatasetSettings(source="folder", path="one", size=6, train_per_class=4))
    assert np.bincount(per_class["y_train"]).tolist() == [4, 4, 4] and len(per_class["y_test"]) == 18
    with pytest.raises(DataError, match="one has no test split"):
        prepare(DatasetSettings(source="folder", path="one", size=6))
    _write_images(tmp_path / "two" / "train", ["cat", "dog"], 3)
    _write_images(tmp_path / "two" / "test", ["cat", "cow"], 2)
    with pytest.raises(DataError, match="different classes; only in one of them: cow, dog"):
        prepare(DatasetSettings(source="folder", path="two", size=6))
    (tmp_path / "one" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="0.png: not a readable image"):
        prepare(DatasetSettings(source="folder", path="one", size=6, test=9))
    with pytest.raises(DataError, match="not a folder of class folders"):
        prepare(DatasetSettings(source="folder", path="absent", size=6, test=9))


def test_torchvision_files_are_read_and_verified(tmp_path, monkeypatch):
    """CIFAR-10 in its own file format, small; torchvision's checksums are those of the small files."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "root" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sums = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        content = {"data": rng.integers(0, 256, (20, 3072), np.uint8), "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    sums["batches.meta"] = hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[n, sums[n]] for n in sums if n.startswith("data")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    settings = DatasetSettings(source="cifar10", path="root", validation=20)
    arrays = prepare(settings)
    assert arrays["x_train"].shape == (100, 32, 32, 3) and arrays["classes"].tolist() == list("abcdefghij")
    (folder / "data_batch_3").write_bytes(b"damaged")
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(DataError, match="cifar10: the download or its check failed.*tries again"):
        prepare(settings)
