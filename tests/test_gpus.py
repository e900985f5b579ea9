"""Processes in which several runs take turns, as on GPUs; here on the CPU."""

import json
import os
import threading
from pathlib import Path

import pytest
from made_up_jobs import DATA

from common.core.compute import TURNS, Turns
from common.core.recipe import Recipe
from common.core.run import Cell, Job
from common.settings import ExecutionSettings
from common.stage import local
from common.stage.engines import Died
from common.stage.gpus import GPUWorkers
from common.stage.scheduler import execute
from common.stage.store import Store

_LOG = []


def _ready():
    _LOG.append("ready")


def _where(device):
    return device, os.getpid(), list(_LOG)


def _in_turns(name, device):
    """What all that run in this process have done so far: each waits until another one has begun."""
    _LOG.append(name)
    while {"one", "other"} - set(_LOG):
        TURNS.pass_on()
    for step in range(3):
        _LOG.append((name, step))
        TURNS.pass_on()
    return list(_LOG)


def _dies(device):
    os._exit(1)


def _wrong(device):
    raise LookupError("not there")


def _waits(device):
    TURNS.wait(threading.Event().wait)


# ------------------------------------------------------------------------------------------- turns


def test_threads_have_their_turns_one_after_the_other():
    turns, seen, inside = Turns(), [], []
    begin = threading.Barrier(3)

    def work(name):
        begin.wait(10)
        with turns.taken():
            for step in range(4):
                inside.append(name)
                assert len(inside) == 1
                seen.append((name, step))
                inside.clear()
                turns.pass_on()

    with turns.taken():
        threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        begin.wait(10)
        while len(turns._waiting) < 2:
            pass
        assert not seen  # nobody has begun without a turn
        turns.pass_on()
        # both had one turn, and wait for the next
        assert sorted(seen) == [("a", 0), ("b", 0)]
    for thread in threads:
        thread.join(10)
    assert [step for _, step in seen] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_one_that_waits_for_the_device_lets_others_go_on_and_one_without_turns_just_waits():
    turns, done = Turns(), threading.Event()

    def work():
        with turns.taken():
            done.set()

    thread = threading.Thread(target=work)
    with turns.taken():
        thread.start()
        assert not done.wait(0.05)
        turns.wait(lambda: done.wait(10))
        assert done.is_set()
        with pytest.raises(ZeroDivisionError):
            turns.wait(lambda: 1 / 0)
        turns.pass_on()
    thread.join(10)
    turns.pass_on()
    turns.wait(lambda: None)
    with turns.taken():
        pass


# ------------------------------------------------------------------------------------------- processes


@pytest.mark.slow
def test_work_of_one_device_is_in_one_process_and_takes_turns_there():
    with GPUWorkers(["cpu", "cpu:0", "cpu"], _ready) as workers:
        found = [workers.submit(_where).result() for _ in range(6)]
        assert {device for device, *_ in found} <= {"cpu", "cpu:0"}
        assert all(log == ["ready"] for *_, log in found)
        with pytest.raises(LookupError, match="not there") as caught:
            workers.submit(_wrong).result()
        assert "in _wrong" in caught.value.__notes__[0]
    with GPUWorkers(["cpu", "cpu"], _ready) as workers:
        logs = [workers.submit(_in_turns, name) for name in ("one", "other")]
        log = max((future.result() for future in logs), key=len)
        steps = [entry for entry in log if isinstance(entry, tuple)]
        assert [step for _, step in steps] == [0, 0, 1, 1, 2, 2]


@pytest.mark.long
@pytest.mark.slow
def test_a_process_that_dies_takes_its_own_work_along_and_another_one_goes_on():
    with GPUWorkers(["cpu", "cpu"], _ready) as workers:
        before = workers.submit(_where).result()
        lost = [workers.submit(_waits), workers.submit(_dies)]
        for future in lost:
            with pytest.raises(Died):
                future.result()
        after = workers.submit(_where).result()
        assert after[1] != before[1]
        stopped = workers.submit(_waits)
        while not stopped.running():
            pass
        workers.shutdown(wait=False, cancel_futures=True)
        with pytest.raises(Died):
            stopped.result()


class Trains(Job):
    """Trains a small network, after what the test wants of it."""

    training: Recipe = Recipe(epochs=2, batch_size=64, learning_rate=0.1, schedule="constant")
    kills: bool = False
    log: str = ""
    """A file that notes when runs begin and end. The first one finds no memory unless it is alone."""

    def execute(self, context):
        trainer = self.training.trainer(context, context.network())
        if self.kills:
            os._exit(1)
        if self.log:
            self._note("begun")
            if self.seed == 0 and not Path(f"{self.log}-seen").exists():
                Path(f"{self.log}-seen").touch()
                self._note("crowded")
                raise MemoryError
        trainer.fit(self.training.rates(len(trainer.batches)))
        if self.log:
            self._note("ended")
        return context.measured(trainer)

    def _note(self, what):
        with Path(self.log).open("a") as file:
            file.write(f"{what}\n")


def _stage(tmp_path, monkeypatch, lanes, kills=(), log=""):
    """How five runs end, and the curves of all that succeed."""
    monkeypatch.setattr(local, "training_slots", lambda execution, most: (len(lanes) or 1, lanes))
    cell = Cell(architecture="vgg_t8", data=DATA)
    runs = [
        Trains(variant="dense", cell=cell, seed=seed, kills=seed in kills, log=str(log)).run
        for seed in range(5)
    ]
    execution = ExecutionSettings(device="cpu", precision="float32")
    entries = execute(runs, Store(tmp_path / f"{lanes}{kills}", execution), execution, "test")
    return [(entry.record.status, entry.record.failure, json.dumps(entry.curves)) for entry in entries]


@pytest.mark.slow
def test_runs_in_turns_leave_what_runs_in_processes_leave(tmp_path, monkeypatch):
    apart = _stage(tmp_path, monkeypatch, [])
    assert _stage(tmp_path, monkeypatch, ["cpu"] * 3) == apart
    assert len({curves for *_, curves in apart}) == 5


@pytest.mark.long
@pytest.mark.slow
def test_a_run_that_kills_the_process_fails_alone_and_the_others_go_on(tmp_path, monkeypatch):
    apart = _stage(tmp_path, monkeypatch, [])
    found = _stage(tmp_path, monkeypatch, ["cpu", "cpu:0", "cpu"], kills=(1,))
    assert found.pop(1)[:2] == ("failed", "died")
    apart.pop(1)
    assert found == apart


@pytest.mark.long
@pytest.mark.slow
def test_after_a_run_that_found_no_memory_beside_others_there_are_fewer_at_once(tmp_path, monkeypatch):
    log = tmp_path / "log"
    found = _stage(tmp_path, monkeypatch, ["cpu"] * 3, log=log)
    assert {status for status, *_ in found} == {"ok"}
    noted = log.read_text().split()
    assert noted.count("crowded") == 1 and noted.count("ended") == 5
    at_once, most = 0, []
    for what in noted:
        at_once += {"begun": 1}.get(what, -1)
        most.append(at_once)
    assert max(most[noted.index("ended") :]) == 2
