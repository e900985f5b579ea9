"""The engine of a cluster of Ray: each run is a task of Ray, in a process of its own on one of the nodes.

This process alone gives runs out, keeps what they leave and logs it. Ray's part is to know the nodes, to bring code and objects
there, to give each task its share of a node and to tell when a worker or a node is gone; what happens then is the scheduler's
to decide.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from common import commandline
from common.core.compute import Compute
from common.core.run import Run
from common.records import Entry
from common.settings import DataError, DatasetSettings, ExecutionSettings, SettingsError
from common.stage import node
from common.stage.connection import connected, own_signals, said, watch
from common.stage.depot import Depot, sha256
from common.stage.engines import Died, Engine, Lost
from common.stage.files import write_atomically
from common.stage.local import RUNS_PER_GPU
from common.stage.places import forget, place_file
from common.stage.planned import RUNNING
from common.stage.store import StageError, Store, code_digest, data_settings
from common.stage.worker import Task

ANSWERED = 300.0
"""Seconds within which a node must have started a worker that says what it is."""
_LOOK = 0.2
_KNOWN = 2.0
"""Seconds for which what is known of the nodes is good."""


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
        self._gone: OSError | None = None
        self._keys = set[str]()
        self._ended = threading.Event()
        self._ray = connected(execution.address, _places(runs))
        try:
            self._prepare(runs)
        except BaseException:
            self._end()
            raise
        self._collector = threading.Thread(target=self._collect, daemon=True)
        self._collector.start()
        watch(self._heard(), self._lose, self._ended)

    @property
    def room(self) -> int:
        slots, most = sum(each.slots for each in self._nodes), self._execution.workers
        if most != "auto" and most <= slots:
            return most
        return slots + slots // 4 + 1  # some wait, so that no node does

    def submit(self, task: Task, alone: bool) -> Future[Entry | None]:
        needs = {need.settings_hash: entry for need in task.run.needs if (entry := self._store.load(need))}
        future: Future[Entry | None] = Future()
        self._keys.add(self._store.key(task.run))
        write_atomically(self._place(task), b"")  # it waits for a node
        with self._changed:
            if self._gone:
                raise self._gone
            self._given[self._remote(alone).remote(self._shared, task, needs)] = task, future
            self._changed.notify()
        return future

    def close(self, at_once: bool = False) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if not self._gone:
            self._collector.join()
        self._end()

    def _end(self) -> None:
        self._ended.set()
        with suppress(OSError):  # the folder may be what cannot be written
            (self._store.folder / node.PROBE).unlink(missing_ok=True)
        if self._gone:  # there is nobody to take leave of: Ray would try for long, and break in the end
            commandline.leave_at_once()
        else:
            with own_signals():
                self._ray.shutdown()  # with this process, whatever its tasks are doing ends
        forget(self._store.folder / RUNNING, self._keys)

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
        self._find_nodes()
        blind = self._blind()
        if blind:
            data, depot = self._travelling(runs, blind[0]), self._depot()
            self._home = dataclasses.replace(self._home, data=data, depot=depot)
        self._shared = self._ray.put(self._home)

    def _find_nodes(self) -> None:
        """Have nodes that can take runs. Raises SettingsError."""
        self._look()
        if not self._nodes:
            share = f" and {self._gpus:g} GPU" if self._gpus else ""
            raise SettingsError(
                f"execution.address = {self._execution.address!r}: no node of the cluster has {self._cpus} CPUs{share} for a run"
            )

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
            ).remote(self._home): each
            for each in self._nodes
        }
        blind = []
        for reference, each in asked.items():
            name = each.name
            try:
                seen, wrong = self._ray.get(reference, timeout=ANSWERED)
            except self._ray.exceptions.GetTimeoutError:
                raise SettingsError(
                    f"node {name} has not started a worker in {ANSWERED:.0f} seconds"
                ) from None
            except self._ray.exceptions.RayError as error:
                self._find_nodes()
                if each.number not in {other.number for other in self._nodes}:
                    continue  # it was lost a moment ago, which Ray has only now seen
                raise SettingsError(f"node {name} cannot start a worker: {said(error)}") from None
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

    def _look(self) -> None:
        """See which nodes can take runs."""
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
        if self._nodes and not found:
            print(
                "no node that can take a run is left: waiting for one to join; if this command is stopped, the same goes on",
                file=sys.stderr,
            )
        self._nodes, self._looked = found, time.monotonic()

    def _heard(self) -> list[tuple[str, int]]:
        """Where what this process cannot do without listens: the head node, and Ray's process on this machine."""
        context = self._ray.get_runtime_context()
        host, _, port = context.gcs_address.rpartition(":")
        own = [each for each in self._ray.nodes() if each["NodeID"] == context.get_node_id()]
        return [(host, int(port)), *((each["NodeManagerAddress"], each["NodeManagerPort"]) for each in own)]

    def _lose(self, place: str) -> None:
        """End all that is given out, because Ray is there no longer."""
        with self._changed:
            self._gone = OSError(
                errno.ECONNRESET, "the cluster's head node, or Ray on this machine, is gone", place
            )
            given, self._given = self._given, {}
        for _, future in given.values():
            future.set_exception(self._gone)

    @functools.cached_property
    def _function(self) -> Any:
        return self._ray.remote(node.execute)

    def _remote(self, alone: bool) -> Any:
        cpus, gpus = float(self._cpus), self._gpus
        if alone and gpus:
            gpus = 1.0
        elif alone:
            cpus = min((each.cpus for each in self._nodes), default=cpus)
        # Ray does nothing again by itself: what a death means is for the scheduler to say
        return self._function.options(num_cpus=cpus, num_gpus=gpus, max_retries=0)

    # ------------------------------------------------------------------------------------------ results

    def _collect(self) -> None:
        """Give the futures what has come, and see which nodes there are, until this is closed."""
        while True:
            with self._changed:
                if not self._given and not self._closed:
                    self._changed.wait(_KNOWN)
                if self._closed:
                    return
                pending = list(self._given)
            try:
                if time.monotonic() - self._looked > _KNOWN:
                    self._look()
                ended = self._ray.wait(pending, num_returns=1, timeout=_LOOK)[0] if pending else []
                if ended:  # and what else
                    ended, _ = self._ray.wait(pending, num_returns=len(pending), timeout=0)
            except Exception as error:
                self._lose(f"Ray: {said(error)}")
                return
            for reference in ended:
                self._give(reference)
            if not self._nodes:
                self._let_go()

    def _give(self, reference: Any) -> None:
        """Give what waits for a task what it has come to."""
        if taken := self._taken(reference):
            task, future = taken
            try:
                future.set_result(self._kept(task, self._ray.get(reference)))
            except Exception as error:
                future.set_exception(self._meant(error))

    def _let_go(self) -> None:
        """While there is no node, end what waits for one and whose time is spent, which a worker would do."""
        with self._changed:
            spent = [reference for reference, (task, _) in self._given.items() if task.budget.spent]
        for reference in spent:
            if taken := self._taken(reference):
                taken[1].set_result(None)

    def _taken(self, reference: Any) -> tuple[Task, Future[Entry | None]] | None:
        """A task that has ended, and what waits for it; None if that was told already."""
        with self._changed:
            found = self._given.pop(reference, None)
        if found:
            with suppress(OSError):  # it is only for those who look on
                self._place(found[0]).unlink(missing_ok=True)
        return found

    def _place(self, task: Task) -> Path:
        return place_file(self._store.folder / RUNNING, self._store.key(task.run))

    def _meant(self, error: Exception) -> Exception:
        """What an error that a task has come to is for the scheduler."""
        errors = self._ray.exceptions
        if isinstance(error, (errors.NodeDiedError, errors.ObjectLostError, errors.LocalRayletDiedError)):
            self._looked = -1.0
            return Lost("the node has died")
        if isinstance(error, (errors.WorkerCrashedError, errors.OutOfMemoryError)):
            return Died(said(error))
        if isinstance(error, errors.RayTaskError):
            return _cause(error)
        if isinstance(error, errors.RayError):
            return StageError(f"Ray: {said(error)}")
        return error

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
    return error.cause if isinstance(error.cause, Exception) else StageError(said(error))


def _read(file: str, data: DatasetSettings) -> bytes:
    try:
        return Path(file).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{file}: the array file of {data.origin} is not there") from None


def _places(runs: Sequence[Run]) -> set[str]:
    """What of the project's folder travels, by the first part of its path: the code."""
    return {"common", "replications", *(Path(place).parts[0] for run in runs for place in run.code)}
