"""The recipe: learning rates of each schedule, milestones on whole iterations, optimisers and what decays."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from common.core import schedules
from common.core.compute import Compute
from common.core.recipe import Recipe
from common.core.run import Cell, Context, Job
from common.settings import DatasetSettings, SettingsError

RECIPE = Recipe(epochs=8, batch_size=25, learning_rate=0.2)
DATA = DatasetSettings(train=90, validation=50, test=60)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, lambda: schedules.multistep(0.2, 8, 4, [4, 6])),
        ({"milestones": (0.25,), "gamma": 0.5}, lambda: schedules.multistep(0.2, 8, 4, [2], 0.5)),
        ({"milestones": (), "warmup_epochs": 1}, lambda: schedules.constant(0.2, 8, 4)[:0] + _warm()),
        ({"schedule": "constant"}, lambda: [0.2] * 32),
        ({"schedule": "linear", "end": 0.1}, lambda: schedules.linear(0.2, 8, 4, 0.1)),
        ({"schedule": "cosine", "warmup_epochs": 2}, lambda: schedules.cosine(0.2, 8, 4, warmup_epochs=2)),
        ({"schedule": "exponential", "gamma": 0.9}, lambda: schedules.exponential(0.2, 8, 4, 0.9)),
    ],
)
def test_rates_of_each_schedule(changes, expected):
    assert RECIPE.changed(**changes).rates(4) == expected()


def _warm():
    return [0.0, 0.05, 0.1, 0.15000000000000002] + [0.2] * 28


def test_milestones_are_shares_of_whatever_epochs_there_are():
    assert RECIPE.drops(3) == [12, 18] and RECIPE.changed(epochs=2).drops(6) == [6, 9]
    # a third is never exact
    assert RECIPE.changed(epochs=90, milestones=(0.333333333, 0.666666667)).drops(391) == [11730, 23460]


def test_a_milestone_between_two_iterations_is_refused_by_name():
    with pytest.raises(
        SettingsError, match=r"^milestones\[1\] = 0\.75: .* not on 4\.50 of 6 \(2 epochs of 3\)"
    ):
        RECIPE.changed(epochs=2).rates(3)
    RECIPE.changed(epochs=2, schedule="cosine").rates(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"milestones": (0.5, 0.5)}, "milestones must rise"),
        ({"milestones": (1.0,)}, "less than 1"),
        ({"warmup_epochs": 8}, "fewer than the 8 epochs"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov needs a momentum"),
        ({"epoch": 3}, "Extra inputs"),
    ],
)
def test_an_impossible_recipe_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        RECIPE.changed(**changes)


class Plain(Job):
    """Does nothing."""


def _context():
    job = Plain(variant="dense", cell=Cell(architecture="digits_cnn", data=DATA), seed=3)
    return Context(job.run, Compute.choose("cpu", "float32"), ())


def test_the_trainer_has_the_recipe_s_optimiser_and_batches():
    context = _context()
    model = context.network()
    recipe = RECIPE.changed(momentum=0.7, nesterov=True, weight_decay=0.01, label_smoothing=0.1)
    trainer = recipe.trainer(context, model)
    (group,) = trainer.optimizer.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.7, True, 0.01)
    assert trainer.label_smoothing == 0.1 and len(trainer.batches) == recipe.per_epoch(context.data) == 4
    assert (trainer.batches.seed, trainer.seed) == (3, 3)
    other = recipe.trainer(context, model, data=context.data.with_train_size(30, 0), seed=8)
    assert len(other.batches) == 2 and (other.batches.seed, other.seed) == (8, 8)
    adam = recipe.changed(optimizer="adam", betas=(0.8, 0.9), epsilon=1e-5).trainer(context, model).optimizer
    assert isinstance(adam, torch.optim.AdamW)
    assert (adam.defaults["betas"], adam.defaults["eps"]) == ((0.8, 0.9), 1e-5)
    assert adam.defaults["weight_decay"] == 0.01


@pytest.mark.parametrize(
    ("decay", "spared"),
    [
        ("all", set()),
        ("weights", {"0.bias", "1.weight", "1.bias", "2.bias", "4.bias"}),
        ("not_depthwise", {"0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "4.bias"}),
    ],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_what_decays(decay, spared, optimizer):
    layers = (
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    model = nn.Sequential(*layers)
    recipe = RECIPE.changed(decay=decay, weight_decay=0.3, optimizer=optimizer)
    groups = recipe.trainer(_context(), model).optimizer.param_groups
    without = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in without} == spared
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    # what a method says of its own weights comes first
    own = recipe.trainer(_context(), model, decays=lambda name, parameter: name == "4.weight").optimizer
    assert [p is model[4].weight for p in own.param_groups[0]["params"]] == [True]
