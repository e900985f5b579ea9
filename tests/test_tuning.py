"""Tuning: validation chooses, what diverges loses, and nothing else that fails is passed over."""

import re

import pytest

from common.core.failures import Diverged, OutOfMemory, Unreachable
from common.core.run import Cell, Job, Outcome
from common.core.tuning import Tuned, TuningSettings, tuned
from common.settings import DatasetSettings, ExecutionSettings
from common.stage.scheduler import in_order
from common.stage.store import Store
from common.stage.worker import perform

CELL = Cell(architecture="mlp", data=DatasetSettings(train=90, validation=50, test=60))
FAILURES = {"diverges": Diverged, "unreachable": Unreachable, "memory": OutOfMemory}


class Start(Job):
    """Fails as its option says."""

    option: str

    def execute(self, context):
        raise FAILURES[self.option]("the start is no good")


class Trial(Job):
    """Its option is its accuracy on validation, by seed, or how it fails; `from ...` is by what it starts from."""

    option: str
    start: Start | None = None

    def execute(self, context):
        if self.option in FAILURES:
            raise FAILURES[self.option](f"{self.option} it does")
        accuracy = float(self.option.split()[self.seed - 1000])
        return Outcome({"validation_accuracy": accuracy, "test_accuracy": 1 - accuracy}, {})


class Arm(Job):
    """Says what it has chosen."""

    option: Tuned[str]

    def execute(self, context):
        return Outcome({}, {}, details={"chosen": self.option.chosen(context)})


def _arm(*options, **settings):
    def trial(name, option, seed):
        start = None
        if option.startswith("from "):
            start = Start(variant=f"{name}-start", cell=CELL, seed=seed, option=option.removeprefix("from "))
        return Trial(variant=name, cell=CELL, seed=seed, option=option, start=start)

    chosen = tuned(TuningSettings(**settings), 3, "arm", options, trial)
    return Arm(variant="arm", cell=CELL, seed=3, option=chosen)


def _record(job, folder):
    store, execution = Store(folder), ExecutionSettings(device="cpu", precision="float32")
    return [perform(run, store, execution, keep_state=True).record for run in in_order([job.run])][-1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("0.3 0.5", "0.6 0.4", "0.5 0.4"), "0.6 0.4"),
        (("0.5 0.5", "0.2 0.8"), "0.5 0.5"),  # of equal ones the first
        (("diverges", "0.0 0.0"), "0.0 0.0"),
        (("unreachable", "0.1 0.1"), "0.1 0.1"),
        (("from diverges", "0.1 0.1"), "0.1 0.1"),
        (("0.3 0.5",), "0.3 0.5"),
    ],
)
def test_the_best_mean_on_validation_is_chosen_and_a_lost_trial_loses(options, expected, tmp_path):
    arm = _arm(*options, tuning_seeds=(1000, 1001))
    assert _record(arm, tmp_path).details == {"chosen": expected}


@pytest.mark.parametrize(
    ("options", "failure", "reason"),
    [
        (
            ("diverges", "from unreachable"),
            "diverged",
            r"all trials of arm are lost: diverges it does; .* the start is no good",
        ),
        (("memory", "0.5 0.5"), "needs", "it starts from .*tuning-arm-0 .*, which failed"),
        (("from memory", "0.5 0.5"), "needs", "the start is no good"),
    ],
)
def test_an_arm_fails_with_all_its_trials_or_with_one_that_says_nothing_of_its_option(
    options, failure, reason, tmp_path
):
    record = _record(_arm(*options, tuning_seeds=(1000, 1001)), tmp_path)
    assert record.failure == failure and not record.is_lost_trial
    assert re.search(reason, record.reason)


def test_a_need_that_is_no_trial_may_not_fail(tmp_path):
    start = Start(variant="start", cell=CELL, seed=1000, option="diverges")
    trial = Trial(variant="arm", cell=CELL, seed=1000, option="0.5", start=start)
    record = _record(trial, tmp_path)
    assert record.failure == "needs" and not record.is_lost_trial
    assert record.model_copy(update={"variant": "tuning-arm-0"}).is_lost_trial


def test_every_option_has_a_trial_for_each_seed_of_tuning():
    arm = _arm("0.1", "0.2", tuning_seeds=(1000, 1001))
    names = [(need.variant, need.seed) for need in arm.needs]
    assert names == [(f"tuning-arm-{number}", seed) for number in (0, 1) for seed in (1000, 1001)]
    assert [(need.variant, need.seed) for need in _arm("0.1", "0.2", tuning="per_seed").needs] == [
        ("tuning-arm-0", 3),
        ("tuning-arm-1", 3),
    ]
    assert _arm("0.1").needs == ()
    with pytest.raises(ValueError, match="no seed in common"):
        TuningSettings(seeds=(0, 7), tuning_seeds=(7,))
