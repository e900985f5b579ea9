"""The kit that measures a GPU, rehearsed on a CPU in real processes; and how it splits time, joins data and judges runs."""

import json
import shutil
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from project import BARE, ROOT, add_example, copy, params, run

# the benchmark is no part of the installed packages
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import parts
from benchmarks.gpu.correctness import derived, gaps, outcomes, over_seeds, twice
from benchmarks.gpu.jobs import Ended, Job, failed, perform
from benchmarks.gpu.kit import Kit
from benchmarks.gpu.network import in_common
from benchmarks.gpu.stages import words
from common.records import Record
from common.stage.papers import load
from common.stage.pipeline import listed

pytestmark = pytest.mark.slow


# ------------------------------------------------------------------------------------------- the steps, rehearsed


@pytest.fixture
def project(tmp_path):
    """A copy with the kit on a machine without MLflow and DVC; profile `digits` is small."""
    found = copy(tmp_path)
    for name in ("benchmarks", "tests/gpu"):
        shutil.copytree(ROOT / name, found / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests/conftest.py", found / "tests")
    add_example(found)
    params(
        found,
        example={"seeds": [0, 1, 2]},
        halo={"training": {"epochs": 2, "milestones": []}, "fine_tuning_epochs": 1},
    )
    (found / "sitecustomize.py").write_text(BARE)
    return found


def rehearse(project, *options):
    """What a step leaves in `measured.json`; without git, as nothing is on the PATH."""
    command = (
        "python",
        "-m",
        "benchmarks.gpu",
        *options,
        "--device",
        "cpu",
        "--quick",
        "--profile",
        "digits",
    )
    ended = run(project, *command, PATH="", PYTHONPATH=str(project))
    assert ended.returncode == 0, ended.stderr
    measured = json.loads((project / "gpu-out/measured.json").read_text())
    assert (project / "gpu-out/summary.md").read_text() in ended.stdout
    return measured, ended.stdout


def test_correctness_executes_tests_and_protocols_and_compares_them(project):
    found, summary = rehearse(project, "1", "--budget", "400", "--papers", "example")
    found = found["correctness"]
    assert found["stopped"] == {}
    assert found["tests"]["passed"] == 0 and found["tests"]["skipped"] >= 19 and found["tests"]["complete"]
    # two of the three seeds, each dense and with one target
    assert found["twice"] == {"example": {"pairs": 4, "same": 4, "differ": [], "failed": 0}}
    assert found["against_cpu"]["example"] == {"pairs": 4, "mean": 0, "sd": 0, "largest": 0}
    assert [(row["seeds"], row["equivalent"]) for row in found["over_seeds"]["float32"]][0] == (2, True)
    assert "4 of 4" in summary and "A rehearsal" in summary


def test_speed_measures_the_card_and_runs_alone_and_at_once(project):
    found, summary = rehearse(project, "2", "--budget", "200")
    assert found["speed"]["stopped"] == {}
    rows = {row["what"]: row for row in found["speed"]["networks"]["resnet8"]}
    assert list(rows) == ["card", "alone", "host", "together-2", "eager", "loader", "mixed-2"]
    assert rows["card"]["copy"] > 0 and rows["card"]["bfloat16"] > 0 and rows["card"]["us_step"] > 0
    for what in ("alone", "eager", "loader", "mixed-2", "together-2"):
        assert "failed" not in rows[what]
        assert rows[what]["share"] == pytest.approx(rows["card"]["us_step"] / rows[what]["us_step"], rel=0.3)
    assert 0 < rows["host"]["us_step"]
    assert "2 runs at once, each" in summary


def test_stages_are_executed_in_order_and_an_error_is_tried_again(project):
    params(project, example={"seeds": [0, 1]}, broken={"seeds": [0], "fails": ["defect:dense-0"]})
    add_example(project, "broken")
    found, summary = rehearse(project, "3", "--budget", "400", "--papers", "broken", "example")
    stages = found["stages"]["stages"]
    assert list(stages) == ["broken", "example"]
    broken, example = stages["broken"], stages["example"]
    assert broken["tries"] == 2 and broken["failed"] == {"error": 1, "needs": 1}
    assert "made to break" in broken["ended"] and "made to break" in summary
    assert (example["ended"], example["tries"]) == ("complete", 1)
    assert example["finished"] == example["runs"] == 4 and example["dense"]["dense mlp"]["runs"] == 2
    with tarfile.open(project / "gpu-out/results.tar.gz") as archive:
        names = set(archive.getnames())
    left = {str(file.relative_to(project)) for file in (project / "results").rglob("*") if file.is_file()}
    assert names == left and {"results/digits/example.jsonl", "results/digits/broken.jsonl"} <= names


@pytest.mark.parametrize(
    ("status", "said"), [(0, "complete"), (3, "out of time"), (None, "killed"), (2, "no data")]
)
def test_how_a_stage_ended_is_said(tmp_path, status, said):
    (tmp_path / "halo.log").write_text("halo: 3 of 7 runs\nno data\n\n")
    assert words(Ended(status, 1.0), "halo", tmp_path).startswith(said)


def test_profiles_of_two_seeds_and_of_many_follow_from_the_settings(tmp_path):
    kit = Kit(tmp_path, "cpu", False, ROOT / "params.yaml", "cifar10")
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(derived(kit, slots=12)))
    for profile in ("twice-1", "twice-2", "cpu"):
        for paper in kit.papers:
            assert len(load(paper, file, profile).paper.seeds) == 2
    for profile in ("seeds-float32", "seeds-bfloat16", "seeds-cpu"):
        runs = listed("halo", load("halo", file, profile))
        dense = {(run.variant, run.seed) for run in runs if run.target == 0}
        assert {("none", 47), ("halo", 47)} <= dense and len(dense) == 2 * 48
        assert {run.variant for run in runs} == {"none", "halo"}  # nothing is tuned


