"""What a run is, its record, where it is kept and where it executes.

A protocol lists `Run`s. Each goes through its paper's `execute` in a worker process and leaves one record. Finished
runs are kept in a scratch folder under a key made of everything that determines them, so that an interrupted stage
resumes where it was, and work that several runs share (a dense network, say) is done once: it is itself a run, which
others list in `needs`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from common import datasets
from common.settings import ROOT, DatasetSettings, ExecutionSettings, Profile, canonical, digest
from common.training import Compute, Hooks, RunFailed, Trainer

SCRATCH = Path(".runs")
CHECKPOINT_SECONDS = 60.0
EVALUATION_BATCH = 2000
# everything whose change can change a result; tracking, statistics and report are not among it
_CODE = (
    "settings.py",
    "datasets.py",
    "training.py",
    "schedules.py",
    "arena.py",
    "runs.py",
    "models/**/*.py",
    "pruning/**/*.py",
)


class StageError(Exception):
    """The stage cannot go on; the message is one clear line. Finished runs are kept."""


@dataclass(frozen=True, eq=False)
class Run:
    """One (variant, dataset, architecture, target, seed) of a paper, trained to its end.

    settings: everything else that determines the run, as JSON values; its entry `data` (a dump of DatasetSettings, or
    a list of them) names what the run reads. needs: runs whose record and state this one starts from.
    """

    paper: str
    variant: str
    dataset: str
    architecture: str
    target: float
    seed: int
    settings: Mapping[str, Any]
    needs: tuple[Run, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that name the run."""
        names = ("paper", "variant", "dataset", "architecture", "target", "seed")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def settings_hash(self) -> str:
        """Digest of the identity, the settings and all that is needed, 64 hexadecimal characters."""
        needs = [need.settings_hash for need in self.needs]
        return digest({**self.identity, "settings": self.settings, "needs": needs})

    def __str__(self) -> str:
        return f"{self.paper}/{self.variant} {self.architecture} target {self.target:g} seed {self.seed}"


@dataclass
class Outcome:
    """What `execute` returns for a run.

    metrics: measured values (at least test_accuracy in [0, 1] and test_loss). cost: the result of
    `common.pruning.counting.cost`. curves: one row per epoch. state: tensors and plain values for runs that need this
    one. details: other JSON facts (layer widths, chosen settings).
    """

    metrics: dict[str, Any]
    cost: dict[str, Any]
    curves: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Any] | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Needed:
    """A finished run that another one starts from: its record and what it kept (None if nothing)."""

    record: dict[str, Any]
    state: dict[str, Any] | None


@dataclass(frozen=True)
class Context:
    """What a run gets to execute with.

    needs: the finished runs that `run.needs` lists, in that order.
    """

    run: Run
    compute: Compute
    needs: tuple[Needed, ...]
    checkpoints: RunCheckpoints | None = None

    def dataset(self, settings: DatasetSettings | Mapping[str, Any]) -> datasets.Dataset:
        """The data set on this run's device; loaded once per process."""
        if not isinstance(settings, DatasetSettings):
            settings = DatasetSettings.model_validate(settings)
        return _dataset(settings, self.compute.device)

    def trainer(
        self,
        model: nn.Module,
        data: datasets.Dataset,
        batch_size: int,
        hooks: Hooks | Sequence[Hooks] = (),
        **options: Any,
    ) -> Trainer:
        """A Trainer on the shuffled, augmented training split, measured on validation each epoch.

        Order and augmentation depend on the run's seed alone, so runs of equal seed are paired. options: as for
        Trainer.
        """
        seed = self.run.seed
        batches = datasets.Batches(data, "train", batch_size, seed=seed, shuffle=True, augment=True)
        return Trainer(
            model,
            batches,
            hooks=hooks,
            validation=datasets.Batches(data, "validation", EVALUATION_BATCH),
            seed=seed,
            compute=self.compute,
            checkpoints=self.checkpoints and self.checkpoints.of_next_trainer(),
            **options,
        )

    def scores(self, trainer: Trainer, data: datasets.Dataset) -> dict[str, float]:
        """test_accuracy, test_loss, validation_accuracy and validation_loss of the trainer's network as it is now."""
        found = {}
        for split in ("validation", "test"):
            scores = trainer.evaluate(datasets.Batches(data, split, EVALUATION_BATCH))
            found |= {f"{split}_{name}": value for name, value in scores.items()}
        return found


@functools.lru_cache(maxsize=8)
def _dataset(settings: DatasetSettings, device: torch.device) -> datasets.Dataset:
    return datasets.load(settings).to(device)


