"""Where finished runs are kept, and the state of those that are not finished.

A run is kept in a scratch folder under a key made of everything that determines it, so that an interrupted stage
resumes where it was, and work that several runs share (a dense network, say) is done once.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pydantic import ValidationError

from common import commandline
from common.core import loading
from common.core.compute import Compute
from common.core.identity import canonical, digest
from common.core.run import Run
from common.records import Entry
from common.settings import ROOT, DatasetSettings, ExecutionSettings
from common.stage.files import load_checked, save_checked, write_atomically

CONTENDER = "contender.py"
"""A paper's entry to the comparison on equal footing, on which no run of the paper depends."""
SCRATCH = Path(".runs")
CHECKPOINT_SECONDS = 60.0


class StageError(Exception):
    """The stage cannot go on; the message is one clear line, after `word`, and `status` that of the command. Finished runs
    are kept."""

    status, word = 2, "error"


class OutOfTime(StageError):
    """The time budget is spent; what is finished is kept, and a started run in the state of its last epoch."""

    status, word = commandline.STOPPED, "stopped"


class TryAgain(StageError):
    """All is done but for runs whose process died; the same command tries them again."""

    status, word = commandline.AGAIN, "not done"


@dataclass
class TimeBudget:
    """The moment (`time.time()`) at which training is to stop at the end of the epoch that it is in."""

    ends: float = math.inf

    @property
    def spent(self) -> bool:
        return time.time() >= self.ends


