"""Several processes train one paper in a folder that they share: who may do so, and who has which run.

Each of them holds a lease as long as it takes part (a shard, `<paper>.shard-<i>-of-<n>`), and under it one for each run that it
executes. So each run is executed once, and those of a process that has ended, however it ended, are free again. A command
that wants the paper for itself holds the lease `<paper>` and waits for the shards to end; new ones wait for it.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from common import commandline
from common.core.identity import canonical
from common.core.run import Run
from common.records import Entry, Identity
from common.stage.lease import Lease, names
from common.stage.planned import RUNNING, Planned, PlannedRun
from common.stage.store import SCRATCH, OutOfTime, StageError, Store

OWNERS = 5
"""So many processes in succession may end with a run, without giving it back, before it is given up."""
WATCHED = 16
"""Of the runs that others have, so many are looked after at a time, so that many who wait ask little of the folder."""
_LOOK, _LONGEST = 1.0, 15.0
"""Seconds between two looks at what others have; they grow while nothing becomes free."""


@dataclass(frozen=True)
class Shard:
    """The `index`th of `count` processes, counted from 1."""

    index: int
    count: int

    def order(self, runs: Sequence[Run]) -> list[Run]:
        """The runs in the order in which it would execute them: its own share of them and what these need, then what is left
        of the others' shares, from their ends. runs: needed ones first.
        """
        bounds = [len(runs) * number // self.count for number in range(self.count + 1)]
        shares = [runs[begin:end] for begin, end in zip(bounds, bounds[1:])]
        mine, *others = shares[self.index - 1 :] + shares[: self.index - 1]
        needed = {run.settings_hash for run in mine}
        for run in reversed(runs):
            if run.settings_hash in needed:
                needed |= {need.settings_hash for need in run.needs}
        own = [run for run in runs if run.settings_hash in needed]
        rest = [run for share in others for run in reversed(share) if run.settings_hash not in needed]
        return own + rest


class Claims:
    """The runs that this process executes, each under a lease that others see.

    lease: that of this process; None where nobody looks. shard: which of several it is; None where it has the store for
    itself. begun: since when these are at it, as of `time.time()`.
    """

    def __init__(
        self, store: Store, lease: Lease | None = None, shard: Shard | None = None, begun: float = math.inf
    ):
        self.store, self.lease, self.shard, self._begun = store, lease, shard, begun
        self._folder = store.folder / RUNNING
        self._mine: dict[str, Lease] = {}
        self._watched: dict[str, Lease] = {}
        self._taken: set[str] = set()
        self._next, self._pause = 0.0, _LOOK

    def take(self, run: Run) -> bool:
        """Whether this process may execute the run; it has it then, until it gives it back. Raises OSError."""
        key = self.store.key(run)
        if key in self._mine or self.lease is None:
            return True
        if self.shard and self._with_another(key):
            return False
        lease = self._watched.pop(key, None) or Lease(self._folder / key, self.lease)
        if not lease.take() and self.shard:
            self._taken.add(key)
            return False
        self._mine[key] = lease
        self._pause = _LOOK
        return True

    def left(self, run: Run) -> Entry | None:
        """What another shard has left of a run that this one has now; what had failed before they began does not count."""
        entry = self.store.load(run) if self.shard else None
        if entry is None or entry.record.may_pass and (entry.ended or 0.0) < self._begun:
            return None
        return entry

    def is_deadly(self, run: Run) -> bool:
        """Whether a run that this shard has now has been the end of too many others."""
        return self.shard is not None and self._mine[self.store.key(run)].number > OWNERS

    def release(self, run: Run) -> None:
        """Give a run back, if this process has it."""
        if lease := self._mine.pop(self.store.key(run), None):
            lease.release()

    def close(self) -> None:
        """Give all back."""
        for lease in self._mine.values():
            lease.release()
        self._mine.clear()
        with suppress(OSError):  # it is not there, or holds those of others
            self._folder.rmdir()

    def _with_another(self, key: str) -> bool:
        """Whether another has a run, as far as the last look told."""
        if time.monotonic() >= self._next:
            self._taken = names(self._folder) - self._mine.keys()
            kept = {key: lease for key, lease in self._watched.items() if key in self._taken}
            for name in self._taken:  # in an order of this process's own, since that of hashes is
                if len(kept) < WATCHED and name not in kept:
                    kept[name] = Lease(self._folder / name, self.lease)
            self._watched = kept
            self._taken -= {name for name, lease in kept.items() if lease.owner() is None}
            self._next = time.monotonic() + self._pause
            self._pause = min(_LONGEST, 1.5 * self._pause)
        return key in self._taken


@contextmanager
def alone(paper: str, profile: str, ends: float = math.inf) -> Iterator[Lease]:
    """Be the only command that trains, collects or imports a paper of a profile here; gives its lease.

    ends: until when others are waited for, as of `time.time()`. Raises OutOfTime, OSError.
    """
    lease = Lease(SCRATCH / profile / paper)
    with _tidied(lease), lease.waited_for(_waiting(paper), ends) as mine:
        if not mine:
            raise OutOfTime(f"the time budget is spent; {paper} is done by {lease.owner()}")
        for name in sorted(names(lease.path.parent)):
            if name.startswith(f"{paper}.shard-"):
                # what a shard has left goes with it
                with Lease(lease.path.with_name(name)).waited_for(_waiting(paper), ends) as ended:
                    if not ended:
                        raise OutOfTime(f"the time budget is spent; {name.replace('.', ': ', 1)} is at work")
        # nobody has a run any more: what is still there was left by a kill
        shutil.rmtree(lease.path / RUNNING, ignore_errors=True)
        yield lease


@contextmanager
def taking_part(paper: str, profile: str, shard: Shard, ends: float = math.inf) -> Iterator[Lease]:
    """Be a shard of those that train a paper of a profile here, beside others; gives its lease.

    ends: until when a command that has the paper for itself, or the same shard, is waited for, as of `time.time()`. Raises
    OutOfTime, OSError.
    """
    whole = Lease(SCRATCH / profile / paper)
    own = Lease(whole.path.with_name(f"{paper}.shard-{shard.index}-of-{shard.count}"))
    told = False
    while True:
        with _tidied(own), own.waited_for(_waiting(paper), ends) as mine:
            # who wants the paper for itself takes its lease and then looks for shards, so one of both sees the other
            other = whole.owner() if mine else own.owner()
            if mine and other is None:
                yield own
                return
        if time.time() >= ends:
            raise OutOfTime(f"the time budget is spent; {paper} is done by {other}")
        if other and not told:
            _waiting(paper)(other)
            told = True
        time.sleep(commandline.LOOKS_EVERY)


def agreed(paper: str, store: Store, lease: Lease, about: Mapping[str, Any], runs: Sequence[Run]) -> float:
    """Leave what is to be done in the folder, and return since when those who train there now are at it.

    lease: of this process. about: as `common.stage.records.environment` returns it. Raises StageError where others at work
    have other versions.
    """
    *how, torch = about["numerics"]
    versions = {"code": about["code"][:16], "torch": str(torch), "execution": canonical(how)}
    planned = Planned.read(store.folder)
    shards = [
        Lease(lease.path.with_name(name))
        for name in names(lease.path.parent)
        if name.startswith(f"{paper}.shard-")
    ]
    others = [owner for other in shards if other.path != lease.path and (owner := other.owner())]
    if planned and others and (differences := planned.differences(versions)):
        raise StageError(
            f"{paper} is trained here by {others[0]} already, and not with the same: {'; '.join(differences)}"
        )
    begun = planned.begun if planned and others else time.time()
    listed = [
        PlannedRun.of(Identity(**run.identity), store.key(run), store.key_elsewhere(run)) for run in runs
    ]
    now = Planned(begun, versions, listed)
    if now != planned:
        now.write(store.folder)
    return begun


def _waiting(paper: str) -> Callable[[str], None]:
    return lambda owner: print(f"{paper}: waiting for {owner}, which does the same here", file=sys.stderr)


@contextmanager
def _tidied(lease: Lease) -> Iterator[None]:
    """Leave no folder behind that holds nothing."""
    try:
        yield
    finally:
        for folder in (lease.path.parent, SCRATCH):
            with suppress(OSError):  # it holds something
                folder.rmdir()
