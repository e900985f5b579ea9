"""The engine of a cluster of Ray: each run is a task of Ray, in a process of its own on one of the nodes.

This process alone gives runs out, keeps what they leave and logs it. Ray's part is to know the nodes, to bring code and objects
there, to give each task its share of a node and to tell when a worker or a node is gone; what happens then is the scheduler's
to decide.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from common import commandline
from common.core.compute import Compute
from common.core.run import Run
from common.records import Entry
from common.settings import ROOT, DataError, DatasetSettings, ExecutionSettings, SettingsError
from common.stage import node, processes
from common.stage.depot import Depot, sha256
from common.stage.engines import Died, Engine, Lost
from common.stage.files import write_atomically
from common.stage.local import RUNS_PER_GPU
from common.stage.store import StageError, Store, code_digest, data_settings
from common.stage.worker import Task

REACHED = 5.0
"""Seconds within which the head node must answer."""
ANSWERED = 300.0
"""Seconds within which a node must have started a worker that says what it is."""
_LOOK = 0.2
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "GRPC_VERBOSITY": "NONE",
    "GLOG_minloglevel": "3",
}
"""What Ray reads when it is loaded: no statistics for its makers, and what it says goes to its own files."""


class _Node(NamedTuple):
    """A node that can take runs, so many at once."""

    number: str
    name: str
    slots: int
    cpus: float


class Cluster(Engine):
    """Runs on the nodes of a cluster.

    Raises SettingsError, before anything trains, where Ray is not installed, no cluster answers, no node can take a run, or
    one differs from this machine in what decides numbers.
    """

    apart = True
    causes = "killed, a fault of CUDA"

    def __init__(self, execution: ExecutionSettings, store: Store, runs: Sequence[Run]):
        self._store, self._execution = store, execution
        on_gpu = Compute.choose(execution.device, execution.precision).device.type == "cuda"
        self._cpus = execution.threads if execution.cpus_per_run == "auto" else execution.cpus_per_run
        share = 1 / RUNS_PER_GPU if execution.gpus_per_run == "auto" else execution.gpus_per_run
        self._gpus = share if on_gpu else 0.0
        self._home = self._described(runs)
        self._nodes: list[_Node] = []
        self._looked = -1.0
        self._given: dict[Any, tuple[Task, Future[Entry | None]]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._ray = _connected(execution.address, _places(runs))
        try:
            self._prepare(runs)
        except BaseException:
            self._end()
            raise
        self._collector = threading.Thread(target=self._collect, daemon=True)
        self._collector.start()

    @property
    def room(self) -> int:
        slots, most = sum(each.slots for each in self._able()), self._execution.workers
        if most != "auto" and most <= slots:
            return most
        return slots + slots // 4 + 1  # some wait, so that no node does

    def submit(self, task: Task, alone: bool) -> Future[Entry | None]:
        needs = {need.settings_hash: entry for need in task.run.needs if (entry := self._store.load(need))}
        future: Future[Entry | None] = Future()
        with self._changed:
            self._given[self._remote(alone).remote(self._shared, task, needs)] = task, future
            self._changed.notify()
        return future

    def close(self, at_once: bool = False) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._collector.join()
        self._end()

    def _end(self) -> None:
        (self._store.folder / node.PROBE).unlink(missing_ok=True)
        with _own_signals():
            self._ray.shutdown()  # with this process, whatever its tasks are doing ends

    # ------------------------------------------------------------------------------------------ before anything trains

    def _described(self, runs: Sequence[Run]) -> node.Home:
        kinds = {(run.paper, run.code): run for run in runs}
        root, folder = Path.cwd(), self._store.folder
        with suppress(ValueError):
            folder = folder.absolute().relative_to(root)
        return node.Home(
            root=str(root),
            folder=str(folder),
            probe=secrets.token_hex(16),
            execution=self._execution,
            code={kind: code_digest([run]) for kind, run in kinds.items()},
            computes=node.computes(self._execution),
        )

    def _prepare(self, runs: Sequence[Run]) -> None:
        write_atomically(self._store.folder / node.PROBE, self._home.probe.encode())
        if not self._able():
            share = f" and {self._gpus:g} GPU" if self._gpus else ""
            raise SettingsError(
                f"execution.address = {self._execution.address!r}: no node of the cluster has {self._cpus} CPUs{share} for a run"
            )
        blind = self._blind()
        if blind:
            data, depot = self._travelling(runs, blind[0]), self._depot()
            self._home = dataclasses.replace(self._home, data=data, depot=depot)
        self._shared = self._ray.put(self._home)

    def _blind(self) -> list[str]:
        """The nodes that do not see the folder. Raises SettingsError naming one that differs."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        ask = self._ray.remote(node.answer)
        asked = {
            ask.options(
                num_cpus=self._cpus,
                num_gpus=self._gpus,
                max_retries=0,
                scheduling_strategy=On(each.number, soft=False),
            ).remote(self._home): each.name
            for each in self._able()
        }
        blind = []
        for reference, name in asked.items():
            try:
                seen, wrong = self._ray.get(reference, timeout=ANSWERED)
            except self._ray.exceptions.GetTimeoutError:
                raise SettingsError(
                    f"node {name} has not started a worker in {ANSWERED:.0f} seconds"
                ) from None
            except self._ray.exceptions.RayError as error:
                raise SettingsError(f"node {name} cannot start a worker: {_told(error)}") from None
            if wrong:
                raise SettingsError(node.refusal(name, wrong))
            blind += [] if seen else [name]
        return blind

    def _travelling(self, runs: Sequence[Run], name: str) -> dict[str, str]:
        """The digests of the array files that nodes fetch. Raises SettingsError for data that cannot travel."""
        found: dict[str, str] = {}
        for data in dict.fromkeys(each for run in runs for each in data_settings(run)):
            if (file := node.array_file(data)) is None:
                continue
            if data.streamed or Path(file).is_absolute() or ".." in Path(file).parts:
                raise SettingsError(
                    f"node {name} does not see {self._home.root}, and {data.origin} cannot travel there: "
                    f"{'streamed images stay where they are' if data.streamed else 'its path is not below that folder'}"
                )
            if file not in found:
                found[file] = sha256(_read(file, data))
        return found

    def _depot(self) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        here = self._ray.get_runtime_context().get_node_id()
        made = self._ray.remote(Depot).options(
            num_cpus=0, max_concurrency=8, scheduling_strategy=On(here, soft=False)
        )
        return made.remote(self._home.root)

    # ------------------------------------------------------------------------------------------ nodes

    def _able(self) -> list[_Node]:
        """The nodes that can take runs, as of some seconds ago at most."""
        if time.monotonic() - self._looked > 2.0 or not self._nodes:
            found = []
            for each in self._ray.nodes():
                has = each["Resources"]
                cpus, gpus = has.get("CPU", 0.0), has.get("GPU", 0.0)
                slots = int(cpus // self._cpus)
                if self._gpus:
                    slots = min(slots, int(gpus / self._gpus + 1e-6))
                if each["Alive"] and slots:
                    name = f"{each['NodeManagerHostname']} ({each['NodeManagerAddress']})"
                    found.append(_Node(each["NodeID"], name, slots, cpus))
            self._nodes, self._looked = found, time.monotonic()
        return self._nodes

    @functools.cached_property
    def _function(self) -> Any:
        return self._ray.remote(node.execute)

    def _remote(self, alone: bool) -> Any:
        cpus, gpus = float(self._cpus), self._gpus
        if alone and gpus:
            gpus = 1.0
        elif alone:
            cpus = min((each.cpus for each in self._able()), default=cpus)
        # Ray does nothing again by itself: what a death means is for the scheduler to say
        return self._function.options(num_cpus=cpus, num_gpus=gpus, max_retries=0)

    # ------------------------------------------------------------------------------------------ results

    def _collect(self) -> None:
        """Give the futures what has come, until this is closed."""
        while True:
            with self._changed:
                while not self._given and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                pending = list(self._given)
            if self._ray.wait(pending, num_returns=1, timeout=_LOOK)[0]:
                pending, _ = self._ray.wait(pending, num_returns=len(pending), timeout=0)
            else:
                pending = []
            for reference in pending:
                with self._changed:
                    task, future = self._given.pop(reference)
                self._give(reference, task, future)

    def _give(self, reference: Any, task: Task, future: Future[Entry | None]) -> None:
        errors = self._ray.exceptions
        try:
            future.set_result(self._kept(task, self._ray.get(reference)))
        except (errors.NodeDiedError, errors.ObjectLostError, errors.LocalRayletDiedError):
            self._looked = -1.0
            future.set_exception(Lost("the node has died"))
        except (errors.WorkerCrashedError, errors.OutOfMemoryError) as error:
            future.set_exception(Died(_told(error)))
        except errors.RayTaskError as error:
            future.set_exception(_cause(error))
        except errors.RayError as error:
            future.set_exception(StageError(f"Ray: {_told(error)}"))
        except Exception as error:
            future.set_exception(error)

    def _kept(self, task: Task, returned: node.Returned) -> Entry | None:
        """Keep what has come from a node that does not see the folder."""
        for ending, content, digest in returned.files:
            if sha256(content) != digest:
                raise Lost(f"what {task.run} has left was damaged on its way")
            write_atomically(self._store.folder / f"{self._store.key(task.run)}{ending}", content)
        if returned.files:
            self._store.checkpoints(task.run).clear()
        return returned.entry


def _cause(error: Any) -> Exception:
    """What a task has raised."""
    return error.cause if isinstance(error.cause, Exception) else StageError(_told(error))


def _told(error: Exception) -> str:
    """What Ray says, which may be a page, in a line: of an error of a task the last, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if getattr(error, "cause", None) else lines[0]


def _read(file: str, data: DatasetSettings) -> bytes:
    try:
        return Path(file).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{file}: the array file of {data.origin} is not there") from None


def _places(runs: Sequence[Run]) -> set[str]:
    """What of the project's folder travels, by the first part of its path: the code."""
    return {"common", "replications", *(Path(place).parts[0] for run in runs for place in run.code)}


def _connected(address: str, places: Collection[str]) -> Any:
    """Ray, connected to the cluster at an address. Raises SettingsError."""
    os.environ.update({name: value for name, value in _QUIET.items() if name not in os.environ})
    try:
        import ray
    except ModuleNotFoundError:
        raise SettingsError(
            "execution.engine = 'ray': Ray is not installed here; `pip install --require-hashes -r requirements-cluster.lock` "
            "adds it (the extra `.[cluster]`)"
        ) from None
    where = _found(address)
    environment = {
        "working_dir": str(ROOT),
        "excludes": [f"/{each.name}" for each in ROOT.iterdir() if each.name not in places] + ["__pycache__"],
        "env_vars": {**processes.ENVIRONMENT, "RAY_USAGE_STATS_ENABLED": "0"},
    }
    try:
        with _own_signals(), _silence():
            ray.init(
                where,
                runtime_env=environment,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
            )
        ray._private.worker.print_to_stdstream = _unsaid
    except Exception as error:
        raise SettingsError(f"execution.address = {address!r}: {_told(error)}") from None
    return ray


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


def _found(address: str) -> str:
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
def _own_signals() -> Iterator[None]:
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
