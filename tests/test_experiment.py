"""Declared experiments: a job's fields are its identity, needs go by their names, cells say what is other there."""

import pickle
from typing import Literal

import pytest
import torch

from common.core.compute import Compute
from common.core.data import FixedBatches
from common.core.experiment import Cells, CellSettings, Cuts, Experiment, VariantSettings, listed
from common.core.failures import Unreachable
from common.core.loading import load
from common.core.models.chain import ConvNet
from common.core.recipe import Recipe
from common.core.run import Cell, Context, Job, Needed
from common.core.trainer import Trainer
from common.core.tuning import Tuned
from common.records import Record
from common.settings import (
    DataError,
    DatasetSettings,
    ExecutionSettings,
    Profile,
    SettingsError,
    Strict,
    validated,
)
from common.stage.scheduler import in_order
from common.stage.store import Store
from common.stage.worker import perform

DATA = DatasetSettings(train=90, validation=50, test=60)
CELL = Cell(architecture="mlp", options={"hidden": [8]}, data=DATA)
RECIPE = Recipe(epochs=2, batch_size=30, learning_rate=0.1, milestones=(0.5,))


class Strength(Strict):
    """A typed value."""

    xi: float


class Dense(Job):
    """Trained."""

    training: Recipe = RECIPE

    def execute(self, context):
        trainer = self.training.trainer(context, context.network())
        trainer.fit(self.training.rates(len(trainer.batches)))
        return context.measured(
            trainer, state={"model": trainer.model.state_dict()}, details={"why": self.strength()}
        )

    def strength(self):
        return Strength(xi=1.0)


class Pruned(Job):
    """Pruned in no way, but measured again."""

    dense: Dense
    others: tuple[Dense, ...] = ()
    strength: Tuned[Strength] | None = None

    def execute(self, context):
        model = context.network()
        model.load_state_dict(context.of(self.dense).state["model"])
        return context.measured(self.dense.training.trainer(context, model))


class Settings(VariantSettings):
    """Of a made-up paper."""

    seeds: tuple[int, ...] = (0, 1)
    cells: Cells = (CellSettings(architecture="mlp"),)
    targets: Cuts = (0.5, 0.9)
    variants: dict[Literal["dense", "pruned"], Cuts | Literal["all"]] = {"dense": (0.1,), "pruned": "all"}
    training: Recipe = RECIPE
    known: tuple[str, ...] = ("a", "b")


class MadeUp(Experiment[Settings]):
    """Its jobs."""

    def jobs(self, seed):
        if "a" not in self.settings.known:
            raise SettingsError("known must have a")
        dense = Dense(variant="dense", cell=self.cell, seed=seed, training=self.settings.training)
        yield dense
        for target in self.settings.wanted.get("pruned", ()):
            yield Pruned(variant="pruned", cell=self.cell, seed=seed, target=target, dense=dense)


def _profile(**changes):
    settings = validated(Settings, changes, "file: profiles.test.made_up")
    execution = ExecutionSettings(device="cpu", precision="float32")
    return Profile(name="test", dataset=DATA, execution=execution, paper=settings)


def _dense(**fields):
    return Dense(**{"variant": "dense", "cell": CELL, "seed": 0, **fields})


# ------------------------------------------------------------------------------------------ jobs


@pytest.mark.parametrize(
    "fields",
    [
        {"variant": "other"},
        {"seed": 1},
        {"target": 0.5},
        {"cell": CELL.model_copy(update={"architecture": "digits_cnn"})},
        {"cell": CELL.model_copy(update={"options": {}})},
        {"cell": CELL.model_copy(update={"data": DatasetSettings(train=80)})},
        {"training": RECIPE.changed(momentum=0.8)},
    ],
)
def test_a_job_is_another_one_when_any_field_is(fields):
    assert _dense().run.settings_hash == _dense().run.settings_hash
    assert _dense(**fields).run.settings_hash != _dense().run.settings_hash


def test_what_a_job_needs_is_in_its_fields_whatever_their_form():
    dense, others = _dense(), tuple(_dense(seed=seed) for seed in (1, 2, 1))
    trials = tuple((_dense(variant=f"tuning-{number}"),) for number in (0, 1))
    strength = Tuned((Strength(xi=1), Strength(xi=2)), trials)
    job = Pruned(
        variant="pruned", cell=CELL, seed=0, target=0.5, dense=dense, others=others, strength=strength
    )
    names = [(need.variant, need.seed) for need in job.needs]
    assert names == [("dense", 0), ("dense", 1), ("dense", 2), ("tuning-0", 0), ("tuning-1", 0)]
    assert [need.settings_hash for need in job.run.needs] == [need.run.settings_hash for need in job.needs]
    # what they hold is theirs
    assert list(job.parts(Recipe)) == [] and list(dense.parts(Recipe)) == [("training", RECIPE)]
    for change in ({"dense": others[0]}, {"others": ()}, {"strength": None}):
        other = Pruned(**{**{name: getattr(job, name) for name in Pruned.model_fields}, **change})
        assert other.run.settings_hash != job.run.settings_hash


