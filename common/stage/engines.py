"""What executes runs: one interface, whatever is behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future

from common.records import Entry
from common.stage.worker import Task


class Died(Exception):
    """The worker that had a run is gone."""


class Engine(ABC):
    """Executes so many runs at once.

    causes: of which a worker may have died, in words.
    """

    causes: str

    @property
    @abstractmethod
    def slots(self) -> int:
        """How many runs can be executed at once."""

    @abstractmethod
    def submit(self, task: Task, alone: bool) -> Future[Entry | None]:
        """Execute a task as soon as there is room; the future gives what `work` does, and raises Died or what that raises.

        alone: in a worker of its own. The caller sees to it that nothing else is being executed then. Raises OSError.
        """

    @abstractmethod
    def close(self, at_once: bool = False) -> None:
        """Let the workers go; at_once: whatever they are doing, else they have nothing to do."""
