"""Where the runs of a cluster are executed, for those who look on from other processes.

Beside the lease of each run lies a file, empty as long as the run waits for a node; its worker writes there where it is, and again
with each heartbeat, so the file's time is when it was last heard of. It says nothing of who has the run: that is the lease's to
say. Nothing here loads torch.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from common.stage.lease import BEAT

_ENDING = ".place"


@dataclass(frozen=True)
class Place:
    """Where a run is executed. where: the node and what of it the run has, in words, empty while it waits for one. since: as of
    `time.time()` there. heard: when the node last wrote, by the file's clock."""

    where: str
    since: float
    heard: float


def place_file(running: Path, key: str) -> Path:
    """The file of a run with this key. running: the folder of leases."""
    return running / f"{key}{_ENDING}"


@contextmanager
def telling(where: str, write: Callable[[bytes], object]) -> Iterator[None]:
    """Let others know within that a run is executed here. write: writes its file; what it cannot write matters to nobody."""
    content = json.dumps({"where": where, "since": time.time()}).encode()
    ended = threading.Event()

    def tell() -> None:
        while True:
            with suppress(OSError):
                write(content)
            if ended.wait(BEAT):
                return

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def forget(running: Path, keys: Collection[str]) -> None:
    """Remove the files of these runs, and what workers that have died had begun to write."""
    with suppress(OSError):  # nobody needs them
        for file in running.glob(f"*{_ENDING}*"):
            if file.name.partition(_ENDING)[0] in keys:
                file.unlink(missing_ok=True)


def places(running: Path) -> dict[str, Place]:
    """The places of runs that were given to a cluster, by their keys; some may be of runs that have ended."""
    found = {}
    for file in running.glob(f"*{_ENDING}"):
        try:
            content, heard = file.read_text("utf-8"), os.stat(file).st_mtime
            said = json.loads(content or "{}")
            place = Place(str(said.get("where", "")), float(said.get("since", heard)), heard)
            found[file.name.removesuffix(_ENDING)] = place
        except (OSError, ValueError, AttributeError, TypeError):
            continue  # it is being removed
    return found
