"""What the commands of `python -m replications` do."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.core.compute import Compute
from common.records import Entry
from common.settings import SettingsError
from common.stage import importing, pipeline, plan
from common.stage.papers import load
from common.stage.partial import PartialResults, partial_file
from common.stage.records import environment, results_files
from common.stage.scheduler import execute
from common.stage.store import SCRATCH, OutOfTime, StageError, Store, TimeBudget, write_atomically

if TYPE_CHECKING:
    from common.stage.tracking import StageLog

RESULTS = Path("results")


def status(command: Callable[[], None]) -> int:
    """The exit status of a command: 2 with one line on stderr if it cannot go on, 3 if its time is spent."""
    try:
        command()
    except OutOfTime as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        return 3
    except (SettingsError, StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: {error.filename}: {error.strerror}; finished runs are kept in {SCRATCH}",
            file=sys.stderr,
        )
        return 2
    return 0


def print_plan(params: str, profile_name: str | None, seconds: float) -> None:
    """Print what a profile costs on this machine. Raises SettingsError."""
    print(plan.plan(params, profile_name, seconds, RESULTS))


def print_claims(params: str, profile_name: str | None) -> None:
    """Print what each claim will compare in a profile. Raises SettingsError."""
    from common.stage import foreseen  # needs scipy, which training does not

    print(foreseen.table(params, profile_name))


def run_paper(paper: str, params: str, profile_name: str | None, ends: float) -> None:
    """Execute all runs of a paper in a profile, write its records and log them.

    ends: when to stop if they are not finished, as of `time.time()`. Raises SettingsError, StageError, OutOfTime.
    """
    begun = time.perf_counter()
    profile = load(paper, params, profile_name)
    listed = pipeline.listed(paper, profile)
    store = Store(SCRATCH / profile.name / paper, profile.execution)
    compute = Compute.choose(profile.execution.device, profile.execution.precision)
    about = environment(listed, compute, store)
    so_far = PartialResults(partial_file(RESULTS, profile.name, paper), about)
    with _tracking(paper, profile.name, about) as log, so_far:

        def finished(entry: Entry) -> None:
            log.add(entry)
            so_far.add(entry)

        try:
            entries = execute(listed, store, profile.execution, paper, finished, TimeBudget(ends))
        except StageError as stop:
            taken = f"`python -m replications import --partial` takes them from {so_far.file}"
            raise type(stop)(f"{stop}; {taken}") from None
        about |= {"wall_seconds": round(time.perf_counter() - begun, 1)}
        for path, content in results_files(profile.name, paper, entries, about).items():
            write_atomically(RESULTS / path, content)
    _report(log, f"`python -m replications run {paper}` logs what is missing without training again")
    for record in (entry.record for entry in entries):
        if record.status == "failed" and not record.is_lost_trial:
            print(f"failed: {paper}/{record.variant} seed {record.seed}: {record.reason}", file=sys.stderr)


def import_results(folder: Path, only: Sequence[str], params: str, unfinished: bool) -> None:
    """Take in the records of another machine, log them and have DVC accept those of complete stages.

    unfinished: also of stages that are not complete. Raises SettingsError, StageError.
    """
    stages = importing.take_in(folder, RESULTS, only, params, unfinished)
    for stage in stages:
        with _tracking(stage.paper, stage.profile, stage.environment) as log:
            for entry in stage.entries:
                log.add(entry)
        _report(log, "the same command logs what is missing")
        listed = f" of {len(stage.entries) + stage.unfinished}" if stage.unfinished else ""
        print(f"{stage.paper}: {len(stage.entries)}{listed} runs imported")
    complete = [stage.paper for stage in stages if not stage.unfinished]
    if complete and (refused := importing.accept(complete)):
        print(refused, file=sys.stderr)
    for stage in stages:
        if stage.unfinished:
            print(
                f"{stage.paper} is not complete, so DVC is not told of it and `dvc repro {stage.paper}` trains: "
                f"{plan.CONTINUES}. `dvc repro --single-item --force statistics report` judges what is there",
                file=sys.stderr,
            )


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

    def add(self, entry: Entry) -> None:
        pass


def _tracking(paper: str, profile: str, environment: Mapping[str, Any]) -> StageLog | _NoTracking:
    try:
        from common.stage.tracking import StageLog
    except ModuleNotFoundError as missing:
        print(f"{missing.name} is not installed here: nothing is logged to MLflow", file=sys.stderr)
        return _NoTracking()
    return StageLog(paper, profile, environment)
