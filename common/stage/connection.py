"""The connection of this process to a cluster of Ray: how it is made, and how its end is noticed.

Ray ends a process, from within and without a word that its caller would see, once the head node has been gone for some time; a
command is to end with one line of its own and what it has kept, so it looks itself.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from common import commandline
from common.settings import ROOT, SettingsError
from common.stage import processes

REACHED = 5.0
"""Seconds within which the head node must answer."""
_LOOK = 0.5
_SILENT = 30.0
"""Seconds for which the network may be away; Ray ends this process after twice that."""
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "GRPC_VERBOSITY": "NONE",
    "GLOG_minloglevel": "3",
}
"""What Ray reads when it is loaded: no statistics for its makers, and what it says goes to its own files."""


def connected(address: str, places: Collection[str]) -> Any:
    """Ray, connected to the cluster at an address. Raises SettingsError."""
    os.environ.update({name: value for name, value in _QUIET.items() if name not in os.environ})
    try:
        import ray
    except ModuleNotFoundError:
        raise SettingsError(
            "execution.engine = 'ray': Ray is not installed here; `pip install --require-hashes -r requirements-cluster.lock` "
            "adds it (the extra `.[cluster]`)"
        ) from None
    where = found(address)
    environment = {
        "working_dir": str(ROOT),
        "excludes": [f"/{each.name}" for each in ROOT.iterdir() if each.name not in places] + ["__pycache__"],
        "env_vars": {**processes.ENVIRONMENT, "RAY_USAGE_STATS_ENABLED": "0"},
    }
    try:
        with own_signals(), _silence():
            ray.init(
                where,
                runtime_env=environment,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
            )
        ray._private.worker.print_to_stdstream = _unsaid
    except Exception as error:
        raise SettingsError(f"execution.address = {address!r}: {said(error)}") from None
    return ray


def said(error: Exception) -> str:
    """What Ray says, which may be a page, in a line: of an error of a task, or a traceback of a node, the last, else the first."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    if getattr(error, "cause", None):
        return lines[-1]
    node = re.search(r"\[Node ([^\]]+)\] Traceback", text)
    return f"node {node[1]}: {lines[-1]}" if node else lines[0]


@contextmanager
def _silence() -> Iterator[None]:
    """What the parts of Ray in C++ write to standard error while it connects is lost: errors of theirs are raised, too."""
    sys.stderr.flush()
    own, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)
        os.close(nothing)


def _unsaid(*_: Any, **__: Any) -> None:
    """In place of what prints on the terminal that a worker has died, which Ray has no setting for."""


def found(address: str) -> str:
    """The head node, which answers. Raises SettingsError."""
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address_or_die

        try:
            found = canonicalize_bootstrap_address_or_die("auto")
        except (ConnectionError, ValueError):
            raise SettingsError(
                "execution.address = 'auto': RAY_ADDRESS names no cluster of Ray, and none was started on this machine; "
                "`ray start --head` starts one"
            ) from None
    else:
        found = address
    host, _, port = found.rpartition(":")
    try:
        socket.create_connection((host, int(port)), REACHED).close()
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SettingsError(
            f"execution.address = {address!r}: no cluster of Ray answers at {found} ({reason})"
        ) from None
    return found


@contextmanager
def own_signals() -> Iterator[None]:
    """Ray sets handlers of its own when it is connected; ours stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in commandline.SIGNALS}
    with commandline.unheard():
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def watch(places: Collection[tuple[str, int]], lost: Callable[[str], object], ended: threading.Event) -> None:
    """Have `lost` called, by a thread, when one of the places, hosts and ports, is listened to no longer, with its name; until
    `ended`."""

    def look(host: str, port: int) -> None:
        heard = time.monotonic()
        while not ended.is_set():
            try:
                with socket.create_connection((host, port), REACHED) as line:
                    line.settimeout(_LOOK)
                    _stay(line, ended)
                heard = time.monotonic()
            except OSError as error:  # refused: nobody listens there; else the network may come back
                if isinstance(error, ConnectionRefusedError) or time.monotonic() - heard > _SILENT:
                    if not ended.is_set():
                        lost(f"{host}:{port}")
                    return
                ended.wait(_LOOK)

    for place in places:
        threading.Thread(target=look, args=place, daemon=True).start()


def _stay(line: socket.socket, ended: threading.Event) -> None:
    """Return when the other side, which may close what says nothing, has done so, or dies."""
    while not ended.is_set():
        try:
            if not line.recv(4096):
                return
        except TimeoutError:
            continue
        except OSError:
            return
