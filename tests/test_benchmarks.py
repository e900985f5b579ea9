"""The benchmark: how it pairs and judges what it measures, and what it writes. Nothing here depends on speed."""

import contextlib
import json
import os
import sys

import numpy as np
import pytest
import torch
from a_side import appending
from PIL import Image
from project import ROOT

# the benchmark is no part of the installed packages
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command
from benchmarks import comparisons, isolation, measuring, profiles
from benchmarks.bench import BATCH, Bench, random_images, result
from benchmarks.catalogue import BENCHMARKS
from benchmarks.loops import TensorBatches
from benchmarks.measuring import Finding, Growth, Measured, measure
from benchmarks.pil import loader
from common.core.loading import load
from common.core.models import build
from common.core.pruning.counting import layer_costs
from common.records import Entry, Record
from common.settings import DatasetSettings
from common.stage import papers, processes
from common.stage.floors import CARDS, training_seconds

pytestmark = pytest.mark.slow


class Work:
    """Sides that take given seconds of a clock that only they move; every call and its place is noted."""

    def __init__(self, **seconds):
        self.now = np.zeros(2)
        self.calls = []
        self.sides = {name: lambda name=name: self._take(name, seconds[name]) for name in seconds}

    def _take(self, name, seconds):
        self.calls.append(name)
        self.now = self.now + seconds(self.calls.count(name))

    def clock(self):
        return tuple(self.now)


def test_sides_alternate_and_rounds_are_paired():
    # the machine becomes slower from call to call, for both sides alike; the CPU clock sees less
    work = Work(plain=lambda call: [3.0 * call, 3.0], core=lambda call: [1.5 * call, 1.0])
    measured = measure(work.sides, rounds=4, images=30, warm_ups=1, clock=work.clock)
    assert work.calls == ["plain", "core"] + ["plain", "core", "core", "plain"] * 2
    assert measured.wall["plain"].tolist() == [6, 9, 12, 15]  # the warm-up is not among them
    assert measured.ratios("plain", "core", "wall").tolist() == [2] * 4
    assert measured.ratios("plain", "core", "cpu").tolist() == [3] * 4
    sides = measured.sides()
    assert sides["core"]["wall_seconds"]["median"] == pytest.approx(5.25)
    assert sides["core"]["images_per_second"] == pytest.approx(30 / 5.25, abs=0.05)


def test_the_clock_stops_after_the_device():
    work = Work(core=lambda call: [0.0, 0.0])

    def device():  # what was launched takes two seconds more
        work.now = work.now + 2.0

    measured = measure(work.sides, rounds=2, synchronise=device, clock=work.clock)
    assert measured.wall["core"].tolist() == [2, 2]
    assert "images_per_second" not in measured.sides()["core"]


def test_cpu_time_counts_the_processes_that_were_started():
    code = "sum(range(10_000_000))"
    _, before = measuring.seconds()
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", code) == 0
    assert measuring.seconds()[1] - before > 0.05


def test_an_interval_lies_within_the_rounds_and_about_their_median():
    ratios = np.array([2.0, 2.1, 2.2, 2.3, 9.0])
    finding = Finding.of("x", "speed", ratios)
    low, high = finding.interval
    assert finding.value == 2.2 and 2.0 <= low < 2.2 < high <= 9.0
    assert Finding.of("x", "speed", ratios).interval == finding.interval


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        ({"at_least": 1.9}, True),
        ({"at_least": 2.05}, None),
        ({"at_least": 2.2}, False),
        ({"at_most": 2.2}, True),
        ({"at_most": 2.05}, None),
        ({"at_most": 1.9}, False),
        ({}, None),
    ],
)
def test_a_goal_is_met_only_by_the_whole_interval(goal, met):
    assert Finding("x", "speed", 2.05, (2.0, 2.1), **goal).met is met


def test_growth_finds_exponent_and_line():
    sizes = [1, 2, 4]
    quadratic = Growth.fit(sizes, [np.full(3, 5.0 * size**2) for size in sizes])
    assert quadratic.exponents == pytest.approx([2] * 3)
    straight = Growth.fit(sizes, [np.full(3, 3.0 + 2 * size) for size in sizes])
    assert (straight.slope, straight.intercept) == pytest.approx((2, 3))
    assert (straight.exponents < 1).all()


def test_both_usual_loops_see_every_image_once_an_epoch():
    data = random_images(2 * BATCH)
    brightness = []
    for batches in (TensorBatches(data, BATCH), loader(data, BATCH, workers=0, pinned=False)):
        images, labels = zip(*batches)
        assert [tuple(x.shape) for x in images] == [(BATCH, 3, 32, 32)] * 2
        counted = sum(y.bincount(minlength=10) for y in labels)
        assert counted.tolist() == data.labels["train"].bincount(minlength=10).tolist()
        brightness.append(float(torch.cat(images).mean()))
    # random crops leave the same share of black border on average
    assert brightness[0] == pytest.approx(brightness[1], abs=0.05) and -0.35 < brightness[0] < -0.1


def test_a_process_of_its_own_has_its_threads_and_passes_errors_on():
    read = "[__import__('os').getenv(name) for name in ('OMP_NUM_THREADS', 'GOMP_SPINCOUNT')]"
    for tuned, wanted in ((True, processes.ENVIRONMENT["GOMP_SPINCOUNT"]), (False, None)):
        assert isolation.alone(eval, read, threads=3, tuned=tuned) == ["3", wanted]
    with pytest.raises(FileNotFoundError):
        isolation.alone(os.listdir, "/nowhere", threads=1, tuned=False)
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_a_side_apart_is_made_once_and_called_again_and_again(tmp_path):
    file = tmp_path / "calls"
    with isolation.Apart(appending, file, threads=1, tuned=False) as side:
        side()
        side()
    made, *calls = file.read_text().split()
    assert calls == ["called", "called"] and int(made) != os.getpid()
    with pytest.raises(FileNotFoundError):
        isolation.Apart(appending, tmp_path / "no folder" / "calls", threads=1, tuned=False)


