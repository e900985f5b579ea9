"""How far a profile is, read from what those who train have left in the folder."""

import json
import os
import subprocess
import sys
import time

import pytest
from made_up_jobs import made_up

from common.core.compute import Compute
from common.core.run import Outcome
from common.records import Identity
from common.stage import status
from common.stage.lease import Lease
from common.stage.places import forget, place_file, telling
from common.stage.planned import RUNNING, Planned, PlannedRun
from common.stage.records import Failed, entry_of, record_of
from common.stage.store import Store


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four finished runs of ten seconds, one that diverged, one that is damaged, and two of which nothing is known."""
    (tmp_path / "replications/halo").mkdir(parents=True)
    (tmp_path / "replications/halo/protocol.py").touch()
    monkeypatch.setattr(status, "ROOT", tmp_path)
    store = Store(tmp_path / "runs/digits/halo")
    compute = Compute.choose("cpu")
    runs = [made_up("l1", seed, target=0.5) for seed in range(8)]
    for run in runs[:5]:
        ended = Failed("diverged", "the loss is not finite") if run.seed == 4 else Outcome({}, {})
        store.save(run, entry_of(record_of(run, compute, ended), compute, 10.0), None)
    (store.folder / f"{store.key(runs[5])}.json").write_text("half of a rec")
    listed = [PlannedRun.of(Identity(**r.identity), store.key(r), store.key_elsewhere(r)) for r in runs]
    Planned(1.0, {}, listed).write(store.folder)
    return tmp_path, store, runs


def _row(folder):
    text = status.table("", "digits", folder / "runs", folder / "results")
    return next(line for line in text.splitlines() if line.startswith("halo  ")).split(), text


def test_a_profile_on_which_nobody_is_at_work(folder):
    row, text = _row(folder[0])
    assert row == ["halo", "8", "4", "0", "1", "3", "0", *"30 s for one worker".split()]
    assert text.startswith("profile digits: no processes at work")
    assert (
        "halo: 1 failed (1 diverged): made_up_jobs/l1 mlp target 0.5 seed 4: the loss is not finite" in text
    )


def test_who_is_at_work_on_what_and_how_long_it_takes_all_together(folder):
    path, store, runs = folder
    held = [Lease(path / f"runs/digits/halo.shard-{i}-of-2") for i in (1, 2)]
    for lease in held:
        assert lease.take()
    running = [Lease(store.folder / RUNNING / store.key(run), held[0]) for run in (runs[4], runs[6])]
    assert all(lease.take() for lease in running)
    row, text = _row(path)
    assert row[:6] == ["halo", "8", "4", "2", "0", "2"] and row[7:] in (["20", "s"], ["19", "s"])
    assert text.startswith("profile digits: 2 processes at work")
    assert "shard 1 of 2, since " in text and "made_up_jobs/l1 mlp target 0.5 seed 6 (0 s)" in text
    held[0].release()  # as one that was killed
    row, text = _row(path)
    assert row[:6] == ["halo", "8", "4", "0", "1", "3"] and "shard 1 of 2" not in text
    held[1].release()


def test_which_node_of_a_cluster_has_a_run_and_when_it_was_heard_of(folder):
    path, store, runs = folder
    command = Lease(path / "runs/digits/halo")
    given = [Lease(store.folder / RUNNING / store.key(run), command) for run in (runs[5], runs[6])]
    assert command.take() and all(lease.take() for lease in given)
    files = [place_file(store.folder / RUNNING, store.key(run)) for run in (runs[5], runs[6])]
    for file in files:
        file.write_bytes(b"")  # as the command leaves it for a run that it has given out
    assert _row(path)[0][1:6] == ["8", "4", "0", "1", "3"]  # nobody executes what waits for a node
    with telling("gpu07 (0.125 of GPU 2)", files[1].write_bytes):
        deadline = time.monotonic() + 10
        while not files[1].stat().st_size and time.monotonic() < deadline:
            time.sleep(0.01)
    said = json.loads(files[1].read_text())
    files[1].write_text(json.dumps(said | {"since": time.time() - 70}))
    os.utime(files[1], (time.time() - 40,) * 2)
    row, text = _row(path)
    assert row[1:6] == ["8", "4", "1", "1", "2"]
    assert "seed 6 (1.2 min on gpu07 (0.125 of GPU 2), heard of 40 s ago)\n" in text
    command.release()  # as one that was killed: what its nodes have said means nothing
    row, text = _row(path)
    assert row[1:6] == ["8", "4", "0", "1", "3"] and "gpu07" not in text


def test_what_is_left_of_places_goes_with_those_of_the_command_alone(tmp_path):
    mine, others = (place_file(tmp_path, key) for key in ("12ab", "12abc"))
    begun = mine.with_name(f"{mine.name}.node-4711.tmp")  # by a worker that was killed
    lease = tmp_path / "12ab.1"
    for file in (mine, others, begun, lease):
        file.touch()
    forget(tmp_path, {"12ab"})
    assert set(tmp_path.iterdir()) == {others, lease}
    forget(tmp_path / "gone", {"12ab"})


def test_what_a_node_cannot_tell_is_no_fault_of_the_run():
    def full(content):
        raise OSError("no space")

    with telling("here", full):
        pass


def test_a_run_of_another_machine_that_counts_is_done(folder):
    path, store, runs = folder
    store.take_over(runs[7], store.load(runs[0]), elsewhere=True)
    assert _row(path)[0][1:3] == ["8", "5"]


def test_nothing_is_written_and_torch_is_not_loaded(folder):
    before = sorted(folder[0].rglob("*"))
    _row(folder[0])
    assert sorted(folder[0].rglob("*")) == before
    code = "import sys, replications.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
