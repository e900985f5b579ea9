"""What a worker on a node of a cluster does: say what it is, and execute runs.

Where the node sees the project's folder, as the machine does on which the command runs, a worker uses the store there. Elsewhere
it works in the copy of the code that Ray has made, with a store of its own: what a run needs is fetched, its checkpoints are sent
as they are written, and what it leaves is returned.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.core import loading
from common.core.run import Run
from common.records import Entry
from common.settings import DatasetSettings, ExecutionSettings
from common.stage.depot import Reached, Refused, sha256
from common.stage.files import save_checked, write_atomically
from common.stage.places import place_file, telling
from common.stage.planned import RUNNING
from common.stage.store import RunCheckpoints, StageError, Store, TimeBudget, data_settings, digest_of_kinds
from common.stage.worker import Task, prepare_process, work

PROBE = "cluster.probe"
"""A file in the store's folder, by whose content a node knows that it sees it."""
RESULTS = (".pt", ".safetensors", ".json")
"""What a finished run leaves, the record last."""


@dataclass(frozen=True)
class Home:
    """The machine where the command runs, as all workers know it.

    root: the project's folder, absolute. folder: that of the store, relative to it. probe: what the probe holds.
    execution: of all runs. code: by paper and further code, the digest. computes: as of `computes`. data: by name of an
    array file, its SHA-256. depot: where to fetch and send, if some node does not see the folder.
    """

    root: str
    folder: str
    probe: str
    execution: ExecutionSettings
    code: Mapping[tuple[str, tuple[str, ...]], str]
    computes: Mapping[str, str]
    data: Mapping[str, str] = field(default_factory=dict)
    depot: Any = None

    def seen(self) -> bool:
        """Whether the folder is seen from here."""
        try:
            return Path(self.root, self.folder, PROBE).read_text() == self.probe
        except OSError:
            return False

    def differences(self) -> list[str]:
        """In what this process differs from those that give the same numbers as the machine of the command."""
        found = [
            f"{name} {here} in place of {self.computes[name]}"
            for name, here in computes(self.execution).items()
            if here != self.computes[name]
        ]
        for (paper, code), digest in self.code.items():
            try:
                same = digest_of_kinds(frozenset([(paper, code)])) == digest
            except OSError as error:
                found.append(f"{error.filename} is not there")
                continue
            if not same:
                found.append(f"other code of {paper}")
        return found


def computes(execution: ExecutionSettings) -> dict[str, str]:
    """What decides beside code and data which numbers a process gives, in words."""
    device, autocast, captured, compiled, *_, version = Store(Path(), execution).numerics
    number = "float32" if autocast == "None" else autocast
    return {
        "torch": str(version),
        "device": str(device),
        "precision": str(number).removeprefix("torch."),
        "captured steps": str(captured),
        "compiled steps": str(compiled),
    }


def answer(home: Home) -> tuple[bool, list[str]]:
    """Whether this node sees the folder, and in what it differs, one word each."""
    seen = home.seen()
    if seen:
        os.chdir(home.root)
    return seen, home.differences()


_seen: dict[str, bool] = {}
"""By the probe of a command for whose runs this process is prepared: whether it sees the folder."""


def _ready(home: Home) -> bool:
    """Prepare this process once for the runs of a command; returns whether it sees the folder. Raises StageError."""
    if home.probe not in _seen:
        seen, wrong = answer(home)
        if wrong:
            raise StageError(refusal(platform.node(), wrong))
        prepare_process(home.execution)
        _seen[home.probe] = seen
    return _seen[home.probe]


def refusal(node: str, differences: list[str]) -> str:
    """The line by which a node is refused."""
    return (
        f"node {node} has {'; '.join(differences)}: all nodes that execute runs need the same; make it so, or leave the "
        "node out"
    )


@dataclass(frozen=True)
class Returned:
    """What a run has left: its entry, None if the time was spent before, and files by ending, with their digests."""

    entry: Entry | None
    files: tuple[tuple[str, bytes, str], ...] = ()