def test_the_plan_names_functions_that_exist():
    for benchmark in BENCHMARKS.values():
        assert callable(getattr(comparisons, benchmark.function))


@pytest.fixture
def tiny():
    """A benchmark with batches of 16 random images."""
    return Bench(data=None, device="cpu", precision="float32", quick=True, batch=16)


class Here(contextlib.AbstractContextManager):
    """In place of a process of its own."""

    def __init__(self, make, *arguments, threads, tuned):
        self._call = make(*arguments)

    def __call__(self):
        self._call()

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize(
    ("name", "steps", "goals"),
    [
        ("loops", 2, {"over_plain": 1.0, "over_loader": 1.0, "rate": 1.0}),
        ("bare_step", 2, {}),
        ("methods", 2, {}),
        ("relevance", 14, {}),
        ("shrunken", 2, {}),
    ],
)
def test_comparisons_run_on_a_small_network(tiny, name, steps, goals, monkeypatch):
    monkeypatch.setattr(comparisons, "Apart", Here)
    found = getattr(comparisons, name)(tiny, "resnet8", steps=steps, rounds=3, **goals)
    assert found["rounds"] == 3 and found["images_per_round"] == 16 * steps // 2
    for finding in found["findings"]:
        low, high = finding["interval"]
        assert 0 < low <= finding["value"] <= high


def test_seeds_are_stages_of_equal_runs_executed_in_two_ways(tiny, monkeypatch):
    executed = []

    def execute(runs, store, execution, title):
        executed.append((execution.workers, execution.threads, [run.seed for run in runs]))
        settings = DatasetSettings.model_validate(runs[0].settings["data"])
        assert len(load(settings).labels["train"]) == 4 * 16 and not list(store.folder.glob("*"))
        return [Entry(record=Record(**run.identity, status="ok"), seconds=0) for run in runs]

    monkeypatch.setattr(comparisons, "execute", execute)
    found = comparisons.seeds(tiny, "resnet8", steps=8, rounds=3)
    assert found["images_per_round"] == 2 * 4 * 16
    assert executed[:2] == [(1, 2, [0, 1]), (2, 1, [0, 1])] and len(executed) == 8
    comparisons.growth_with_seeds(tiny, "resnet8", counts=(1, 3), steps=8, rounds=3)
    assert [seeds for _, _, seeds in executed[8:10]] == [[0], [0, 1, 2]]


@pytest.mark.parametrize(
    ("architecture", "milliseconds"), [("resnet20", 68), ("resnet56", 184), ("vgg16", 120)]
)
def test_the_floor_of_an_epoch_on_an_h200(architecture, milliseconds):
    model = build(architecture, classes=10, image_shape=(3, 32, 32), device="meta")
    layers = layer_costs(model, random_images(BATCH).image_shape)
    floor = training_seconds(layers, CARDS["h200"]) * 50_000
    assert 1000 * floor == pytest.approx(milliseconds, rel=0.02)


def test_the_command_writes_json_and_picture(tmp_path, monkeypatch, capsys):
    def perform(name, options):
        measured = Measured(100, *({"plain": np.array([2.0, 2.2, 2.4]), "core": np.ones(3)} for _ in "ab"))
        kinds = ("throughput", "speed", "share", "overhead", "cost", "memory", "growth")
        ratios = measured.ratios("plain", "core", "wall")
        findings = [Finding.of(f"{name}, {kind}", kind, ratios, at_least=2.1) for kind in kinds]
        return result("made up", measured, "wall", findings)

    monkeypatch.setattr(command, "alone", lambda function, *arguments, threads: function(*arguments))
    monkeypatch.setattr(command, "perform", perform)
    names = ["loops-resnet20", "growth-seeds"]
    assert command.main(["--quick", "--device", "cpu", "--out", str(tmp_path), "--only", *names]) == 0
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert list(report["comparisons"]) == names
    assert report["environment"]["data"] and report["environment"]["torch"] and report["environment"]["cpu"]
    found = report["comparisons"]["loops-resnet20"]
    assert found["threads"] == 2 and found["sides"]["core"]["images_per_second"] == 100
    assert found["findings"][0]["value"] == pytest.approx(2.2) and found["findings"][0]["met"] is None
    assert "loops-resnet20, speed: 2.20 (2.00 to 2.40)  goal ≥ 2.1: undecided" in capsys.readouterr().out
    with Image.open(tmp_path / "benchmark.png") as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_wrong_data_ends_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "alone", lambda function, *arguments, threads: function(*arguments))
    assert command.main(["--data", str(tmp_path / "absent.npz"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "absent.npz" in error and error.count("\n") == 1


def test_a_profile_s_networks_are_measured_as_its_stages_train_them(tmp_path):
    profile = papers.load("imp_slr", profile="digits")
    found = profiles.trained(profile, "imp_slr")
    assert [one.label for one in found] == ["mlp, batches of 64", "digits_cnn_strided, batches of 64"]
    measured = profiles.share_of_bare_step(profile, found[0], rounds=2)
    assert measured["steps"] == 10 and set(measured["sides"]) == {"bare step", "core"}
    assert profiles.core_seconds(tmp_path, "digits", "imp_slr") is None
    (tmp_path / "environment" / "digits").mkdir(parents=True)
    (tmp_path / "environment" / "digits" / "imp_slr.json").write_text('{"seconds": {"a": 1.25, "b": 0.5}}')
    assert profiles.core_seconds(tmp_path, "digits", "imp_slr") == {"runs": 2, "core_seconds": 1.8}