def test_make_lays_out_what_a_bare_machine_lacks():
    makefile = (ROOT / "Makefile").read_text()
    assert "--require-hashes" in makefile
    for line in ("/gpu-out/", "/gpu-pack/"):
        assert line in (ROOT / ".gitignore").read_text().split("\n")


# ------------------------------------------------------------------------------------------- processes


def _python(code):
    return lambda seconds: [sys.executable, "-c", f"seconds = {seconds}\n{code}"]


def test_jobs_share_the_time_and_one_that_outlasts_it_is_killed_with_what_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.jobs.GRACE", 0.5)
    started = tmp_path / "started"
    child = tmp_path / "child.py"
    child.write_text(f"import time; time.sleep(4); open({str(started)!r}, 'w')")
    code = "import subprocess, sys, time; print(seconds, flush=True)\n"
    code += f"subprocess.Popen([sys.executable, {str(child)!r}]); time.sleep(60)"
    jobs = [
        Job("first", _python("print(seconds)")),
        Job("second", _python("print(seconds, flush=True); raise SystemExit('no such thing')")),
        Job("after", _python("print(seconds)"), after="first"),
        Job("never", _python("print(seconds)"), after="second"),
        Job("long", _python(code), whole=True),
    ]
    ended = perform(jobs, 3.0, slots=2, cwd=tmp_path, logs=tmp_path / "logs")
    assert {name: how.status for name, how in ended.items()} == {
        "first": 0,
        "second": 1,
        "after": 0,
        "never": None,
        "long": None,
    }
    shares = {
        name: float((tmp_path / f"logs/{name}.log").read_text().split()[0]) for name in ("first", "long")
    }
    assert shares["first"] == pytest.approx(3.0 * 2 / 4, abs=0.1)  # two slots for four that share
    assert 1.5 < shares["long"] < 3.0
    assert failed(ended, tmp_path / "logs") == {"second": "no such thing"}
    time.sleep(2.5)
    assert not started.exists()


# ------------------------------------------------------------------------------------------- judging


def _found(accuracies, variant="none", text="same", status="ok"):
    """Runs by digest, one a seed."""
    found = {}
    for seed, accuracy in enumerate(accuracies):
        record = Record(
            paper="p",
            variant=variant,
            dataset="d",
            architecture="a",
            target=0.0,
            seed=seed,
            status=status,
            metrics={"test_accuracy": accuracy},
        )
        found[f"{variant}{seed}"] = (record, f"{text}{accuracy}")
    return found


def test_runs_that_differ_are_counted_and_named_and_open_ones_are_not():
    once, again = _found([0.5, 0.6, 0.7]), _found([0.5, 0.61])
    assert twice(once, again) == {"pairs": 2, "same": 1, "differ": ["p/none a 0 seed 1"], "failed": 0}
    assert twice(once, {})["pairs"] == 0
    found = gaps(once, again)
    assert found["pairs"] == 2 and found["mean"] == pytest.approx(-0.005) and found["largest"] == 0.01
    assert gaps(once, _found([0.5], status="failed"))["pairs"] == 0


@pytest.mark.parametrize(
    ("shift", "spread", "equivalent"), [(0.0, 0.005, True), (0.009, 0.005, False), (0.0, 0.1, False)]
)
def test_accuracies_are_equivalent_where_the_interval_lies_within_the_margin(shift, spread, equivalent):
    there = np.full(20, 0.9)
    here = there + shift + spread * np.tile([-1, 1], 10)
    (found,) = over_seeds(_found(here), _found(there))
    low, high = found["interval"]
    assert found["seeds"] == 20 and low < shift < high and found["equivalent"] is equivalent


def test_one_seed_shows_no_equivalence():
    (found,) = over_seeds(_found([0.9]), _found([0.9]))
    assert found["equivalent"] is False


