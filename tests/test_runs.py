"""Runs: real stages in real processes - resumed after SIGKILL, with failures, damage, full disks, dead workers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from made_up_jobs import made_up
from project import add_example, copy, environment, params, run, start

from common.core.data import Batches
from common.core.loading import load
from common.core.recipe import Recipe
from common.core.run import Cell
from common.core.trainer import Trainer
from common.predictions import unpacked
from common.settings import DatasetSettings, ExecutionSettings
from common.stage import partial, processes
from common.stage.files import load_checked, save_checked
from common.stage.scheduler import execute, in_order
from common.stage.store import (
    OutOfTime,
    RunCheckpoints,
    StageError,
    Store,
    TimeBudget,
)
from replications import commands
from replications.__main__ import main
from replications.equal_footing.protocol import Dense

pytestmark = pytest.mark.slow

STAGE = ("python", "-m", "replications", "run", "example")
RESULTS = tuple(f"results/digits/example.{name}" for name in ("jsonl", "curves.jsonl", "predictions.npz"))


@pytest.fixture
def project(tmp_path):
    project = copy(tmp_path)
    add_example(project)
    params(project, example={})
    # a stage without tracking is quicker; tests/test_tracking.py looks at MLflow
    (project / "common" / "stage" / "tracking.py").write_text("raise ModuleNotFoundError(name='mlflow')\n")
    return project


def _records(project: Path) -> list[dict]:
    return [json.loads(line) for line in (project / RESULTS[0]).read_text().splitlines()]


def _bytes(project: Path) -> list[bytes]:
    return [(project / name).read_bytes() for name in RESULTS]


def _identity(record: dict) -> tuple:
    return record["variant"], record["target"], record["seed"]


def test_a_stage_leaves_one_complete_record_per_run(project):
    result = run(project, *STAGE)
    assert result.returncode == 0, result.stderr
    records = _records(project)
    assert sorted(map(_identity, records)) == sorted(
        (variant, target, seed) for seed in range(3) for variant, target in (("dense", 0.0), ("pruned", 0.9))
    )
    for record in records:
        assert record["status"] == "ok" and 0 <= record["metrics"]["test_accuracy"] <= 1
        assert {"paper", "dataset", "architecture", "settings", "settings_hash", "data"} <= set(record)
        assert record["cost"]["dense_parameters"] == record["cost"]["parameters"] == 650
    found = unpacked((project / RESULTS[2]).read_bytes(), project / RESULTS[2])
    assert [found[r["predictions"]].accuracy for r in records] == [
        r["metrics"]["test_accuracy"] for r in records
    ]
    pruned = [r for r in records if r["variant"] == "pruned"]
    assert all(65 <= r["cost"]["nonzero_parameters"] <= 76 for r in pruned)
    beside = json.loads((project / "results/environment/digits/example.json").read_text())
    assert set(beside["seconds"]) == {r["settings_hash"] for r in records} and beside["versions"]["torch"]


def test_same_settings_give_the_same_bytes_whatever_the_workers(project):
    assert run(project, *STAGE).returncode == 0
    first = _bytes(project)
    subprocess.run(["rm", "-rf", ".runs", "results"], cwd=project, check=True)
    text = (project / "params.yaml").read_text().replace("workers: 2", "workers: 1")
    (project / "params.yaml").write_text(text)
    assert run(project, *STAGE).returncode == 0
    assert _bytes(project) == first


@pytest.mark.parametrize("finished", [pytest.param(1, marks=pytest.mark.long), 4])
def test_a_killed_stage_resumes_and_ends_with_the_same_bytes(project, finished):
    params(project, example={"seconds": 0.4})
    assert run(project, *STAGE).returncode == 0
    expected = _bytes(project)
    subprocess.run(["rm", "-rf", ".runs", "results"], cwd=project, check=True)
    process = start(project, *STAGE)
    folder = project / ".runs/digits/example"
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.json"))) < finished:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (project / RESULTS[0]).exists()
    kept = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.json")}
    assert finished <= len(kept) < 6
    assert run(project, *STAGE).returncode == 0
    assert _bytes(project) == expected
    for name, changed in kept.items():
        assert (folder / name).stat().st_mtime_ns == changed  # a finished run was not repeated


def test_a_failed_run_is_recorded_with_its_reason_and_the_others_go_on(project):
    params(project, example={"fails": ["fail:dense-1"]})
    result = run(project, *STAGE)
    assert result.returncode == 0, result.stderr
    records = {_identity(r): r for r in _records(project)}
    assert (
        records["dense", 0.0, 1]["status"] == "failed"
        and records["dense", 0.0, 1]["reason"] == "made to fail"
        and records["dense", 0.0, 1]["failure"] == "unreachable"
    )
    assert "starts from example/dense" in records["pruned", 0.9, 1]["reason"]
    assert [r["status"] for r in records.values()].count("ok") == 4
    assert "made to fail" in result.stderr


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_run_that_kills_its_worker_fails_alone(project, workers):
    execution = {"device": "cpu", "precision": "float32", "threads": 1, "workers": workers}
    params(project, execution=execution, example={"fails": ["kill:dense-1"]})
    result = run(project, *STAGE)
    assert result.returncode == 4, result.stderr
    assert "not done: 2 of 6 runs of example have failed because a process died" in result.stderr
    records = {_identity(r): r for r in _records(project)}
    dense, pruned = records["dense", 0.0, 1], records["pruned", 0.9, 1]
    assert dense["failure"] == "died" and pruned["failure"] == "needs" and "cause" not in dense
    named = ("paper", "variant", "dataset", "architecture", "target", "seed", "settings_hash", "failure")
    assert pruned["cause"] == {name: dense[name] for name in named}
    for name in ("chance", "device", "precision", "torch"):
        assert {r[name] for r in records.values()} == {dense[name]}
    status = {name: r["status"] for name, r in records.items()}
    assert status.pop(("dense", 0.0, 1)) == "failed" and status.pop(("pruned", 0.9, 1)) == "failed"
    assert set(status.values()) == {"ok"}
    (
        project / "spared"
    ).touch()  # now it would pass: neither `.runs` nor the results say that it has failed for good
    again = run(project, *STAGE)
    assert again.returncode == 0, again.stderr
    assert {r["status"] for r in _records(project)} == {"ok"} and "died" not in again.stderr


@pytest.mark.parametrize(
    "kept, early", [("digits/halo", False), ("digits/imp_slr", True), ("other/halo", True)]
)
def test_workers_are_prepared_at_once_where_no_run_is_kept(tmp_path, monkeypatch, kept, early):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".runs" / kept).mkdir(parents=True)
    prepared = []
    monkeypatch.setattr(processes, "prepare", lambda: prepared.append(True))
    monkeypatch.setattr(commands, "run_paper", lambda *arguments: None)
    assert main(["run", "halo", "--profile", "digits"]) == 0
    assert prepared == [True] * early


def test_a_run_without_memory_beside_others_is_done_alone(project):
    params(project, example={"fails": ["crowd:dense-1"]})
    crowded = run(project, *STAGE)
    assert crowded.returncode == 0, crowded.stderr
    assert {r["status"] for r in _records(project)} == {"ok"}
    one = {"device": "cpu", "precision": "float32", "threads": 1, "workers": 1}
    params(project, execution=one, example={"fails": ["crowd:dense-2"]})
    alone = run(project, *STAGE)
    assert alone.returncode == 0, alone.stderr
    failed = {_identity(r): r["failure"] for r in _records(project) if r["status"] == "failed"}
    assert failed == {("dense", 0.0, 2): "resources", ("pruned", 0.9, 2): "needs"}


def test_a_defect_fails_one_run_and_the_same_command_tries_it_again(project):
    params(project, example={"fails": ["defect:dense-1"]})
    result = run(project, *STAGE)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: 2 of 6 runs of example have failed on an error, as example/dense mlp")
    assert "KeyError: 'made to break' (replications/example/protocol.py, line " in last
    records = {_identity(record): record for record in _records(project)}
    dense, pruned = records.pop(("dense", 0.0, 1)), records.pop(("pruned", 0.9, 1))
    assert dense["failure"] == "error" and pruned["cause"]["failure"] == "error"
    assert {record["status"] for record in records.values()} == {"ok"}
    kept = {file: file.stat().st_mtime_ns for file in (project / ".runs/digits/example").glob("*.json")}
    again = run(project, *STAGE)
    assert again.returncode == 2 and again.stderr.splitlines()[-1] == last
    changed = [file for file, time in kept.items() if file.stat().st_mtime_ns != time]
    assert len(kept) == 6 and len(changed) == 2


@pytest.mark.parametrize("suffix", ["json", pytest.param("pt", marks=pytest.mark.long)])
def test_damage_is_noticed_named_and_redone(project, suffix):
    assert run(project, *STAGE).returncode == 0
    expected = _bytes(project)
    damaged = sorted((project / ".runs/digits/example").glob(f"*.{suffix}"))[0]
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    if suffix == "pt":
        for record in _kept(project, "pruned"):
            record.unlink()
    shutil.rmtree(project / "results")  # whose records count as well
    result = run(project, *STAGE)
    assert result.returncode == 0 and f"{damaged.name}: damaged" in result.stderr
    assert _bytes(project) == expected
    assert load_checked(damaged) is not None


@pytest.mark.long
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 3), (signal.SIGUSR1, 3)])
@pytest.mark.parametrize("finished", [None, 0, 2])
def test_a_signal_stops_a_stage_with_one_line_and_it_goes_on_later(project, number, status, finished):
    """At once, while workers are started, and while they train."""
    params(project, example={"seconds": 0.4})
    assert run(project, *STAGE).returncode == 0
    expected = _bytes(project)
    subprocess.run(["rm", "-rf", ".runs", "results"], cwd=project, check=True)
    process = subprocess.Popen(
        [sys.executable, *STAGE[1:]],
        cwd=project,
        env=environment(),
        start_new_session=True,
        stderr=-1,
        text=True,
    )
    folder = project / ".runs/digits"
    deadline = time.monotonic() + 120
    # a process that has just been started is not ours yet
    while len(list(folder.glob("example/*.json" if finished else "*"))) < (finished or 0) + (finished == 0):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    if finished is None:
        time.sleep(0.5)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == status, said
    progress = ("run/s", "s/run", "mlflow")
    said = [line for line in said if line and not any(word in line for word in progress)]
    assert len(said) == 1 and said[0].startswith("stopped: ") and "the same command goes on" in said[0]
    assert not (project / RESULTS[0]).exists() and not list(folder.rglob("*.tmp"))
    assert run(project, *STAGE).returncode == 0 and _bytes(project) == expected


@pytest.mark.long
def test_of_two_commands_one_waits_and_nothing_is_trained_twice(project):
    params(project, example={"seconds": 0.4})
    command = [sys.executable, *STAGE[1:]]
    both = [
        subprocess.Popen(command, cwd=project, env=environment(), stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=900)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    waited = [text for text in said if "example: waiting for process " in text]
    assert len(waited) == 1 and sum("run/s" in text for text in said) == 1
    assert not list((project / ".runs/digits").glob("*.lease*"))


def test_streams_that_are_closed_or_full_cost_no_run(project):
    params(project, example={"seeds": [0]})
    # only a Python of its own starts without streams
    for python, streams in (
        (sys.executable, "<&- >&- 2>&-"),
        ("python", "2>/dev/full >/dev/full"),
        ("python", "2>&1 | head -c1"),
    ):
        shutil.rmtree(project / ".runs", ignore_errors=True)
        shutil.rmtree(project / "results", ignore_errors=True)
        run(project, "sh", "-c", f"{python} {' '.join(STAGE[1:])} {streams}")
        assert len(_records(project)) == 2, streams
    params(project, example={"seeds": [0]}, halo={"fine_tuning_epochs": 8})  # whole iterations
    full = run(project, "sh", "-c", "python -m replications plan --seconds 0 > /dev/full")
    assert full.returncode == 2
    assert full.stderr.splitlines()[-1] == "error: standard output: No space left on device"


def test_a_long_name_of_the_folder_for_temporary_files_is_no_hindrance(project, tmp_path):
    params(project, example={"seeds": [0]})
    (folder := tmp_path / ("d" * 140)).mkdir()
    result = run(project, *STAGE, TMPDIR=str(folder))
    assert result.returncode == 0 and "Traceback" not in result.stderr and len(_records(project)) == 2


def _example_runs(count):
    """Dense runs on equal footing, of a small network on few digits."""
    cell = Cell(architecture="vgg_t8", data=DatasetSettings(train=200, validation=100))
    arena = Recipe(epochs=2, batch_size=64, learning_rate=0.1, schedule="linear")
    return [Dense(variant="dense", cell=cell, seed=seed, arena=arena).run for seed in range(count)]


def test_a_worker_that_cannot_be_prepared_stops_the_stage_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("common.stage.local.training_slots", lambda execution, most: (2, []))
    broken = ExecutionSettings(device="cpu").model_copy(update={"threads": -1})
    with pytest.raises(StageError, match="a worker process cannot be prepared: "):
        execute(_example_runs(2), Store(tmp_path), broken, "test")


def _kept(project: Path, variant: str) -> list[Path]:
    """The kept records of a variant."""
    files = (project / ".runs/digits/example").glob("*.json")
    return [file for file in files if f'"variant":"{variant}"' in file.read_text()]


def test_a_run_whose_state_is_lost_is_done_again_only_for_one_that_starts_from_it(project):
    assert run(project, *STAGE).returncode == 0
    expected = _bytes(project)
    for state in (project / ".runs/digits/example").glob("*.pt"):
        state.unlink()
    before = {file: file.stat().st_mtime_ns for file in _kept(project, "dense")}
    assert run(project, *STAGE).returncode == 0
    assert {file: file.stat().st_mtime_ns for file in _kept(project, "dense")} == before
    _kept(project, "pruned")[0].unlink()
    shutil.rmtree(project / "results")  # whose records count as well
    assert run(project, *STAGE).returncode == 0
    assert sum(file.stat().st_mtime_ns != time for file, time in before.items()) == 1
    assert _bytes(project) == expected


def test_what_a_stage_has_finished_is_in_a_file_of_its_own_until_it_is_complete(project):
    file = project / "results/partial/digits/example.jsonl"
    one = {"device": "cpu", "precision": "float32", "threads": 1, "workers": 1}
    params(project, execution=one, example={"fails": ["full:pruned-2"]})
    stopped = run(project, *STAGE)
    assert stopped.returncode == 2 and not (project / RESULTS[0]).exists()
    assert "error: a-disk: No space left on device; 5 finished runs are kept" in stopped.stderr
    assert "`python -m replications import --partial` takes them from results/partial/" in stopped.stderr
    about, entries = partial.read(file)
    assert len(entries) == 5 and about["numerics"][0] == "cpu"
    assert all(entry.machine == about["machine"] for entry in entries)
    with file.open("ab") as more:
        more.write(b"0123 {half a li")
    assert partial.read(file) == (about, entries)
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"seed":1', b'"seed":7', 1))
    with pytest.raises(StageError, match="example.jsonl, line [0-9]: damaged or changed"):
        partial.read(file)
    params(project, example={})
    assert run(project, *STAGE).returncode == 0 and len(_records(project)) == 6
    assert not file.exists()


def test_a_full_disk_stops_the_stage_in_one_line_and_loses_nothing(project):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    assert run(project, *STAGE).returncode == 0
    expected = _bytes(project)
    folder = project / ".runs/digits/example"
    finished = sorted(folder.glob("*.json"))
    finished[0].unlink()
    shutil.rmtree(project / "results")  # whose records count as well
    # every write of a temporary file, but of what is planned, hits a full device
    sitecustomize = project / "sitecustomize.py"
    sitecustomize.write_text(
        "import pathlib\n_open = pathlib.Path.open\n"
        "def full(self, mode='r', *rest, **more):\n"
        "    full = self.name.endswith('.tmp') and not self.name.startswith('planned')\n"
        "    return open('/dev/full', 'wb') if full else _open(self, mode, *rest, **more)\n"
        "pathlib.Path.open = full\n"
    )
    result = run(project, *STAGE, PYTHONPATH=str(project))
    assert result.returncode == 2
    message = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert (
        len(message) == 1
        and "No space left on device" in message[0]
        and "5 finished runs are kept" in message[0]
    )
    sitecustomize.unlink()
    assert run(project, *STAGE).returncode == 0 and _bytes(project) == expected


def test_an_unwritable_folder_is_one_clear_line(project):
    (project / ".runs").write_text("a file in the way")
    result = run(project, *STAGE)
    assert result.returncode == 2 and "error: " in result.stderr and ".runs" in result.stderr


def test_wrong_settings_stop_before_anything_trains(project):
    params(project, example={"targets": [1.2]})
    result = run(project, *STAGE)
    assert result.returncode == 2
    assert result.stderr.strip() == (
        "error: params.yaml: profiles.digits.example.targets[0] = 1.2: should be less than 1"
    )
    assert not (project / ".runs").exists()


def test_runs_are_ordered_by_need_and_names_must_be_distinct():
    dense = made_up()
    pruned = made_up("pruned", needs=(dense,), target=0.5)
    assert in_order([pruned, dense]) == [dense, pruned]
    again = made_up()
    assert len(in_order([dense, again])) == 1 and dense.settings_hash == again.settings_hash
    with pytest.raises(ValueError, match="two different runs are called .*/dense"):
        in_order([dense, made_up(epochs=3)])


def test_what_a_run_needs_is_part_of_its_identity():
    one, other = (made_up(epochs=n) for n in (1, 2))
    hashes = {made_up("pruned", needs=(need,)).settings_hash for need in (one, other)}
    assert len(hashes) == 2


def test_checked_files_survive_and_show_damage(tmp_path, capsys):
    file = tmp_path / "deep" / "x.bin"
    save_checked(file, b"content\nwith lines")
    assert load_checked(file) == b"content\nwith lines"
    assert [f.name for f in file.parent.iterdir()] == ["x.bin"]
    file.write_bytes(file.read_bytes()[:-1])
    assert load_checked(file) is None and "x.bin: damaged" in capsys.readouterr().err
    assert load_checked(tmp_path / "absent") is None


def test_two_trainers_of_a_run_keep_their_states_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("common.stage.store.CHECKPOINT_SECONDS", -1.0)
    checkpoints = RunCheckpoints(tmp_path / "run.part")
    for number in range(2):
        checkpoints.of_next_trainer().offer(0, lambda n=number: {"trainer": n}, finished=False)
    again = RunCheckpoints(tmp_path / "run.part")
    assert [again.of_next_trainer().load(0) for _ in range(2)] == [{"trainer": 0}, {"trainer": 1}]
    again.clear()
    assert not (tmp_path / "run.part").exists()


@pytest.mark.long
def test_a_spent_time_budget_stops_between_runs_and_the_stage_goes_on_later(project):
    params(project, example={"seconds": 3.0})
    for seconds in range(4, 80, 4):  # how long a process takes to start is not known
        result = run(project, *STAGE, "--time-budget", f"{seconds}s")
        assert result.returncode == 3 and not (project / RESULTS[0]).exists()
        if kept := len(list((project / ".runs/digits/example").glob("*.json"))):
            break
    assert 0 < kept < 6 and f"the time budget is spent; {kept} finished runs are kept" in result.stderr
    assert len(partial.read(project / "results/partial/digits/example.jsonl")[1]) == kept
    elsewhere = project.parent / "elsewhere"  # another checkout goes on from a copy
    shutil.copytree(project, elsewhere)
    assert run(elsewhere, *STAGE, "--time-budget", "10m").returncode == 0
    assert len(list((elsewhere / ".runs/digits/example").glob("*.json"))) == 6
    subprocess.run(["rm", "-rf", ".runs"], cwd=project, check=True)
    assert run(project, *STAGE).returncode == 0
    assert _bytes(elsewhere) == _bytes(project)


@pytest.mark.parametrize("budget, told", [("soon", "'soon'"), ("-3", "'-3'"), ("0m", "'0m'")])
def test_a_wrong_time_budget_is_named(project, budget, told):
    result = run(project, *STAGE, f"--time-budget={budget}")
    assert result.returncode == 2 and told in result.stderr and "90s, 25m or 2h" in result.stderr


def test_a_spent_time_budget_stops_inside_a_run_which_goes_on_later(tmp_path):
    data = load(DatasetSettings(train=200))

    def trainer(checkpoints):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        batches = Batches(data, "train", 50, shuffle=True)
        return Trainer(model, batches, checkpoints=checkpoints and checkpoints.of_next_trainer())

    unbroken = trainer(None)
    unbroken.fit([0.1] * 16)
    for epochs_before in (1, 2):  # each attempt gets one epoch further
        attempt = trainer(RunCheckpoints(tmp_path / "run.part", TimeBudget(ends=0.0)))
        with pytest.raises(OutOfTime):
            attempt.fit([0.1] * 16)
        assert attempt.epochs_done == epochs_before
    resumed = trainer(RunCheckpoints(tmp_path / "run.part"))
    resumed.fit([0.1] * 16)
    assert resumed.history == unbroken.history
    assert torch.equal(resumed.model[1].weight, unbroken.model[1].weight)


def test_a_kept_run_of_another_schema_is_done_again(tmp_path, capsys):
    run = made_up()
    store = Store(tmp_path)
    save_checked(tmp_path / f"{store.key(run)}.json", b'{"record": {"paper": 7}}')
    assert store.load(run) is None
    assert "of another revision's schema" in capsys.readouterr().err
