"""What a run is, its record, where it is kept and where it executes.

A protocol lists `Run`s. Each goes through its paper's `execute` in a worker process and leaves one record. Finished
runs are kept in a scratch folder under a key made of everything that determines them, so that an interrupted stage
resumes where it was, and work that several runs share (a dense network, say) is done once: it is itself a run, which
others list in `needs`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import queue
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from common import datasets, processes
from common.settings import ROOT, DatasetSettings, ExecutionSettings, Profile, canonical, digest
from common.training import Compute, Hooks, RunFailed, Trainer, out_of_memory, release_memory

SCRATCH = Path(".runs")
CHECKPOINT_SECONDS = 60.0
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


RUNS_PER_GPU = 8
"""Narrow networks leave most of a GPU idle: so many are trained on one at once."""


class StageError(Exception):
    """The stage cannot go on; the message is one clear line. Finished runs are kept."""


class OutOfTime(StageError):
    """The time budget is spent; what is finished is kept, and a started run in the state of its last epoch."""


@dataclass
class TimeBudget:
    """The moment (`time.time()`) at which training is to stop at the end of the epoch that it is in."""

    ends: float = math.inf

    @property
    def spent(self) -> bool:
        return time.time() >= self.ends


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
            validation=datasets.Batches(data, "validation"),
            seed=seed,
            compute=self.compute,
            checkpoints=self.checkpoints and self.checkpoints.of_next_trainer(),
            **options,
        )

    def scores(self, trainer: Trainer, data: datasets.Dataset) -> dict[str, float]:
        """test_accuracy, test_loss, validation_accuracy and validation_loss of the trainer's network as it is now."""
        found = {}
        for split in ("validation", "test"):
            scores = trainer.evaluate(datasets.Batches(data, split))
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

    def __init__(self, folder: Path, budget: TimeBudget):
        self._folder, self._budget = folder, budget
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
            save_checked(path, _pack(state()))
            self._last = time.monotonic()
        if self._budget.spent:
            raise OutOfTime


class RunCheckpoints:
    """The checkpoints of one run; its trainers are numbered in the order in which it makes them."""

    def __init__(self, folder: Path, budget: TimeBudget | None = None):
        self._folder, self._budget = folder, budget or TimeBudget()
        self._trainers = itertools.count()

    def of_next_trainer(self) -> ScratchCheckpoints:
        """Where the next trainer of the run keeps its state."""
        return ScratchCheckpoints(self._folder / f"trainer-{next(self._trainers)}", self._budget)

    def clear(self) -> None:
        """Remove all states; called when the run has its record."""
        shutil.rmtree(self._folder, ignore_errors=True)


class Store:
    """The scratch folder of a stage's finished runs.

    papers: the folders of `replications` whose code it executes. execution: what the runs are executed with.
    """

    def __init__(self, folder: Path, papers: Sequence[str], execution: ExecutionSettings | None = None):
        self.folder = folder
        execution = execution or ExecutionSettings()
        compute = Compute.choose(execution.device, execution.precision, execution.compilation)
        # a GPU gives the same numbers whatever its index
        numerics = [compute.device.type, str(compute.autocast), compute.recorded, compute.compiled]
        numerics += [execution.deterministic, execution.threads, torch.__version__]
        self._shared = [code_digest(tuple(papers)), numerics]

    def key(self, run: Run) -> str:
        """Name under which a run is kept: digest of settings, code, data, number format and torch version."""
        needs = [self.key(need) for need in run.needs]
        return digest([run.settings_hash, self._shared, data_prints(run), needs])[:32]

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

    def checkpoints(self, run: Run, budget: TimeBudget | None = None) -> RunCheckpoints:
        """Where the run keeps its state while it trains, and when it stops doing so (default: at its end)."""
        return RunCheckpoints(self.folder / f"{self.key(run)}.part", budget)


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


def perform(
    run: Run, store: Store, execution: ExecutionSettings, keep_state: bool, budget: TimeBudget | None = None
) -> dict[str, Any] | None:
    """Execute one run in this process and keep it.

    Returns its entry {"record", "curves", "seconds", ...}, or None if the time budget ended before the run did.
    """
    begun = time.perf_counter()
    needs = tuple(Needed(store.load(need)["record"], store.state(need)) for need in run.needs)
    lost = [(need, n.record) for need, n in zip(run.needs, needs) if n.record["status"] != "ok"]
    checkpoints = store.checkpoints(run, budget)
    outcome, reason = None, None
    if lost:
        reason = f"it starts from {lost[0][0]}, which failed: {lost[0][1]['reason']}"
    else:
        compute = Compute.choose(execution.device, execution.precision, execution.compilation)
        context = Context(run, compute, needs, checkpoints)
        try:
            outcome = importlib.import_module(f"replications.{run.paper}.protocol").execute(run, context)
        except OutOfTime:
            return None
        except RunFailed as failure:
            reason = str(failure)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            reason = f"out of memory on {compute.device} outside training; lower its batch size or width"
        if reason:
            release_memory(compute.device)
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


