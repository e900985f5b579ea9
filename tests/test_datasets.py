"""Data sets: splits, digests, augmentation, and data that is damaged or wrong."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from common.core import data as batching
from common.core import loading
from common.core import streamed as streaming
from common.core.data import SPLITS, Batches, Dataset, stratified
from common.core.loading import load, prepared_file
from common.settings import AugmentationSettings, DataError, DatasetSettings
from common.stage.prepare import prepare, write


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


def test_digits_that_are_not_there_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(
        DataError, match=r"^sklearn/datasets/data/digits\.csv\.gz: not where Python looks for packages"
    ):
        load(DatasetSettings(source="digits"))


def test_the_split_is_fixed_and_follows_its_seed():
    one, same, other = (load(DatasetSettings(split_seed=seed)) for seed in (0, 0, 1))
    assert one.digest == same.digest != other.digest


def test_a_seed_draws_training_and_validation_images_and_the_test_images_stay():
    """Contents are compared as sets of rows, so that no order of the images hides that they are the same."""
    settings = DatasetSettings(train=600)
    one, again, other = (load(settings, seed) for seed in (100, 100, 101))
    rows = [
        {split: {image.numpy().tobytes() for image in images} for split, images in data.images.items()}
        for data in (one, again, other)
    ]
    assert one.digest == again.digest and rows[0] == rows[1]
    assert torch.equal(one.images["test"], other.images["test"])
    assert not rows[2]["test"] & (rows[2]["train"] | rows[2]["validation"])
    assert rows[0]["train"] | rows[0]["validation"] == rows[2]["train"] | rows[2]["validation"]
    common = len(rows[0]["train"] & rows[2]["train"]) / 600
    assert 0.7 < common < 0.8  # 600 of 797
    assert one.mean != other.mean  # normalised by the training images in use


def test_a_shared_split_is_that_of_all_seeds():
    settings = DatasetSettings(train=600, split="shared")
    assert load(settings, 1).digest == load(settings, 2).digest != load(DatasetSettings(train=600), 1).digest


def test_other_sources_draw_from_their_training_images_alone(tmp_path):
    images = np.arange(40 * 4 * 4, dtype=np.uint16).reshape(40, 4, 4).astype(np.uint8)
    images[:, 0, 0] = np.arange(40)
    labels = np.arange(40) % 2
    file = tmp_path / "own.npz"
    np.savez(file, x_train=images[:30], y_train=labels[:30], x_test=images[30:], y_test=labels[30:])
    settings = DatasetSettings(source="npz", path=str(file), train=10, validation=6)
    drawn = [
        {split: set(found[:, 0, 0, 0].tolist()) for split, found in load(settings, seed).images.items()}
        for seed in range(3)
    ]
    for data in drawn:
        assert data["train"] | data["validation"] <= set(range(30)) and not data["train"] & data["validation"]
        assert data["test"] == set(range(30, 40))
    assert drawn[0]["train"] != drawn[1]["train"] != drawn[2]["train"]


def test_changed_digits_are_noticed(monkeypatch):
    monkeypatch.setattr(loading, "DIGITS_SHA256", "0" * 64)
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
    return Dataset("ramp", split, labels, count, 255.0, (0.5,) * channels, (0.25,) * channels)


def test_batches_normalise_and_keep_the_last_partial_batch():
    data = _ramp()
    batches = Batches(data, "train", 4)
    (x, y), (rest, _) = batches.epoch(0)
    assert len(batches) == 2 and len(rest) == 2 and y.tolist() == [0, 1, 2, 3]
    expected = (data.images["train"][:4].float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(x, expected.permute(0, 3, 1, 2))
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_a_part_of_the_test_split_is_stratified_and_the_rest_stays(npz):
    whole = load(npz())
    part = load(npz().model_copy(update={"test": 4}))
    assert len(whole.labels["test"]) > len(part.labels["test"]) == 4
    assert part.labels["test"].bincount().max() <= 2
    assert torch.equal(part.images["train"], whole.images["train"])


@pytest.mark.parametrize("side, expected", [(8, 2000), (32, 2000), (224, 83)])
def test_passes_without_gradients_take_as_many_images_as_memory_should_hold(side, expected):
    images = {split: torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(3, side, side, 1) for split in SPLITS}
    labels = {split: torch.zeros(3, dtype=torch.int64) for split in SPLITS}
    data = Dataset("made up", images, labels, 1, mean=(0.0,), std=(1.0,))
    assert Batches(data, "test").batch_size == expected


def test_an_epoch_is_a_pure_function_of_seed_and_number():
    data = _ramp()
    data = replace(data, augmentation=AugmentationSettings(crop_padding=2, flip=True, rotation=15))
    make = lambda seed: Batches(data, "train", 4, seed=seed, shuffle=True, augment=True)  # noqa: E731
    again = [torch.cat([x for x, _ in make(0).epoch(3)]) for _ in range(2)]
    assert torch.equal(*again)
    assert not torch.equal(again[0], torch.cat([x for x, _ in make(1).epoch(3)]))
    assert not torch.equal(again[0], torch.cat([x for x, _ in make(0).epoch(4)]))


def test_batches_do_not_depend_on_how_many_are_made_together(monkeypatch):
    settings = {"augmentation": {"crop_padding": 1, "flip": True, "rotation": 10.0}}
    batches = Batches(load(DatasetSettings(**settings)), "train", 7, shuffle=True, augment=True)
    together = list(batches.epoch(3))
    monkeypatch.setattr(batching, "_TOGETHER", 1)
    alone = list(batches.epoch(3))
    assert len(alone) == len(batches) and [len(labels) for _, labels in alone][-2:] == [
        7,
        len(batches.labels) % 7,
    ]
    for (images, labels), (x, y) in zip(together, alone, strict=True):
        assert torch.equal(images, x) and torch.equal(labels, y)
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_every_crop_is_a_window_of_the_padded_image():
    data = replace(_ramp(), augmentation=AugmentationSettings(crop_padding=2, flip=True), mean=(0,) * 3)
    data = replace(data, std=(1.0,) * 3)
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
    loading.fingerprint.cache_clear()

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
        ({"y_train": np.array(list("abcd") * 10)}, "y_train is <U1"),
    ],
)
def test_wrong_npz_is_named(npz, changes, message):
    with pytest.raises(DataError, match=message):
        load(npz(**changes))


def test_local_npz_is_loaded(npz):
    settings = npz(y_train=(np.arange(40) % 4).astype(np.uint8))
    data = load(settings)
    assert data.classes == 4 and data.image_shape == (3, 8, 8)
    assert [len(data.labels[s]) for s in SPLITS] == [32, 8, 10]
    assert np.array_equal(data.images["test"].numpy(), _arrays()["x_test"])
    assert loading.fingerprint(settings) == hashlib.sha256(open("mine.npz", "rb").read()).hexdigest()
    with pytest.raises(DataError, match="nowhere.npz: the array file of nowhere.npz is not there"):
        load(DatasetSettings(source="npz", path="nowhere.npz"))


def test_a_missing_or_damaged_prepared_file_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = DatasetSettings(source="cifar10", validation=8)
    write(prepared_file(settings), loading.checked(_arrays(), "cifar10"))
    assert [len(load(settings).labels[s]) for s in SPLITS] == [32, 8, 10]
    content = bytearray(prepared_file(settings).read_bytes())
    for change, message in ((1, "digest does not match|damaged"), (-900, "damaged")):
        broken = (
            bytes(content[:change]) if change < 0 else bytes(content[:2000]) + b"?" + bytes(content[2001:])
        )
        prepared_file(settings).write_bytes(broken)
        with pytest.raises(DataError, match=message):
            load(settings)
    prepared_file(settings).unlink()
    with pytest.raises(DataError, match="cifar10 is not there.*common.stage.prepare"):
        load(settings)


def _photographs(root, per_class=6, classes=("cat", "dog", "eel")):
    """JPEG files of different sizes and contents, in class folders."""
    rng = np.random.default_rng(len(classes) + per_class)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 256, (5 + i, 4 + i, 3), np.uint8)
            Image.fromarray(pixels).resize((48 + 5 * i, 40 + 3 * i)).save(root / name / f"{i}.jpeg")


@pytest.fixture
def streamed(tmp_path, monkeypatch):
    """Settings for folders of 18 training and 9 test images that stay on disk."""
    monkeypatch.chdir(tmp_path)
    loading.fingerprint.cache_clear()
    monkeypatch.setattr(streaming, "DECODED_AT_ONCE", 2)
    _photographs(tmp_path / "photos" / "train")
    _photographs(tmp_path / "photos" / "val", per_class=3)
    settings = DatasetSettings(
        source="folder", path="photos", size=32, streamed=True, validation=3, augmentation={"flip": True}
    )
    write(prepared_file(settings), prepare(settings))
    return settings


@pytest.mark.slow
def test_streamed_images_stand_for_images_in_memory(streamed):
    data = load(streamed).to("cpu")
    assert data.image_shape == (3, 32, 32) and data.classes == 3
    assert {k: len(v) for k, v in data.labels.items()} == {"train": 15, "validation": 3, "test": 9}
    assert data.digest == load(streamed).digest and len(loading.fingerprint(streamed)) == 64
    small = data.with_train_size(6, seed=1)
    assert torch.bincount(small.labels["train"]).tolist() == [2, 2, 2] and small.digest != data.digest
    batches = Batches(data, "test", 5)
    (x, y), (rest, _) = batches.epoch(0)
    assert len(batches) == 2 and len(rest) == 4 and y.tolist() == [0, 0, 0, 1, 1]
    assert x.is_contiguous(memory_format=torch.channels_last)
    files = data.images["test"]
    for i in range(5):
        image = Image.open(files.root / files.paths[i].decode())
        assert image.filename.split("/")[-2] == ("cat", "dog")[y[i]]
        side = round(32 * 256 / 224)
        short = side / min(image.size)
        resized = image.resize([max(side, int(n * short)) for n in image.size], Image.Resampling.BILINEAR)
        left, top = ((n - 32) / 2 for n in resized.size)
        expected = resized.crop((round(left), round(top), round(left) + 32, round(top) + 32))
        shown = x[i].permute(1, 2, 0) * torch.tensor(data.std) + torch.tensor(data.mean)
        torch.testing.assert_close(shown * 255, torch.from_numpy(np.array(expected)).float())


@pytest.mark.slow
def test_a_crop_depends_on_seed_epoch_and_image_alone(streamed):
    data = load(streamed)

    def seen(data, seed=0, epoch=3, batch_size=4):
        batches = Batches(data, "train", batch_size, seed=seed, shuffle=True, augment=True)
        return list(batches.epoch(epoch))

    state = torch.get_rng_state()
    first, again = seen(data), seen(data)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for one, other in zip(first, again) for a, b in zip(one, other))
    crops = {image.numpy().tobytes() for x, _ in first for image in x}
    assert len(crops) == 15
    assert crops == {image.numpy().tobytes() for x, _ in seen(data, batch_size=15) for image in x}
    some = {image.numpy().tobytes() for x, _ in seen(data.with_train_size(6, seed=1)) for image in x}
    assert some < crops
    for other in (seen(data, seed=1), seen(data, epoch=4)):
        assert not crops & {image.numpy().tobytes() for x, _ in other for image in x}


@pytest.mark.slow
def test_crops_are_mirrored_only_where_that_is_asked_for(streamed, tmp_path):
    pixels = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2) * 4
    for file in (tmp_path / "photos" / "train").rglob("*.jpeg"):
        Image.fromarray(pixels).save(file, quality=100, comment=str(file).encode())
    prepared_file(streamed).unlink()
    write(prepared_file(streamed), prepare(streamed))

    def falling(flip):
        augmentation = AugmentationSettings(flip=flip)
        data = replace(load(streamed), augmentation=augmentation)
        ((x, _),) = Batches(data, "train", 15, seed=2, augment=True).epoch(0)
        return (x[..., -1] < x[..., 0]).all((1, 2)).sum().item()

    assert falling(flip=False) == 0 < falling(flip=True) < 15


@pytest.mark.slow
def test_a_file_that_breaks_while_training_is_named(streamed, tmp_path):
    batches = Batches(load(streamed), "train", 4, shuffle=True, augment=True)
    victim = tmp_path / "photos" / "train" / "dog" / "4.jpeg"
    content = victim.read_bytes()
    for broken in (content[:200], None):
        victim.write_bytes(broken) if broken else victim.unlink()
        with pytest.raises(
            DataError, match="photos/train/dog/4.jpeg: (damaged or changed|.*No such file)"
        ) as error:
            list(batches.epoch(0))
        assert "\n" not in str(error.value)
    victim.write_bytes(content)
    assert sum(len(y) for _, y in batches.epoch(0)) == 15


@pytest.mark.slow
def test_an_image_that_cannot_be_decoded_is_named(streamed, tmp_path):
    victim = tmp_path / "photos" / "train" / "eel" / "5.jpeg"
    victim.write_bytes(victim.read_bytes()[:-300])
    prepared_file(streamed).unlink()
    write(prepared_file(streamed), prepare(streamed))
    with pytest.raises(DataError, match="eel/5.jpeg: not a readable image"):
        list(Batches(load(streamed), "train", 4).epoch(0))


@pytest.mark.slow
def test_a_missing_folder_of_streamed_images_is_named(streamed, tmp_path):
    (tmp_path / "photos").rename(tmp_path / "moved")
    with pytest.raises(DataError, match="photos: the folder of the streamed images is not there"):
        load(streamed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": None}, "streamed needs source 'folder' and a size"),
        ({"source": "npz"}, "streamed needs source 'folder' and a size"),
        ({"augmentation": {"crop_padding": 4}}, "augmentation.crop_padding must be 0"),
    ],
)
def test_streaming_that_cannot_be_is_refused(changes, message):
    values = {"source": "folder", "path": "photos", "size": 32, "streamed": True} | changes
    with pytest.raises(ValueError, match=message):
        DatasetSettings(**values)


def test_settings_that_do_not_stream_are_written_as_before():
    assert "streamed" not in DatasetSettings(source="folder", path="photos").model_dump(mode="json")
    local = [DatasetSettings(source=s, path=f"data/photos{e}") for s, e in (("folder", ""), ("npz", ".npz"))]
    assert [settings.name for settings in (DatasetSettings(), *local)] == ["digits", "photos", "photos"]
