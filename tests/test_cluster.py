"""Runs on a cluster of Ray: a real one, of two nodes on this machine, of which one does not see the project's folder."""

import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from cluster_jobs import CELL, Trains
from cluster_nodes import ELSEWHERE, Nodes, free_port, own_view

from common.core.identity import canonical
from common.settings import DatasetSettings, ExecutionSettings, SettingsError, validated
from common.stage import cluster, connection
from common.stage.scheduler import execute
from common.stage.store import Store
from common.stage.worker import perform, prepare_process

NUMBERS = {"device": "cpu", "precision": "float32"}
DIGITS = DatasetSettings()


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"engine": "dask"}, ["execution.engine = 'dask'", "'local' or 'ray'"]),
        ({"engine": "ray", "address": "ray://head:1"}, ["execution.address = 'ray://head:1'"]),
        ({"engine": "ray", "gpus_per_run": 2}, ["execution.gpus_per_run", "less than or equal to 1"]),
        ({"engine": "ray", "cpus_per_run": 0}, ["execution.cpus_per_run", "greater than or equal to 1"]),
        ({"engine": "ray", "device": "cuda:1"}, ["Ray chooses the GPU of a run", "auto, cuda or cpu"]),
        ({"engine": "ray", "device": "cpu", "gpus_per_run": 0.5}, ["gpus_per_run must be absent"]),
        ({"address": "head:6379"}, ["engine is local: address must be absent or auto"]),
    ],
)
def test_a_wrong_setting_is_named(values, parts):
    with pytest.raises(SettingsError) as error:
        validated(ExecutionSettings, values, "p.yaml: execution")
    assert all(part in str(error.value) for part in parts), error.value


def test_what_executes_a_run_does_not_tell_it_apart(tmp_path):
    plain = ExecutionSettings(**NUMBERS)
    ray = ExecutionSettings(engine="ray", address="head:6379", cpus_per_run=2, **NUMBERS)
    run = Trains(variant="dense", cell=CELL.model_copy(update={"data": DIGITS}), seed=0).run
    assert Store(tmp_path, ray).key(run) == Store(tmp_path, plain).key(run)
    assert ray.numbers == plain.numbers == Store(tmp_path, ray).execution
    assert set(plain.numbers) == {"device", "precision", "compilation", "deterministic", "threads"}


def test_without_ray_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        SettingsError, match=r"Ray is not installed here; .*requirements-cluster.lock.*\.\[cluster\]"
    ):
        connection.connected("auto", ())


# ------------------------------------------------------------------------------------------- a cluster


@pytest.fixture(scope="module")
def nodes():
    pytest.importorskip("ray", reason="Ray is not installed: `make cluster` adds it")
    if (apart := own_view()) is None:
        pytest.skip("no node can be started that does not see a folder: `unshare` is not allowed here")
    found = Nodes()
    found.second = found.join(*apart, *ELSEWHERE, str(found.folder))
    data = np.random.default_rng(0)
    arrays = {f"x_{part}": data.integers(0, 256, (400, 8, 8), dtype=np.uint8) for part in ("train", "test")}
    arrays |= {f"y_{part}": np.arange(400) % 10 for part in ("train", "test")}
    np.savez(found.folder / "data.npz", **arrays)
    yield found
    found.close()


@pytest.fixture
def project(nodes, monkeypatch):
    monkeypatch.chdir(nodes.folder)
    Path(f"{nodes.folder}.log").unlink(missing_ok=True)
    return nodes.folder


def _executed(nodes, runs, name, **more):
    settings = ExecutionSettings(engine="ray", address=nodes.address, **NUMBERS, **more)
    return execute(runs, Store(Path(".runs", name), settings), settings, "test")


def _left(entry):
    """What must be the same wherever a run is executed."""
    return canonical(entry.model_dump(include={"record", "curves", "predictions", "has_state"}))


