"""Executes runs, several at once, each as soon as what it needs is finished.

A protocol lists jobs. The run of each is executed by a worker and leaves one record. Work that several runs share is
itself a run, which the others list in `needs`.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from common import commandline
from common.core import networks, tuning
from common.core.compute import Compute, make_repeatable, out_of_memory, release_memory, usable
from common.core.failures import OutOfMemory, RunFailed
from common.core.identity import canonical
from common.core.models import Network
from common.core.run import Context, Needed, Outcome, Run
from common.records import Entry
from common.settings import ROOT, ExecutionSettings, SettingsError
from common.stage import latency, processes
from common.stage.gpus import Died, GPUWorkers
from common.stage.records import Failed, entry_of, predictions_of, record_of, taken_over
from common.stage.store import OutOfTime, StageError, Store, TimeBudget

RUNS_PER_GPU = 8
"""Narrow networks leave most of a GPU idle: so many are trained on one at once."""
DEATHS = 2
"""So often a worker may die with a run that is alone with it, before the run is given up."""
STREAMS_PER_GPU = 32
"""torch has no more; two threads on one stream would be in each other's captures."""


@dataclass(frozen=True)
class Networks:
    """Of which runs the networks are wanted, by the hashes of their settings.

    kept: in a file. measured: for what they take on this machine.
    """

    kept: frozenset[str] = frozenset()
    measured: frozenset[str] = frozenset()


def perform(
    run: Run,
    store: Store,
    execution: ExecutionSettings,
    keep_state: bool,
    budget: TimeBudget | None = None,
    wanted: Networks = Networks(),
) -> Entry | None:
    """Execute one run in this process and keep it, and its network if that is wanted.

    Returns what it leaves, or None if the time budget ended before the run did.
    """
    begun = time.perf_counter()
    compute = Compute.choose(execution.device, execution.precision, execution.compilation)
    needs = tuple(_needed(need, store) for need in run.needs)
    checkpoints = store.checkpoints(run, budget)
    kept, measured = (run.settings_hash in hashes for hashes in (wanted.kept, wanted.measured))
    context = Context(run, compute, needs, checkpoints.of_next_trainer, kept or measured)
    try:
        ended = _ended(context)
    except OutOfTime:
        return None
    if isinstance(ended, Failed):
        release_memory(compute.device)
        curves, state, predictions = [], None, None
    else:
        curves, state = ended.curves, ended.state if keep_state else None
        predictions = predictions_of(context, ended, store)
    record = record_of(run, compute, ended, predictions)
    seconds = round(time.perf_counter() - begun, 3)
    takes = None
    if isinstance(ended, Outcome) and kept:
        store.save_network(run, _network(context, ended, store))
    if isinstance(ended, Outcome) and measured:
        takes = _takes(context, ended)
    entry = entry_of(record, compute, seconds, curves, state is not None, predictions, takes)
    entry = store.save(run, entry, state)
    checkpoints.clear()
    return entry


def _network(context: Context, outcome: Outcome, store: Store) -> bytes:
    """The file of the network whose accuracy a run reports; empty where there is none."""
    tested = context.reported(outcome.metrics)
    if tested and isinstance(tested.network, Network):
        about = {**context.run.identity, "settings_hash": context.run.settings_hash}
        data = context.data
        return networks.packed(tested.network, context.job.cell, data.classes, data.image_shape, about)
    files = [store.network_file(need) for need in taken_over(context, outcome)]
    return next((file.read_bytes() for file in files if file.exists()), b"")


def _takes(context: Context, outcome: Outcome) -> dict[str, float] | None:
    """What the network whose accuracy a run reports takes on this machine; None where that cannot be measured."""
    tested = context.reported(outcome.metrics)
    if tested is None or tested.network is None:
        return None
    try:
        return latency.measured(context, tested.network)
    except (RuntimeError, MemoryError):  # of memory for a second network, say: the run is complete without
        return None


