"""Jobs that the nodes of a cluster execute in tests; the nodes find this module by their PYTHONPATH."""

import os
import signal
import time
from pathlib import Path

from common.core.hooks import Hooks
from common.core.recipe import Recipe
from common.core.run import Cell, Job
from common.settings import DatasetSettings
from common.stage import store

DATA = DatasetSettings(source="npz", path="data.npz", train=200, validation=100)
CELL = Cell(architecture="mlp", data=DATA)


class Noting(Hooks):
    """Writes down each epoch, and takes its time."""

    def __init__(self, job):
        self.job = job

    def epoch_started(self, trainer, epoch):
        self.job.note(f"epoch-{epoch}")
        time.sleep(self.job.seconds)


class Trains(Job):
    """Trains a small network, and keeps its state at the end of each epoch.

    log: file that says what is done, and whether where it is done the folder is seen. seconds: of an epoch, at least.
    """

    training: Recipe = Recipe(epochs=3, batch_size=50, learning_rate=0.1, schedule="constant")
    starts: tuple[Job, ...] = ()
    kills: bool = False
    seconds: float = 0.0
    project: str = ""

    def execute(self, context):
        store.CHECKPOINT_SECONDS = 0.0
        self.note("begun")
        if self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        trainer = self.training.trainer(context, context.network(), hooks=(Noting(self),))
        for start in self.starts:
            trainer.model.load_state_dict(context.of(start).state["model"])
        trainer.fit(self.training.rates(len(trainer.batches)))
        return context.measured(trainer, state={"model": trainer.model.state_dict()})

    def note(self, what):
        seen = Path(self.project, "data.npz").exists()
        with Path(f"{self.project}.log").open("a") as file:
            file.write(f"{self.variant}-{self.seed} {what} {'seen' if seen else 'blind'} {os.getpid()}\n")
