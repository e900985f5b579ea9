"""The plan: kinds of runs, rehearsed trainers, and the command in a copy of the project."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from made_up_jobs import MadeUp, made_up
from project import ROOT, add_example, copy, params, run
from torch import nn

from common.core.data import Batches, FixedBatches
from common.core.failures import RunFailed
from common.core.pruning.counting import cost
from common.core.run import Outcome
from common.core.trainer import Hooks, Trainer
from common.settings import DatasetSettings, ExecutionSettings
from common.stage import floors, plan, rehearsal
from common.stage.floors import Peaks
from common.stage.papers import load, papers
from common.stage.plan import Expected, Stage
from common.stage.rehearsal import Cost, kinds
from common.stage.worker import perform

pytestmark = pytest.mark.slow

EPOCHS, PER_EPOCH = 6, 1000


def test_runs_that_differ_in_the_seed_alone_are_of_one_kind():
    listed = []
    for seed in (3, 4):
        tuning = [made_up("tuning", 1000 + trial, rate=0.1) for trial in range(2)]
        listed.append(made_up("pruned", seed, (made_up("dense", seed, rate=0.1), *tuning), rate=0.1))
    listed.append(made_up("dense", 5, rate=0.2))
    found = kinds(listed)
    assert [(kind.run.variant, [run.seed for run in kind.members]) for kind in found] == [
        ("dense", [3, 4]),
        ("tuning", [1000, 1001]),
        ("pruned", [3, 4]),
        ("dense", [5]),
    ]
    # the pruned run needs as many runs as before; both trials are now the one that is rehearsed
    assert [need.seed for need in found[2].run.needs] == [3, 1000, 1000]


# ------------------------------------------------------------------------------------------ rehearsed trainers


class _Shrinking(Hooks):
    """Halves the hidden layer at the end of the third epoch, and counts what is called."""

    def __init__(self):
        self.steps, self.epochs = 0, []

    def stepped(self, trainer):
        self.steps += 1

    def epoch_ended(self, trainer, epoch):
        self.epochs.append((epoch, trainer.iteration))
        if epoch == 2:
            first, last = trainer.model[1], trainer.model[2]
            first.weight = nn.Parameter(first.weight[:8].detach())
            first.bias = nn.Parameter(first.bias[:8].detach())
            last.weight = nn.Parameter(last.weight[:, :8].detach())
            trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)


@pytest.fixture
def performed(monkeypatch, tmp_path):
    """Rehearse one run of a made-up job in this process: a function of what it does and the time to measure."""
    monkeypatch.setattr(rehearsal, "_known", {})

    def rehearse(execute, measured=True, card=None):
        monkeypatch.setattr(MadeUp, "does", staticmethod(execute), raising=False)
        execution = ExecutionSettings(device="cpu", precision="float32")
        store = rehearsal._Rehearsal(tmp_path, execution, time.time() + (60 if measured else -1), card)
        return perform(made_up(), store, execution, True)

    yield rehearse
    rehearsal._restore()


def _trainer(hooks=(), width=16):
    images, labels = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    batches = FixedBatches([(images, labels)] * PER_EPOCH)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, width), nn.Linear(width, 2))
    return Trainer(model, batches, hooks=hooks, validation=FixedBatches([(images, labels)]))


def _outcome(trainer):
    trainer.fit([0.01] * (EPOCHS * PER_EPOCH), "dense")
    state = {"model": trainer.model.state_dict(), "ballast": torch.zeros(25_000)}
    return Outcome(trainer.evaluate(), cost(trainer.model, (1, 2, 2)), trainer.history, state)


def test_a_rehearsal_has_all_epochs_and_few_iterations(performed, monkeypatch):
    monkeypatch.setattr(rehearsal, "TIMED_SECONDS", 0.0)  # two iterations a shape, and one to warm up
    hook = _Shrinking()
    trainer = _trainer(hook)
    entry = performed(lambda context: _outcome(trainer))
    assert entry.cost.epochs == EPOCHS and not entry.cost.from_macs
    assert hook.epochs == [(epoch, (epoch + 1) * PER_EPOCH) for epoch in range(EPOCHS)]
    assert hook.steps == 2 * 3  # the network had two shapes
    keys = {"phase", "epoch", "lr", "train_loss", "train_accuracy", "validation_accuracy", "validation_loss"}
    assert [row["epoch"] for row in entry.curves] == list(range(EPOCHS))
    assert all(set(row) == keys for row in entry.curves)
    # 100,000 bytes of state, and the record twice
    assert 100_000 < entry.cost.disk < 120_000


def test_iterations_that_are_left_out_are_reckoned(performed):
    def execute(context):
        trainer = _trainer(_Slow())
        trainer.fit([0.01] * (EPOCHS * PER_EPOCH))
        return Outcome({}, {}, trainer.history)

    entry = performed(execute)
    # each iteration sleeps for at least 1 ms
    assert entry.cost.seconds > EPOCHS * PER_EPOCH * 0.001 > entry.seconds


class _Slow(Hooks):
    def stepped(self, trainer):
        time.sleep(0.001)


def test_what_is_unknown_when_time_is_over_is_reckoned_from_macs(performed):
    performed(lambda context: _outcome(_trainer()))
    (known,) = (timing for key, timing in rehearsal._known.items() if key[0] == "train")
    hook = _Counting()
    entry = performed(lambda context: _outcome(_trainer(hook, width=32)), measured=False)
    assert entry.cost.from_macs and hook.steps == 0 and len(entry.curves) == EPOCHS
    assert entry.cost.seconds > EPOCHS * 2 * known.seconds


def test_for_a_card_that_is_not_there_time_is_that_of_its_floor(performed):
    hook = _Counting()
    entry = performed(lambda context: _outcome(_trainer(hook)), card=Peaks(flops=1e6, bytes=1e6))
    macs, images = 4 * 16 + 16 * 2, 4 * PER_EPOCH
    # validated after each epoch and tested once, on four images, forward only
    evaluations = (EPOCHS + 1) * 4 * 2 * macs / 1e6
    assert entry.cost.seconds == pytest.approx(EPOCHS * images * 6 * macs / 1e6 + evaluations)
    assert hook.steps == 1 and len(entry.curves) == EPOCHS


def test_for_a_card_a_run_has_few_images_and_takes_the_time_of_all(performed):
    trained = []

    def execute(context):
        data = context.dataset(DatasetSettings(source="digits", train=1000, validation=100, test=100))
        for part in (data, data.with_train_size(500, 0)):
            batches = Batches(part, "train", 100)
            trained.append(sum(len(labels) for _, labels in batches.epoch(0)))
            model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
            Trainer(model, batches).fit([0.01] * len(batches))
        return Outcome({}, {})

    entry = performed(execute, card=Peaks(flops=1e6, bytes=1e6))
    assert (entry.cost.problem, trained) == (None, [400, 200])
    assert entry.cost.seconds == pytest.approx((1000 + 500) * 6 * 640 / 1e6)


class _Counting(_Shrinking):
    def epoch_ended(self, trainer, epoch):
        pass


def test_a_run_that_fails_says_why(performed):
    def execute(context):
        raise RunFailed("made to fail")

    assert performed(execute).cost.problem == "made to fail"


def test_kinds_without_a_cost_count_as_the_mean_of_the_others():
    rates = {"dense": 0.1, "failed": 0.2, "late": 0.3}
    runs = [made_up(name, seed, rate=rate) for name, rate in rates.items() for seed in (0, 1)]
    dense, failed, late = kinds([*runs, made_up("dense", 2, rate=0.1)])
    stage = Stage("fake", [dense, failed, late], done={runs[0].settings_hash, runs[2].settings_hash})
    costs = {
        dense.run.settings_hash: Cost(3.0, 10, 100),
        failed.run.settings_hash: Cost(1.0, 1, 1, problem="x"),
    }
    assert Expected.of(stage, costs) == Expected(epochs=70, seconds=21.0, left=15.0, disk=700)
    assert Expected.of(stage, {}) is None


# ------------------------------------------------------------------------------------------ the command


@pytest.fixture
def project(tmp_path):
    """A copy in which the only paper is the example, without MLflow."""
    project = copy(tmp_path)
    for paper in papers():
        shutil.rmtree(project / "replications" / paper)
    add_example(project)
    params(project)
    (project / "sitecustomize.py").write_text("import sys\nsys.modules['mlflow'] = None\n")
    return project


def _command(project, *command):
    return run(project, "python", "-m", "replications", *command, PYTHONPATH=str(project))


def _cells(result, stage="example"):
    """Runs, done and epochs of a stage."""
    assert result.returncode == 0, result.stderr
    table = result.stdout.split("\n\n")[1]  # below it, what open claims need
    rows = {line.split()[0]: line.split() for line in table.splitlines()}
    return tuple(rows[stage][1:4])


def test_a_plan_for_a_card_needs_none(project):
    planned = _command(project, "plan", "--card", "h100", "--seconds", "60")
    assert _cells(planned) == ("6", "0", "6") and "one H100 at 30% of its floor" in planned.stdout
    refused = _command(project, "plan", "--card", "h10")
    assert refused.returncode == 2 and "h100" in refused.stderr and "Traceback" not in refused.stderr


HUNDREDTH = """
profile: hundredth
profiles:
  hundredth:
    extends: cifar10
    dataset: {source: npz, path: images.npz, train: null, validation: 50}
    pretraining_impact: {labels: 50, corpus: {source: npz, path: corpus.npz, train: null, validation: 50, test: null}}
