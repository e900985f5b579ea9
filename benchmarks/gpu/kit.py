"""What the steps share: the options, and the file that holds all that was measured."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench import Bench
from benchmarks.gpu.jobs import GRACE
from benchmarks.gpu.summary import summary
from common.settings import ROOT
from common.stage.files import write_atomically
from common.stage.papers import papers

HEADLINES = (
    "imp_slr",
    "halo",
    "feature_relevance",
    "pruning_from_scratch",
    "equal_footing",
    "pretraining_impact",
)
"""The papers in the order in which their headline claims are wanted; the last needs a second data set."""


@dataclass(frozen=True)
class Kit:
    """The options. out: the folder of all output. only: papers in place of all. data: a folder with copies of CIFAR.

    quick: a rehearsal, with little of everything.
    """

    out: Path
    device: str
    quick: bool
    params: Path
    profile: str
    only: tuple[str, ...] = ()
    data: Path | None = None

    @property
    def papers(self) -> list[str]:
        """Those that take part, in the order of their headlines."""
        known = papers()
        order = [paper for paper in HEADLINES if paper in known]
        return list(self.only) or order + [paper for paper in known if paper not in order]

    @property
    def variables(self) -> dict[str, str]:
        """What processes of the kit need in their environment, wherever they run."""
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    @cached_property
    def machine(self) -> dict[str, Any]:
        """The machine and the versions. Raises SettingsError for a device that is not there."""
        found = Bench(None, self.device, "bfloat16", self.quick).environment()
        wanted = ("device", "cpu", "cores", "python", "torch", "torchvision")
        return {key: found[key] for key in wanted} | {"cuda": torch.version.cuda}


class Step:
    """The part of the output that one step writes, with the time it has."""

    def __init__(self, kit: Kit, name: str, budget: float):
        self.kit, self.name, self.budget = kit, name, budget
        self._begun = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds, without those that processes take to stop."""
        return self.budget - min(GRACE, self.budget / 10) - (time.monotonic() - self._begun)

    def keep(self, found: Mapping[str, Any]) -> None:
        """Put what was found so far into `measured.json`, in place of what was there of this step, and into `summary.md`."""
        file = self.kit.out / "measured.json"
        measured = json.loads(file.read_text()) if file.exists() else {}
        seconds = round(time.monotonic() - self._begun, 1)
        about = {
            "machine": self.kit.machine,
            "quick": self.kit.quick,
            "budget": self.budget,
            "seconds": seconds,
        }
        measured[self.name] = {**about, **found}
        write_atomically(file, (json.dumps(measured, indent=1) + "\n").encode())
        write_atomically(self.kit.out / "summary.md", summary(measured).encode())