def _needed(need: Run, store: Store) -> Needed:
    if (entry := store.load(need)) is None:
        raise StageError(f"{need} is no longer in {store.folder}; the same command does it again")
    return Needed(entry.record, store.state(need) or {}, entry.curves)


def _ended(context: Context) -> Outcome | Failed:
    """What a run comes to. Raises OutOfTime."""
    run, job = context.run, context.run.job
    for number, (need, left) in enumerate(zip(run.needs, context.needs, strict=True)):
        if left.record.status == "ok" or tuning.lost(job, job.needs[number], left.record):
            continue
        reason = f"it starts from {need}, which failed: {left.record.reason}"
        return Failed("needs", reason, left.record.root)
    try:
        return job.execute(context)
    except RunFailed as error:
        return Failed(error.failure, str(error))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            if not usable(context.compute.device):
                raise  # the process ends, and with it what it has on the device
            return _of_defect(error)
        where = context.compute.device
        return Failed(
            OutOfMemory.failure, f"out of memory on {where} outside training; lower its batch size or width"
        )
    except (StageError, OSError):  # of a folder or a disk that all runs share
        raise
    except Exception as error:
        return _of_defect(error)


def _of_defect(error: Exception) -> Failed:
    """The failure of a run whose code has raised an error, with the last of our lines that it went through."""
    if isinstance(error, SettingsError):
        return Failed("error", str(error))
    ours = [
        (Path(frame.filename).relative_to(ROOT), frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if any(Path(frame.filename).is_relative_to(ROOT / room) for room in ("common", "replications"))
    ]
    place = " ({}, line {})".format(*ours[-1]) if ours else ""
    told = " ".join(str(error).split())
    return Failed("error", f"{type(error).__name__}: {told}{place}")


def prepare_process(execution: ExecutionSettings) -> None:
    """Make a process that trains repeatable, with memory that it keeps."""
    make_repeatable(execution)
    processes.keep_memory()


def _start_worker(execution: ExecutionSettings) -> None:
    """Prepare a worker process and let it end with its parent."""
    commandline.end_with_parent()
    try:
        prepare_process(execution)
    except Exception as error:  # it would look as if the first run had killed the worker
        _own.refuses = f"a worker process cannot be prepared: {error}"


_own = threading.local()
"""refuses: why a worker cannot train."""


def _work(
    run: Run,
    store: Store,
    execution: ExecutionSettings,
    keep_state: bool,
    budget: TimeBudget,
    wanted: Networks,
    device: str | None = None,
) -> Entry | None:
    if refuses := getattr(_own, "refuses", None):
        raise StageError(refuses)
    if device:
        execution = execution.model_copy(update={"device": device})
    return None if budget.spent else perform(run, store, execution, keep_state, budget, wanted)


def in_order(runs: Sequence[Run]) -> list[Run]:
    """The runs and all they need, each once, needed ones first.

    Raises ValueError when two different runs bear the same name.
    """
    ordered: dict[str, Run] = {}

    def add(run: Run) -> None:
        if run.settings_hash in ordered:
            return
        for need in run.needs:
            add(need)
        ordered[run.settings_hash] = run

    for run in runs:
        add(run)
    names: dict[str, Run] = {}
    for run in ordered.values():
        other = names.setdefault(canonical(run.identity), run)
        if other is not run:
            raise ValueError(f"two different runs are called {run}")
    return list(ordered.values())


def execute(
    runs: Sequence[Run],
    store: Store,
    execution: ExecutionSettings,
    title: str,
    finished: Callable[[Entry], object] = lambda entry: None,
    budget: TimeBudget | None = None,
    wanted: Networks = Networks(),
) -> list[Entry]:
    """Execute all runs that are not finished yet, several at once, and return the entries of all, in order.

    finished: called with each entry as soon as it is there, also with those of an earlier attempt. budget: when to stop;
    none by default. wanted: networks; a run whose network is to be kept, and is not, is done again. A run that fails leaves a `failed` record and the others go on. Raises StageError for what
    concerns the stage: a full disk, a folder that cannot be written, a defect in the code; OutOfTime; and
    `commandline.Stopped` when a signal has stopped a command.
    """
    ordered = in_order(runs)
    needed = {need.settings_hash for run in ordered for need in run.needs}
    entries: dict[str, Entry] = {}
    starts = set[str]()  # the runs from which those that are not finished start
    for run in reversed(ordered):
        if entry := store.finished(run, run.settings_hash in starts, run.settings_hash in wanted.kept):
            entries[run.settings_hash] = entry
        else:
            starts |= {need.settings_hash for need in run.needs}
    for run in ordered:
        if entry := entries.get(run.settings_hash):
            finished(entry)
    todo = [run for run in ordered if run.settings_hash not in entries]
    if todo:
        workers, devices = training_slots(execution, len(todo))
        done = len(ordered) - len(todo)
        quiet = 1.0 if sys.stderr.isatty() else 15.0
        with tqdm(total=len(ordered), initial=done, desc=title, unit="run", mininterval=quiet) as bar:

            def done_with(entry: Entry) -> None:
                entries[entry.record.settings_hash] = entry
                bar.update()
                finished(entry)

            scheduler = _Scheduler(
                store, execution, workers, devices, needed, entries, done_with, budget or TimeBudget(), wanted
            )
            scheduler.execute(todo)
    return [entries[run.settings_hash] for run in ordered]


def training_slots(execution: ExecutionSettings, most: int) -> tuple[int, list[str]]:
    """How many runs train at once, and on which GPU each (none: on the CPU)."""
    device = Compute.choose(execution.device, execution.precision).device
    if device.type == "cuda":
        every = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        devices = every if device.index is None else [str(device)]
        wanted = RUNS_PER_GPU * len(devices) if execution.workers == "auto" else execution.workers
        count = min(wanted, STREAMS_PER_GPU * len(devices))
        return min(count, most), [devices[i % len(devices)] for i in range(count)]
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = max(1, available // execution.threads) if execution.workers == "auto" else execution.workers
    return min(count, most), []


class _Scheduler:
    """Gives each run to a worker as soon as what it needs is finished.

    A worker is a process on a CPU, and on a GPU a thread of its one process, with a stream of its own: kernels of several
    processes would take turns there.
    """

    def __init__(
        self,
        store: Store,
        execution: ExecutionSettings,
        workers: int,
        devices: Sequence[str],
        needed: Collection[str],
        entries: Mapping[str, Entry],
        finish: Callable[[Entry], object],
        budget: TimeBudget,
        wanted: Networks,
    ):
        self.store, self.execution, self.workers, self.devices = store, execution, workers, devices
        self.wanted = wanted
        self.needed, self.entries, self.finish, self.budget = needed, entries, finish, budget
        self.running: dict[Future[Entry | None], Run] = {}
        self.again: list[Run] = []
        """Runs that found no memory beside others, or whose process has died with those of others."""
        self.room = workers + 1
        """Runs that are given to workers at once, at most; fewer when memory has been short."""
        self.defects: list[str] = []
        self.deaths = Counter[str]()
        """How often a worker has died with a run that was alone with it, by settings hash."""

    def execute(self, todo: list[Run]) -> None:
        waiting, suspects = list(todo), list[Run]()
        if not self.devices:
            processes.await_workers()
        with commandline.patience() as self.asked:
            while waiting or suspects:
                # after a worker has died, those that were running go on one by one, so that only the guilty one fails;
                # so do those for which there was no memory beside others
                workers, batch = (1, [suspects.pop(0)]) if suspects else (self.workers, waiting)
                with self._pool(workers) as pool:
                    try:
                        self._drain(pool, workers, batch)
                    except BrokenProcessPool:
                        suspects += self._after_a_death(alone=workers == 1)
                    except BaseException as error:
                        pool.shutdown(wait=False, cancel_futures=True)
                        commandline.end_children()
                        if isinstance(error, (OSError, EOFError)):
                            raise StageError(f"{self._told(error)}; {self._kept()}") from None
                        raise
                suspects += self.again
                self.again = []
        if self.defects:
            raise StageError(f"{len(self.defects)} runs stopped on an error: {'; '.join(self.defects[:3])}")
        if any(run.settings_hash not in self.entries for run in todo):
            raise OutOfTime(f"the time budget is spent; {self._kept()}")

    def _pool(self, workers: int) -> Executor:
        if self.devices:
            return GPUWorkers(self.devices[:workers], functools.partial(prepare_process, self.execution))
        with commandline.naming("/dev/shm"):  # where the system keeps what processes wait for each other by
            return ProcessPoolExecutor(
                workers, processes.context(), initializer=_start_worker, initargs=(self.execution,)
            )

    def _drain(self, pool: Executor, workers: int, waiting: list[Run]) -> None:
        # one run waits in the pool, so that a worker that is free goes on while this process records what it did; a
        # single worker has none beside the one that may kill it
        most = workers + 1 if workers > 1 else 1
        while waiting or self.running:
            if self.budget.spent:
                waiting.clear()
            ready = (run for run in waiting if all(need.settings_hash in self.entries for need in run.needs))
            for run in list(itertools.islice(ready, max(0, min(most, self.room) - len(self.running)))):
                waiting.remove(run)
                keep = run.settings_hash in self.needed
                with commandline.unheard():  # a worker may be started for it
                    future = pool.submit(
                        _work, run, self.store, self.execution, keep, self.budget, self.wanted
                    )
                self.running[future] = run
            if not self.running:
                if not self.again:  # else what is left may need one of them
                    waiting.clear()  # what is left needs a run that a defect stopped
                return
            ended = wait(self.running, timeout=commandline.LOOKS_EVERY, return_when=FIRST_COMPLETED).done
            if number := self.asked():
                raise commandline.Stopped(number, self._kept())
            for future in ended:
                self._collect(future, alone=workers == 1)

    def _collect(self, future: Future[Entry | None], alone: bool) -> None:
        try:
            entry = future.result()
        except (BrokenProcessPool, OSError, StageError):
            raise
        except Died:
            self.again += self._lost(self.running.pop(future), alone)
        except Exception as error:
            run = self.running.pop(future)
            self.defects.append(f"{run}: {type(error).__name__}: {error}")
            traceback.print_exception(error)
        else:
            run = self.running.pop(future)
            if entry and entry.record.failure == "resources" and not alone:
                self.store.forget(run)
                self.again.append(run)
                self.room = max(1, min(self.room, self.workers) - 1)
            elif entry:
                self.finish(entry)

    def _after_a_death(self, alone: bool) -> list[Run]:
        """The runs that may have killed their worker and are to be tried again."""
        runs = list(self.running.values())
        self.running.clear()
        return [suspect for run in runs for suspect in self._lost(run, alone)]

    def _lost(self, run: Run, alone: bool) -> list[Run]:
        """A run whose worker has died, to be tried again unless it is finished. One that was alone with it, the second time,
        is recorded as failed; the next command tries it again."""
        self.deaths[run.settings_hash] += alone
        entry = self.store.finished(run, needed=False)
        if entry is None and self.deaths[run.settings_hash] == DEATHS:
            causes = "a fault of CUDA, killed" if self.devices else "killed"
            died = Failed("died", f"its process died ({causes}, or the machine is out of memory)")
            compute = Compute.choose(self.execution.device, self.execution.precision)
            entry = self.store.save(run, entry_of(record_of(run, compute, died), compute, 0.0), None)
        if entry is None:
            return [run]
        self.finish(entry)
        return []

    def _kept(self) -> str:
        return f"{len(self.entries)} finished runs are kept in {self.store.folder}; the same command goes on from there"

    def _told(self, error: OSError | EOFError) -> str:
        if isinstance(error, EOFError):
            return "the process from which workers are forked has ended"
        return (
            commandline.told(error) if error.filename else f"{self.store.folder}: {error.strerror or error}"
        )
