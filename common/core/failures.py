"""How a run can fail to be completed."""

from __future__ import annotations

from typing import ClassVar

from common.records import Failure


class RunFailed(Exception):
    """A run that cannot be completed; the message becomes the reason in its record, `failure` its kind.

    Raised as one of the classes below, which say the kind; by itself it counts as Unreachable.
    """

    failure: ClassVar[Failure] = "unreachable"


class Unreachable(RunFailed):
    """No network meets the target or the budget, or what is asked for does not exist."""


class Diverged(RunFailed):
    """Training whose loss, or what a method makes of the network, is no longer a finite number."""

    failure = "diverged"


class OutOfMemory(RunFailed):
    """A device or the machine has no memory left."""

    failure = "resources"
