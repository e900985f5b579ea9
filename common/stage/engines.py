"""What executes runs: one interface, whatever is behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future

from common.core.run import Run
from common.records import Entry
from common.settings import ExecutionSettings
from common.stage.store import Store
from common.stage.worker import Task


class Died(Exception):
    """The worker that had a run is gone."""


class Lost(Died):
    """The machine that had a run is gone, with all that it was doing."""


class Engine(ABC):
    """Executes runs, several at once.

    apart: whether each run has a worker of its own, so that whatever ends it is that run's doing; several runs can be alone
    at once then. causes: of which a worker may have died, in words.
    """

    apart = False
    causes = "killed"

    @property
    @abstractmethod
    def room(self) -> int:
        """How many runs it can be given at once: those that are executed, and some that wait. One: they are alone."""

    @abstractmethod
    def submit(self, task: Task, alone: bool) -> Future[Entry | None]:
        """Execute a task as soon as there is room; the future gives what `work` does, and raises Died or what that raises.

        alone: with nothing beside it, for which the caller cares where workers are not `apart`. Raises OSError.
        """

    @abstractmethod
    def close(self, at_once: bool = False) -> None:
        """Let the workers go; at_once: whatever they are doing, else they have nothing to do."""


def engine_of(execution: ExecutionSettings, store: Store, runs: Sequence[Run]) -> Engine:
    """What executes these runs. Raises SettingsError where that cannot be reached."""
    if execution.engine == "ray":
        from common.stage.cluster import Cluster

        return Cluster(execution, store, runs)
    from common.stage.local import Local

    return Local(execution, len(runs))
