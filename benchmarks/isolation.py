"""A function in a process of its own, whose threads are set before torch starts."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

# two spinning OpenMP threads become ten times slower beside any other busy process
_PASSIVE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


def alone(function: Callable[..., Any], *arguments: Any, threads: int) -> Any:
    """What `function` returns in a fresh process with so many threads; what it raises, too."""
    context = multiprocessing.get_context("spawn")
    # the first thing that the process does: torch comes with the module of `function`, which is not there yet
    with ProcessPoolExecutor(1, context, initializer=_set_threads, initargs=(threads,)) as pool:
        return pool.submit(function, *arguments).result()


def _set_threads(count: int) -> None:
    os.environ.update(_PASSIVE, OMP_NUM_THREADS=str(count))
