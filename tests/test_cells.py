"""Parts of a paper's experiment with data and settings of their own, images streamed from disk among them."""

import importlib

import numpy as np
import pytest
from PIL import Image

from common.core import loading
from common.core.loading import prepared_file
from common.core.recipe import Recipe
from common.settings import ROOT, DatasetSettings, ExecutionSettings, Profile, SettingsError, parts, validated
from common.stage import papers
from common.stage import prepare as preparing
from common.stage.papers import profile_datasets
from common.stage.scheduler import in_order
from common.stage.store import Store
from common.stage.worker import perform

pytestmark = pytest.mark.slow

PHOTOS = {"source": "folder", "path": "data/photos", "size": 16, "streamed": True, "validation": 4}
IMP_SLR = {
    "experiments": ["schedules", "during"],
    "training": {"epochs": 4, "milestones": [0.5]},
    "retrain_epochs": 2,
    "targets": [0.5],
    "learning_rates": [0.05],
    "lengths": [3],
    "short_lengths": [1],
    "schedules": ["SLR"],
    "during": {"gmp": {}, "dpf": None},
    "bimp": {"shares": [0.5]},
}
HALO = {
    "training": {"epochs": 2, "milestones": [0.5]},
    "targets": [0.5],
    "variants": {"halo": "all", "magnitude-one-shot": [0.5]},
    "trials": {
        "l1": [{"xi": 1e-3}],
        "sws": [{"xi": 1e-3}],
        "mcp": [{"xi": 1e-2, "psi": 30}],
        "halo": [{"xi": 1e-3, "psi": 1e-2}],
        "fine_tuning": [0.1],
    },
    "fine_tuning_epochs": 1,
}
FEATURE_RELEVANCE = {
    "training": {"epochs": 2, "milestones": [0.5]},
    "every": 1,
    "last": 1,
    "targets": [0.4],
    "variants": {"frs": "all"},
    "scoring_share": 0.5,
}
# paper -> its settings, the name of its list of cells, a cell
PAPERS = {
    "imp_slr": (IMP_SLR, "cells", {"architecture": "mlp"}),
    "halo": (HALO, "cells", {"architecture": "digits_cnn"}),
    "feature_relevance": (
        FEATURE_RELEVANCE,
        "cells",
        {"architecture": "resnet8", "options": {"stem": 4}},
    ),
}


def _runs(paper, **changes):
    """The runs of two cells: one on the profile's digits, one that `changes` say more of; and all they need."""
    settings, name, cell = PAPERS[paper]
    protocol = importlib.import_module(f"replications.{paper}.protocol")
    values = {"seeds": [0], **settings, name: [cell, cell | changes]}
    execution = ExecutionSettings(device="cpu", precision="float32")
    chosen = validated(protocol.Settings, values, paper)
    data = DatasetSettings(train=60, validation=20, test=40)
    profile = Profile(name="test", dataset=data, execution=execution, paper=chosen)
    return in_order(papers.runs(paper, profile)), execution


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """24 training and 12 test images of two classes, streamed."""
    monkeypatch.chdir(tmp_path)
    loading.fingerprint.cache_clear()
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for bright, name in enumerate(("day", "night")):
            folder = tmp_path / "data" / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (20, 24, 3), np.uint8) + np.uint8(150 * bright)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    settings = DatasetSettings(**PHOTOS)
    preparing.write(prepared_file(settings), preparing.prepare(settings))


@pytest.mark.parametrize("paper", PAPERS)
def test_a_cell_with_its_own_data_and_settings_runs_to_its_records(paper, photos, tmp_path):
    settings = {"training": {"batch_size": 7}, "seeds": [3]}
    runs, execution = _runs(paper, data=PHOTOS, settings=settings)
    recipes = [recipe for run in runs if run.dataset == "photos" for recipe in parts(run.job, Recipe)]
    assert 7 in [recipe.batch_size for recipe in recipes]
    assert {run.seed for run in runs if run.dataset == "photos"} == {3}
    assert {run.seed for run in runs if run.dataset == "digits"} == {0}
    own = [run for run in runs if run.dataset == "photos"]
    assert len(own) == len(runs) / 2 and all(run.settings["data"]["streamed"] for run in own)
    store = Store(tmp_path / "runs")
    needed = {need.settings_hash for run in own for need in run.needs}
    for run in own:
        record = perform(run, store, execution, run.settings_hash in needed).record.content()
        assert record["status"] == "ok", record
        assert record["dataset"] == "photos" and record["data"] == [
            loading.fingerprint(DatasetSettings(**PHOTOS))
        ]
        assert 0 <= record["metrics"]["test_accuracy"] <= 1


@pytest.mark.parametrize("paper", PAPERS)
def test_a_wrong_setting_of_a_cell_is_named(paper):
    where = (
        rf"{paper}\.{PAPERS[paper][1]}\[1\]\.settings\.training\.epoch: unknown key; .*did you mean 'epochs'"
    )
    with pytest.raises(SettingsError, match=where):
        _runs(paper, data={"source": "digits", "train": 50}, settings={"training": {"epoch": 3}})


def test_the_paper_profile_names_the_imagenet_folder_that_is_missing(tmp_path, monkeypatch, capsys):
    file = ROOT / "params.yaml"
    known = {data.name: data for data in profile_datasets(file, "paper")}
    assert known["imagenet"].streamed and {"cifar10", "cifar100", "mnist"} < set(known)
    monkeypatch.chdir(tmp_path)
    # nothing is downloaded here
    monkeypatch.setattr(preparing, "_SOURCES", {"folder": preparing._SOURCES["folder"]})
    assert preparing.main(["--params", str(file), "--profile", "paper"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: data/imagenet: not a folder of class folders with images")
