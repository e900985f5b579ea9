"""Python processes that need not import the packages: forked from one that has them, and nothing of the project.

That saves a stage some seven seconds of a core, half of them in the process that forks its workers. Each process has its
own folder, environment, `sitecustomize`, session and end. One that takes away a package which others here need starts anew.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from multiprocessing import resource_tracker, util
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

PACKAGES = ("numpy", "pydantic", "scipy.stats", "torch", "torch._dynamo", "yaml")
LEAVES = ("matplotlib.figure", "matplotlib.backends.backend_svg", "mlflow")
"""None of the others needs these."""
# what stands in for Python: it passes on what it was called with, ends as the other process does, and takes it along
_CLIENT = """#!/bin/sh
'''exec' "{python}" -IS "$0" "$@"
' '''
import json, os, socket, sys
if sys.argv[1:2] not in (["-m"], ["-c"]):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(request)
    status = int(server.recv(64) or 1)
os.kill(os.getpid(), -status) if status < 0 else os._exit(status)
"""


@cache
def python() -> str:
    """The path of an executable that does what Python does with `-m` or `-c`, from such a process. The process from which
    all are forked ends with this one."""
    if sys.platform != "linux":
        return sys.executable
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    address, client = (str(Path(folder.name) / name) for name in ("socket", "python"))
    Path(client).write_text(_CLIENT.format(python=sys.executable, address=address))
    Path(client).chmod(0o755)
    listening, ends = socket.socket(socket.AF_UNIX), os.pipe()
    listening.bind(address)
    listening.listen()
    passed = [listening.fileno(), ends[0]]
    subprocess.Popen([sys.executable, __file__, client, *map(str, passed)], pass_fds=passed, stdin=-3)
    listening.close()
    os.close(ends[0])
    return client


Request = tuple[list[str], str, dict[str, str]]
"""Arguments, folder and environment."""


def _serve(listening: socket.socket, ends: int) -> Request | None:
    """Fork a process for each request, in which its request is returned; None when no more will come."""
    for name in (*PACKAGES, *LEAVES):
        importlib.import_module(name)
    assert threading.active_count() == 1, "a lock of another thread would stay locked"
    gc.freeze()  # else each process would look through all of it, and copy it by that
    with selectors.DefaultSelector() as waiting:
        waiting.register(listening, selectors.EVENT_READ)
        waiting.register(ends, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if key.fileobj == ends:
                    return None
                if key.fileobj is listening:
                    client, _ = listening.accept()
                    size, files, *_ = socket.recv_fds(client, 4, 3)
                    request = _received(client, int.from_bytes(size, "big"))
                    with warnings.catch_warnings(
                        action="ignore"
                    ):  # of threads, which packages may have below Python
                        pid = os.fork()
                    if not pid:
                        os.setsid()
                        for number, file in enumerate(files):
                            os.dup2(file, number)
                        for file in (*files, client.detach(), listening.detach(), ends):
                            os.close(file)
                        for other in waiting.get_map().values():
                            if other.data:
                                _close(other.fd)
                        return json.loads(request)
                    for file in files:
                        os.close(file)
                    ended = os.pidfd_open(pid)
                    waiting.register(ended, selectors.EVENT_READ, (pid, ended, client))
                    waiting.register(client, selectors.EVENT_READ, (pid, ended, client))
                else:
                    pid, ended, client = key.data
                    if key.fileobj is client:  # it was killed
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(pid, signal.SIGKILL)
                    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    waiting.unregister(ended)
                    waiting.unregister(client)
                    os.close(ended)
                    with client, contextlib.suppress(OSError):
                        client.send(str(status).encode())
                    break  # the other file of the two may be among those found


def _received(client: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        found += client.recv(size - len(found))
    return found


def _close(file: int) -> None:
    with contextlib.suppress(OSError):
        os.close(file)


def _become(client: str, arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """Be the process that was asked for."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    given = environment.get("PYTHONPATH")
    sys.path[:0] = given.split(os.pathsep) if given else []
    sys.modules.pop("sitecustomize", None)
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("sitecustomize")
    if any(sys.modules[name.split(".")[0]] is None for name in PACKAGES):
        os.execve(sys.executable, [sys.executable, *arguments], environment)
    tqdm.monitor_interval = 0  # else a thread of its own would be in the way of another fork
    sys.executable, util.spawnv_passfds = client, _forked
    how, what, *rest = arguments
    sys.argv = [how, *rest]
    sys.path.insert(0, os.getcwd() if how == "-m" else "")
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {"__name__": "__main__"})


_spawnv_passfds = util.spawnv_passfds


def _forked(path: str, arguments: list[str], files: list[int]) -> int:
    """In place of what starts the processes of `multiprocessing`: the one that forks workers has the packages, too."""
    code = arguments[-1]
    if "multiprocessing.forkserver" not in code or threading.active_count() > 1:
        return _spawnv_passfds(path, arguments, files)
    if pid := os.fork():
        return pid
    for file in map(int, os.listdir("/dev/fd")):
        if file > 2 and file not in files:
            _close(file)
    for name in [name for name in sys.modules if name.split(".")[0] in ("common", "replications")]:
        del sys.modules[name]
    resource_tracker._resource_tracker._fd = resource_tracker._resource_tracker._pid = None
    _end_after(lambda: exec(code, {"__name__": "__main__"}))


def _end_after(work: Callable[[], object]) -> NoReturn:
    """End as Python does, but without taking apart what is loaded, which takes a second."""
    status = 1
    try:
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        print(end.code, file=sys.stderr) if isinstance(end.code, str) else None
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _client, _listening, _ends = sys.argv[1:]
    del sys.path[0]
    _asked = _serve(socket.socket(fileno=int(_listening)), int(_ends))
    _end_after(lambda: _become(_client, *_asked) if _asked else None)
