"""Every paper's method and the controls, at common costs, on the same data, seeds and total training epochs.

The methods are the `CONTENDERS` of each folder's `contender.py`; the controls are those of this folder. Each is tuned at
each target with the same number of trials. For each method and seed, one more record (`<method> @ MACs`) holds the accuracy
at a share of the dense network's MACs, interpolated between the method's runs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import field_validator

from common.arena import Contender, Contest
from common.core import experiment
from common.core.experiment import Cells, CellSettings, Cuts, ExperimentSettings
from common.core.failures import Unreachable
from common.core.recipe import Recipe
from common.core.run import Context, Job, Outcome
from common.core.tuning import Tuned, TuningSettings, tuned
from common.settings import Share

NAME = "equal_footing"
AT_MACS = " @ MACs"
ARENA = "common/arena.py"


class Settings(ExperimentSettings, TuningSettings):
    """What the comparison is made of."""

    cells: Cells = (CellSettings(architecture="vgg_t8"),)
    arena: Recipe = Recipe(
        epochs=20, batch_size=64, learning_rate=0.1, schedule="linear", nesterov=True, weight_decay=5e-4
    )
    """The training that all contenders share."""
    targets: Cuts = (0.75, 0.9, 0.95)
    """Shares of the dense network's parameters that are removed: the operating points."""
    macs_target: Share | None = 0.5
    """Share of the dense network's MACs that is removed where accuracy is read off between those points; null: nowhere."""

    @field_validator("arena")
    @classmethod
    def _fits_parts_of_any_length(cls, arena: Recipe) -> Recipe:
        if arena.schedule == "multistep":
            raise ValueError("schedule must not have milestones: contenders train in parts of any length")
        return arena


# ------------------------------------------------------------------------------------------ who takes part


def code() -> tuple[str, ...]:
    """The folders whose code its runs execute: those of the papers that enter, and this one with the controls."""
    files = Path(__file__).parent.parent.glob("*/contender.py")
    return tuple(sorted(f"replications/{file.parent.name}" for file in files))


@functools.cache
def contenders() -> dict[str, tuple[str, Contender]]:
    """What enters, by name: its folder and the contender."""
    found: dict[str, tuple[str, Contender]] = {}
    for folder in code():
        entries = importlib.import_module(f"{folder.replace('/', '.')}.contender").CONTENDERS
        found |= {name: (folder, contender) for name, contender in entries.items()}
    return found


# ------------------------------------------------------------------------------------------ jobs


class Dense(Job):
    """The network that is not pruned."""

    arena: Recipe

    @property
    def code(self) -> tuple[str, ...]:
        return (ARENA,)

    def execute(self, context: Context) -> Outcome:
        contest = Contest(context, self.arena)
        trainer = contest.trainer(contest.network())
        trainer.fit(contest.rates(self.arena.epochs), "dense")
        return contest.outcome(trainer)


class Contend(Job):
    """A contender at one target, with one of its settings or the best of them."""

    method: str
    arena: Recipe
    setting: Tuned[dict[str, Any]]

    @property
    def code(self) -> tuple[str, ...]:
        folder, _ = contenders()[self.method]
        return ARENA, folder

    def execute(self, context: Context) -> Outcome:
        _, contender = contenders()[self.method]
        setting = self.setting.chosen(context)
        outcome = contender.contend(Contest(context, self.arena), **setting)
        outcome.details["chosen"] = setting
        return outcome


class AtMacs(Job):
    """Test accuracy at the share 1 - target of the dense MACs, linear in the logarithm of the MACs between two runs."""

    dense: Dense
    points: tuple[Contend, ...]

    @property
    def code(self) -> tuple[str, ...]:
        return self.points[0].code

    def execute(self, context: Context) -> Outcome:
        records = [context.of(job).record for job in (self.dense, *self.points)]
        points = sorted((r.cost["sparse_macs"], r.metrics["test_accuracy"]) for r in records)
        macs, accuracy = np.array(points, dtype=float).T
        dense = records[0].cost
        wanted = round((1 - self.target) * dense["macs"])
        if not macs[0] <= wanted <= macs[-1]:
            raise Unreachable(
                f"its runs reach from {macs[0]:.0f} to {macs[-1]:.0f} MACs; {wanted} lies outside"
            )
        found = float(np.interp(np.log(wanted), np.log(macs), accuracy))
        costs = {
            "sparse_macs": wanted,
            "dense_macs": dense["macs"],
            "dense_parameters": dense["dense_parameters"],
        }
        return Outcome({"test_accuracy": found}, costs, details={"interpolated": True})


# ------------------------------------------------------------------------------------------ which jobs


class Experiment(experiment.Experiment[Settings]):
    """The dense network, and every contender at each target."""

    def jobs(self, seed: int) -> Iterator[Job]:
        dense = self.job(Dense, "dense", seed)
        yield dense
        for method in contenders():
            points = tuple(self.contend(method, seed, target) for target in self.settings.targets)
            yield from points
            if (target := self.settings.macs_target) is not None:
                yield self.job(AtMacs, method + AT_MACS, seed, target, dense=dense, points=points)

    def contend(self, method: str, seed: int, target: float) -> Contend:
        """The contender's run with the best of its settings."""

        def trial(name: str, setting: dict[str, Any], seed: int) -> Contend:
            return self.job(Contend, name, seed, target, method=method, setting=Tuned((setting,)))

        _, contender = contenders()[method]
        options = [dict(setting) for setting in contender.settings]
        best = tuned(self.settings, seed, method, options, trial)
        return self.job(Contend, method, seed, target, method=method, setting=best)
