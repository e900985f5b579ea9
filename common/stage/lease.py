"""Leases: who may do something in a folder, on this machine or on any that shares the folder. One owner at a time.

A lease is a file beside what it is for, called `<name>.lease-<number>`; the highest number holds. It says who the owner is, and
a thread of the owner writes into it again and again, so that its heartbeat ends with it, however it ends. On its own machine an
owner is asked for by its process, so what it leaves is free at once; elsewhere its lease is over when the heartbeat has been
still for as long as `STILL` by the watch of whoever waits, so clocks need not agree. Who takes a lease that is over makes
the file with the next number, which only one can, and an owner that was merely slow finds that its own is no longer the highest.

A lease may be held `under` another one of the same owner: it has no heartbeat then and is over with that one, so who holds many
writes once. Its number counts those who have held it since one of them gave it back.

This is what files on any file system can do: make one if there is none, read, write, and list.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from common.core.identity import digest

BEAT = 5.0
"""Seconds between two heartbeats."""
STILL = 30.0
"""Seconds without a heartbeat after which a lease is over."""
_LOOK = 0.25


_FILE = re.compile(r"(.+)\.lease-(\d+)")


class Lease:
    """The right to do what the file or folder `path` stands for; it need not be there.

    under: one that this process holds as long as it holds this.
    """

    def __init__(self, path: Path, under: Lease | None = None):
        self.path, self._under = path, under
        self._number: int | None = None
        self._since = 0.0
        self._ended = threading.Event()
        self._watched: tuple[str, float] | None = None
        """What another's lease last said, and since when it has said so."""

    @property
    def held(self) -> bool:
        """Whether this is still the owner: one that could not write for long may have been followed by another."""
        return self._number is not None and self._highest() == self._number

    @property
    def number(self) -> int:
        """That of the lease while it is held: 1, and one more for each owner that has ended without giving it back."""
        return self._number or 0

    def owner(self) -> str | None:
        """Who holds the lease, in words; None if nobody does. Raises OSError."""
        return self._judged()[1]

    def take(self) -> bool:
        """Become the owner if there is none; returns whether this is it. Raises OSError."""
        last, other = self._judged()
        if other is not None:
            return False
        number, self._since = last + 1, time.time()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._file(number).open("x", encoding="utf-8") as file:
                file.write(json.dumps(self._own() | {"beat": 0}))
        except (FileExistsError, FileNotFoundError):  # taken, or the folder removed, by another
            return False
        if self._highest() != number:  # others have gone on from a number that was over
            self._file(number).unlink(missing_ok=True)
            return False
        self._number = number
        for old in self._numbers():
            if old < number:
                self._file(old).unlink(missing_ok=True)
        self._ended.clear()
        if self._under is None:
            threading.Thread(target=self._beat, args=(number,), daemon=True).start()
        return True

    def release(self) -> None:
        """Be the owner no longer."""
        self._ended.set()
        if self._number is not None:
            with suppress(OSError):  # it ends with this process
                self._file(self._number).unlink(missing_ok=True)
            self._number = None

    @contextmanager
    def waited_for(
        self, waiting: Callable[[str], object] = lambda owner: None, ends: float = math.inf
    ) -> Iterator[bool]:
        """Be the owner within, as soon as nobody else is; gives False where that is not so at `ends` (`time.time()`).

        waiting: called once with who the other is. Raises OSError.
        """
        told = False
        while not (mine := self.take()) and time.time() < ends:
            if not told and (other := self.owner()):
                waiting(other)
                told = True
            time.sleep(_LOOK)
        try:
            yield mine
        finally:
            self.release()

    def _judged(self) -> tuple[int, str | None]:
        """The highest number, 0 if there is none, and who holds the lease."""
        number = self._highest()
        if not number:
            return 0, None
        text = _said(self._file(number))
        about = _parsed(text)
        if "under" in about:
            text = _said(self.path.parent / str(about["under"]))
        if self._watched is None or self._watched[0] != text:
            self._watched = text, time.monotonic()
        still = time.monotonic() - self._watched[1] > STILL
        over = not _lives(about) if about.get("place") == _place() else still
        return number, None if over or _is_left(about, text) else _name(about)

    def _beat(self, number: int) -> None:
        beats = 0
        while not self._ended.wait(BEAT):
            beats += 1
            with suppress(OSError):  # a full disk costs the lease, if it stays full, and nothing else
                if self._highest() != number:
                    return
                with self._file(number).open("r+", encoding="utf-8") as file:
                    file.write(json.dumps(self._own() | {"beat": beats}))

    def _own(self) -> dict[str, Any]:
        own = _here() | {"since": self._since}
        if self._under is None:
            return own
        return own | {"under": os.path.relpath(self._under._file(self._under.number), self.path.parent)}

    def _file(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.lease-{number}")

    def _numbers(self) -> list[int]:
        return _leases(self.path.parent).get(self.path.name, [])

    def _highest(self) -> int:
        return max(self._numbers(), default=0)


@dataclass(frozen=True)
class Held:
    """What a lease says to who only looks. since: of the file's clock, as of `time.time()`. over: whether its owner is gone,
    or, on another machine, has not been heard of for twice as long as `STILL`, if the clocks agree."""

    process: int
    host: str
    since: float
    over: bool


def leases(folder: Path) -> dict[str, Held]:
    """The leases in a folder, by the names of what they are for."""
    found = {}
    for name, numbers in _leases(folder).items():
        file = folder / f"{name}.lease-{max(numbers)}"
        about = _parsed(_said(file))
        beats = file.parent / str(about["under"]) if "under" in about else file
        try:
            quiet = time.time() - beats.stat().st_mtime > 2 * STILL
        except FileNotFoundError:
            quiet = True
        gone = not _lives(about) if about.get("place") == _place() else quiet
        if not isinstance(process := about.get("process"), int):
            continue  # it is being written, or removed
        over = gone or "under" in about and _is_left(about, _said(beats))
        found[name] = Held(process, str(about.get("host")), float(about.get("since", 0)), over)
    return found


def names(folder: Path) -> set[str]:
    """What there are leases for in a folder, whether they are over or not."""
    return set(_leases(folder))


def _leases(folder: Path) -> dict[str, list[int]]:
    """The numbers of the leases in a folder, by the names of what they are for."""
    found: dict[str, list[int]] = {}
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return {}
    for name in names:
        if parts := _FILE.fullmatch(name):
            found.setdefault(parts[1], []).append(int(parts[2]))
    return found


def _said(file: Path) -> str:
    try:
        return file.read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _is_left(about: Mapping[str, Any], text: str) -> bool:
    """Whether a lease is under one, with this text, that its owner no longer holds."""
    owner = _parsed(text)
    if "under" not in about or text and not owner:  # that one is being written
        return False
    return any(about.get(name) != owner.get(name) for name in ("place", "process", "started"))


def _name(about: Mapping[str, Any]) -> str:
    return f"process {about.get('process', '?')} on {about.get('host', 'another machine')}"


def _parsed(text: str) -> Mapping[str, Any]:
    """What a lease says; nothing while it is being written."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _here() -> dict[str, Any]:
    own = os.getpid()
    return {"host": platform.node(), "place": _place(), "process": own, "started": started(own)}


@cache
def _place() -> str:
    """Where process numbers are those of this process: the machine since it was started, and its room for processes."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _lives(about: Mapping[str, Any]) -> bool:
    """Whether a process of this machine that a lease names is there, and not another with its number."""
    process = about.get("process")
    if not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return started(process) in (None, about.get("started"))


def signature() -> str:
    """Names this process, without disclosing the machine."""
    return f"{digest(_place())[:16]} {os.getpid()} {started(os.getpid())}"


def over(signature: str) -> bool:
    """Whether the process with a signature has ended; one of another machine counts as ended."""
    place, _, rest = signature.partition(" ")
    process, _, begun = rest.partition(" ")
    about = {"process": int(process) if process.isdigit() else None, "started": begun}
    return place != digest(_place())[:16] or not _lives(about)


def started(process: int) -> str | None:
    """When a process was started, as this system counts; None where that cannot be told. Zombies count as ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    state, *rest = text.rpartition(")")[2].split()
    return "ended" if state in "ZX" else rest[18]
