"""Processes, several at once, within a time."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

GRACE = 10.0
"""Seconds for which a process may outlast its time, since a stage stops at the end of an epoch."""
WATCH = 15.0


@dataclass(frozen=True)
class Job:
    """A process to start.

    command: for so many seconds that it may take. after: the job that must have ended well. whole: it may take all the
    time that is left, not its share of it.
    """

    name: str
    command: Callable[[float], Sequence[str]]
    after: str | None = None
    whole: bool = False


@dataclass(frozen=True)
class Ended:
    """How a job ended. status: of its exit, None if it was killed or not started for lack of time."""

    status: int | None
    seconds: float


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    output: BinaryIO
    begun: float
    until: float


def perform(
    jobs: Sequence[Job],
    seconds: float,
    *,
    slots: int,
    cwd: Path,
    logs: Path,
    variables: Mapping[str, str] | None = None,
    watch: Callable[[], object] = lambda: None,
) -> dict[str, Ended]:
    """Run jobs in this order, so many at once, for so many seconds in all (and `GRACE`); how each ended.

    Each gets an equal share of the time and the slots that are left. cwd: where they run. logs: the folder in which
    each leaves its output as NAME.log. variables: in their environment, beside those here. watch: called every
    `WATCH` seconds.
    """
    ends = time.monotonic() + seconds
    waiting, running, ended = list(jobs), list[_Running](), dict[str, Ended]()
    logs.mkdir(parents=True, exist_ok=True)
    watched = time.monotonic()
    try:
        while waiting or running:
            for job in _ready(waiting, ended)[: slots - len(running)]:
                left = ends - time.monotonic()
                if left > 0:
                    share = left if job.whole else left * _share(waiting, running, slots)
                    running.append(_start(job, share, cwd, logs, variables or {}))
                else:
                    ended[job.name] = Ended(None, 0.0)
                waiting.remove(job)
            time.sleep(0.1)
            for one in list(running):
                if (status := one.process.poll()) is None and time.monotonic() > one.until:
                    _kill(one)
                elif status is None:
                    continue
                one.output.close()
                running.remove(one)
                ended[one.job.name] = Ended(status, round(time.monotonic() - one.begun, 1))
            if time.monotonic() - watched > WATCH:
                watch()
                watched = time.monotonic()
            if not running and not _ready(waiting, ended):
                ended |= {job.name: Ended(None, 0.0) for job in waiting}  # what they wait for went wrong
                waiting.clear()
    finally:
        for one in running:
            _kill(one)
            one.output.close()
    return ended


def failed(ended: Mapping[str, Ended], logs: Path) -> dict[str, str]:
    """The last line that each job has left which stopped on an error (exit status 3 is a spent time budget)."""
    found = {}
    for name, how in ended.items():
        if how.status not in (0, 3, None):
            lines = (logs / f"{name}.log").read_text(errors="replace").split("\n")
            found[name] = next(
                (line.strip() for line in reversed(lines) if line.strip()), f"status {how.status}"
            )
    return found


def _ready(waiting: Sequence[Job], ended: Mapping[str, Ended]) -> list[Job]:
    done = {name for name, how in ended.items() if how.status == 0}
    return [job for job in waiting if job.after is None or job.after in done]


def _share(waiting: Sequence[Job], running: Sequence[_Running], slots: int) -> float:
    shared = sum(not job.whole for job in waiting)
    free = slots - sum(one.job.whole for one in running)
    return min(1.0, max(free, 1) / shared)


def _start(job: Job, seconds: float, cwd: Path, logs: Path, variables: Mapping[str, str]) -> _Running:
    output = (logs / f"{job.name}.log").open("ab")
    process = subprocess.Popen(
        job.command(seconds),
        cwd=cwd,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that what it starts ends with it
    )
    now = time.monotonic()
    return _Running(job, process, output, now, now + seconds + GRACE)


def _kill(one: _Running) -> None:
    try:
        os.killpg(one.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    one.process.wait()
