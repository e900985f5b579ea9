"""What those who train a paper in a folder have set out to do, so that others can see how far it is.

Whoever trains leaves the list of runs in the folder, each with the names of its files. Nothing here loads torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.core.identity import canonical
from common.records import Identity
from common.stage.files import load_checked, save_checked

_FILE = "planned"
RUNNING = "running"
"""Below the folder of a paper's runs: the leases of those that are being executed."""


class PlannedRun(NamedTuple):
    """A run that is wanted. key, elsewhere: names of its files in the folder, by who has executed it; kind: the same for all
    seeds."""

    key: str
    elsewhere: str
    kind: str
    name: str

    @classmethod
    def of(cls, identity: Identity, key: str, elsewhere: str) -> PlannedRun:
        """The run with this identity."""
        i = identity
        return cls(key, elsewhere, f"{i.variant} {i.dataset} {i.architecture} {i.target:g}", i.name)


@dataclass(frozen=True)
class Planned:
    """begun: when those who train now have begun, as of `time.time()`. about: their versions, by name. runs: of the present
    look, and of those before."""

    begun: float
    about: dict[str, Any]
    runs: Sequence[PlannedRun]

    def write(self, folder: Path) -> None:
        """Leave it in the folder of a paper's runs. Raises OSError."""
        content = {"begun": self.begun, "about": self.about, "runs": [list(run) for run in self.runs]}
        save_checked(folder / _FILE, canonical(content).encode())

    @classmethod
    def read(cls, folder: Path) -> Planned | None:
        """What the folder of a paper's runs holds; None if it is not there, or of another revision."""
        content = load_checked(folder / _FILE)
        try:
            found = json.loads(content) if content else None
            return found and cls(found["begun"], found["about"], [PlannedRun(*run) for run in found["runs"]])
        except (ValueError, KeyError, TypeError):
            return None

    def differences(self, about: dict[str, Any]) -> list[str]:
        """In which of their versions others differ, in words."""
        return [
            f"{name} {value} here and {self.about.get(name)} there"
            for name, value in about.items()
            if self.about.get(name) != value
        ]
