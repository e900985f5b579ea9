"""What the commands of `python -m replications` do."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import importing, pipeline, planning, runs
from common.settings import SettingsError, load
from common.training import Compute

if TYPE_CHECKING:
    from common.tracking import StageLog

RESULTS = Path("results")


def status(command: Callable[[], None]) -> int:
    """The exit status of a command: 2 with one line on stderr if it cannot go on, 3 if its time is spent."""
    try:
        command()
    except runs.OutOfTime as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        return 3
    except (SettingsError, runs.StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: {error.filename}: {error.strerror}; finished runs are kept in {runs.SCRATCH}",
            file=sys.stderr,
        )
        return 2
    return 0


def print_plan(params: str, profile_name: str | None, seconds: float) -> None:
    """Print what a profile costs on this machine. Raises SettingsError."""
    print(planning.plan(params, profile_name, seconds, RESULTS))


def run_paper(paper: str, params: str, profile_name: str | None, ends: float) -> None:
    """Execute all runs of a paper in a profile, write its records and log them.

    ends: when to stop if they are not finished, as of `time.time()`. Raises SettingsError, StageError, OutOfTime.
    """
    begun = time.perf_counter()
    profile = load(paper, params, profile_name)
    planned = pipeline.planned(paper, profile)
    code = pipeline.code_folders(paper)
    store = runs.Store(runs.SCRATCH / profile.name / paper, code, profile.execution)
    environment = runs.environment(
        code, Compute.choose(profile.execution.device, profile.execution.precision)
    )
    with _tracking(paper, profile.name, environment) as log:
        entries = runs.execute(planned, store, profile.execution, paper, log.add, runs.TimeBudget(ends))
        records = runs.write_results(profile, paper, entries, RESULTS)
    _report(log, f"`python -m replications run {paper}` logs what is missing without training again")
    environment |= {"seconds": {entry["record"]["settings_hash"]: entry["seconds"] for entry in entries}}
    environment |= {"wall_seconds": round(time.perf_counter() - begun, 1)}
    # by which an import on another machine knows that they are whole
    files = (records, records.with_suffix(".curves.jsonl"))
    environment |= {"sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}}
    beside = RESULTS / "environment" / profile.name / f"{paper}.json"
    runs.write_atomically(beside, json.dumps(environment, indent=1, sort_keys=True).encode())
    for record in (entry["record"] for entry in entries if entry["record"]["status"] != "ok"):
        print(
            f"failed: {paper}/{record['variant']} seed {record['seed']}: {record['reason']}", file=sys.stderr
        )


def import_results(folder: Path, only: Sequence[str], params: str) -> None:
    """Take in the records of another machine, log them and have DVC accept them. Raises SettingsError, StageError."""
    stages = importing.take_in(folder, RESULTS, only, params)
    for stage in stages:
        with _tracking(stage.paper, stage.profile, stage.environment) as log:
            for entry in stage.entries:
                log.add(entry)
        _report(log, "the same command logs what is missing")
        print(f"{stage.paper}: {len(stage.entries)} runs imported")
    if refused := importing.accept([stage.paper for stage in stages]):
        print(refused, file=sys.stderr)


def _report(log: StageLog | _NoTracking, remedy: str) -> None:
    if log.error:
        print(
            f"MLflow logging failed ({type(log.error).__name__}: {log.error}). The records are complete; {remedy}.",
            file=sys.stderr,
        )


class _NoTracking:
    """Stands in where MLflow is not installed."""

    error = None

    def __enter__(self) -> _NoTracking:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, entry: dict) -> None:
        pass


def _tracking(paper: str, profile: str, environment: dict):
    try:
        from common.tracking import StageLog
    except ModuleNotFoundError as missing:
        print(f"{missing.name} is not installed here: nothing is logged to MLflow", file=sys.stderr)
        return _NoTracking()
    return StageLog(paper, profile, environment)
