"""What a worker does with one run: execute it, and keep what it leaves."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from common.core import networks, tuning
from common.core.compute import Compute, make_repeatable, out_of_memory, release_memory, usable
from common.core.failures import OutOfMemory, RunFailed
from common.core.models import Network
from common.core.run import Context, Needed, Outcome, Run
from common.records import Entry
from common.settings import ROOT, ExecutionSettings, SettingsError
from common.stage import latency, processes
from common.stage.records import Failed, entry_of, predictions_of, record_of, taken_over
from common.stage.store import OutOfTime, StageError, Store, TimeBudget


@dataclass(frozen=True)
class Networks:
    """Of which runs the networks are wanted, by the hashes of their settings.

    kept: in a file. measured: for what they take on this machine.
    """

    kept: frozenset[str] = frozenset()
    measured: frozenset[str] = frozenset()

    def of(self, run: Run) -> Networks:
        """What of it concerns one run."""
        own = {run.settings_hash}
        return Networks(self.kept & own, self.measured & own)


NO_NETWORKS = Networks()


def perform(
    run: Run,
    store: Store,
    execution: ExecutionSettings,
    keep_state: bool,
    budget: TimeBudget | None = None,
    wanted: Networks = NO_NETWORKS,
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


@dataclass(frozen=True)
class Task:
    """A run that a worker is to execute, as of `perform`."""

    run: Run
    store: Store
    execution: ExecutionSettings
    keep_state: bool
    budget: TimeBudget
    wanted: Networks


def work(task: Task, device: str | None = None) -> Entry | None:
    """Execute a task in this process, on a device in place of what its settings say; None if its time was or is spent."""
    if task.budget.spent:
        return None
    execution = task.execution.model_copy(update={"device": device}) if device else task.execution
    return perform(task.run, task.store, execution, task.keep_state, task.budget, task.wanted)
