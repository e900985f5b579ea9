"""Leases: one owner, in one process, in several, and on another machine that only shares the folder."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from common.stage import lease
from common.stage.lease import Lease


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.02)
    monkeypatch.setattr(lease, "STILL", 0.3)
    monkeypatch.setattr(lease, "_LOOK", 0.01)


def _files(folder):
    return sorted(file.name for file in folder.iterdir())


def test_one_has_it_and_leaves_nothing_behind(tmp_path):
    first, second = Lease(tmp_path / "x"), Lease(tmp_path / "x")
    assert first.take() and first.held and not second.take() and not second.held
    assert f"process {os.getpid()} on " in second.owner()
    first.release()
    assert second.owner() is None and second.take() and not first.take()
    second.release()
    assert _files(tmp_path) == []


def test_of_many_at_once_one_at_a_time_has_it(tmp_path, quick):
    inside, most = [], []

    def work():
        with Lease(tmp_path / "x").waited_for() as mine:
            inside.append(mine)
            most.append(len(inside))
            time.sleep(0.005)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most == [1] * 12 and _files(tmp_path) == []


@pytest.mark.slow
def test_what_a_killed_process_leaves_is_free_at_once(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from common.stage.lease import Lease;"
        "print(Lease(Path(sys.argv[1])).take(), flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, tmp_path / "x"], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "True\n"
    ours = Lease(tmp_path / "x")
    assert ours.owner().startswith(f"process {owner.pid} on ") and not ours.take()
    owner.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20  # a zombie, which nobody has waited for, has ended, too
    while not ours.take():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert _files(tmp_path) == ["x.lease-2"]
    owner.communicate()


def _of_another_machine(folder, number=1, beat=0):
    about = {"host": "elsewhere", "place": "elsewhere 1", "process": 1, "started": "1", "beat": beat}
    (folder / f"x.lease-{number}").write_text(json.dumps(about))


def test_of_another_machine_it_is_over_when_its_heart_stands_still(tmp_path, quick):
    _of_another_machine(tmp_path)
    ours, told = Lease(tmp_path / "x"), []
    for beat in range(1, 6):
        assert not ours.take()
        time.sleep(0.1)
        _of_another_machine(tmp_path, beat=beat)
    with ours.waited_for(told.append) as mine:
        assert mine and told == ["process 1 on elsewhere"]
        _of_another_machine(tmp_path, number=3)  # which thought that this one had ended
        assert not ours.held
    assert _files(tmp_path) == ["x.lease-3"]


def test_the_heart_beats_and_waiting_has_an_end(tmp_path, quick):
    _of_another_machine(tmp_path, number=7)
    ours = Lease(tmp_path / "x")
    with ours.waited_for(ends=time.time() + 0.05) as mine:
        assert not mine
    (tmp_path / "x.lease-7").unlink()
    assert ours.take()
    seen = set()
    deadline = time.monotonic() + 20
    while len(seen) < 3:
        seen.add((tmp_path / "x.lease-1").read_text())
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ours.release()


def test_a_number_that_was_over_cannot_be_taken_after_those_that_followed(tmp_path, monkeypatch):
    ours = Lease(tmp_path / "x")
    monkeypatch.setattr(ours, "_judged", lambda: (1, None))  # it looked long ago
    _of_another_machine(tmp_path, number=3)
    assert not ours.take() and _files(tmp_path) == ["x.lease-3"]
    monkeypatch.setattr(ours, "_judged", lambda: (2, None))
    assert not ours.take() and _files(tmp_path) == ["x.lease-3"]


def test_another_process_with_the_same_number_is_not_the_owner(tmp_path):
    about = lease._here() | {"started": "1"}
    (tmp_path / "x.lease-1").write_text(json.dumps(about))
    assert Lease(tmp_path / "x").owner() is None
    assert lease.over(lease.signature().replace(lease.started(os.getpid()), "1"))
    assert not lease.over(lease.signature())
