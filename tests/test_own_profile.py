"""A profile for data of one's own: what it says, where it is put, and that every paper can be run with it."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from project import ROOT

from common.profiles import profile_chain
from common.settings import DataError, SettingsError
from common.stage import own_profile
from common.stage.own_profile import Own, block, look, nearest, new_profile

PARAMS = """\
# of mine
profile: digits
profiles:
  digits:  # kept
    dataset: {source: digits}

  cifar10-cpu:
    extends: digits
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


def _npz(shape=(28, 28), count=700):
    x = np.random.default_rng(0).integers(0, 256, (count + 90, *shape), np.uint8)
    y = np.arange(count + 90) % 7
    np.savez("own.npz", x_train=x[:count], y_train=y[:count], x_test=x[count:], y_test=y[count:])


def _photos(count, size=(30, 20)):
    for name in "abc":
        Path("photos", name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, (i, 9, 9)).save(f"photos/{name}/{i}.png")


def test_what_is_there_is_looked_at(here):
    _npz((9, 11))
    assert look("own.npz") == Own("npz", "own.npz", 7, 700, 90, 9, 1)
    _photos(4)
    assert look("photos") == Own("folder", "photos", 3, 12, None, 20, 3)
    with pytest.raises(DataError, match="absent.npz: not a readable .npz file"):
        look("absent.npz")


@pytest.mark.parametrize(("side", "cuda", "name"), [
    (8, False, "digits"), (8, True, "digits"), (16, False, "cifar10-cpu"), (28, True, "cifar10-cpu"),
    (64, False, "cifar10-cpu"), (64, True, "cifar10"), (5, False, "cifar10-cpu"),
])  # fmt: skip
def test_the_nearest_profile_fits_images_and_machine(here, monkeypatch, side, cuda, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert nearest(Own("npz", "x", 10, 1000, 100, side, 3)) == name


def test_splits_fit_what_there_is_and_leave_no_tiny_batch():
    for own, splits in (
        (Own("npz", "x", 7, 700, 90, 28, 1), (512, 116, 90)),
        (Own("npz", "x", 10, 50000, 10000, 28, 1), (4992, 1000, 2000)),
        (Own("folder", "x", 3, 240, None, 20, 3), (128, 32, 48)),
        (Own("folder", "x", 2, 150, None, 20, 3), (100, 20, 30)),
    ):
        found = block(own)["dataset"]
        assert (found["train"], found["validation"], found["test"]) == splits
    with pytest.raises(DataError, match="x: 67 images would be for training; 100 are needed"):
        block(Own("folder", "x", 2, 100, None, 20, 3))
    assert block(Own("npz", "x", 60, 400, 90, 28, 1))["feature_relevance"] == {"scoring_share": 0.24}


def test_the_profile_stands_behind_the_others_and_nothing_else_changes(here, monkeypatch):
    monkeypatch.setattr(own_profile, "papers", list)
    _npz()
    Path("params.yaml").write_text(PARAMS)
    *_, last = new_profile("mine", "own.npz", "params.yaml")
    assert last == "`python -m replications plan --profile mine` says what it costs"
    text = Path("params.yaml").read_text()
    assert text.startswith(PARAMS)
    own = yaml.safe_load(text)["profiles"]["mine"]
    assert own == block(look("own.npz"))
    Path("params.yaml").write_text("profiles:\n    cifar10-cpu: {}\nprofile: cifar10-cpu\n")
    new_profile("mine", "own.npz", "params.yaml")  # not at the end of the file
    assert [name for name, _ in profile_chain("params.yaml", "mine")] == ["cifar10-cpu", "mine"]
    assert Path("params.yaml").read_text().endswith("\nprofile: cifar10-cpu\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits", "params.yaml: profiles.digits is there already"),
        ("2024", "'2024': a name of a profile must be letters"),
        ("on", "'on': a name of a profile"),
        ("../up", "a name of a profile"),
        ("a b", "a name of a profile"),
    ],
)
def test_a_name_that_cannot_be_is_refused_and_nothing_is_written(here, name, message):
    _npz()
    Path("params.yaml").write_text(PARAMS)
    with pytest.raises(SettingsError, match=message):
        new_profile(name, "own.npz", "params.yaml")
    assert Path("params.yaml").read_text() == PARAMS


@pytest.mark.slow
@pytest.mark.parametrize("data", ["own.npz", "photos"])
def test_every_paper_can_be_run_with_it(here, data):
    _npz() if data == "own.npz" else _photos(90)
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text())
    *notes, written, _ = new_profile("mine", data, "params.yaml")
    # what the corpus needs is not there
    assert ["pretraining_impact" in note for note in notes if "is not there" in note] == [True]
    assert written.startswith("params.yaml: profile mine extends cifar10-cpu")
