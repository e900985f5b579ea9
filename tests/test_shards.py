"""Several processes in one folder: each run is executed once, whoever dies, and `collect` leaves what one process would."""

import json
import os
import shutil
import signal
import time
from collections import Counter

import pytest
from made_up_jobs import made_up
from project import only_example, params, replications, start

from common.core.compute import Compute
from common.stage import lease, shards
from common.stage.lease import Lease
from common.stage.planned import RUNNING
from common.stage.records import Failed, entry_of, record_of
from common.stage.scheduler import in_order
from common.stage.shards import OWNERS, Claims, Shard
from common.stage.store import Store
from replications.__main__ import main

RESULTS = tuple(f"results/digits/example.{name}" for name in ("jsonl", "curves.jsonl", "predictions.npz"))


def _family(seeds):
    dense = [made_up(seed=seed) for seed in range(seeds)]
    return in_order([made_up("pruned", d.seed, (d,), target=t) for d in dense for t in (0.5, 0.9)])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_shards_have_equal_shares_and_each_has_all_in_the_end(count):
    runs = _family(5)
    orders = [Shard(index, count).order(runs) for index in range(1, count + 1)]
    for order in orders:
        assert Counter(order) == Counter(runs)
    share = len(runs) / count
    first = [set(order[: int(share)]) for order in orders]
    assert len(set().union(*first)) >= 0.7 * int(share) * count  # they begin with runs of their own
    for order in orders:  # what a run of one's own needs is there before
        own = order[: int(share)]
        assert all(order.index(need) < order.index(run) for run in own for need in run.needs)


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two processes' claims on one store, as it were."""
    monkeypatch.setattr(shards, "_LOOK", 0.0)
    store = Store(tmp_path / "example")
    leases = [Lease(tmp_path / f"example.shard-{i}-of-2") for i in (1, 2)]
    assert all(each.take() for each in leases)
    yield [Claims(store, each, Shard(i, 2), begun=100.0) for i, each in enumerate(leases, 1)]
    for each in leases:
        each.release()


def test_a_run_is_one_process_s_until_it_gives_it_back(two):
    (first, second), (run, other) = two, _family(1)[:2]
    assert first.take(run) and first.take(run) and not second.take(run) and second.take(other)
    first.release(run)
    assert second.take(run) and not first.take(run)
    second.close()
    assert first.take(run) and first.take(other)
    first.close()
    assert not (first.store.folder / RUNNING).exists()


def test_who_has_a_paper_alone_removes_what_a_kill_has_left_of_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    left = tmp_path / ".runs/digits/example" / RUNNING / "ab12.lease-1"
    left.parent.mkdir(parents=True)
    left.write_text("{}")
    with shards.alone("example", "digits"):
        assert not left.parent.exists()


def test_what_a_process_had_that_is_gone_is_free(two):
    (first, second), run = two, _family(1)[0]
    assert first.take(run)
    first.lease.release()
    assert second.take(run) and not second.is_deadly(run)


def test_a_heart_that_stands_still_on_another_machine_frees_all_that_was_under_it(two, monkeypatch, tmp_path):
    monkeypatch.setattr(lease, "STILL", 0.2)
    (first, second), run = two, _family(1)[0]
    first.lease.release()
    monkeypatch.setattr(lease, "_place", lambda: "elsewhere 1")
    monkeypatch.setattr(lease, "BEAT", 1e6)
    elsewhere = Lease(tmp_path / "example.shard-1-of-2")
    assert elsewhere.take() and Claims(first.store, elsewhere, Shard(1, 2)).take(run)
    monkeypatch.undo()
    monkeypatch.setattr(shards, "_LOOK", 0.0)
    monkeypatch.setattr(lease, "STILL", 0.2)
    assert not second.take(run)
    deadline = time.monotonic() + 20
    while not second.take(run):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_with_which_process_after_process_ends_is_given_up(two):
    (first, second), run = two, _family(1)[0]
    for number in range(1, OWNERS + 1):
        assert first.take(run) and not first.is_deadly(run)
        file = first.store.folder / RUNNING / f"{first.store.key(run)}.lease-{number}"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"started": "1"}))  # as one that was killed
        first._mine.clear()
    assert second.take(run) and second.is_deadly(run)


def test_what_failed_before_the_array_began_is_tried_again_and_what_failed_since_is_not(two):
    (first, _), run = two, _family(1)[0]
    compute = Compute.choose("cpu")
    entry = entry_of(record_of(run, compute, Failed("died", "killed")), compute, 1.0)
    for ended, known in ((99.0, False), (101.0, True)):
        first.store.save(run, entry.model_copy(update={"ended": ended}), None)
        assert (first.left(run) is not None) == known


