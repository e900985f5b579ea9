"""Workers on GPUs: one process for each GPU, in which so many runs take turns.

Each run has a thread and a stream of its own. A thread has its turn, launches work and passes the turn on, so that the GPU is
never short of work and nobody waits for Python's lock (`common.core.compute.Turns`). A fault of CUDA ends the process with
all that it was doing; those who wait for its runs are told, and whatever is executed next there starts another process.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from common import commandline
from common.core.compute import TURNS, usable
from common.stage.engines import Died


class GPUWorkers(ThreadPoolExecutor):
    """Executes what is submitted in processes, one for each device, and for it to have as a last argument its device.

    lanes: the device of each that works at once, such as `cuda:0`; several may be on one. prepare: called in each process
    before all else. A future raises Died when its process has.
    """

    def __init__(self, lanes: Sequence[str], prepare: Callable[[], None]):
        self._own = threading.local()
        self._processes = {device: _Process(device, lanes.count(device), prepare) for device in set(lanes)}
        waiting: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        for number, device in enumerate(lanes):
            waiting.put((self._processes[device], lanes[:number].count(device)))
        super().__init__(len(lanes), initializer=lambda: setattr(self._own, "lane", waiting.get()))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(self._there, fn, args, kwargs)

    def _there(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        process, number = self._own.lane
        return process.call(number, (fn, args, kwargs))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As of an Executor; where futures are cancelled, what is being executed is, too."""
        if cancel_futures:
            self._each(_Process.kill)
        super().shutdown(wait, cancel_futures=cancel_futures)
        if wait:
            self._each(_Process.end)

    def _each(self, action: Callable[[_Process], None]) -> None:
        for process in self._processes.values():
            action(process)


class _Process:
    """The process of one device; it is started when it is needed, and again when it has died."""

    def __init__(self, device: str, lanes: int, prepare: Callable[[], None]):
        self.device, self.lanes, self.prepare = device, lanes, prepare
        self._starting = threading.Lock()
        self._running: tuple[BaseProcess, list[Connection]] | None = None
        self._killed = False

    def call(self, lane: int, work: tuple[Any, ...]) -> Any:
        """What the work comes to in this process. Raises Died."""
        process, ends = self._started()
        try:
            ends[lane].send(work)
            found, error = ends[lane].recv()
        except (EOFError, ConnectionError):
            process.join()
            raise Died(f"the process on {self.device} has died") from None
        if error is not None:
            raise error
        return found

    def _started(self) -> tuple[BaseProcess, list[Connection]]:
        with self._starting:
            if self._killed:
                raise Died(f"the process on {self.device} has been ended")
            if self._running is None or not self._running[0].is_alive():
                pairs = [multiprocessing.Pipe() for _ in range(self.lanes)]
                theirs = [end for _, end in pairs]
                # CUDA does not survive a fork
                starting = multiprocessing.get_context("spawn")
                process = starting.Process(target=_serve, args=(self.device, theirs, self.prepare))
                with commandline.unheard():
                    process.start()
                for end in theirs:
                    end.close()  # else nobody would notice that the process has closed it
                self._running = process, [end for end, _ in pairs]
            return self._running

    def kill(self) -> None:
        """End the process, whatever it is doing, and start no other."""
        with self._starting:
            self._killed = True
            if self._running:
                self._running[0].kill()

    def end(self) -> None:
        """End the process, which has nothing to do."""
        if self._running:
            process, ends = self._running
            for end in ends:
                end.close()
            process.join()


_Lane = tuple[_Process, int]


def _serve(device: str, ends: Sequence[Connection], prepare: Callable[[], None]) -> None:
    """Do what comes over each connection until it is closed."""
    commandline.end_with_parent()
    prepare()
    threads = [threading.Thread(target=_lane, args=(device, end)) for end in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _lane(device: str, end: Connection) -> None:
    """Do what comes over a connection; the process ends with what cannot be answered, so that nobody waits in vain."""
    try:
        if torch.device(device).type == "cuda":
            with TURNS.taken():
                torch.cuda.set_device(device)
                torch.cuda.set_stream(torch.cuda.Stream())
        while end.poll(None):
            with TURNS.taken():
                try:
                    fn, args, kwargs = end.recv()
                except EOFError:
                    return
                answer: tuple[Any, Exception | None]
                try:
                    answer = fn(*args, device, **kwargs), None
                except Exception as error:
                    if not usable(torch.device(device)):
                        raise
                    error.add_note("".join(traceback.format_exception(error)))
                    answer = None, error
                del fn, args, kwargs
                end.send(answer)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
