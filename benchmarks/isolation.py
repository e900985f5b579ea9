"""Functions in processes of their own, whose threads and memory are set before torch starts."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from common.stage import processes


def alone(function: Callable[..., Any], *arguments: Any, threads: int, tuned: bool = True) -> Any:
    """What `function` returns in a fresh process with so many threads; what it raises, too.

    tuned: as worker processes of a stage are; else as a Python process is by itself.
    """
    with _pool() as pool, _inherited(threads, tuned):
        return pool.submit(_begin, function, arguments, threads, tuned).result()


class Apart:
    """What `make` returns, called in a fresh process that stays; use it as a context manager.

    threads, tuned: as in `alone`. Nothing is returned by a call, which ends when the device is done.
    """

    def __init__(self, make: Callable[..., Callable[[], Any]], *arguments: Any, threads: int, tuned: bool):
        self._pool = _pool()
        try:
            with _inherited(threads, tuned):
                self._pool.submit(_begin, _keep, (make, *arguments), threads, tuned).result()
        except BaseException:
            self._pool.shutdown()
            raise

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def __call__(self) -> None:
        self._pool.submit(_call).result()


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


@contextmanager
def _inherited(threads: int, tuned: bool) -> Iterator[None]:
    """The environment that processes started meanwhile get: some of it is read before their first statement."""
    before = dict(os.environ)
    for name in processes.ENVIRONMENT:
        os.environ.pop(name, None)
    if tuned:
        processes.set_environment()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _begin(function: Callable[..., Any], arguments: tuple, threads: int, tuned: bool) -> Any:
    if tuned:
        settings = importlib.import_module("common.settings").ExecutionSettings
        prepare = importlib.import_module("common.stage.worker").prepare_process
        prepare(settings(threads=threads, deterministic=False))
    return function(*arguments)


_made: list[Callable[[], Any]] = []


def _keep(make: Callable[..., Callable[[], Any]], *arguments: Any) -> None:
    _made.append(make(*arguments))


def _call() -> None:
    import torch

    _made[0]()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
