"""Executes runs, several at once, each as soon as what it needs is finished.

A protocol lists jobs. The run of each is executed by a worker and leaves one record. Work that several runs share is
itself a run, which the others list in `needs`.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

from tqdm import tqdm

from common import commandline
from common.core.compute import Compute
from common.core.identity import canonical
from common.core.run import Run
from common.records import Entry
from common.settings import ExecutionSettings
from common.stage.engines import Died, Engine, Lost, engine_of
from common.stage.records import Failed, entry_of, record_of
from common.stage.shards import OWNERS, Claims
from common.stage.store import OutOfTime, StageError, Store, TimeBudget
from common.stage.worker import NO_NETWORKS, Networks, Task

DEATHS = 2
"""So often a worker may die with a run that is alone with it, before the run is given up."""


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
    wanted: Networks = NO_NETWORKS,
    claims: Claims | None = None,
) -> list[Entry]:
    """Execute all runs that are not finished yet, several at once, and return the entries of all, in order.

    finished: called with each entry as soon as it is there, also with those of an earlier attempt. budget: when to stop;
    none by default. wanted: networks; a run whose network is to be kept, and is not, is done again. claims: who else may
    execute the runs; nobody by default. A run that fails leaves a `failed` record and the others go on. Raises StageError for
    what concerns the stage: a full disk, a folder that cannot be written, a defect in the code; SettingsError for an engine
    that cannot be had; OutOfTime; and `commandline.Stopped` when a signal has stopped a command.
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
    claims = claims or Claims(store)
    every = claims.shard.order(ordered) if claims.shard else ordered
    todo = [run for run in every if run.settings_hash not in entries]
    if todo:
        engine = engine_of(execution, store, todo)
        done = len(ordered) - len(todo)
        quiet = 1.0 if sys.stderr.isatty() else 15.0
        with tqdm(total=len(ordered), initial=done, desc=title, unit="run", mininterval=quiet) as bar:

            def done_with(entry: Entry) -> None:
                entries[entry.record.settings_hash] = entry
                bar.update()
                finished(entry)

            scheduler = _Scheduler(
                engine, store, execution, needed, entries, done_with, budget or TimeBudget(), wanted, claims
            )
            scheduler.execute(todo)
    return [entries[run.settings_hash] for run in ordered]


