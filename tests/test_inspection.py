"""The gate behind the split: what training cannot use is refused, what it had better not see is said."""

import numpy as np
import pytest
import torch

from common.core.data import Batches
from common.core.loading import load
from common.settings import AugmentationSettings, DataError, DatasetSettings
from common.stage.inspection import is_told, remarks


def _arrays(**changes):
    rng = np.random.default_rng(0)
    arrays = {"x_train": rng.integers(0, 256, (60, 8, 8, 3), np.uint8), "y_train": np.arange(60) % 4}
    arrays |= {"x_test": rng.integers(0, 256, (20, 8, 8, 3), np.uint8), "y_test": np.arange(20) % 4}
    return arrays | changes


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Settings for a local file with such arrays."""
    monkeypatch.chdir(tmp_path)

    def make(settings=None, **changes):
        np.savez("own.npz", **_arrays(**changes))
        return DatasetSettings(source="npz", path="own.npz", **{"validation": 20, **(settings or {})})

    return make


def test_nothing_is_said_of_sound_images(own):
    settings = own()
    assert is_told(settings) and remarks(settings) == []
    assert not is_told(DatasetSettings()) and not is_told(settings.model_copy(update={"path": "absent.npz"}))


def test_a_channel_without_variation_stays_finite_and_is_told(own):
    x = _arrays()["x_train"]
    x[..., 1] = 77
    settings = own(x_train=x)
    data = load(settings)
    ((images, _), *_) = Batches(data, "train", 40).epoch(0)
    assert images[:, 1].abs().max() < 1e-5 and images.isfinite().all()
    ((images, _),) = Batches(data, "test").epoch(0)
    assert images.isfinite().all() and images[:, 1].std() > 0.1
    assert remarks(settings) == ["own.npz: channel 1 of the training images is constant, and says nothing"]


def test_images_without_any_variation_are_refused(own):
    with pytest.raises(DataError, match="own.npz: every channel of the training images is constant"):
        load(own(x_train=np.full((60, 8, 8, 3), 5, np.uint8)))


def test_a_class_that_the_split_leaves_without_a_training_image_is_refused(own):
    labels = np.zeros(60, int)
    labels[:3] = 1, 2, 3
    with pytest.raises(
        DataError, match="own.npz: the 10 training images have none of class 1.*3 of 4 classes"
    ):
        load(own({"train": 10}, y_train=labels))
    data = load(own({"train": 30}))
    with pytest.raises(DataError, match="the 3 training images have none of class 3"):
        data.with_train_size(3, seed=0)


def test_classes_that_are_not_measured_are_told(own):
    (said,) = remarks(own(y_test=np.arange(20) % 3))
    assert said == "own.npz: 1 of 4 classes have no test image, as class 3"


def test_the_same_image_in_training_and_test_is_told(own):
    arrays = _arrays()
    arrays["x_test"][:5] = arrays["x_train"][:5]
    arrays["x_train"][8] = arrays["x_train"][4]  # of one class
    arrays["x_train"][10] = arrays["x_train"][9]  # of two
    said = remarks(own(**arrays))
    assert said[0] == "own.npz: 2 of 60 images for training and validation are copies of others there"
    assert said[1] == "own.npz: 1 images for training and validation are in more classes than one"
    assert said[2].startswith("own.npz: 5 of 20 test images are for training or validation, too")


def test_images_of_fewer_bits_than_they_say_are_told(own):
    (said,) = remarks(own(x_train=_arrays()["x_train"] // 16))
    assert "no pixel of the training images is above 15 of 255" in said
    assert remarks(own(x_train=_arrays()["x_train"] // 16, scale=np.array(15.0))) == []


def test_splits_that_ask_for_too_much_name_file_and_settings(own):
    with pytest.raises(DataError, match="own.npz: dataset.train = 50 and dataset.validation = 20: 70 images"):
        load(own({"train": 50}))
    with pytest.raises(DataError, match="own.npz: dataset.test = 21: 21 images"):
        load(own({"test": 21}))
    with pytest.raises(DataError, match="own.npz: 60 validation images leave none of 60 for training"):
        load(own({"validation": 60}))
    with pytest.raises(
        DataError, match="digits: 900 validation images and the test images leave none of 1797"
    ):
        load(DatasetSettings(validation=900))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 8}, "keep their size"),
        ({"path": "x"}, "source 'digits' is embedded: path must be absent"),
        ({"train_per_class": 5}, "source 'digits' has test images of its own: train_per_class"),
        ({"source": "mnist", "train_per_class": 5}, "'mnist' has test images of its own"),
        (
            {"source": "caltech101", "train_per_class": 5, "test": 9},
            "train_per_class stands in place of test",
        ),
    ],
)
def test_what_a_source_would_ignore_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DatasetSettings(**changes)


def test_images_that_are_not_square_are_turned_and_not_sheared(own):
    """A bright disc in the middle of a wide image is a disc at every angle, and stays where it is."""
    rows, columns = np.mgrid[:24, :48]
    disc = (255 * ((rows - 11.5) ** 2 + (columns - 23.5) ** 2 < 64)).astype(np.uint8)
    bar = np.zeros((24, 48), np.uint8)
    bar[:, 20:28] = 255
    x = np.stack([disc, bar] * 30)[..., None]
    settings = own(x_train=x, x_test=x[:20], y_train=np.arange(60) % 2, y_test=np.arange(20) % 2)
    data = load(settings.model_copy(update={"augmentation": AugmentationSettings(rotation=90.0)}))
    ((images, labels),) = Batches(data, "train", 40, augment=True).epoch(0)
    shown = images[:, 0] * data.std[0] + data.mean[0]
    discs, bars = shown[labels == 0], shown[labels == 1]
    # where a sheared disc would reach, and would not
    assert (discs - torch.from_numpy(disc) / 255).abs().mean() < 0.02
    # a bar keeps its thickness: along a line through the centre at the angle at which it is thinnest
    assert (bars > 0.5).float().sum((1, 2)).min() > 150
