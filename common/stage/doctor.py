"""`python -m replications doctor`: finds what a kill has left that stops DVC or MLflow for good, says so, and repairs it.

They write some files in place, so a kill at that moment leaves half of one, and every later command ends with an error about
it. `make repro` does this first. What the suite itself writes is whole or not there. Nothing here loads torch.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from common.stage.files import write_atomically
from common.stage.lease import started
from common.stage.mlflow_store import NAME, StoreError, checkout, mend

LOCK = Path("dvc.lock")
RUNNING = Path(".dvc/tmp/rwlock")
"""Where DVC notes which process reads or writes what."""
_PATIENCE = 5.0


class AtWork(Exception):
    """Another command is at work with what is to be repaired; the message is one line."""


def main() -> int:
    """Repair, and say what was done; returns the exit status."""
    place = str(Path.cwd())
    if {"{", "}"} & set(place):  # it formats names of files
        print(f"error: {place}: DVC cannot work below a folder with braces in its name", file=sys.stderr)
        return 2
    try:
        done = repaired()
    except (AtWork, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in done or [f"nothing to repair: {LOCK}, {RUNNING} and {NAME} are whole"]:
        print(line)
    return 0


def repaired() -> list[str]:
    """Repair what is damaged in the project in the working directory; returns what was done, a line each.

    Raises AtWork when DVC is at work, StoreError when the store cannot be read, OSError.
    """
    done = []
    with _held(RUNNING.with_name("lock")):
        if found := _lock_damage(LOCK):
            done.append(
                f"{LOCK} was {found}: {_put_back()}; `dvc repro` looks at every stage again and trains what is not finished"
            )
    with _held(RUNNING.with_name("rwlock.lock")):
        if found := _mended_running():
            done.append(f"{RUNNING} {found}")
    if found := mend(checkout() / NAME):
        done.append(found)
    return done


@contextmanager
def _held(file: Path) -> Iterator[None]:
    """Hold a lock of DVC, which its commands hold while they write. Raises AtWork if one of them does for long."""
    if not file.parent.is_dir():
        yield
        return
    with file.open("a") as lock:
        ends = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > ends:
                    raise AtWork(f"{file}: held by a DVC command that is at work; wait for its end") from None
                time.sleep(0.1)
        yield


def _lock_damage(file: Path) -> str | None:
    """Why DVC cannot read its lock file; None if it can, or if there is none."""
    if not file.exists():
        return None
    text = file.read_text("utf-8", errors="replace")
    if not text.endswith("\n"):
        return "cut short" if text else "empty"
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return "cut short"
    whole = isinstance(content, dict) and content.get("schema") and isinstance(content.get("stages"), dict)
    if not whole or not all(
        isinstance(stage, dict) and "cmd" in stage for stage in content["stages"].values()
    ):
        return "cut short"
    try:
        from dvc.schema import COMPILED_LOCKFILE_SCHEMA
        from voluptuous import Invalid
    except ModuleNotFoundError:
        return None
    try:
        COMPILED_LOCKFILE_SCHEMA(content)
    except Invalid:
        return "cut short"
    return None


def _put_back() -> str:
    shown = subprocess.run(["git", "show", f"HEAD:./{LOCK}"], capture_output=True, check=False)
    if shown.returncode == 0 and shown.stdout.endswith(b"\n"):
        write_atomically(LOCK, shown.stdout)
        return "it is again as last committed"
    LOCK.unlink()
    return "it is removed"


def _mended_running() -> str | None:
    """Remove what says that commands are at work which are not; returns what was wrong."""
    if not RUNNING.exists():
        return None
    try:
        content = json.loads(RUNNING.read_text("utf-8"))
        kept: dict[str, dict[str, Any]] = {
            "write": {path: one for path, one in content.get("write", {}).items() if _at_work(one)},
            "read": {
                path: [one for one in them if _at_work(one)] for path, them in content.get("read", {}).items()
            },
        }
    except (ValueError, AttributeError, TypeError, KeyError):
        RUNNING.unlink()
        return "was cut short: it is removed"
    kept["read"] = {path: them for path, them in kept["read"].items() if them}
    before = len(content.get("write", {})) + sum(map(len, content.get("read", {}).values()))
    if before == len(kept["write"]) + sum(map(len, kept["read"].values())):
        return None
    write_atomically(RUNNING, json.dumps(kept).encode())
    return "named commands that were killed: they are taken out"


def _at_work(about: Mapping[str, Any]) -> bool:
    """Whether a process is there that DVC has noted, and still is a command of DVC."""
    if started(int(about["pid"])) in (None, "ended"):
        return False
    return b"dvc" in Path("/proc", str(about["pid"]), "cmdline").read_bytes()