# ------------------------------------------------------------------------------------------ real processes


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The example paper, whose runs note that they have begun, and go on when there is a file `go`."""
    project = only_example(tmp_path_factory.mktemp("shards"))
    protocol = project / "replications/example/protocol.py"
    gate = (
        'Path("begun").open("a").write(f"{self.variant} {self.seed}\\n")\n'
        '        while not Path("go").exists():\n            time.sleep(0.05)'
    )
    protocol.write_text(protocol.read_text().replace("time.sleep(self.seconds)", gate))
    execution = {"device": "cpu", "precision": "float32", "workers": 1}
    params(project, execution=execution, example={"seeds": {"first": 0, "count": 4}})
    return project


@pytest.fixture
def project(base, tmp_path):
    project = shutil.copytree(base, tmp_path / "project")
    yield project
    (project / "go").touch()  # what a test that failed has left ends, too


def _begun(project):
    file = project / "begun"
    return Counter(file.read_text().splitlines()) if file.exists() else Counter()


def _process(file):
    """The process that a lease names; None while it is being written."""
    text = file.read_text() if file.exists() else ""
    return json.loads(text)["process"] if text else None


def _shards(project, count, of):
    """Shards that have a run in hand each, and their processes' numbers."""
    started = [
        start(
            project,
            "python",
            "-m",
            "replications",
            "run",
            "example",
            "--shard",
            f"{i}/{of}",
            PYTHONPATH=str(project),
        )
        for i in range(1, count + 1)
    ]
    folder = project / ".runs/digits"
    deadline = time.monotonic() + 300
    while sum(_begun(project).values()) < count:
        if time.monotonic() > deadline or any(process.poll() is not None for process in started):
            for process in started:
                process.kill()
            pytest.fail(str([process.communicate() for process in started]))
        time.sleep(0.05)
    return started, [_process(folder / f"example.shard-{i}-of-{of}.lease-1") for i in range(1, count + 1)]


@pytest.mark.slow
def test_three_shards_of_which_one_is_killed_do_each_run_once_and_leave_what_one_process_does(
    project, base, tmp_path
):
    started, numbers = _shards(project, 3, of=3)
    waits = replications(project, "run", "example", "--time-budget", "0.5s")
    assert waits.returncode == 3 and "-of-3 is at work" in waits.stderr
    seen = replications(project, "status").stdout
    assert "3 processes at work" in seen and "shard 2 of 3, since " in seen and "example/dense mlp" in seen
    os.kill(numbers[1], signal.SIGKILL)
    os.kill(numbers[2], signal.SIGUSR1)
    (project / "go").touch()
    texts = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, -signal.SIGKILL, 3], texts
    assert "stopped: by SIGUSR1" in texts[2][1]
    begun = _begun(project)
    assert len(begun) == 8 and sum(begun.values()) <= 10, begun  # twice at most what the two had in hand
    assert not (project / "results").exists() and not list(
        (project / ".runs/digits/example").glob("running/*")
    )

    collected = replications(project, "collect")
    assert collected.returncode == 0, collected.stderr
    alone = shutil.copytree(base, tmp_path / "alone")
    (alone / "go").touch()
    assert replications(alone, "run", "example").returncode == 0
    assert [(project / name).read_bytes() for name in RESULTS] == [
        (alone / name).read_bytes() for name in RESULTS
    ]
    assert _begun(project) == begun and not list((project / ".runs/digits").glob("*.lease-*"))


@pytest.mark.slow
def test_collect_says_what_is_missing_and_shards_with_other_versions_are_refused(project):
    (started,), (number,) = _shards(project, 1, of=2)
    code = project / "replications/example/protocol.py"
    before = code.read_text()
    code.write_text(before + "\n# another revision\n")
    refused = replications(project, "run", "example", "--shard", "2/2")
    assert refused.returncode == 2 and "not with the same: code " in refused.stderr, refused.stderr
    code.write_text(before)
    os.kill(number, signal.SIGTERM)
    assert started.communicate() and started.returncode == 3
    collected = replications(project, "collect", "example")
    assert (
        collected.returncode == 3
        and "8 of 8 runs are missing (4 dense, 4 pruned; seeds 0 to 3)" in collected.stderr
    )
    assert "`python -m replications run example --shard I/N`" in collected.stderr
    assert not (project / RESULTS[0]).exists()


def test_a_wrong_shard_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["run", "example", "--shard", "3/2"])
    assert "'3/2' is not a shard such as 3/8, from 1/8 to 8/8" in capsys.readouterr().err