def execute(home: Home, task: Task, needs: Mapping[str, Entry]) -> Returned:
    """Execute a task on this node. needs: the entries of the runs that it starts from, by settings hash.

    Raises StageError, and OSError that names this node where it is its file system that fails.
    """
    try:
        return _executed(home, task, needs)
    except Refused:
        raise
    except OSError as error:
        name = f"{error.filename or 'a file'} on node {platform.node()}"
        raise OSError(error.errno, error.strerror or str(error), name) from None


def _executed(home: Home, task: Task, needs: Mapping[str, Entry]) -> Returned:
    if _ready(home):
        file = place_file(task.store.folder / RUNNING, task.store.key(task.run))
        with telling(_place(), functools.partial(write_atomically, file)):
            return Returned(work(task))
    if home.depot is None:
        raise StageError(
            f"node {platform.node()} has joined and does not see {home.root}; give the command again"
        )
    reached = Reached(home.depot)
    for data in data_settings(task.run):
        if name := array_file(data):
            reached.fetch(name, home.data[name])
    store = _Elsewhere(task.store, home, needs, reached)
    name = str(place_file(store.folder / RUNNING, store.key(task.run)))
    with telling(_place(), functools.partial(reached.send, name)):
        store.restore(task.run)
        entry = work(dataclasses.replace(task, store=store))
        return Returned(entry, store.taken(task.run) if entry else ())


def _place() -> str:
    """This node, and what of it the task of Ray has that is executed here, in words."""
    import ray

    context = ray.get_runtime_context()
    has = context.get_assigned_resources()
    if share := has.get("GPU"):
        numbers = context.get_accelerator_ids()["GPU"]
        return f"{platform.node()} ({share:g} of GPU {', '.join(numbers)})"
    return f"{platform.node()} ({has.get('CPU', 0):g} CPU)"


def array_file(data: DatasetSettings) -> str | None:
    """The file of a data set that travels; None for the embedded one."""
    if data.source == "digits":
        return None
    return data.local if data.source == "npz" else str(loading.prepared_file(data))


class _Elsewhere(Store):
    """The store on a node that does not see the folder: of what the runs there need and of what they leave."""

    def __init__(self, store: Store, home: Home, needs: Mapping[str, Entry], reached: Reached):
        super().__init__(Path(home.folder), home.execution, store.root, store.numerics)
        self._needs, self._reached = needs, reached

    def load(self, run: Run) -> Entry | None:
        return self._needs.get(run.settings_hash) or super().load(run)

    def state(self, run: Run) -> dict[str, Any] | None:
        self._reached.fetch(str(self.folder / f"{self.key(run)}.pt"))
        return super().state(run)

    def network_file(self, run: Run) -> Path:
        file = super().network_file(run)
        if run.settings_hash in self._needs:
            self._reached.fetch(str(file))
        return file

    def checkpoints(self, run: Run, budget: TimeBudget | None = None) -> RunCheckpoints:
        return RunCheckpoints(self.part(run), budget, self._keep)

    def restore(self, run: Run) -> None:
        """Have the checkpoints that the run has left, wherever it was, and none of another attempt here."""
        shutil.rmtree(self.part(run), ignore_errors=True)
        self._reached.restore(str(self.part(run)))

    def taken(self, run: Run) -> tuple[tuple[str, bytes, str], ...]:
        """What a run has left, which needs to be here no longer but for a state that others start from."""
        found = []
        for ending in RESULTS:
            file = self.folder / f"{self.key(run)}{ending}"
            if file.exists():
                content = file.read_bytes()
                found.append((ending, content, sha256(content)))
                if ending != ".pt":
                    file.unlink()
        return tuple(found)

    def _keep(self, path: Path, content: bytes) -> None:
        save_checked(path, content)
        self._reached.send(str(path), path.read_bytes())
