"""The engine of one machine: processes on its CPU, or one for each of its GPUs."""

from __future__ import annotations

import functools
import os
import threading
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from common import commandline
from common.core.compute import Compute
from common.records import Entry
from common.settings import ExecutionSettings
from common.stage import processes
from common.stage.engines import Died, Engine
from common.stage.gpus import GPUWorkers
from common.stage.store import StageError
from common.stage.worker import Task, prepare_process, work

RUNS_PER_GPU = 8
"""Narrow networks leave most of a GPU idle: so many are trained on one at once."""
STREAMS_PER_GPU = 32
"""torch has no more; two threads on one stream would be in each other's captures."""


def training_slots(execution: ExecutionSettings, most: int) -> tuple[int, list[str]]:
    """How many runs train at once, and on which GPU each (none: on the CPU)."""
    device = Compute.choose(execution.device, execution.precision).device
    if device.type == "cuda":
        every = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        devices = every if device.index is None else [str(device)]
        wanted = RUNS_PER_GPU * len(devices) if execution.workers == "auto" else execution.workers
        count = min(wanted, STREAMS_PER_GPU * len(devices))
        return min(count, most), [devices[i % len(devices)] for i in range(count)]
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = max(1, available // execution.threads) if execution.workers == "auto" else execution.workers
    return min(count, most), []


class Local(Engine):
    """Processes on the CPU, or threads of a process for each GPU, with a stream of its own each: kernels of several
    processes would take turns there.

    most: so many runs there are. Workers can be started at once when it is made.
    """

    def __init__(self, execution: ExecutionSettings, most: int):
        self._execution = execution
        self._slots, self._devices = training_slots(execution, most)
        self._pool: Executor | None = None
        self._alone = False
        if self._devices:
            self.causes = "a fault of CUDA, killed"
        if not self._devices:
            processes.await_workers()

    @property
    def room(self) -> int:
        # one run waits, so that a worker that is free goes on while what the other did is recorded; a single worker has
        # none beside the one that may kill it
        return self._slots + 1 if self._slots > 1 else 1

    def submit(self, task: Task, alone: bool) -> Future[Entry | None]:
        if self._pool is None or alone or self._alone:
            self._renew(alone)
        try:
            return self._submitted(task)
        except BrokenProcessPool:  # by another run
            self._renew(alone)
            return self._submitted(task)

    def _submitted(self, task: Task) -> Future[Entry | None]:
        assert self._pool is not None
        with commandline.unheard():  # a worker may be started for it
            inside = self._pool.submit(work if self._devices else _work, task)
        outside: Future[Entry | None] = Future()
        inside.add_done_callback(functools.partial(_pass_on, outside))
        return outside

    def _renew(self, alone: bool) -> None:
        self.close()
        self._alone = alone
        count = 1 if alone else self._slots
        if self._devices:
            prepare = functools.partial(prepare_process, self._execution)
            self._pool = GPUWorkers(self._devices[:count], prepare)
            return
        with commandline.naming("/dev/shm"):  # where the system keeps what processes wait for each other by
            self._pool = ProcessPoolExecutor(
                count, processes.context(), initializer=_start_worker, initargs=(self._execution,)
            )

    def close(self, at_once: bool = False) -> None:
        if self._pool:
            self._pool.shutdown(wait=not at_once, cancel_futures=at_once)
        if at_once:
            commandline.end_children()
        self._pool = None


def _pass_on(outside: Future[Any], inside: Future[Any]) -> None:
    """Give what a future of a pool came to."""
    if inside.cancelled():
        outside.cancel()
    elif isinstance(error := inside.exception(), BrokenProcessPool):
        outside.set_exception(Died(str(error)))
    elif error:
        outside.set_exception(error)
    else:
        outside.set_result(inside.result())


def _start_worker(execution: ExecutionSettings) -> None:
    """Prepare a worker process and let it end with its parent."""
    commandline.end_with_parent()
    try:
        prepare_process(execution)
    except Exception as error:  # it would look as if the first run had killed the worker
        _own.refuses = f"a worker process cannot be prepared: {error}"


_own = threading.local()
"""refuses: why a worker cannot train."""


def _work(task: Task) -> Entry | None:
    if refuses := getattr(_own, "refuses", None):
        raise StageError(refuses)
    return work(task)
