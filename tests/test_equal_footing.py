"""Equal footing: every contender keeps to its parameters and epochs, all are tuned alike; nothing is extrapolated."""

import pytest
import torch

from common.arena import TRIALS, Contender, Contest
from common.core.compute import Compute
from common.core.experiment import listed
from common.core.failures import RunFailed
from common.core.run import Cell, Context, Needed, Outcome, Run
from common.core.tuning import Tuned
from common.records import Record
from common.settings import DatasetSettings, ExecutionSettings, Profile, SettingsError, validated
from common.stage.papers import papers
from replications.equal_footing import protocol
from replications.halo import contender as halo_contender
from replications.halo.method import HALO

pytestmark = pytest.mark.slow

DATA = DatasetSettings(train=120, validation=50)
CELL = Cell(architecture="vgg_t8", data=DATA)
ARENA = protocol.Settings().arena.changed(epochs=8, batch_size=40)


CONTENDERS = {name: contender for name, (_, contender) in protocol.contenders().items()}


def _context(job, needs=()) -> Context:
    return Context(job.run, Compute.choose("cpu", "float32"), tuple(needs))


def _job(method: str, target: float, setting: dict | None = None) -> protocol.Contend:
    chosen = Tuned((setting or dict(CONTENDERS[method].settings[0]),))
    return protocol.Contend(
        variant=method, cell=CELL, target=target, seed=0, method=method, arena=ARENA, setting=chosen
    )


def _contest(target: float) -> Contest:
    return Contest(_context(_job("global magnitude", target)), ARENA)


def test_papers_enter_and_the_controls_do():
    entered = {folder.removeprefix("replications/") for folder, _ in protocol.contenders().values()}
    assert {protocol.NAME, "halo"} <= entered <= {*papers()} and "small dense" in CONTENDERS


@pytest.mark.parametrize("method", CONTENDERS)
def test_a_method_keeps_to_its_share_of_parameters_and_epochs_with_all_its_settings(method):
    contest, found = _contest(0.75), []
    for setting in map(dict, CONTENDERS[method].settings):
        job = _job(method, 0.75, setting)
        outcome = job.execute(_context(job))
        cost = outcome.cost
        assert cost["dense_parameters"] == contest.parameters
        assert 0.2 * contest.parameters < cost["nonzero_parameters"] <= 0.26 * contest.parameters
        assert len(outcome.curves) <= ARENA.epochs and cost["training_macs"] > 0
        assert {"test_accuracy", "validation_accuracy"} <= set(outcome.metrics)
        assert outcome.details["chosen"] == setting
        found.append(outcome.metrics)
    # no setting is tried twice under two names
    assert len({metrics["test_loss"] for metrics in found}) == TRIALS


def test_a_contender_has_as_many_settings_as_all_others():
    with pytest.raises(ValueError, match="3 settings that are tried, not 1"):
        Contender(lambda contest: None, [{}])


def test_parts_of_the_arena_are_whole_epochs_and_leave_one():
    contest = _contest(0.5)
    assert [contest.part(share) for share in (0.01, 0.25, 0.6, 1.0)] == [1, 2, 5, 7]
    assert contest.rates(4, 0.5)[0] == 0.5 and contest.rates(8) == ARENA.rates(3)


def test_each_contender_is_tuned_at_each_target_with_as_many_trials():
    settings = protocol.Settings(seeds=(3,), tuning_seeds=(1000, 1001), targets=(0.5, 0.9))
    jobs = [run.job for run in _listed(settings) if isinstance(run.job, protocol.Contend)]
    assert {(job.method, job.target) for job in jobs} == {(m, t) for m in CONTENDERS for t in (0.5, 0.9)}
    for job in jobs:
        assert list(job.setting.options) == list(map(dict, CONTENDERS[job.method].settings))
        assert len(job.needs) == 2 * TRIALS
        for need in job.needs:
            assert (need.method, need.target) == (job.method, job.target) and need.seed in (1000, 1001)
            assert need.setting.options[0] in job.setting.options and not need.needs


def test_what_validation_prefers_is_trained(monkeypatch):
    seen = []
    monkeypatch.setitem(
        protocol.contenders(),
        "fake",
        ("replications/halo", Contender(_recorder(seen), [{"x": n} for n in range(3)])),
    )
    trials = tuple((_job("fake", 0.5, {"x": n}),) for n in range(3))
    setting = Tuned(tuple({"x": n} for n in range(3)), trials)
    job = protocol.Contend(
        variant="fake", cell=CELL, target=0.5, seed=0, method="fake", arena=ARENA, setting=setting
    )
    left = [_scored(validation, test) for validation, test in ((0.6, 0.9), (0.8, 0.1), (0.7, 0.5))]
    assert job.execute(_context(job, left)).details == {"chosen": {"x": 1}} and seen == [1]


def _recorder(seen: list):
    def contend(contest, x):
        seen.append(x)
        return Outcome({}, {})

    return contend


def _scored(validation: float, test: float) -> Needed:
    metrics = {"validation_accuracy": validation, "test_accuracy": test}
    return Needed(Record.model_construct(metrics=metrics, status="ok"))


@pytest.mark.parametrize("epochs", [4, 5])
def test_the_pull_on_halo_s_lambdas_is_that_of_its_setting_however_long_training_is(epochs, monkeypatch):
    made = []

    def penalty(tensors, xi, psi, training):
        made.append((xi, psi, training))
        return HALO(tensors, xi, psi, training)

    monkeypatch.setattr(halo_contender, "HALO", penalty)
    arena = ARENA.changed(epochs=epochs)
    outcome = CONTENDERS["HALO"].contend(
        Contest(_context(_job("HALO", 0.5)), arena), pull=1.5, xi_to_psi=0.02
    )
    ((xi, psi, training),) = made
    assert psi * sum(training.rates) / (1 - arena.momentum) == pytest.approx(1.5)
    assert xi == pytest.approx(0.02 * psi)
    # three iterations an epoch; the network has the same rates
    drops = [round(share * 3 * epochs) for share in (0.5, 0.75)]
    assert [training.rates.index(rate) for rate in dict.fromkeys(training.rates)] == [0, *drops]
    assert [row["lr"] for row in outcome.curves] == training.rates[2::3]


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


def _listed(settings: protocol.Settings) -> list[Run]:
    profile = Profile(name="digits", dataset=DATA, execution=ExecutionSettings(), paper=settings)
    return listed("equal_footing", protocol.Experiment, profile)


@pytest.mark.parametrize(("macs_target", "more"), [(0.6, 1), (None, 0)])
def test_all_methods_run_at_all_targets_and_seeds(macs_target, more):
    settings = protocol.Settings(seeds=(0, 1), macs_target=macs_target)
    found = {(run.variant, run.target, run.seed) for run in _listed(settings)}
    assert len(found) == 2 * (1 + len(CONTENDERS) * (len(settings.targets) + more))


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
