"""The processes that train on a CPU: what they inherit, and the one from which they are forked.

Nothing here loads torch, so that a command can set this up before it does.
"""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.context import BaseContext

from common import commandline

# what every run needs; a package that is not installed is passed over
_SHARED = ["common.stage.local", "torch._dynamo"]
_LONGEST_FOLDER = 60
"""Bytes; the name of a socket has some hundred, of which Python's own takes up to forty."""

ENVIRONMENT = {
    # threads spin for some ten microseconds, as long as a gap between kernels, and then sleep: without spinning a step
    # on two threads takes half as long again, with the default ten times as long beside another busy process
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "10000",
    # large blocks of memory come in huge pages, where the system offers them
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""What OpenMP and the C library read once, when a process starts."""
_FILES = 24
"""So many files are open in a process that starts workers, at least."""


def set_environment() -> None:
    """Let this process, as far as torch is not loaded yet, and all that it starts have `ENVIRONMENT`; what the user has
    set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def keep_memory() -> None:
    """Let the C library keep freed memory: fetching the same pages anew in each step costs up to half of it."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        most_mappings, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(most_mappings, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def context() -> BaseContext:
    """How worker processes are started: forked from one that has loaded what they share, where the system has that.

    It is spoken to by a socket in the folder for temporary files, whose name may be too long for one.
    """
    forked = "forkserver" in multiprocessing.get_all_start_methods()
    if not forked or len(os.fsencode(tempfile.gettempdir())) > _LONGEST_FOLDER:
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(_SHARED)
    return found


def _open_files() -> int:
    """How many files a process may have open at once."""
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if most == resource.RLIM_INFINITY else most


def prepare() -> None:
    """Let the process from which workers are forked load what they share while this one goes on.

    Raises OSError where the system allows too few files or processes.
    """
    with commandline.naming("worker processes"):
        if sys.platform == "linux" and (most := _open_files()) < _FILES:
            raise OSError(errno.EMFILE, f"{most} files may be open at once (ulimit -n), {_FILES} are needed")
        if context().get_start_method() == "forkserver":
            with commandline.unheard():
                forkserver.ensure_running()


def await_workers() -> None:
    """Return when workers can be started at once."""
    prepare()
    with commandline.unheard():
        first = context().Process(target=int)  # type: ignore[attr-defined]  # every context has it
        first.start()
    first.join()
