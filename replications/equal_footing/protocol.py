"""Every paper's method and the controls, at common costs, on the same data, seeds and total training epochs.

The methods are the `CONTENDERS` of each paper's `contender.py`; this folder adds the controls. For each method
and seed, one more record a target (`<method> @ MACs`) holds the accuracy at that share of the dense network's MACs,
interpolated between the method's runs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, field_validator

from common.arena import Contender, Contest
from common.core import experiment, schedules
from common.core.experiment import Cells, CellSettings, Cuts, ExperimentSettings
from common.core.failures import Unreachable
from common.core.identity import stream
from common.core.pruning.masks import Allocation, KeepMasked, Masks, prunable, select
from common.core.recipe import Recipe
from common.core.run import Context, Job, Outcome

NAME = "equal_footing"
AT_MACS = " @ MACs"
ARENA = "common/arena.py"


class Settings(ExperimentSettings):
    """What the comparison is made of."""

    cells: Cells = (CellSettings(architecture="vgg_t8"),)
    arena: Recipe = Recipe(
        epochs=20, batch_size=64, learning_rate=0.1, schedule="linear", nesterov=True, weight_decay=5e-4
    )
    """The training that all contenders share."""
    targets: Cuts = (0.75, 0.9, 0.95)
    """Shares of the dense network's parameters that are removed: the operating points."""
    macs_targets: Cuts = (0.5, 0.7)
    """Shares of the dense network's MACs at which accuracy is read off between those points."""
    retraining: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the epochs after pruning, for the controls that prune a trained network."""

    @field_validator("arena")
    @classmethod
    def _fits_parts_of_any_length(cls, arena: Recipe) -> Recipe:
        if arena.schedule == "multistep":
            raise ValueError("schedule must not have milestones: contenders train in parts of any length")
        return arena


# ------------------------------------------------------------------------------------------ who takes part


def code() -> tuple[str, ...]:
    """The folders beside this one whose code its runs execute: those of the papers that enter."""
    files = Path(__file__).parent.parent.glob("*/contender.py")
    return tuple(sorted(f"replications/{file.parent.name}" for file in files))


@functools.cache
def contenders() -> dict[str, tuple[str, Contender]]:
    """The methods that papers enter, by name: the paper and the function."""
    found: dict[str, tuple[str, Contender]] = {}
    for folder in code():
        paper = Path(folder).name
        entries = importlib.import_module(f"replications.{paper}.contender").CONTENDERS
        found |= {name: (paper, function) for name, function in entries.items()}
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


class Control(Job):
    """A control at one target."""

    method: str
    arena: Recipe
    retraining: float

    @property
    def code(self) -> tuple[str, ...]:
        return (ARENA,)

    def execute(self, context: Context) -> Outcome:
        contest, allocation = Contest(context, self.arena), CONTROLS[self.method]
        if allocation is None:
            return _small_dense(contest)
        return _pruned(contest, allocation, self.retraining)


class Contend(Job):
    """A paper's method at one target."""

    method: str
    arena: Recipe

    @property
    def code(self) -> tuple[str, ...]:
        paper, _ = contenders()[self.method]
        return ARENA, f"replications/{paper}"

    def execute(self, context: Context) -> Outcome:
        _, contend = contenders()[self.method]
        return contend(Contest(context, self.arena))


class AtMacs(Job):
    """Test accuracy at the share 1 - target of the dense MACs, linear in the logarithm of the MACs between two runs."""

    dense: Dense
    points: tuple[Control | Contend, ...]

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


# ------------------------------------------------------------------------------------------ controls


def _pruned(contest: Contest, allocation: Allocation, retraining: float) -> Outcome:
    """Train, prune once by `allocation`, retrain from the full learning rate linearly to zero."""
    arena = contest.arena
    after = max(1, round(retraining * arena.epochs))
    model = contest.network()
    trainer = contest.trainer(model)
    trainer.fit(contest.rates(arena.epochs - after), "dense")
    weights = prunable(model)
    generator = torch.Generator().manual_seed(stream(contest.seed, "mask"))
    masks = Masks(select(weights, contest.sparsity(model), allocation=allocation, generator=generator))
    masks.apply(model)
    trainer.add_hook(KeepMasked(masks))
    trainer.fit(schedules.linear(arena.learning_rate, after, len(trainer.batches)), "retraining")
    return contest.outcome(trainer)


def _small_dense(contest: Contest) -> Outcome:
    """The same network with all widths scaled alike to the budget, trained from scratch as long."""
    full = contest.shape_of().widths
    budget = contest.keep * contest.parameters

    def widths(scale: float) -> list[int]:
        return [max(1, round(scale * width)) for width in full]

    scales = np.linspace(0, 1, 513)[1:]
    fitting = [scale for scale in scales if contest.size_of(widths(scale)) <= budget]
    if not fitting:
        least = contest.size_of(widths(0))
        raise Unreachable(
            f"no network of the architecture has {budget:.0f} parameters or fewer; the least is {least}"
        )
    trainer = contest.trainer(contest.network(widths(max(fitting))))
    trainer.fit(contest.rates(contest.arena.epochs), "dense")
    return contest.outcome(trainer, widths=widths(max(fitting)))


CONTROLS: dict[str, Allocation | None] = {
    "random weights": "random",
    "global magnitude": "global",
    "small dense": None,
}
"""How each chooses the weights that go."""


# ------------------------------------------------------------------------------------------ which jobs


class Experiment(experiment.Experiment[Settings]):
    """The dense network, every control and every contender, at each target."""

    def jobs(self, seed: int) -> Iterator[Job]:
        dense = self.job(Dense, "dense", seed)
        yield dense
        kinds: dict[str, type[Control | Contend]] = dict.fromkeys(CONTROLS, Control)
        kinds |= dict.fromkeys(contenders(), Contend)
        for method, kind in kinds.items():
            points = tuple(
                self.job(kind, method, seed, target, method=method) for target in self.settings.targets
            )
            yield from points
            for target in self.settings.macs_targets:
                yield self.job(AtMacs, method + AT_MACS, seed, target, dense=dense, points=points)
