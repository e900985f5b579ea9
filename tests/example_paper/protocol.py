"""A small made-up paper: "zeroing half of a linear classifier's weights costs accuracy". Used to test the suite."""

import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

from common.core.failures import Unreachable
from common.core.identity import stream
from common.core.pruning.counting import cost
from common.core.run import Outcome, Run
from common.settings import PaperSettings, Rate, Seeds, Targets


class Settings(PaperSettings):
    seeds: Seeds = (0, 1, 2)
    targets: Targets = (0.9,)
    epochs: int = 2
    learning_rate: Rate = 0.1
    # faults for the tests: which runs fail, stall, have a defect or kill their process
    fails: tuple[str, ...] = ()
    seconds: float = 0.0


def runs(profile):
    settings = profile.paper
    listed = []
    for seed in settings.seeds:
        base = {"data": profile.dataset.model_dump(mode="json"), "epochs": settings.epochs}
        base |= {
            "learning_rate": settings.learning_rate,
            "seconds": settings.seconds,
            "fails": list(settings.fails),
        }
        dense = Run("example", "dense", profile.dataset.source, "linear", 0.0, seed, base)
        listed.append(dense)
        for target in settings.targets:
            pruned = ("pruned", profile.dataset.source, "linear", target, seed, base, (dense,))
            listed.append(Run("example", *pruned))
    return listed


def execute(run, context):
    time.sleep(run.settings["seconds"])
    _misbehave(run)
    data = context.dataset(run.settings["data"])
    generator = torch.Generator().manual_seed(stream(run.seed, "init"))
    linear = nn.Linear(64, data.classes)
    nn.init.normal_(linear.weight, std=0.1, generator=generator)
    nn.init.zeros_(linear.bias)
    model = nn.Sequential(nn.Flatten(), linear)
    trainer = context.trainer(model, data, batch_size=64)
    if run.variant == "dense":
        trainer.fit([run.settings["learning_rate"]] * run.settings["epochs"] * len(trainer.batches))
    else:
        model.load_state_dict(context.needs[0].state["model"])
        with torch.no_grad():
            linear.weight[linear.weight.abs() < linear.weight.abs().quantile(run.target)] = 0
    state = {"model": model.state_dict()}
    return Outcome(context.scores(trainer, data), cost(model, data.image_shape), trainer.history, state)


def _misbehave(run):
    wanted = f"{run.variant}-{run.seed}"
    if f"fail:{wanted}" in run.settings["fails"]:
        raise Unreachable("made to fail")
    if f"defect:{wanted}" in run.settings["fails"]:
        raise KeyError("made to break")
    if f"kill:{wanted}" in run.settings["fails"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if f"crowd:{wanted}" in run.settings["fails"]:
        _take_memory(Path(f"memory-{wanted}"))


def _take_memory(taken):
    """Stands for memory that is there for one of two runs."""
    if not taken.exists():
        taken.touch()
        raise MemoryError("not beside another run")
