"""Every paper's method and the controls, at common costs, on the same data, seeds and total training epochs.

The methods are the `CONTENDERS` of each paper's `contender.py`; this folder adds the controls. For each method
and seed, one more record a target (`<method> @ MACs`) holds the accuracy at that share of the dense network's MACs,
interpolated between the method's runs.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from common.arena import Arena, Contender, Contest
from common.core import schedules
from common.core.failures import Unreachable
from common.core.identity import stream
from common.core.pruning.masks import Allocation, KeepMasked, Masks, prunable, select
from common.core.run import Context, Outcome, Run
from common.settings import PaperSettings, Profile, Targets

NAME = "equal_footing"
AT_MACS = " @ MACs"
ARENA = "common/arena.py"


class Settings(PaperSettings):
    """What the comparison is made of."""

    arena: Arena = Arena()
    targets: Targets = (0.75, 0.9, 0.95)
    """Shares of the dense network's parameters that are removed: the operating points."""
    macs_targets: Targets = (0.5, 0.7)
    """Shares of the dense network's MACs at which accuracy is read off between those points."""
    retraining: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the epochs after pruning, for the controls that prune a trained network."""


def code() -> tuple[str, ...]:
    """The folders beside this one whose code its runs execute: those of the papers that enter."""
    files = Path(__file__).parent.parent.glob("*/contender.py")
    return tuple(sorted(f"replications/{file.parent.name}" for file in files))


def contenders() -> dict[str, tuple[str, Contender]]:
    """The methods that papers enter, by name: the paper and the function."""
    found: dict[str, tuple[str, Contender]] = {}
    for folder in code():
        paper = Path(folder).name
        entries = importlib.import_module(f"replications.{paper}.contender").CONTENDERS
        found |= {name: (paper, function) for name, function in entries.items()}
    return found


def runs(profile: Profile) -> list[Run]:
    """The dense network, every control and every contender, at each target and seed."""
    settings = profile.paper
    data = {"data": profile.dataset.model_dump(mode="json"), "arena": settings.arena.model_dump(mode="json")}
    base = (profile.dataset.name, settings.arena.architecture)
    codes: dict[str, tuple[str, ...]] = dict.fromkeys(CONTROLS, (ARENA,))
    codes |= {method: (ARENA, f"replications/{paper}") for method, (paper, _) in contenders().items()}
    listed = []
    for seed in settings.seeds:
        dense = Run(NAME, "dense", *base, 0.0, seed, data, code=(ARENA,))
        listed.append(dense)
        for method, code in codes.items():
            own = {**data, "retraining": settings.retraining} if method in CONTROLS else data
            points = tuple(
                Run(NAME, method, *base, target, seed, own, code=code) for target in settings.targets
            )
            at_macs = (
                Run(NAME, method + AT_MACS, *base, t, seed, data, (dense, *points), code)
                for t in settings.macs_targets
            )
            listed += [*points, *at_macs]
    return listed


def execute(run: Run, context: Context) -> Outcome:
    """Train and measure one run, or interpolate between runs."""
    if run.variant.endswith(AT_MACS):
        return _at_macs(run, context)
    contest = Contest(run, context, Arena.model_validate(run.settings["arena"]))
    if run.variant == "dense":
        return _dense(contest)
    if run.variant in CONTROLS:
        return CONTROLS[run.variant](contest)
    return contenders()[run.variant][1](contest)


def _dense(contest: Contest) -> Outcome:
    trainer = contest.trainer(contest.network())
    trainer.fit(contest.dense_rates(contest.arena.epochs), "dense")
    return contest.outcome(trainer)


def _pruned(contest: Contest, allocation: Allocation) -> Outcome:
    """Train, prune once by `allocation`, retrain from the full learning rate linearly to zero."""
    arena = contest.arena
    after = max(1, round(contest.run.settings["retraining"] * arena.epochs))
    model = contest.network()
    trainer = contest.trainer(model)
    trainer.fit(contest.dense_rates(arena.epochs - after), "dense")
    weights = prunable(model)
    generator = torch.Generator().manual_seed(stream(contest.run.seed, "mask"))
    masks = Masks(select(weights, contest.sparsity(model), allocation=allocation, generator=generator))
    masks.apply(model)
    trainer.add_hook(KeepMasked(masks))
    trainer.fit(schedules.linear(arena.learning_rate, after, contest.per_epoch), "retraining")
    return contest.outcome(trainer)


def _small_dense(contest: Contest) -> Outcome:
    """The same network with all widths scaled alike to the budget, trained from scratch as long."""
    full = contest.network().widths
    budget = contest.keep * contest.parameters

    def widths(scale: float) -> list[int]:
        return [max(1, round(scale * width)) for width in full]

    def size(scale: float) -> int:
        return sum(parameter.numel() for parameter in contest.shape_of(widths(scale)).parameters())

    scales = np.linspace(0, 1, 513)[1:]
    fitting = [scale for scale in scales if size(scale) <= budget]
    if not fitting:
        raise Unreachable(
            f"no network of the architecture has {budget:.0f} parameters or fewer; the least is {size(0)}"
        )
    trainer = contest.trainer(contest.network(widths(max(fitting))))
    trainer.fit(contest.dense_rates(contest.arena.epochs), "dense")
    return contest.outcome(trainer, widths=widths(max(fitting)))


CONTROLS: dict[str, Contender] = {
    "random weights": lambda contest: _pruned(contest, "random"),
    "global magnitude": lambda contest: _pruned(contest, "global"),
    "small dense": _small_dense,
}


def _at_macs(run: Run, context: Context) -> Outcome:
    """Test accuracy at the share 1 - target of the dense MACs, linear in the logarithm of the MACs between two runs."""
    points = sorted(
        (need.record.cost["sparse_macs"], need.record.metrics["test_accuracy"]) for need in context.needs
    )
    macs, accuracy = np.array(points, dtype=float).T
    dense = context.needs[0].record.cost
    wanted = round((1 - run.target) * dense["macs"])
    if not macs[0] <= wanted <= macs[-1]:
        raise Unreachable(f"its runs reach from {macs[0]:.0f} to {macs[-1]:.0f} MACs; {wanted} lies outside")
    found = float(np.interp(np.log(wanted), np.log(macs), accuracy))
    costs = {
        "sparse_macs": wanted,
        "dense_macs": dense["macs"],
        "dense_parameters": dense["dense_parameters"],
    }
    return Outcome({"test_accuracy": found}, costs, details={"interpolated": True})
