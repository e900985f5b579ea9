"""`python -m replications status`: how far the papers of a profile are, who is at work on them, and what has failed.

It reads what those who train leave in the folder that they share, writes nothing, and does not load torch.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from common.profiles import selected_profile
from common.reading import json_value, read_text
from common.records import Record
from common.settings import ROOT, SettingsError, validated
from common.stage import tables
from common.stage.files import load_checked
from common.stage.lease import Held, leases
from common.stage.places import Place, places
from common.stage.planned import RUNNING, Planned, PlannedRun

_END = 4096
"""Bytes at the end of a finished run's file that say whether it has failed and how long it took."""
_ENDED = re.compile(rb'"status":"(ok|failed)",.*"seconds":([0-9.e+-]+)\}$', re.DOTALL)
_NAMED = 5
"""So many failures, and runs of one process, are named."""
_SHARD = re.compile(r"(.+)\.shard-(\d+)-of-(\d+)")


class Finished(NamedTuple):
    """seconds: of its execution. failed: its record, if it has failed."""

    seconds: float
    failed: Record | None


@dataclass(frozen=True)
class Progress:
    """How far a paper is.

    planned: what those who train have set out to do; None where nobody has. recorded: how many runs the results hold.
    finished, running, places: by the keys of runs; places of those that a cluster executes. processes: who holds the paper, by
    what they are (empty: all of it).
    """

    paper: str
    planned: Planned | None
    recorded: int = 0
    finished: Mapping[str, Finished] = field(default_factory=dict)
    running: Mapping[str, Held] = field(default_factory=dict)
    places: Mapping[str, Place] = field(default_factory=dict)
    processes: Mapping[str, Held] = field(default_factory=dict)

    @property
    def failed(self) -> list[Record]:
        """The records of runs that have failed; a setting that was no good in a trial has not."""
        return [end.failed for end in self.finished.values() if end.failed and not end.failed.is_lost_trial]

    @property
    def waiting(self) -> list[PlannedRun]:
        """The runs that nobody executes and that are not finished."""
        runs = self.planned.runs if self.planned else ()
        return [run for run in runs if run.key not in self.running and run.key not in self.finished]

    def since(self, key: str) -> float:
        """When a run that is running has begun, as of `time.time()`."""
        return self.places[key].since if key in self.places else self.running[key].since

    def left(self, now: float) -> float | None:
        """Seconds of one worker that are left, by those of finished runs of the same kind; None if no run has finished."""
        runs = self.planned.runs if self.planned else ()
        kinds: dict[str, list[float]] = {}
        for run in runs:
            if (end := self.finished.get(run.key)) and not end.failed:
                kinds.setdefault(run.kind, []).append(end.seconds)
        if not kinds:
            return None if self.waiting or self.running else 0.0
        means = {kind: sum(each) / len(each) for kind, each in kinds.items()}
        mean = sum(map(sum, kinds.values())) / sum(map(len, kinds.values()))
        spent = {run.key: now - self.since(run.key) for run in runs if run.key in self.running}
        return sum(means.get(run.kind, mean) for run in self.waiting) + sum(
            max(0.0, means.get(run.kind, mean) - spent[run.key]) for run in runs if run.key in spent
        )


def progress(profile: str, scratch: Path, results: Path) -> list[Progress]:
    """How far each paper of the profile is, by the folders of finished runs and of results."""
    names = sorted(file.parent.name for file in (ROOT / "replications").glob("*/protocol.py"))
    held = {name: lease for name, lease in leases(scratch / profile).items() if not lease.over}
    return [
        _progress(paper, scratch / profile / paper, _recorded(results, profile, paper), held)
        for paper in names
    ]


def _progress(paper: str, folder: Path, recorded: int, held: Mapping[str, Held]) -> Progress:
    processes = {"": held[paper]} if paper in held else {}
    for name, lease in held.items():
        if (shard := _SHARD.fullmatch(name)) and shard[1] == paper:
            processes[f"shard {shard[2]} of {shard[3]}"] = lease
    planned = Planned.read(folder)
    if planned is None:
        return Progress(paper, None, recorded, processes=processes)
    # one that waits for a node of a cluster is held by the command that has given it out, and nobody executes it
    told = places(folder / RUNNING)
    queued = {key for key, place in told.items() if not place.where}
    running = {
        key: lease for key, lease in leases(folder / RUNNING).items() if not lease.over and key not in queued
    }
    there = set(os.listdir(folder))
    finished = {}
    for run in planned.runs:
        for key in (run.key, run.elsewhere):
            if run.key not in finished and f"{key}.json" in there and (end := _ended(folder / f"{key}.json")):
                finished[run.key] = end
    # of a run that is tried again, what it came to before counts for nothing
    finished = {key: end for key, end in finished.items() if key not in running}
    return Progress(paper, planned, recorded, finished, running, told, processes)