def test_the_settings_of_a_record_name_what_a_job_needs():
    strength = Tuned((Strength(xi=1),), ((_dense(variant="tuning-0", target=0.9),),))
    job = Pruned(variant="pruned", cell=CELL, seed=0, target=0.5, dense=_dense(), strength=strength)
    assert job.run.settings == {
        "job": "Pruned",
        "options": {"hidden": [8]},
        "data": DATA.model_dump(mode="json"),
        "dense": "dense at 0",
        "others": [],
        "strength": {"options": [{"xi": 1.0}], "trials": [["tuning-0 at 0.9"]]},
    }
    assert _dense().run.settings["training"] == RECIPE.model_dump(mode="json")


def test_a_job_finds_what_it_needs_by_the_job_itself():
    one, two = _dense(), _dense(seed=1)
    job = Pruned(variant="pruned", cell=CELL, seed=0, dense=two, others=(one,))
    left = [Needed(Record.model_construct(seed=need.seed)) for need in job.needs]
    context = Context(job.run, Compute.choose("cpu", "float32"), tuple(left))
    # equal jobs are the same one
    assert (context.of(_dense()).record.seed, context.of(_dense(seed=1)).record.seed) == (0, 1)
    with pytest.raises(KeyError, match="does not need"):
        context.of(_dense(seed=2))


def test_a_run_travels_to_another_process_with_its_job():
    dense = _dense()
    job = Pruned(variant="pruned", cell=CELL, seed=0, target=0.5, dense=dense, others=(dense,))
    run = pickle.loads(pickle.dumps(job.run))
    assert run.settings_hash == job.run.settings_hash and run.job.run is run
    assert run.job.dense.training == RECIPE and run.job.needs[0] is run.job.dense


def test_jobs_run_to_their_records(tmp_path):
    jobs = list(MadeUp(Settings(), CELL, load(DATA)).jobs(0))
    store, execution = Store(tmp_path), ExecutionSettings(device="cpu", precision="float32")
    dense, *pruned = [
        perform(run, store, execution, keep_state=True).record for run in in_order([job.run for job in jobs])
    ]
    assert dense.details == {"why": {"xi": 1.0}} and dense.paper == "test_experiment"
    for record in pruned:
        assert record.metrics == {**dense.metrics} and record.cost == dense.cost


# ------------------------------------------------------------------------------------------ cells and variants


def test_a_cell_changes_the_settings_as_a_profile_changes_another():
    other = {"training": {"epochs": 4}, "seeds": [7], "variants": {"pruned": None}}
    own = DatasetSettings(train=60, validation=20, test=40)
    cells = [
        {"architecture": "mlp", "options": {"hidden": [8]}},
        {"architecture": "lenet300", "data": own.model_dump(), "settings": other},
    ]
    runs = listed("made_up", MadeUp, _profile(cells=cells, training={"momentum": 0.5}))
    first, second = ([run for run in runs if run.architecture == name] for name in ("mlp", "lenet300"))
    assert [(run.variant, run.target, run.seed) for run in first] == [
        (name, target, seed)
        for seed in (0, 1)
        for name, target in (("dense", 0.0), ("pruned", 0.5), ("pruned", 0.9))
    ]
    (run,) = second
    assert (run.seed, run.job.cell.data.train) == (7, 60)
    assert run.job.training == RECIPE.changed(epochs=4, momentum=0.5) and first[0].job.cell.options == {
        "hidden": [8]
    }


