"""The log of a stage in MLflow, which is written beside training by a thread of its own.

Nothing here loads MLflow, which takes seconds: the thread does, while the first runs train.
"""

from __future__ import annotations

import itertools
import math
import queue
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.records import Entry
from common.stage import lease
from common.stage.mlflow_store import PATIENCE, StoreError, await_logging, store_uri

if find_spec("mlflow") is None:
    raise ModuleNotFoundError("MLflow is not installed", name="mlflow")

_MAKING = 60.0
"""Seconds that the end of a stage waits for MLflow to be loaded and a new store to be made."""
_PATIENCE_WHEN_STOPPED = 0.5
_NUMBERS = itertools.count()
_logging = set[str]()
"""Signatures of what logs in this process."""
_silent = set[str]()
"""Stores that have not answered, until they do."""


class StageLog:
    """Logs the runs of a stage while it goes on; use it as a context manager.

    environment: `code`, `machine` and `versions` as `common.stage.records.environment` returns them. A run that the store already
    holds is passed over. When the store cannot be reached, the stage goes on and `error` says why; a run that cannot be
    logged costs no other, and `missing` counts them: they are logged the next time the stage is run. The end waits for what
    is still to be logged, but `PATIENCE` at most without seeing that any of it goes on.

    signature: of this log, by which another process knows whether it goes on. entries: what is still to be logged, None at
    the end. making: whether the store is not there yet. complete: whether the stage has come to its end.
    """

    def __init__(self, paper: str, profile: str, environment: Mapping[str, Any]):
        self.paper, self.profile, self.environment = paper, profile, environment
        self.error: Exception | None = None
        self.missing = 0
        self.added = 0
        self.uri = store_uri()
        self.signature = f"{lease.signature()} {next(_NUMBERS)}"
        self.entries: queue.SimpleQueue[tuple[Entry, Path | None] | None] = queue.SimpleQueue()
        self.making, self.complete = True, False
        self._moved = 0.0
        self._thread = threading.Thread(target=self._log, daemon=True)

    def __enter__(self) -> StageLog:
        _logging.add(self.signature)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self.complete = kind is None
        self.entries.put(None)
        ends = time.monotonic() + (math.inf if self.complete else _PATIENCE_WHEN_STOPPED)
        patience = _PATIENCE_WHEN_STOPPED if self.uri in _silent else PATIENCE
        ended = await_logging(
            self._thread, lambda: self._moved, lambda: _MAKING if self.making else patience, ends
        )
        if not ended and self.complete:
            _silent.add(self.uri)
            self.error = self.error or StoreError(f"{self.uri} does not answer")

    def add(self, entry: Entry, network: Path | None = None) -> None:
        """Log one entry, and its network where that is in a file; returns at once."""
        self.entries.put((entry, network))

    def moves(self) -> None:
        """Something has been logged or found."""
        self._moved = time.monotonic()
        _silent.discard(self.uri)

    def _log(self) -> None:
        try:
            from common.stage.mlflow_runs import Writer

            Writer(self).write()
        except Exception as error:  # tracking must never cost a stage its runs
            self.error = error
        finally:
            _logging.discard(self.signature)


def goes_on(signature: str) -> bool:
    """Whether what logs with a signature, in this process or another of this machine, is still at it."""
    process = signature.rpartition(" ")[0]
    return signature in _logging if process == lease.signature() else not lease.over(process)