class _Scheduler:
    """Gives each run to an engine as soon as what it needs is finished."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        execution: ExecutionSettings,
        needed: Collection[str],
        entries: Mapping[str, Entry],
        finish: Callable[[Entry], object],
        budget: TimeBudget,
        wanted: Networks,
        claims: Claims,
    ):
        self.engine, self.store, self.execution, self.wanted = engine, store, execution, wanted
        self.needed, self.entries, self.finished, self.budget = needed, entries, finish, budget
        self.claims, self.shared = claims, claims.shard is not None
        self.running: dict[Future[Entry | None], Run] = {}
        self.again: list[Run] = []
        """Runs that found no memory beside others, or whose worker has died with those of others."""
        self.most = math.inf
        """Runs that are given to the engine at once, at most; fewer when memory has been short."""
        self.crowded = set[str]()
        """Of `again`, those that are to be alone where the others go on meanwhile, by settings hash."""
        self.defects: list[str] = []
        self.deaths = Counter[str]()
        """How often a worker has died of nothing but a run, by settings hash."""

    def execute(self, todo: list[Run]) -> None:
        waiting, suspects = list(todo), list[Run]()
        with commandline.patience() as self.asked:
            try:
                while waiting or suspects:
                    # those that were running when a worker died go on one by one, so that only the guilty one fails;
                    # so do those for which there was no memory beside others
                    if suspects:
                        self._drain([suspects.pop(0)], alone=True)
                    else:
                        self._drain(waiting, alone=not self.engine.apart and self.engine.room == 1)
                    suspects += self.again
                    self.again = []
            except BaseException as error:
                self.engine.close(at_once=True)
                self.claims.close()
                if isinstance(error, (OSError, EOFError)):
                    raise StageError(f"{self._told(error)}; {self._kept()}") from None
                raise
            self.engine.close()
            self.claims.close()
        if self.defects:
            raise StageError(f"{len(self.defects)} runs stopped on an error: {'; '.join(self.defects[:3])}")
        if any(run.settings_hash not in self.entries for run in todo):
            raise OutOfTime(f"the time budget is spent; {self._kept()}")

    def _drain(self, waiting: list[Run], alone: bool) -> None:
        while waiting or self.running:
            if self.budget.spent:
                waiting.clear()
            most = 1 if alone else int(min(self.engine.room, self.most))
            if self.shared and not alone:  # none waits in the engine that another process could begin
                most = max(1, min(most, self.engine.room - 1))
            for run in self._taken(waiting, most - len(self.running)):
                keep = run.settings_hash in self.needed
                task = Task(run, self.store, self.execution, keep, self.budget, self.wanted.of(run))
                self.running[self.engine.submit(task, alone or run.settings_hash in self.crowded)] = run
            if not self.running and not (self.shared and waiting and not self.again and not self.defects):
                if not self.again:  # else what is left may need one of them
                    waiting.clear()  # what is left needs a run that a defect stopped
                return
            if not self.running:  # others have what is left, or what it needs
                time.sleep(commandline.LOOKS_EVERY)
            ended = wait(self.running, timeout=commandline.LOOKS_EVERY, return_when=FIRST_COMPLETED).done
            if number := self.asked():
                raise commandline.Stopped(number, self._kept())
            for future in ended:
                self._collect(future, alone)
            if self.engine.apart:
                waiting[:0] = self.again
                self.again = []

    def _taken(self, waiting: list[Run], most: int) -> list[Run]:
        """Take out so many runs at most that can be executed now, and those that others turn out to have finished."""
        found: list[Run] = []
        for run in list(waiting) if most > 0 else ():
            if len(found) == most:
                break
            ready = all(need.settings_hash in self.entries for need in run.needs)
            if not (ready and self.claims.take(run)):
                continue
            waiting.remove(run)
            if entry := self.claims.left(run):
                self.finish(run, entry)
            elif self.claims.is_deadly(run):
                self.finish(
                    run, self._died(run, f"{OWNERS} processes in succession have ended while they trained it")
                )
            else:
                found.append(run)
        return found

    def finish(self, run: Run, entry: Entry) -> None:
        """Record what a run has come to."""
        self.finished(entry)
        self.claims.release(run)

    def _collect(self, future: Future[Entry | None], alone: bool) -> None:
        run = self.running.pop(future)
        try:
            entry = future.result()
        except (OSError, StageError):
            raise
        except Lost:
            self.again += self._lost(run, guilty=False)
        except Died:
            self.crowded.add(run.settings_hash)
            self.again += self._lost(run, guilty=alone or self.engine.apart)
        except Exception as error:
            self.defects.append(f"{run}: {type(error).__name__}: {error}")
            traceback.print_exception(error)
        else:
            alone |= run.settings_hash in self.crowded
            if entry and entry.record.failure == "resources" and not alone:
                self.store.forget(run)
                self.again.append(run)
                self.crowded.add(run.settings_hash)
                if not self.engine.apart:
                    self.most = max(1, min(self.most, self.engine.room - 1) - 1)
            elif entry:
                self.finish(run, entry)

    def _lost(self, run: Run, guilty: bool) -> list[Run]:
        """A run whose worker has died, to be tried again unless it is finished. One that nothing else can have killed, the
        second time, is recorded as failed; the next command tries it again."""
        self.deaths[run.settings_hash] += guilty
        entry = self.store.finished(run, needed=False)
        if entry is None and self.deaths[run.settings_hash] == DEATHS:
            entry = self._died(
                run, f"its process died ({self.engine.causes}, or the machine is out of memory)"
            )
        if entry is None:
            return [run]
        self.finish(run, entry)
        return []

    def _died(self, run: Run, reason: str) -> Entry:
        """Keep a run as failed because processes have died with it."""
        compute = Compute.choose(self.execution.device, self.execution.precision)
        record = record_of(run, compute, Failed("died", reason))
        return self.store.save(run, entry_of(record, compute, 0.0), None)

    def _kept(self) -> str:
        return f"{len(self.entries)} finished runs are kept in {self.store.folder}; the same command goes on from there"

    def _told(self, error: OSError | EOFError) -> str:
        if isinstance(error, EOFError):
            return "the process from which workers are forked has ended"
        return (
            commandline.told(error) if error.filename else f"{self.store.folder}: {error.strerror or error}"
        )