def test_outcomes_are_read_from_a_log_that_ends_anywhere(tmp_path):
    log = tmp_path / "tests.log"
    assert outcomes(log) == {"passed": 0, "failed": [], "skipped": 0, "complete": False}
    text = "tests/gpu/test_a.py::test_one[x y] PASSED [ 5%]\ntests/gpu/test_a.py::test_two FAILED [10%]\ntests/gpu/te"
    log.write_text(text)
    assert outcomes(log) == {"passed": 1, "failed": ["test_two"], "skipped": 0, "complete": False}
    log.write_text(text + "\n=== 1 failed, 1 passed in 3.2s ===\n")
    assert outcomes(log)["complete"]
    log.write_text(
        "tests/gpu/test_a.py::test_one[x y] \n[gw1] [ 50%] PASSED tests/gpu/test_a.py::test_one[x y] \n"
        "tests/gpu/test_a.py::test_two \n[gw0] [100%] FAILED tests/gpu/test_a.py::test_two \n"
        "=== short test summary info ===\nFAILED tests/gpu/test_a.py::test_two - assert 1\n=== 1 failed, 1 passed in 3s ===\n"
    )
    assert outcomes(log) == {"passed": 1, "failed": ["test_two"], "skipped": 0, "complete": True}


def test_time_at_once_is_counted_from_the_last_to_begin_to_the_first_to_end():
    slow, fast = [10.0, 20.0, 30.0], [5.0, 10.0, 15.0, 20.0, 25.0]
    seconds, epochs = in_common([slow, fast], 2, of=2)
    assert seconds == 15.0 and epochs == pytest.approx(1.5 + 3)
    for marks in ([slow], [[1.0, 2.0], [3.0, 4.0]], [[1.0], [2.0]]):
        with pytest.raises(RuntimeError, match="no time"):
            in_common(marks, 2, of=2)


def test_time_of_fewer_begins_when_the_others_have_ended():
    short, long, longer = [1.0, 2.0, 3.0], [1.5, 3.0, 4.0, 5.0], [1.0, 3.5, 6.0, 8.5]
    assert in_common([longer, short, long], 3, of=3)[0] == 1.5  # from 1.5 to 3
    seconds, epochs = in_common([longer, short, long], 2, of=3)  # from 3 to 5
    assert seconds == 2.0 and epochs == pytest.approx(2 + 2 / 2.5)
    with pytest.raises(RuntimeError, match="no time"):
        in_common([longer, long], 2, of=3)  # one has never begun


def test_all_kernels_of_a_network_are_known_without_a_gpu():
    pytest.importorskip("triton", reason="no Triton, as on a machine without NVIDIA's packages")
    from benchmarks.gpu import ahead

    found = ahead.launches(["resnet8"], (16, 3), 132)
    names = {(module.rsplit(".")[-1], name) for module, name, *_ in found}
    assert names == {
        (module.__name__.rsplit(".")[-1], name) for module, of in ahead._KERNELS.items() for name in of
    }
    kinds = {types for _, name, types, *_ in found if name == "convolve"}
    assert {types[0] for types in kinds} == {torch.bfloat16} and len(kinds) > 2
    assert hasattr(ahead.kernels.convolve, "warmup")  # they are themselves again


# ------------------------------------------------------------------------------------------- data in parts


def test_parts_are_small_and_join_to_the_same_arrays(tmp_path):
    random = np.random.default_rng(0)
    arrays = {"x_train": random.integers(0, 256, (7001, 8, 12, 3), dtype=np.uint8)}
    arrays |= {"y_train": np.arange(7001, dtype=np.uint8) % 10, "y_test": np.arange(90) % 10}
    arrays |= {"x_test": random.integers(0, 256, (90, 8, 12, 3), dtype=np.uint8), "classes": np.array(["a"])}
    np.savez(tmp_path / "set.npz", **arrays)
    assert parts.main(["split", str(tmp_path / "set.npz"), str(tmp_path / "parts"), "--size", "1"]) == 0
    files = sorted((tmp_path / "parts").iterdir())
    assert len(files) >= 3 and all(file.stat().st_size <= 1e6 for file in files)
    assert parts.main(["join", str(tmp_path / "parts"), str(tmp_path / "joined" / "set.npz")]) == 0
    parts.join(files[::-1], tmp_path / "again.npz")
    for file in ("joined/set.npz", "again.npz"):
        with np.load(tmp_path / file) as joined:
            for key in ("x_train", "y_train", "x_test", "y_test"):
                assert np.array_equal(joined[key], arrays[key]) and joined[key].dtype == arrays[key].dtype


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (["split", "set.npz", "parts", "--size", "0.001"], "too small"),
        (["split", "absent.npz", "parts"], "absent.npz"),
        (["join", "parts", "set.npz"], "missing"),
    ],
)
def test_what_cannot_be_split_or_joined_is_said_in_one_line(tmp_path, monkeypatch, capsys, command, error):
    monkeypatch.chdir(tmp_path)
    images = np.zeros((20, 8, 8, 3), np.uint8)
    np.savez("set.npz", x_train=images, y_train=np.zeros(20), x_test=images, y_test=np.zeros(20))
    Path("parts").mkdir()
    assert parts.main(command) == 2
    told = capsys.readouterr().err
    assert error in told and told.count("\n") == 1