def _pack(state: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _unpack(content: bytes | None) -> dict[str, Any] | None:
    return None if content is None else torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


# ---------------------------------------------------------------------------------------------- checkpoints


class ScratchCheckpoints:
    """Checkpoints of the fits of one trainer, written at most once a minute; a fit that is shorter is simply redone."""

    def __init__(self, folder: Path, budget: TimeBudget, save: Callable[[Path, bytes], None]):
        self._folder, self._budget, self._save = folder, budget, save
        self._last = time.monotonic()

    def load(self, fit: int) -> dict[str, Any] | None:
        """The last state that the fit with this number left, or None."""
        return _unpack(load_checked(self._folder / f"fit-{fit}.pt"))

    def offer(self, fit: int, state: Callable[[], dict[str, Any]], finished: bool) -> None:
        """Keep the state if the last one is old enough, or if this ends a fit that has been kept before.

        Raises OutOfTime, with the state kept, when the time budget is spent.
        """
        path = self._folder / f"fit-{fit}.pt"
        old = time.monotonic() - self._last > CHECKPOINT_SECONDS
        if old or self._budget.spent or (finished and path.exists()):
            self._save(path, _pack(state()))
            self._last = time.monotonic()
        if self._budget.spent:
            raise OutOfTime


class RunCheckpoints:
    """The checkpoints of one run; its trainers are numbered in the order in which it makes them.

    save: writes the file of a state, in the format of `save_checked`.
    """

    def __init__(
        self,
        folder: Path,
        budget: TimeBudget | None = None,
        save: Callable[[Path, bytes], None] = save_checked,
    ):
        self._folder, self._budget, self._save = folder, budget or TimeBudget(), save
        self._trainers = itertools.count()

    def of_next_trainer(self) -> ScratchCheckpoints:
        """Where the next trainer of the run keeps its state."""
        return ScratchCheckpoints(self._folder / f"trainer-{next(self._trainers)}", self._budget, self._save)

    def clear(self) -> None:
        """Remove all states; called when the run has its record."""
        shutil.rmtree(self._folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- finished runs


def _numerics(execution: ExecutionSettings) -> list[str | int]:
    """What decides, beside settings, code and data, which numbers a run gives."""
    compute = Compute.choose(execution.device, execution.precision, execution.compilation)
    # a GPU gives the same numbers whatever its index
    chosen: list[str | int] = [compute.device.type, str(compute.autocast)]
    chosen += [compute.captured, compute.compiled, execution.deterministic, execution.threads]
    chosen += ["fused"] * compute.fused
    return [*chosen, str(torch.__version__)]


class Store:
    """The scratch folder of a stage's finished runs.

    execution: what the runs are executed with. root: the project whose code they execute, this one by default.
    numerics: in place of `execution`, what `numerics` was where runs of another machine were executed.
    """

    def __init__(
        self,
        folder: Path,
        execution: ExecutionSettings | None = None,
        root: Path | None = None,
        numerics: Sequence[str | int] = (),
    ):
        self.folder, self.root = folder, root
        execution = execution or ExecutionSettings()
        self.numerics = list(numerics) or _numerics(execution)
        self.execution = execution.numbers
        """The settings that can change a number, as they are written; what they come to depends on the machine."""

    def key(self, run: Run) -> str:
        """Name under which a run is kept: digest of settings, code, data, number format and torch version."""
        return self._key(run, self.numerics)

    def key_elsewhere(self, run: Run) -> str:
        """Name under which a run is kept that another machine has executed, and whose record counts here."""
        return self._key(run, ["elsewhere", self.execution])

    def _key(self, run: Run, executed: Sequence[Any]) -> str:
        known, how = _keys.setdefault(run, {}), (str(executed), self.root)
        if how not in known:
            needs = [self._key(need, executed) for need in run.needs]
            code = code_digest([run], self.root)
            known[how] = digest([run.settings_hash, [code, executed], data_prints(run), needs])[:32]
        return known[how]

    def _elsewhere(self, run: Run) -> Path:
        return self.folder / f"{self.key_elsewhere(run)}.json"

    def load(self, run: Run) -> Entry | None:
        """What a finished run has left, here or in records that were taken over; or None."""
        own = self._load(self.folder / f"{self.key(run)}.json")
        return own or self._load(self._elsewhere(run))

    def holds(self, run: Run) -> bool:
        """Whether there is what `load` returns, as far as can be told without reading what it says."""
        files = (self.folder / f"{self.key(run)}.json", self._elsewhere(run))
        return any(load_checked(file) is not None for file in files)

    def take_over(self, run: Run, entry: Entry, elsewhere: bool) -> None:
        """Count a run as finished whose record is in the results. elsewhere: another machine has executed it."""
        if elsewhere:
            save_checked(self._elsewhere(run), canonical(entry).encode())
        else:
            self.save(run, entry, None)

    @staticmethod
    def _load(file: Path) -> Entry | None:
        content = load_checked(file)
        try:
            return None if content is None else Entry.model_validate_json(content)
        except ValidationError:
            print(f"{file}: of another revision's schema; the run is done again", file=sys.stderr)
            return None

    def state(self, run: Run) -> dict[str, Any] | None:
        """What a finished run kept for others."""
        return _unpack(load_checked(self.folder / f"{self.key(run)}.pt"))

    def save(self, run: Run, entry: Entry, state: Mapping[str, Any] | None) -> Entry:
        """Keep a finished run; returns its entry. The record comes last: with it, the run counts as finished."""
        if state is not None:
            save_checked(self.folder / f"{self.key(run)}.pt", _pack(state))
        save_checked(self.folder / f"{self.key(run)}.json", canonical(entry).encode())
        return entry

    def network_file(self, run: Run) -> Path:
        """Where the network that a run reports is kept, if it is; empty where it reports none."""
        return self.folder / f"{self.key(run)}.safetensors"

    def save_network(self, run: Run, content: bytes) -> None:
        """Keep a network, as of `common.core.networks`."""
        write_atomically(self.network_file(run), content)

    def forget(self, run: Run) -> None:
        """Have the run done again."""
        (self.folder / f"{self.key(run)}.json").unlink(missing_ok=True)

    def finished(self, run: Run, needed: bool, with_network: bool = False) -> Entry | None:
        """As `load`, but None as well when others need a state that has been lost or damaged, or was never here, and for
        a run that may not fail another time.

        with_network: also when its network is not here.
        """
        entry = self.load(run)
        if entry and entry.record.may_pass:
            return None
        if entry and needed and entry.has_state and self.state(run) is None:
            return None
        if entry and with_network and entry.record.status == "ok" and not self.network_file(run).exists():
            return None
        return entry

    def checkpoints(self, run: Run, budget: TimeBudget | None = None) -> RunCheckpoints:
        """Where the run keeps its state while it trains, and when it stops doing so (default: at its end)."""
        return RunCheckpoints(self.part(run), budget)

    def part(self, run: Run) -> Path:
        """The folder of what the run keeps while it trains."""
        return self.folder / f"{self.key(run)}.part"


_keys: WeakKeyDictionary[Run, dict[tuple[str, Path | None], str]] = WeakKeyDictionary()


def data_settings(run: Run) -> list[DatasetSettings]:
    """The data sets that the run's settings name under `data`; it is tested on the first."""
    data = run.settings.get("data") or []
    sources = data if isinstance(data, list) else [data]
    return [DatasetSettings.model_validate(source) for source in sources]


def data_prints(run: Run) -> list[str]:
    """The fingerprints of the run's data sets."""
    if run not in _prints:
        _prints[run] = [loading.fingerprint(data) for data in data_settings(run)]
    return list(_prints[run])


_prints: WeakKeyDictionary[Run, list[str]] = WeakKeyDictionary()


# ---------------------------------------------------------------------------------------------- code


def code_files(paper: str, code: Sequence[str] = (), root: Path | None = None) -> list[Path]:
    """The files that determine a paper's runs, relative to the project at `root` (default: this one).

    They are the core, what lies directly in the paper's folder, and the files and folders that `code` names, as of a
    Run. The paper's contender is not among them, unless `code` names its folder. A folder within a paper's folder
    is not, either: it holds a program with a stage of its own, whose output is in the fingerprint of the data. That
    no run executes more than this is tested, so files need not be listed anywhere.
    """
    root = root or ROOT
    own = (root / "replications" / paper).glob("*.py")
    files = {*(root / "common/core").rglob("*.py"), *(file for file in own if file.name != CONTENDER)}
    for place in code:
        path = root / place
        files |= {path} if path.suffix == ".py" else set(path.glob("*.py"))
    # most __init__.py are empty
    return sorted(file.relative_to(root) for file in files if file.stat().st_size)


def code_prints(files: Iterable[Path], root: Path | None = None) -> dict[str, str]:
    """SHA-256 of files that `code_files` names, by name."""
    return {str(file): hashlib.sha256(((root or ROOT) / file).read_bytes()).hexdigest() for file in files}


def code_digest(runs: Iterable[Run], root: Path | None = None) -> str:
    """Digest of the files that determine these runs."""
    return digest_of_kinds(frozenset((run.paper, run.code) for run in runs), root or ROOT)


@functools.cache
def digest_of_kinds(kinds: frozenset[tuple[str, tuple[str, ...]]], root: Path = ROOT) -> str:
    """The same of all runs of these papers, each with the code that it executes beside (as of a Run)."""
    files = {file for paper, code in kinds for file in code_files(paper, code, root)}
    return digest(code_prints(files, root))