def _here(runs, name):
    """What the runs leave when this machine executes them."""
    settings = ExecutionSettings(**NUMBERS)
    prepare_process(settings)
    store = Store(Path(".runs", name), settings)
    needed = {need.settings_hash for run in runs for need in run.needs}
    return [_left(perform(run, store, settings, run.settings_hash in needed)) for run in runs]


def _noted(project):
    return [line.split() for line in Path(f"{project}.log").read_text().splitlines()]


@pytest.mark.slow
def test_nodes_leave_what_this_machine_leaves_and_a_run_that_kills_its_worker_fails_alone(nodes, project):
    dense = [Trains(variant="dense", cell=CELL, seed=seed, project=str(project)) for seed in range(3)]
    pruned = [
        Trains(variant="pruned", cell=CELL, seed=job.seed, starts=(job,), project=str(project))
        for job in dense
    ]
    kills = Trains(variant="kills", cell=CELL, seed=0, kills=True, project=str(project)).run
    runs = [job.run for job in (*dense, *pruned)]
    *found, died = _executed(nodes, [*runs, kills], "cluster")
    noted = _noted(project)
    assert (died.record.status, died.record.failure) == ("failed", "died")
    assert [what for name, what, *_ in noted if name == "kills-0"] == ["begun", "begun"]
    where = {name: seen for name, what, seen, _ in noted if what == "begun" and name != "kills-0"}
    assert set(where.values()) == {"seen", "blind"} and len(where) == len(runs)
    assert sum(what == "begun" for _, what, *_ in noted) == len(runs) + 2  # each once
    assert [_left(entry) for entry in found] == _here(runs, "here")
    folder = Path(".runs/cluster")
    assert len(list(folder.glob("*.json"))) == 7 and len(list(folder.glob("*.pt"))) == 3
    files = [file for file in folder.iterdir() if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".pt"}  # no checkpoint, no probe


@pytest.mark.slow
def test_a_node_that_differs_is_refused_by_name_before_anything_trains(nodes, project, monkeypatch):
    computes = cluster.node.computes
    monkeypatch.setattr(cluster.node, "computes", lambda settings: {**computes(settings), "torch": "9.9"})
    run = Trains(variant="dense", cell=CELL, seed=7, project=str(project)).run
    with pytest.raises(
        SettingsError, match=r"^node \S+ \([\d.]+\) has torch .* in place of 9\.9: all nodes"
    ) as error:
        _executed(nodes, [run], "differs")
    assert "\n" not in str(error.value) and not Path(f"{project}.log").exists()
    free = f"127.0.0.1:{free_port()}"
    settings = ExecutionSettings(engine="ray", address=free, **NUMBERS)
    with pytest.raises(SettingsError, match=f"execution.address = '{free}': no cluster of Ray answers"):
        execute([run], Store(Path(".runs/none"), settings), settings, "test")


@pytest.mark.slow
def test_runs_of_a_node_that_is_lost_go_on_elsewhere_from_their_last_state(nodes, project):
    """The last test: the node stays away."""
    runs = [
        Trains(variant="long", cell=CELL, seed=seed, seconds=0.7, project=str(project)).run
        for seed in range(2)
    ]
    lost = []

    def kill():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not lost:
            lines = _noted(project) if Path(f"{project}.log").exists() else []
            for name in {name for name, what, seen, _ in lines if (what, seen) == ("epoch-1", "blind")}:
                nodes.lose(nodes.second)
                lost.append(name)
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    found = _executed(nodes, runs, "lost")
    killer.join()
    (name,) = lost
    noted = _noted(project)
    epochs = [what for other, what, seen, _ in noted if other == name and seen == "seen"]
    assert epochs[0] == "begun" and epochs[1] in ("epoch-1", "epoch-2"), noted  # not from its first epoch
    assert [_left(entry) for entry in found] == _here(runs, "not-lost")
    assert not list(Path(".runs/lost").glob("*.part"))
