"""What every command does first: have standard streams, and be one that can be stopped.

This is loaded before all else and loads little, so that a command can be stopped from its first moment on. Whatever a command writes
is whole or not there, so it may end anywhere; only what trains has something to keep and stops with patience.
"""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

AGAIN = 4
"""Exit status: it is done, but for runs whose process died; the same command tries them again."""
STOPPED = 3
"""Exit status: stopped before the end; the same command goes on."""
INTERRUPTED = 130
"""Exit status: the same, by Ctrl-C."""

LOOKS_EVERY = 0.2
"""Seconds after which what is done with patience looks whether a signal has come."""

_SAME = 1.0
"""Seconds within which a second signal is the same once more: many send theirs to a process and to its group."""

_ROOM = 2**28
"""Bytes of memory that a command must be able to address, so that it can load what it needs or say that it cannot."""

SIGNALS = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)}
"""What stops a command: Ctrl-C, a request to end, and the warning before a cluster takes the machine back."""


class Stopped(Exception):
    """A signal has stopped what was done with patience; the message is one line, `status` that of the command."""

    def __init__(self, number: signal.Signals, kept: str = "the same command goes on from what is finished"):
        by_hand = number == signal.SIGINT
        super().__init__(f"{'interrupted' if by_hand else f'by {number.name}'}; {kept}")
        self.status = INTERRUPTED if by_hand else STOPPED


class _Stop:
    """patient: whether what is going on looks at `asked` by itself. asked: the signal that came meanwhile; since: when."""

    patient = False
    asked: signal.Signals | None = None
    since = 0.0


class _Leave:
    """at_once: whether `run` leaves out what packages do at the end of a process."""

    at_once = False


def leave_at_once() -> None:
    """Let `run` end the process without what packages have set out to do at its end, because that would break or not end."""
    _Leave.at_once = True


def listen() -> None:
    """From now on one of `SIGNALS` ends the process at once with one line, or, within `patience`, is noted; and so do
    packages that cannot be loaded, and limits of the system that nothing else has an answer to."""
    for number in SIGNALS:
        signal.signal(number, _on_signal)
    sys.excepthook = _on_error
    if sys.platform == "linux":
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if 0 <= most < _ROOM:  # OpenBLAS would ask for it without an end
            raise MemoryError(
                f"{most >> 20} MiB of memory may be addressed (ulimit -v), {_ROOM >> 20} are needed at least"
            )


def _on_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    first = error
    while first.__cause__:
        first = first.__cause__
    if isinstance(first, OSError):
        text = told(first)
    elif isinstance(first, (ImportError, MemoryError)) or str(first) == "can't start new thread":
        text = " ".join(str(first).split()) or "out of memory"
    else:
        sys.__excepthook__(kind, error, trace)
        return
    try:
        os.write(2, f"error: {text}\n".encode(errors="backslashreplace"))
    finally:
        os._exit(2)


def _on_signal(number: int, _: FrameType | None) -> None:
    if _Stop.patient and _Stop.asked is None:
        _Stop.asked, _Stop.since = signal.Signals(number), time.monotonic()
        return
    if _Stop.patient and time.monotonic() - _Stop.since < _SAME:
        return
    stop = Stopped(signal.Signals(number))
    try:
        os.write(2, f"stopped: {stop}\n".encode())
        for started in _started():
            os.kill(started, signal.SIGKILL)
    finally:
        os._exit(stop.status)


def _started() -> Iterator[int]:
    """The processes that this one has started, where the system tells, but for Python's own, which tidies up and ends."""
    own = f"/proc/{os.getpid()}/task"
    for thread in os.listdir(own) if os.path.isdir(own) else ():
        for started in Path(own, thread, "children").read_text().split():
            if b"resource_tracker" not in Path("/proc", started, "cmdline").read_bytes():
                yield int(started)


@contextmanager
def patience() -> Iterator[Callable[[], signal.Signals | None]]:
    """Within it the first signal is left to the caller, who asks for it by what this gives; a second ends the process."""
    _Stop.patient = True
    try:
        yield lambda: _Stop.asked
    finally:
        _Stop.patient = False


@contextmanager
def unheard() -> Iterator[None]:
    """Processes that are started within hear none of `SIGNALS`, which are their parent's to answer."""
    from multiprocessing import resource_tracker

    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        # Python's own would be started within otherwise, which lets some signals through again; SIGUSR1, which SLURM sends to
        # every process of a task, would end it
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def call(*command: str) -> int:
    """Run a command to its end and give its exit status. Raises Stopped, with the command ended, when a signal comes."""
    import subprocess

    with patience() as asked:
        with unheard():
            process = subprocess.Popen(command)
        while True:
            try:
                return process.wait(LOOKS_EVERY)
            except subprocess.TimeoutExpired:
                if number := asked():
                    process.kill()
                    raise Stopped(number) from None


def end_children() -> None:
    """Kill the processes that this one has started for its work."""
    import multiprocessing

    for process in multiprocessing.active_children():
        process.kill()


def end_with_parent() -> None:
    """Let this process, which another has started for its work, end when that one is no longer there."""
    import multiprocessing
    import threading

    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run(main: Callable[[], int]) -> NoReturn:
    """End the process with the exit status of a command's main function.

    Whoever closes the pipe that its output goes to has had enough; other trouble with the output is one line and 2.
    """
    _have_streams()
    listen()
    try:
        found = main()
        sys.stdout.flush()
    except Stopped as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        found = stop.status
    except BrokenPipeError:
        found = 0
        _leave_output()
    except OSError as error:
        print(f"error: {told(error)}", file=sys.stderr)
        found = 2
        _leave_output()
    if not _Leave.at_once:
        if any(not thread.daemon for thread in threading.enumerate() if thread != threading.main_thread()):
            sys.exit(found)  # which waits for them
        # what packages do at the end, but for taking all that torch and MLflow have loaded to pieces: that takes a second
        atexit._run_exitfuncs()
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(found)


def told(error: OSError) -> str:
    """The file that an error is about, and what the system says of it."""
    return f"{error.filename or 'a file without a name'}: {error.strerror or error}"


@contextmanager
def naming(file: str | Path) -> Iterator[None]:
    """Have errors of the system that name no file name this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


# ---------------------------------------------------------------------------------------------- standard streams


class _Output(io.TextIOWrapper):
    """Standard output, whose errors name it."""

    def write(self, text: str) -> int:
        with naming("standard output"):
            return super().write(text)

    def flush(self) -> None:
        with naming("standard output"):
            super().flush()


class _Messages(io.TextIOWrapper):
    """Standard error, whose readers may leave and whose disk may be full: no message is worth a run."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            pass


def _have_streams() -> None:
    """Open those of the three that the caller has closed, so that no file gets their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # the lowest number that is free is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin = sys.stdin or open(0, closefd=False)
    for number, kind in ((1, _Output), (2, _Messages)):
        found = sys.stdout if number == 1 else sys.stderr
        encoding = found.encoding if found else "utf-8"
        errors = found.errors if found else "backslashreplace"
        raw = open(number, "wb", closefd=False)
        stream = kind(raw, encoding=encoding, errors=errors, line_buffering=number == 2 or raw.isatty())
        setattr(sys, "stdout" if number == 1 else "stderr", stream)


def _leave_output() -> None:
    """Let nothing more be written to standard output, also not at the end of the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