"""


@pytest.mark.long
@pytest.mark.parametrize("paper", papers())
def test_each_stage_of_cifar10_comes_to_its_end_and_takes_six_minutes_at_most(paper, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, classes in (("images", 10), ("corpus", 100)):
        arrays = {}
        for split, count in (("train", 500), ("test", 100)):
            arrays[f"x_{split}"] = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            arrays[f"y_{split}"] = np.arange(count) % classes
        np.savez(f"{name}.npz", **arrays)
    profiles = yaml.safe_load((ROOT / "params.yaml").read_text())["profiles"]
    hundredth = yaml.safe_load(HUNDREDTH)
    Path("params.yaml").write_text(yaml.safe_dump(hundredth | {"profiles": profiles | hundredth["profiles"]}))
    profile = load(paper, "params.yaml", "hundredth")
    stage = plan.stage(paper, profile, tmp_path / "results")
    assert stage.kinds and not stage.missing
    costs = rehearsal.rehearse({paper: stage.kinds}, profile.execution, 3600, floors.CARDS["h100"])
    assert {kind.run.settings_hash for kind in stage.kinds} == set(costs)
    assert {cost.problem for cost in costs.values()} == {None}
    # there is a hundredth of the images
    assert 0 < 100 * Expected.of(stage, costs).seconds / floors.REACHED <= 360


def test_the_plan_counts_what_is_there_and_what_is_done(project):
    planned = _command(project, "plan", "--seconds", "300")
    # three seeds of a dense network trained for two epochs and of one that is masked after it
    assert _cells(planned) == ("6", "0", "6") and _cells(planned, "total") == ("6", "0", "6")
    assert "kinds of runs" not in planned.stdout and list((project / ".runs").iterdir()) == []
    assert _command(project, "run", "example").returncode == 0
    assert _cells(_command(project, "plan", "--seconds", "0")) == ("6", "6", "?")
    # as well from the records alone, unless other code has made them
    shutil.rmtree(project / ".runs")
    assert _cells(_command(project, "plan", "--seconds", "0"))[:2] == ("6", "6")
    beside = project / "results/environment/digits/example.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"code": "0" * 64}))
    assert _cells(_command(project, "plan", "--seconds", "0"))[:2] == ("6", "0")


def test_a_stage_whose_data_is_missing_says_what_prepares_it(project):
    file = project / "params.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["profiles"]["digits"]["dataset"] = {"source": "cifar10"}
    file.write_text(yaml.safe_dump(settings))
    pipeline = project / "dvc.yaml"
    stages = yaml.safe_load(pipeline.read_text())
    stages["stages"]["example"]["deps"].append("data/prepared")
    pipeline.write_text(yaml.safe_dump(stages))
    result = _command(project, "plan", "--seconds", "0")
    assert _cells(result) == ("?", "?", "?")
    assert "example: data/prepared/cifar10" in result.stdout
    assert "`dvc repro data` prepares what it reads" in result.stdout