def _ended(file: Path) -> Finished | None:
    """What the file of a finished run says; None if it is damaged or gone."""
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - _END))
            end = _ENDED.search(opened.read())
    except FileNotFoundError:
        return None
    if end and end[1] == b"ok":
        return Finished(float(end[2]), None)
    if (content := load_checked(file)) is None:
        return None
    try:
        found = json.loads(content)
        record = validated(Record, found["record"], str(file))
        return Finished(float(found["seconds"]), record if record.status == "failed" else None)
    except (ValueError, KeyError, TypeError, SettingsError):
        return None  # of another revision's schema


def _recorded(results: Path, profile: str, paper: str) -> int:
    """How many runs the results hold of a paper."""
    try:
        return len(json_value(read_text(results / "environment" / profile / f"{paper}.json"))["seconds"])
    except (SettingsError, ValueError, KeyError, TypeError):
        return 0


# ------------------------------------------------------------------------------------------ what is printed


_COLUMNS = ("paper", "runs", "done", "running", "failed", "waiting", "recorded", "to go")


def table(params: str, profile_name: str | None, scratch: Path, results: Path) -> str:
    """What to print of a profile, by default the one that the file selects. Raises SettingsError."""
    profile = profile_name or selected_profile(params)
    found, now = progress(profile, scratch, results), time.time()
    rows: list[tuple[str, ...]] = [_COLUMNS]
    rows += [_row(each, now) for each in found]
    at_work = sum(len(each.processes) for each in found)
    lines = [
        f"profile {profile}: {at_work or 'no'} process{'es' * (at_work != 1)} at work",
        "",
        *tables.aligned(rows),
    ]
    for each in found:
        lines += _processes(each, now) + _failures(each)
    return "\n".join(lines)


def _row(each: Progress, now: float) -> tuple[str, ...]:
    if each.planned is None:
        return (each.paper, "?", "?", "0", "?", "?", tables.count(each.recorded), "?")
    failed = len(each.failed)
    counts = (
        len(each.planned.runs),
        len(each.finished) - failed,
        len(each.running),
        failed,
        len(each.waiting),
    )
    left = each.left(now)
    if left is not None and each.running:
        to_go = tables.time(left / len(each.running))
    else:
        to_go = "" if left == 0 else f"{tables.time(left)} for one worker"
    return (each.paper, *map(tables.count, counts), tables.count(each.recorded), to_go)


def _processes(each: Progress, now: float) -> list[str]:
    """Who is at work on a paper, and on which runs."""
    names = {run.key: run.name for run in each.planned.runs} if each.planned else {}
    lines = []
    for what, holder in sorted(each.processes.items()):
        own = [
            f"{names.get(key, key)} ({tables.time(now - each.since(key))}{_place(each.places.get(key), now)})"
            for key in sorted(each.running, key=each.since)
            if (each.running[key].host, each.running[key].process) == (holder.host, holder.process)
        ]
        since = time.strftime("%F %T", time.localtime(holder.since))
        who = f"process {holder.process} on {holder.host}{', ' * bool(what)}{what}, since {since}"
        lines.append(f"{each.paper}: {who}: {_some(own, '; ') or 'no run at this moment'}")
    return lines


def _place(place: Place | None, now: float) -> str:
    return f" on {place.where}, heard of {tables.time(now - place.heard)} ago" if place else ""


def _failures(each: Progress) -> list[str]:
    """What has failed of a paper, and why."""
    failed = each.failed
    if not failed:
        return []
    kinds = Counter(record.root_failure or "failed" for record in failed)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    lines = [f"{record.name}: {record.reason}" for record in failed]
    return [f"{each.paper}: {len(failed)} failed ({counts}): {_some(lines, '; ')}"]


def _some(lines: Sequence[str], between: str) -> str:
    more = len(lines) - _NAMED
    return between.join([*lines[:_NAMED], *([f"and {more} more"] if more > 0 else [])])