def test_a_profile_says_of_a_recipe_what_is_other_than_by_default():
    settings = _profile(training={"epochs": 6}).paper
    assert settings.training == RECIPE.changed(epochs=6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"known": ["b"]}, r"made_up\.cells\[0\] \(mlp\): known must have a"),
        (
            {"cells": [{"architecture": "mlp", "settings": {"training": {"epoch": 3}}}]},
            r"made_up\.cells\[0\]\.settings\.training\.epoch: unknown key; .*'epochs'",
        ),
        (
            {"training": {"milestones": [0.4]}},
            r"made_up\.cells\[0\] \(mlp\): training\.milestones\[0\] = 0\.4: must fall on a whole iteration, not on 2\.40",
        ),
        (
            {"cells": [{"architecture": "mlp", "options": {"hiden": [3]}}]},
            r"test\.made_up\.cells\[0\]: option 'hiden' of 'mlp': unknown; .*'hidden'",
        ),
        (
            {"cells": [{"architecture": "mlp", "options": {"hidden": ["8"]}}]},
            r"test\.made_up\.cells\[0\]: option 'hidden' of 'mlp' = \['8'\]: should be a valid integer",
        ),
        ({"cells": [{"architecture": "mlpp"}]}, r"made_up\.cells\[0\]\.architecture = 'mlpp': .*mean 'mlp'"),
        ({"cells": []}, r"made_up\.cells = \[\]"),
        ({"variants": {"dens": "all"}}, r"made_up\.variants\.dens"),
        ({"targets": [0.0, 0.5]}, r"made_up\.targets.*above 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(SettingsError, match=message):
        listed("made_up", MadeUp, _profile(**changes))


def test_images_that_are_not_there_are_no_fault_of_the_cell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = [{"architecture": "mlp", "data": {"source": "cifar10"}}]
    with pytest.raises(DataError, match="^data/prepared/cifar10"):
        listed("made_up", MadeUp, _profile(cells=cells))


@pytest.mark.parametrize("settings", [{}, {"training": {"epochs": 4}}])
def test_a_cell_that_repeats_runs_of_another_is_refused(settings):
    cells = [{"architecture": "mlp"}, {"architecture": "mlp", "settings": settings}]
    with pytest.raises(
        SettingsError, match=r"cells\[1\] \(mlp\): must not repeat .*dense mlp .* in cells\[0\]"
    ):
        listed("made_up", MadeUp, _profile(cells=cells))


# ------------------------------------------------------------------------------------------ networks and their images


def _listed_with(architecture, data, recipe, **options):
    cells = (CellSettings(architecture=architecture, options=options),)
    settings = Settings(seeds=(0,), cells=cells, training=recipe)
    return listed(
        "made_up", MadeUp, Profile(name="p", dataset=data, execution=ExecutionSettings(), paper=settings)
    )


def test_a_last_batch_of_one_image_is_refused_where_a_network_cannot_be_trained_on_it():
    recipe = RECIPE.changed(batch_size=32, milestones=())
    data = DATA.model_copy(update={"train": 65})
    told = "cells\\[0\\] \\(resnet18\\): training.batch_size = 32: 65 training images leave a last batch of one: resnet18"
    with pytest.raises(SettingsError, match=told):
        _listed_with("resnet18", data, recipe, stem=4)
    for sound in (
        recipe.changed(batch_size=31),
        recipe.changed(batch_size=65),
        recipe.changed(batch_size=100),
    ):
        _listed_with("resnet18", data, sound, stem=4)
    _listed_with("digits_cnn", data, recipe)  # its maps are larger than one pixel


def test_a_network_that_is_too_deep_for_its_images_is_refused(monkeypatch):
    with pytest.raises(SettingsError, match="cells\\[0\\] \\(vgg16\\): images of 8x8 are too small"):
        _listed_with("vgg16", DATA, RECIPE)
    # one that finds out as late as in its forward pass
    monkeypatch.setattr(ConvNet, "forward", lambda self, x: torch.nn.functional.max_pool2d(x, 9))
    with pytest.raises(
        SettingsError, match="digits_cnn cannot be trained on images of \\(2, 1, 8, 8\\): .*too small"
    ):
        _listed_with("digits_cnn", DATA, RECIPE)


@pytest.mark.parametrize(
    "architecture, options, message",
    [
        (
            "vgg_mini",
            {"hidden": [0]},
            r"\(vgg_mini\): with options {'hidden': \[0\]} classifier.0.weight has no",
        ),
        ("vgg_mini", {"hidden": [-3]}, r"\(vgg_mini\): .*negative dimension"),
        ("mlp", {"hidden": [8, 0]}, r"\(mlp\): with options .* layers.3.weight has no entries"),
        ("resnet8", {"stem": 0}, r"\(resnet8\): with options {'stem': 0}"),
        ("resnet8", {"multiplier": float("nan")}, r"\(resnet8\): cannot convert float NaN"),
        ("mobilenet_t8", {"strides": [1]}, r"\(mobilenet_t8\): "),
    ],
)
def test_options_of_which_no_network_comes_are_one_line(architecture, options, message):
    with pytest.raises(SettingsError, match=message) as error:
        _listed_with(architecture, DATA, RECIPE, **options)
    assert "\n" not in str(error.value)


def test_a_batch_of_one_image_in_training_fails_the_run_with_its_reason():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    images, labels = torch.rand(5, 1, 2, 2), torch.arange(5) % 2
    trainer = Trainer(model, FixedBatches([(images[:4], labels[:4]), (images[4:], labels[4:])]))
    with pytest.raises(Unreachable, match="one of the 2 batches has a single image.*another batch_size"):
        trainer.fit([0.1] * 2)
