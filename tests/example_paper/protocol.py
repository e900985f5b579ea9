"""A small made-up paper: "zeroing most of a linear classifier's weights costs accuracy". Used to test the suite."""

import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from common.core import experiment
from common.core.experiment import Cells, CellSettings, Cuts, ExperimentSettings
from common.core.failures import Unreachable
from common.core.recipe import Recipe
from common.core.run import Context, Job, Outcome
from common.settings import Seeds


class Settings(ExperimentSettings):
    """What a profile can say of the paper."""

    seeds: Seeds = (0, 1, 2)
    cells: Cells = (CellSettings(architecture="mlp", options={"hidden": []}),)
    targets: Cuts = (0.9,)
    training: Recipe = Recipe(epochs=2, batch_size=64, learning_rate=0.1, schedule="constant")
    # faults for the tests: which runs fail, stall, have a defect, find a full disk or kill their process
    fails: tuple[str, ...] = ()
    seconds: float = 0.0


class Faulty(Job):
    """What the jobs have in common: the faults."""

    fails: tuple[str, ...]
    seconds: float

    def misbehave(self) -> None:
        """Fail as the tests want it."""
        time.sleep(self.seconds)
        wanted = f"{self.variant}-{self.seed}"
        if f"fail:{wanted}" in self.fails:
            raise Unreachable("made to fail")
        if f"defect:{wanted}" in self.fails:
            raise KeyError("made to break")
        if f"full:{wanted}" in self.fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a-disk")
        if f"kill:{wanted}" in self.fails and not Path("spared").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if f"crowd:{wanted}" in self.fails and not (taken := Path(f"memory-{wanted}")).exists():
            taken.touch()
            raise MemoryError("not beside another run")


class Dense(Faulty):
    """The classifier."""

    training: Recipe

    def execute(self, context: Context) -> Outcome:
        self.misbehave()
        trainer = self.training.trainer(context, context.network())
        trainer.fit(self.training.rates(len(trainer.batches)))
        return context.measured(trainer, state={"model": trainer.model.state_dict()})


class Pruned(Faulty):
    """The classifier without its smallest weights."""

    dense: Dense

    def execute(self, context: Context) -> Outcome:
        self.misbehave()
        model = context.network()
        model.load_state_dict(context.of(self.dense).state["model"])
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight[weight.abs() < weight.abs().quantile(self.target)] = 0
        return context.measured(self.dense.training.trainer(context, model))


class Experiment(experiment.Experiment[Settings]):
    """The jobs of one cell."""

    def jobs(self, seed: int) -> Iterator[Job]:
        dense = self.job(Dense, "dense", seed)
        yield dense
        for target in self.settings.targets:
            yield self.job(Pruned, "pruned", seed, target, dense=dense)
