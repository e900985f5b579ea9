"""Class folders of one's own: leftovers are no classes, no image counts twice, and what is passed over is told."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.core.loading import prepared_file
from common.settings import DataError, DatasetSettings
from common.stage import prepare as preparing
from common.stage.prepare import main, prepare

_folder = partial(DatasetSettings, source="folder", path="photos", size=8, validation=2)


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch):
    """Two classes of six images in a working folder of their own."""
    monkeypatch.chdir(tmp_path)
    _fill(tmp_path / "photos")
    return tmp_path / "photos"


def _fill(root, classes="ab", count=6, seed=0):
    rng = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(root / name / f"{i}.png")


def _prepared(**more):
    remarks = []
    arrays = prepare(_folder(**{"test": 2, **more}), remarks)
    return arrays["classes"].tolist(), sum(len(arrays[f"y_{split}"]) for split in ("train", "test")), remarks


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", [".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git"])
@pytest.mark.parametrize("place", [".", "a"])
def test_leftovers_are_neither_classes_nor_images(photos, place, name, streamed):
    left = photos / place / name
    left.mkdir()
    assert _prepared(streamed=streamed)[:2] == (["a", "b"], 12)
    (left / "0-checkpoint.png").write_bytes((photos / "a" / "0.png").read_bytes())
    (photos / "b" / "._0.png").write_bytes(b"what another system keeps beside a file")
    classes, count, remarks = _prepared(streamed=streamed)
    assert (classes, count) == (["a", "b"], 12)
    assert remarks == ["photos: 2 files or folders are hidden, or left by a system or a notebook: not read"]


def test_files_that_are_passed_over_are_counted_by_their_ending(photos):
    for name in ("a/x.heic", "a/y.HEIC", "b/labels.csv", "b/README"):
        (photos / name).write_bytes(b"")
    (photos / "loose.png").write_bytes((photos / "a/0.png").read_bytes())
    Image.new("RGB", (8, 8)).save(photos / "a/7.GIF")
    classes, count, remarks = _prepared()
    assert (classes, count) == (["a", "b"], 13)
    assert [remark.removeprefix("photos: ").removesuffix(": not read") for remark in remarks] == [
        "1 files or folders are images in no class folder",
        "1 files or folders end in .csv",
        "2 files or folders end in .heic",
        "1 files or folders have no ending",
    ]


@pytest.mark.parametrize(
    ("link", "target"),
    [("a/up", ".."), ("a/root", "/"), ("a/self", "."), ("a/other", "../b"), ("c", "a"), ("a/home", "../..")],
)
def test_a_link_to_what_is_read_already_is_refused(photos, link, target):
    (photos / link).symlink_to(target)
    with pytest.raises(DataError, match=f"photos/({link}|b): a link to .*, whose images would count twice"):
        _prepared()


def test_other_links_are_followed(photos, tmp_path):
    _fill(tmp_path / "elsewhere", "c", seed=1)
    (photos / "c").symlink_to(tmp_path / "elsewhere" / "c")
    (photos / "a" / "more.png").symlink_to(tmp_path / "elsewhere" / "c" / "0.png")
    assert _prepared()[:2] == (["a", "b", "c"], 19)


def test_a_folder_that_is_split(photos, tmp_path):
    _fill(tmp_path / "other" / "train")
    _fill(tmp_path / "other" / "test", count=2, seed=1)
    _fill(tmp_path / "other" / "extra", count=2, seed=2)
    classes, count, remarks = _prepared(path="other", test=None)
    assert (classes, count) == (["a", "b"], 16)
    assert remarks == ["other: 1 files or folders are beside train and test: not read"]
    with pytest.raises(DataError, match="other has a test split of its own: dataset.train_per_class"):
        _prepared(path="other", test=None, train_per_class=3)
    (tmp_path / "other" / "train" / "a" / "test").symlink_to("../../test/a")
    with pytest.raises(DataError, match="count twice"):
        _prepared(path="other", test=None)


def test_splits_are_not_taken_for_classes_and_a_class_may_be_called_train(tmp_path):
    _fill(tmp_path / "odd" / "Train")
    _fill(tmp_path / "odd" / "Val")
    with pytest.raises(DataError, match="odd: Train, Val are no classes: a folder that is split has"):
        _prepared(path="odd")
    _fill(tmp_path / "traffic", ["car", "train"])
    assert _prepared(path="traffic")[:2] == (["car", "train"], 12)


def test_one_class_is_none(tmp_path):
    _fill(tmp_path / "one", "a")
    with pytest.raises(DataError, match="it has 1 of them, and two are needed"):
        _prepared(path="one")


def test_what_is_no_file_is_named_and_not_read(photos):
    (photos / "a" / "endless.png").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="a/endless.png: not a readable image: no ordinary file"):
        _prepared()


def test_the_manifest_keeps_what_was_said_when_the_folder_was_prepared(photos, monkeypatch, capsys):
    Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(photos / "a" / "0.png")
    (photos / "b" / "notes.txt").write_text("x")
    settings = _folder(test=2)
    monkeypatch.setattr(preparing, "profile_datasets", lambda *arguments: [settings])
    said = [
        "photos: 1 files or folders end in .txt: not read",
        "photos: 1 images have an alpha channel, and are laid on white (the first: a/0.png)",
    ]
    for _ in range(2):  # the second time there is nothing to prepare
        assert main([]) == 0
        assert capsys.readouterr().err.splitlines()[-2:] == [f"note: {remark}" for remark in said]
        assert json.loads(Path("data/prepared/manifest.json").read_text())["photos"]["remarks"] == said
        changed = prepared_file(settings).stat().st_mtime_ns
    assert prepared_file(settings).stat().st_mtime_ns == changed


def test_that_sides_are_cut_off_is_told(photos):
    left = np.zeros((8, 14, 3), np.uint8)
    left[:, :3], left[:, 3:11] = 200, np.random.default_rng(1).integers(0, 100, (8, 8, 3))
    Image.fromarray(left).save(photos / "a" / "wide.png")
    told = "photos: 1 images are not square: only the square in their middle is taken (the first: a/wide.png)"
    assert told in _prepared()[2]
    arrays = prepare(_folder(test=2))
    images = np.concatenate([arrays["x_train"], arrays["x_test"]])
    assert sum(np.array_equal(image, left[:, 3:11]) for image in images) == 1
