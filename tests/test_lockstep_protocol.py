"""What the protocol of IMP+SLR executes is what its lockstep cases train: settings, hooks and optimisers in between."""

import lockstep
import numpy as np
import pytest
import torch

from common.core.compute import Compute
from common.core.data import Dataset
from common.core.run import Context, Needed
from common.core.trainer import Trainer
from common.records import Record
from common.settings import DatasetSettings, ExecutionSettings, Profile
from common.stage import papers
from replications.imp_slr import protocol

pytestmark = pytest.mark.slow

SETTINGS = {
    "seeds": [0],
    "targets": [0.9],
    "training": {"epochs": 6, "batch_size": lockstep.BATCH},
    "retrain_epochs": 3,
    "experiments": ["schedules", "during", "cycles"],
    "lengths": [2],
    "short_lengths": [1],
    "learning_rates": [0.1],
    "schedules": ["FT", "LRW", "SLR", "CLR", "LLR", "ALLR"],
    "during": {
        **{name: {} for name in ("gmp", "dpf", "gsm", "lc", "dnw")},
        "str": {"weight_decays": [2e-2]},
        "cs": {"initials": [0.0], "penalty": 1e-3},
    },
    "cycles": [3],
    "retraining": {"cycle_epochs": "each"},
    "cells": [{"architecture": "resnet8", "options": {"stem": 2, "shortcut": "A"}}],
}
# without DST: its step has a slope of 0.4 in the default precision, which is double here and single where it was frozen
CASES = {"dense": "dense", "slr-3cycles": "SLR-3", "str-0.02": "STR", "cs-0": "CS"}
CASES |= {name: name.upper() for name in ("gmp", "dpf", "gsm", "lc", "dnw")}
CASES |= {name.lower(): f"{name}-1" for name in SETTINGS["schedules"]}


class Double(Trainer):
    """Takes images of any precision."""

    def logits(self, images):
        return super().logits(images.double())


def _stored():
    """The stored images as every split of a data set."""
    found = lockstep.start()
    images, labels = found["images"].permute(0, 2, 3, 1).contiguous(), found["labels"].long()
    splits = ("train", "validation", "test")
    return Dataset(
        "stored",
        dict.fromkeys(splits, images),
        dict.fromkeys(splits, labels),
        10,
        255.0,
        (0.5,) * 3,
        (0.25,) * 3,
    )


def _execute(run, trained):
    """Execute a run and what it needs from the stored weights and batches; `trained` collects weights by variant."""
    needs, made = tuple(_execute(need, trained) for need in run.needs), []

    class Stored(Context):
        def dataset(self, settings):
            return _stored()

        def trainer(self, model, data, batch_size, hooks=(), seed=None, **options):
            if not needs:
                lockstep.started("resnet", model)
            made.append(Double(model, lockstep.StoredBatches(), hooks=hooks, **options))
            return made[0]

    outcome = run.job.execute(Stored(run, Compute(torch.device("cpu")), needs))
    trained[run.variant] = {name: value.clone() for name, value in made[0].model.state_dict().items()}
    record = Record.model_construct(settings=run.settings, metrics=outcome.metrics, details=outcome.details)
    return Needed(record, {"model": trained[run.variant]})


@pytest.fixture(scope="module")
def trained():
    """Weights at the end of each run, by variant."""
    settings = protocol.Settings.model_validate(SETTINGS)
    data = DatasetSettings(train=lockstep.BATCH * lockstep.PER_EPOCH)
    profile = Profile(name="test", dataset=data, execution=ExecutionSettings(), paper=settings)
    found = {}
    torch.set_default_dtype(torch.float64)
    try:
        for run in papers.runs("imp_slr", profile):
            if run.variant in CASES and run.variant not in found:
                _execute(run, found)
    finally:
        torch.set_default_dtype(torch.float32)
    return found


@pytest.mark.parametrize("variant", CASES)
def test_a_run_trains_what_is_frozen(trained, variant):
    found, frozen = trained[variant], lockstep.frozen("imp_slr")[CASES[variant]]
    weights = {name: value for name, value in found.items() if value.is_floating_point()}
    for name, value in weights.items():
        assert np.abs(value.numpy() - frozen[name]).max() <= 1e-12, name