# ---------------------------------------------------------------------------------------------- keeping


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also when the process is killed. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checked(path: Path, content: bytes) -> None:
    """Write `content` behind a line with its SHA-256, which also shows what a power cut may leave half written."""
    write_atomically(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def load_checked(path: Path) -> bytes | None:
    """The content that `save_checked` wrote; None if the file is missing or damaged (then named on stderr)."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    found, _, content = raw.partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() == found:
        return content
    print(f"{path}: damaged (its digest does not match); the run is done again", file=sys.stderr)
    return None


def _pack(state: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _unpack(content: bytes | None) -> dict[str, Any] | None:
    return None if content is None else torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


class ScratchCheckpoints:
    """Checkpoints of the fits of one trainer, written at most once a minute; a fit that is shorter is simply redone."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._last = time.monotonic()

    def load(self, fit: int) -> dict[str, Any] | None:
        """The last state that the fit with this number left, or None."""
        return _unpack(load_checked(self._folder / f"fit-{fit}.pt"))

    def offer(self, fit: int, state: Callable[[], dict[str, Any]], finished: bool) -> None:
        """Keep the state if the last one is old enough, or if this ends a fit that has been kept before."""
        path = self._folder / f"fit-{fit}.pt"
        if time.monotonic() - self._last > CHECKPOINT_SECONDS or (finished and path.exists()):
            save_checked(path, _pack(state()))
            self._last = time.monotonic()


class RunCheckpoints:
    """The checkpoints of one run; its trainers are numbered in the order in which it makes them."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._trainers = itertools.count()

    def of_next_trainer(self) -> ScratchCheckpoints:
        """Where the next trainer of the run keeps its state."""
        return ScratchCheckpoints(self._folder / f"trainer-{next(self._trainers)}")

    def clear(self) -> None:
        """Remove all states; called when the run has its record."""
        shutil.rmtree(self._folder, ignore_errors=True)


class Store:
    """The scratch folder of a stage's finished runs. papers: the folders of `replications` whose code it executes."""

    def __init__(self, folder: Path, papers: Sequence[str]):
        self.folder = folder
        self._code = code_digest(tuple(papers))

    def key(self, run: Run) -> str:
        """Name under which a run is kept: digest of settings, code, data and torch version."""
        needs = [self.key(need) for need in run.needs]
        return digest([run.settings_hash, self._code, data_prints(run), torch.__version__, needs])[:32]

    def load(self, run: Run) -> dict[str, Any] | None:
        """{"record", "curves", "seconds"} of a finished run, or None."""
        content = load_checked(self.folder / f"{self.key(run)}.json")
        return None if content is None else json.loads(content)

    def state(self, run: Run) -> dict[str, Any] | None:
        """What a finished run kept for others."""
        return _unpack(load_checked(self.folder / f"{self.key(run)}.pt"))

    def save(self, run: Run, entry: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
        """Keep a finished run. The record comes last: with it, the run counts as finished."""
        if state is not None:
            save_checked(self.folder / f"{self.key(run)}.pt", _pack(state))
        save_checked(self.folder / f"{self.key(run)}.json", canonical(entry).encode())

    def finished(self, run: Run, needed: bool) -> dict[str, Any] | None:
        """As `load`, but None as well when others need a state that has been lost or damaged."""
        entry = self.load(run)
        if entry and needed and entry["has_state"] and self.state(run) is None:
            return None
        return entry

    def checkpoints(self, run: Run) -> RunCheckpoints:
        """Where the run keeps its state while it trains."""
        return RunCheckpoints(self.folder / f"{self.key(run)}.part")


def data_prints(run: Run) -> list[str]:
    """The fingerprints of the data sets that the run's settings name under `data`."""
    data = run.settings.get("data") or []
    sources = data if isinstance(data, list) else [data]
    return [datasets.fingerprint(DatasetSettings.model_validate(source)) for source in sources]


@functools.cache
def code_digest(papers: tuple[str, ...]) -> str:
    """Digest of the source files that determine the results of these papers."""
    files = [file for pattern in _CODE for file in (ROOT / "common").glob(pattern)]
    files += [file for paper in papers for file in (ROOT / "replications" / paper).rglob("*.py")]
    return digest(
        {str(f.relative_to(ROOT)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)}
    )


# ---------------------------------------------------------------------------------------------- executing


def _record(
    run: Run, status: str, outcome: Outcome | None = None, reason: str | None = None
) -> dict[str, Any]:
    record = {**run.identity, "status": status, "settings": run.settings, "settings_hash": run.settings_hash}
    record |= {"data": data_prints(run), "metrics": {}, "cost": {}, "details": {}}
    if outcome is not None:
        record |= {"metrics": outcome.metrics, "cost": outcome.cost, "details": outcome.details}
    return record | ({"reason": reason} if reason else {})


def perform(run: Run, store: Store, execution: ExecutionSettings, keep_state: bool) -> dict[str, Any]:
    """Execute one run in this process and keep it; returns its entry {"record", "curves", "seconds", ...}."""
    begun = time.perf_counter()
    needs = tuple(Needed(store.load(need)["record"], store.state(need)) for need in run.needs)
    lost = [(need, n.record) for need, n in zip(run.needs, needs) if n.record["status"] != "ok"]
    checkpoints = store.checkpoints(run)
    outcome, reason = None, None
    if lost:
        reason = f"it starts from {lost[0][0]}, which failed: {lost[0][1]['reason']}"
    else:
        compute = Compute.choose(execution.device, execution.precision, execution.compilation)
        context = Context(run, compute, needs, checkpoints)
        try:
            outcome = importlib.import_module(f"replications.{run.paper}.protocol").execute(run, context)
        except RunFailed as failure:
            reason = str(failure)
        except torch.OutOfMemoryError:
            reason = f"out of memory on {compute.device} ({run}); lower its batch size or width"
            torch.cuda.empty_cache()
    record = _record(run, "failed" if outcome is None else "ok", outcome, reason)
    state = outcome.state if outcome and keep_state else None
    seconds = round(time.perf_counter() - begun, 3)
    entry = _entry(record, seconds, outcome.curves if outcome else [], state is not None)
    store.save(run, entry, state)
    checkpoints.clear()
    return entry


def _entry(record: Mapping, seconds: float, curves: Sequence = (), has_state: bool = False) -> dict[str, Any]:
    return _plain({"record": record, "curves": curves, "seconds": seconds, "has_state": has_state})


def _plain(value: Any) -> Any:
    """JSON values only: NaN and infinities become null, tuples lists."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _start_worker(devices: Any) -> None:
    """Make a worker process single-threaded, bind it to its device, and let it end with its parent."""
    torch.set_num_threads(1)
    # weights that a penalty drives to zero pass through denormal numbers, which are slow
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # nothing here reads memory before writing it, and filling it costs up to a tenth of a small network's step
    torch.utils.deterministic.fill_uninitialized_memory = False
    global _worker_device
    _worker_device = devices.get() if devices is not None else None

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_worker_device: str | None = None


def _work(run: Run, store: Store, execution: ExecutionSettings, keep_state: bool) -> dict[str, Any]:
    if _worker_device is not None:
        execution = execution.model_copy(update={"device": _worker_device})
    return perform(run, store, execution, keep_state)


def in_order(runs: Sequence[Run]) -> list[Run]:
    """The runs and all they need, each once, needed ones first.

    Raises ValueError when two different runs bear the same name.
    """
    ordered: dict[str, Run] = {}

    def add(run: Run) -> None:
        if run.settings_hash in ordered:
            return
        for need in run.needs:
            add(need)
        ordered[run.settings_hash] = run

    for run in runs:
        add(run)
    names: dict[str, Run] = {}
    for run in ordered.values():
        other = names.setdefault(canonical(run.identity), run)
        if other is not run:
            raise ValueError(f"two different runs are called {run}")
    return list(ordered.values())


def execute(
    runs: Sequence[Run],
    store: Store,
    execution: ExecutionSettings,
    title: str,
    finished: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> list[dict[str, Any]]:
    """Execute all runs that are not finished yet, several at once, and return the entries of all, in order.

    finished: called with each entry as soon as it is there, also with those of an earlier attempt. A run that fails leaves a `failed` record and the others go on. Raises StageError for what concerns the stage: a
    full disk, a folder that cannot be written, a defect in the code.
    """
    ordered = in_order(runs)
    needed = {need.settings_hash for run in ordered for need in run.needs}
    entries: dict[str, dict[str, Any]] = {}
    for run in ordered:
        if entry := store.finished(run, run.settings_hash in needed):
            entries[run.settings_hash] = entry
            finished(entry)
    todo = [run for run in ordered if run.settings_hash not in entries]
    if todo:
        workers, devices = _workers(execution, len(todo))
        done = len(ordered) - len(todo)
        quiet = 1.0 if sys.stderr.isatty() else 15.0
        with tqdm(total=len(ordered), initial=done, desc=title, unit="run", mininterval=quiet) as bar:

            def done_with(entry: dict[str, Any]) -> None:
                entries[entry["record"]["settings_hash"]] = entry
                bar.update()
                finished(entry)

            _Scheduler(store, execution, workers, devices, needed, entries, done_with).execute(todo)
    return [entries[run.settings_hash] for run in ordered]


def _workers(execution: ExecutionSettings, most: int) -> tuple[int, list[str] | None]:
    device = Compute.choose(execution.device, execution.precision).device
    if device.type == "cuda":
        devices = (
            [str(device)]
            if device.index is not None
            else [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        )
        count = len(devices) if execution.workers == "auto" else execution.workers
        return min(count, most), [devices[i % len(devices)] for i in range(count)]
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available if execution.workers == "auto" else execution.workers, most), None


class _Scheduler:
    """Gives each run to a worker process as soon as what it needs is finished."""

    def __init__(self, store, execution, workers, devices, needed, entries, finish):
        self.store, self.execution, self.workers, self.devices = store, execution, workers, devices
        self.needed, self.entries, self.finish = needed, entries, finish
        self.running: dict[Future, Run] = {}
        self.defects: list[str] = []

    def execute(self, todo: list[Run]) -> None:
        waiting, suspects = list(todo), []
        while waiting or suspects:
            # after a worker has died, those that were running go on one by one, so that only the guilty one fails
            workers, batch = (1, [suspects.pop(0)]) if suspects else (self.workers, waiting)
            with self._pool(workers) as pool:
                try:
                    self._drain(pool, workers, batch)
                except BrokenProcessPool:
                    suspects += self._after_a_death(alone=workers == 1)
                except (OSError, KeyboardInterrupt) as error:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise StageError(self._stopped(error)) from None
        if self.defects:
            raise StageError(f"{len(self.defects)} runs stopped on an error: {'; '.join(self.defects[:3])}")

    def _pool(self, workers: int) -> ProcessPoolExecutor:
        # CUDA cannot be used after a fork; without it, workers come from a process that has imported torch once
        forks = not self.devices and "forkserver" in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if forks else "spawn")
        queue = None
        if forks:
            context.set_forkserver_preload([__name__])
        if self.devices:
            queue = context.Queue()
            for device in self.devices:
                queue.put(device)
        return ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(queue,))

    def _drain(self, pool: ProcessPoolExecutor, workers: int, waiting: list[Run]) -> None:
        while waiting or self.running:
            ready = (run for run in waiting if all(need.settings_hash in self.entries for need in run.needs))
            for run in list(itertools.islice(ready, workers - len(self.running))):
                waiting.remove(run)
                keep = run.settings_hash in self.needed
                self.running[pool.submit(_work, run, self.store, self.execution, keep)] = run
            if not self.running:
                # what is left needs a run that a defect stopped
                return waiting.clear()
            for future in wait(self.running, return_when=FIRST_COMPLETED).done:
                self._collect(future)

    def _collect(self, future: Future) -> None:
        try:
            entry = future.result()
        except (BrokenProcessPool, OSError):
            raise
        except Exception as error:
            run = self.running.pop(future)
            self.defects.append(f"{run}: {type(error).__name__}: {error}")
            traceback.print_exception(error)
        else:
            del self.running[future]
            self.finish(entry)

    def _after_a_death(self, alone: bool) -> list[Run]:
        """The runs that may have killed their worker; one that was alone with it is recorded as failed."""
        runs = list(self.running.values())
        self.running.clear()
        suspects = []
        for run in runs:
            entry = self.store.load(run)
            if entry is None and alone:
                reason = "its process died (killed, or the machine is out of memory)"
                entry = _entry(_record(run, "failed", reason=reason), 0.0)
                self.store.save(run, entry, None)
            if entry is None:
                suspects.append(run)
            else:
                self.finish(entry)
        return suspects

    def _stopped(self, error: BaseException) -> str:
        kept = f"{len(self.entries)} finished runs are kept in {self.store.folder}; the same command goes on from there"
        if isinstance(error, OSError):
            return f"{error.filename or self.store.folder}: {error.strerror or error}; {kept}"
        return f"interrupted; {kept}"


def environment(papers: Sequence[str], compute: Compute) -> dict[str, Any]:
    """What the records leave out: code, machine and versions."""
    cuda = compute.device.type == "cuda"
    return {
        "code": code_digest(tuple(papers)),
        "machine": {
            "device": torch.cuda.get_device_name(compute.device)
            if cuda
            else platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "system": platform.system(),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "precision": str(compute.autocast or torch.float32).removeprefix("torch."),
    }


def write_results(profile: Profile, paper: str, entries: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write `<paper>.jsonl` (records) and `<paper>.curves.jsonl` into `folder`/<profile>; returns the records' path."""
    target = folder / profile.name / f"{paper}.jsonl"
    records = [canonical(entry["record"]) for entry in entries]
    curves = [
        canonical({"settings_hash": e["record"]["settings_hash"], "curves": e["curves"]}) for e in entries
    ]
    write_atomically(target, "".join(line + "\n" for line in records).encode())
    write_atomically(target.with_suffix(".curves.jsonl"), "".join(line + "\n" for line in curves).encode())
    return target
