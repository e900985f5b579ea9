"""The store of MLflow that runs are logged to: where it is, whether it answers, and the project's own, which is one SQLite file.

MLflow makes that file in many steps, and one that is cut short is never mended by it. So it is made under another name, by one
process at a time, and what is found half made or damaged is set aside.
"""

from __future__ import annotations

import math
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, urlsplit

from common.stage.lease import Lease

NAME = "mlflow.db"
ARTIFACTS = "mlartifacts"
PATIENCE = 5.0
"""Seconds after which a store that does not answer is left alone."""
_AT_WORK = 0.02
"""Seconds of a core by which one sees that logging goes on."""
_YOUNG = 10.0
"""Seconds for which a half-made file may be one that another program is making."""
_TABLES = {"alembic_version", "experiments", "runs"}


class StoreError(Exception):
    """The store cannot be used; the message is one line."""


def checkout() -> Path:
    """The folder of the project. DVC executes queued experiments in copies below it, which are removed afterwards: what
    they log belongs to the project."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):
            return folder.parents[2]
    return here


def store_uri() -> str:
    """The tracking server of MLFLOW_TRACKING_URI, or the project's own SQLite file."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _uri(checkout() / NAME)


def _uri(file: Path) -> str:
    # in an address they would mean something else
    return f"sqlite:///{os.path.relpath(file) if {'?', '%'} & set(str(file)) else file}"


def own_file(uri: str) -> Path | None:
    """The SQLite file of a store, None if it is another kind of store."""
    name = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(name).absolute() if uri.startswith("sqlite:///") else None


def await_answer(uri: str) -> None:
    """Return as soon as the store can be written, at the latest after `PATIENCE`. Raises StoreError with the reason."""
    file, server = own_file(uri), urlsplit(uri)
    try:
        if file:
            # what another process makes is waited for by `ready`
            with closing(_connection(file, PATIENCE)) as connection:
                connection.execute("BEGIN IMMEDIATE")
        elif server.scheme in ("http", "https") and server.hostname:
            port = server.port or {"http": 80, "https": 443}[server.scheme]
            socket.create_connection((server.hostname, port), PATIENCE).close()
    except (sqlite3.Error, OSError, ValueError) as error:
        raise StoreError(f"{file or uri}: {error}") from None


def await_logging(
    thread: threading.Thread,
    moved: Callable[[], float],
    patience: Callable[[], float],
    ends: float = math.inf,
) -> bool:
    """Wait for a thread that logs while it is seen to go on; returns whether it has ended.

    moved: when it last had an answer of the store (`time.monotonic()`); it goes on, too, while it computes. patience: for how
    many seconds neither may be so. ends: when the waiting is over in any case.
    """
    last, worked = time.monotonic(), 0.0
    while thread.is_alive() and time.monotonic() < ends:
        thread.join(0.05)
        if (now := _computed(thread)) > worked + _AT_WORK:  # slow, but not waiting
            last, worked = time.monotonic(), now
        if time.monotonic() - max(last, moved()) > patience():
            break
    return not thread.is_alive()


def _computed(thread: threading.Thread) -> float:
    """Seconds of a core that a thread has used; 0 where the system does not tell, or it has ended."""
    if not hasattr(time, "pthread_getcpuclockid") or thread.ident is None:
        return 0.0
    try:
        return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    except OSError:
        return 0.0


def _connection(file: Path, timeout: float) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(file))}?mode=rw", uri=True, timeout=timeout)


def ready(uri: str) -> str | None:
    """Have the project's own file there and whole; returns what was wrong with one that has been set aside.

    Takes some seconds where it is made; a process that makes it is waited for. Raises StoreError, OSError.
    """
    file = own_file(uri)
    if file is None or file.exists() and not damage(file):
        return None
    with Lease(file).waited_for():
        told = mend(file)
        if not file.exists():
            _make(file)
    return told


def damage(file: Path) -> str | None:
    """What is wrong with an SQLite file that MLflow cannot go on from, in words; None if nothing is, or there is no file.

    Raises StoreError if it cannot be read now, or is something else's.
    """
    try:
        if not file.exists():
            return None
        if not file.stat().st_size:
            return "empty"
        with closing(_connection(file, PATIENCE)) as connection:
            names = {
                name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            }
            if names and not names & _TABLES:
                raise StoreError(f"{file}: an SQLite file, but not one of MLflow")
            if not names >= _TABLES or any(name.startswith("_alembic_tmp_") for name in names):
                return "half made"
            version = connection.execute("SELECT count(*) FROM alembic_version").fetchone()[0]
            return None if version else "half made"
    except (sqlite3.OperationalError, OSError) as error:  # locked, or not to be read by this user
        raise StoreError(f"{file}: {error}") from None
    except sqlite3.DatabaseError as error:
        if file.name != NAME:  # it may never have been meant for one
            raise StoreError(f"{file}: {error}") from None
        return f"damaged: {error}"


def mend(file: Path) -> str | None:
    """Set a file aside that MLflow cannot go on from; returns what was wrong and where it is now, None if all is well.

    Raises StoreError as `damage` does, OSError.
    """
    while (found := damage(file)) and time.time() - file.stat().st_mtime < _YOUNG:
        time.sleep(0.5)
    if not found:
        return None
    number = 1
    while (aside := file.with_name(f"{file.name}.damaged-{number}")).exists():
        number += 1
    for suffix in ("-journal", "-wal", "-shm", ""):
        if (part := file.with_name(file.name + suffix)).exists():
            part.rename(aside.with_name(aside.name + suffix))
    return f"{file.name} was {found}: it is now {aside.name}, and a new one takes its place; runs are logged again with their stages"


def _make(file: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for left in file.parent.glob(f"{file.name}.*.tmp*"):  # by a process that was killed
        left.unlink()
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    store = SqlAlchemyStore(_uri(temporary), (file.parent / ARTIFACTS).as_uri())
    store.engine.dispose()
    temporary.rename(file)
