"""`python -m replications run PAPER`: the stage of a paper, from settings to records; what `dvc repro` calls.

Beside it, `plan` says what a profile will cost on this machine, and `import` takes in the results of another one.
"""

from __future__ import annotations

import os

# threads that wait must not spin while other processes work; read when torch is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import importing, pipeline, planning, runs
from common.settings import PARAMS_FILE, SettingsError, load
from common.training import Compute

if TYPE_CHECKING:
    from common.tracking import StageLog

RESULTS = Path("results")


def run_paper(paper: str, params: str, profile_name: str | None, budget: runs.TimeBudget) -> None:
    """Execute all runs of a paper in a profile, write its records and log them. Raises SettingsError, StageError."""
    begun = time.perf_counter()
    profile = load(paper, params, profile_name)
    planned = pipeline.planned(paper, profile)
    code = pipeline.code_folders(paper)
    store = runs.Store(runs.SCRATCH / profile.name / paper, code, profile.execution)
    environment = runs.environment(
        code, Compute.choose(profile.execution.device, profile.execution.precision)
    )
    with _tracking(paper, profile.name, environment) as log:
        entries = runs.execute(planned, store, profile.execution, paper, log.add, budget)
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


def _time_budget(text: str) -> runs.TimeBudget:
    """`90s`, `25m` or `2h` from now."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 25m or 2h")
    return runs.TimeBudget(time.time() + float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]])


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m replications", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute the runs of one paper")
    run.add_argument("paper")
    run.add_argument("--params", default=PARAMS_FILE, help="settings file (default: %(default)s)")
    run.add_argument("--profile", help="profile to use in place of the one that the file selects")
    run.add_argument(
        "--time-budget",
        type=_time_budget,
        default=runs.TimeBudget(),
        metavar="TIME",
        help="stop cleanly after 90s, 25m, 2h, ... (exit status 3); the same command goes on, also elsewhere from a copy of .runs",
    )
    plan = commands.add_parser("plan", help="what a profile costs on this machine, and what of it is done")
    plan.add_argument("--params", default=PARAMS_FILE, help="settings file (default: %(default)s)")
    plan.add_argument("--profile", help="profile to use in place of the one that the file selects")
    plan.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="how long the rehearsal may take; 0 only counts runs (default: %(default)s)",
    )
    take = commands.add_parser("import", help="take in the results of another machine without training")
    take.add_argument("folder", type=Path, help="a copy of its folder `results`")
    take.add_argument("--paper", action="append", default=[], help="only this one; may be repeated")
    take.add_argument("--params", default=PARAMS_FILE, help="settings file (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.command == "run":
            run_paper(options.paper, options.params, options.profile, options.time_budget)
        elif options.command == "plan":
            print(planning.plan(options.params, options.profile, options.seconds, RESULTS))
        else:
            import_results(options.folder, options.paper, options.params)
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


if __name__ == "__main__":
    sys.exit(main())
