"""Equal footing: every contender and control keeps to its parameters and epochs; interpolation does not extrapolate."""

import pytest
import torch

from common.arena import Contest
from common.core.compute import Compute
from common.core.experiment import listed
from common.core.failures import RunFailed
from common.core.run import Cell, Context, Needed
from common.records import Record
from common.settings import DatasetSettings, ExecutionSettings, Profile, SettingsError, validated
from replications.equal_footing import protocol

pytestmark = pytest.mark.slow

DATA = DatasetSettings(train=120, validation=50)
CELL = Cell(architecture="vgg_t8", data=DATA)
ARENA = protocol.Settings().arena.changed(epochs=8, batch_size=40)


METHODS = [*protocol.CONTROLS, *protocol.contenders()]


def _context(job, needs=()) -> Context:
    return Context(job.run, Compute.choose("cpu", "float32"), tuple(needs))


def _job(method: str, target: float):
    shared = {"variant": method, "cell": CELL, "target": target, "seed": 0, "method": method, "arena": ARENA}
    if method in protocol.CONTROLS:
        return protocol.Control(**shared, retraining=0.25)
    return protocol.Contend(**shared)


def _contest(target: float) -> Contest:
    return Contest(_context(_job("global magnitude", target)), ARENA)


def test_every_paper_enters():
    entered = {paper for paper, _ in protocol.contenders().values()}
    assert entered == {"imp_slr", "halo", "feature_relevance", "pruning_from_scratch", "pretraining_impact"}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_keeps_to_its_share_of_parameters_and_epochs(method):
    contest, job = _contest(0.75), _job(method, 0.75)
    outcome = job.execute(_context(job))
    cost = outcome.cost
    assert cost["dense_parameters"] == contest.parameters
    assert 0.2 * contest.parameters < cost["nonzero_parameters"] <= 0.26 * contest.parameters
    assert len(outcome.curves) <= ARENA.epochs and cost["training_macs"] > 0
    assert {"test_accuracy", "validation_accuracy"} <= set(outcome.metrics)


def test_more_epochs_than_the_arena_allows_are_a_failure():
    contest = _contest(0.0)
    trainer = contest.trainer(contest.network())
    trainer.fit(contest.rates(ARENA.epochs + 1))
    with pytest.raises(RunFailed, match="trained for 9 epochs; the arena allows 8"):
        contest.outcome(trainer)


def test_a_share_that_masks_cannot_meet_is_named():
    contest = _contest(0.999)
    with pytest.raises(RunFailed, match="only a share of 0.99.* are prunable weights; 0.999 must go"):
        contest.sparsity(contest.network())


def _point(macs: int, accuracy: float) -> Needed:
    cost = {"sparse_macs": macs, "macs": 1000, "dense_parameters": 500}
    return Needed(Record.model_construct(cost=cost, metrics={"test_accuracy": accuracy}))


def test_accuracy_at_a_share_of_the_macs_is_interpolated_and_not_extrapolated():
    needs = (_point(1000, 0.9), _point(400, 0.8), _point(100, 0.6))
    dense = protocol.Dense(variant="dense", cell=CELL, seed=0, arena=ARENA)
    points = tuple(_job("small dense", target) for target in (0.5, 0.9))

    def at(target):
        job = protocol.AtMacs(variant="x", cell=CELL, target=target, seed=0, dense=dense, points=points)
        return job.execute(_context(job, needs)).metrics["test_accuracy"]

    assert at(0.6) == pytest.approx(0.8) and at(0.9) == pytest.approx(0.6)
    assert at(0.8) == pytest.approx(0.7)  # 200 is the geometric mean of 100 and 400
    with pytest.raises(RunFailed, match="reach from 100 to 1000 MACs; 50 lies outside"):
        at(0.95)


def test_all_methods_run_at_all_targets_and_seeds():
    settings = protocol.Settings(seeds=(0, 1))
    profile = Profile(name="digits", dataset=DATA, execution=ExecutionSettings(), paper=settings)
    runs = listed("equal_footing", protocol.Experiment, profile)
    found = {(run.variant, run.target, run.seed) for run in runs}
    points = len(settings.targets) + len(settings.macs_targets)
    assert len(found) == 2 * (1 + len(METHODS) * points)


def test_a_network_of_the_contest_is_where_it_will_train():
    """Masks made from it before training must lie on the same device; the memory format shows that on a CPU."""
    model = _contest(0.5).network()
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert all(c.weight.is_contiguous(memory_format=torch.channels_last) for c in convolutions)
    assert not all(c.weight.is_contiguous() for c in convolutions)


def test_an_arena_with_milestones_is_refused():
    """Contenders train in parts of any length; milestones would fall between iterations of some."""
    with pytest.raises(SettingsError, match="x.arena: schedule must not have milestones"):
        validated(protocol.Settings, {"arena": {"schedule": "multistep"}}, "x")
    assert validated(protocol.Settings, {"arena": {"epochs": 7}}, "x").arena.nesterov