def prepare_process(execution: ExecutionSettings) -> None:
    """Make a process that trains repeatable, and single-threaded unless the settings say otherwise."""
    torch.set_num_threads(execution.threads)
    # weights that a penalty drives to zero pass through denormal numbers, which are slow
    torch.set_flush_denormal(True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not repeatable
    torch.use_deterministic_algorithms(execution.deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not execution.deterministic
    # nothing here reads memory before writing it, and filling it costs up to a tenth of a small network's step
    torch.utils.deterministic.fill_uninitialized_memory = False
    _keep_memory()


def _keep_memory() -> None:
    """Let the C library keep freed memory: fetching the same pages anew in each step costs up to half of it."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        most_mappings, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(most_mappings, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def _start_worker(execution: ExecutionSettings) -> None:
    """Prepare a worker process and let it end with its parent."""
    prepare_process(execution)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_own = threading.local()


def _start_thread(devices: queue.SimpleQueue[str]) -> None:
    """Bind a thread that trains on a GPU to that device and to a stream of its own."""
    _own.device = devices.get()
    torch.cuda.set_device(_own.device)
    torch.cuda.set_stream(torch.cuda.Stream())


def _work(
    run: Run, store: Store, execution: ExecutionSettings, keep_state: bool, budget: TimeBudget
) -> dict[str, Any] | None:
    if device := getattr(_own, "device", None):
        execution = execution.model_copy(update={"device": device})
    return None if budget.spent else perform(run, store, execution, keep_state, budget)


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
    budget: TimeBudget | None = None,
) -> list[dict[str, Any]]:
    """Execute all runs that are not finished yet, several at once, and return the entries of all, in order.

    finished: called with each entry as soon as it is there, also with those of an earlier attempt. budget: when to stop;
    none by default. A run that fails leaves a `failed` record and the others go on. Raises StageError for what
    concerns the stage: a full disk, a folder that cannot be written, a defect in the code; and OutOfTime.
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
        workers, devices = training_slots(execution, len(todo))
        done = len(ordered) - len(todo)
        quiet = 1.0 if sys.stderr.isatty() else 15.0
        with tqdm(total=len(ordered), initial=done, desc=title, unit="run", mininterval=quiet) as bar:

            def done_with(entry: dict[str, Any]) -> None:
                entries[entry["record"]["settings_hash"]] = entry
                bar.update()
                finished(entry)

            scheduler = _Scheduler(
                store, execution, workers, devices, needed, entries, done_with, budget or TimeBudget()
            )
            scheduler.execute(todo)
    return [entries[run.settings_hash] for run in ordered]


def training_slots(execution: ExecutionSettings, most: int) -> tuple[int, list[str]]:
    """How many runs train at once, and on which GPU each (none: on the CPU)."""
    device = Compute.choose(execution.device, execution.precision).device
    if device.type == "cuda":
        every = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        devices = every if device.index is None else [str(device)]
        count = RUNS_PER_GPU * len(devices) if execution.workers == "auto" else execution.workers
        return min(count, most), [devices[i % len(devices)] for i in range(count)]
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = max(1, available // execution.threads) if execution.workers == "auto" else execution.workers
    return min(count, most), []


class _Scheduler:
    """Gives each run to a worker as soon as what it needs is finished.

    A worker is a process on a CPU, and on a GPU a thread with a stream of its own: kernels of several processes would
    take turns there.
    """

    def __init__(self, store, execution, workers, devices, needed, entries, finish, budget):
        self.store, self.execution, self.workers, self.devices = store, execution, workers, devices
        self.needed, self.entries, self.finish, self.budget = needed, entries, finish, budget
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
                    self.budget.ends = 0.0  # threads stop at the end of their epoch
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise StageError(self._stopped(error)) from None
        if self.defects:
            raise StageError(f"{len(self.defects)} runs stopped on an error: {'; '.join(self.defects[:3])}")
        if any(run.settings_hash not in self.entries for run in todo):
            raise OutOfTime(f"the time budget is spent; {self._kept()}")

    def _pool(self, workers: int) -> Executor:
        if self.devices:
            prepare_process(self.execution)
            devices: queue.SimpleQueue[str] = queue.SimpleQueue()
            for device in self.devices:
                devices.put(device)
            return ThreadPoolExecutor(workers, initializer=_start_thread, initargs=(devices,))
        start = processes.context()
        return ProcessPoolExecutor(workers, start, initializer=_start_worker, initargs=(self.execution,))

    def _drain(self, pool: Executor, workers: int, waiting: list[Run]) -> None:
        while waiting or self.running:
            if self.budget.spent:
                waiting.clear()
            ready = (run for run in waiting if all(need.settings_hash in self.entries for need in run.needs))
            for run in list(itertools.islice(ready, workers - len(self.running))):
                waiting.remove(run)
                keep = run.settings_hash in self.needed
                future = pool.submit(_work, run, self.store, self.execution, keep, self.budget)
                self.running[future] = run
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
            if entry is not None:
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

    def _kept(self) -> str:
        return f"{len(self.entries)} finished runs are kept in {self.store.folder}; the same command goes on from there"

    def _stopped(self, error: BaseException) -> str:
        if isinstance(error, OSError):
            return f"{error.filename or self.store.folder}: {error.strerror or error}; {self._kept()}"
        return f"interrupted; {self._kept()}"


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
