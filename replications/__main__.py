"""`python -m replications run PAPER`: the stage of a paper, from settings to records.

What `dvc repro` calls; see `dvc.yaml`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

from common import runs
from common.settings import PARAMS_FILE, SettingsError, load
from common.training import Compute

RESULTS = Path("results")


def run_paper(paper: str, params: str, profile_name: str | None) -> None:
    """Execute all runs of a paper in a profile, write its records and log them. Raises SettingsError, StageError."""
    begun = time.perf_counter()
    profile = load(paper, params, profile_name)
    protocol = importlib.import_module(f"replications.{paper}.protocol")
    planned = protocol.runs(profile)
    # a comparison of papers names the folders whose code it runs
    code = getattr(protocol, "PAPERS", (paper,))
    store = runs.Store(runs.SCRATCH / profile.name / paper, code)
    environment = runs.environment(
        code, Compute.choose(profile.execution.device, profile.execution.precision)
    )
    with _tracking(paper, profile.name, environment) as log:
        entries = runs.execute(planned, store, profile.execution, paper, log.add)
        runs.write_results(profile, paper, entries, RESULTS)
    if log.error:
        print(
            f"MLflow logging failed ({type(log.error).__name__}: {log.error}). The records are complete; "
            f"`python -m replications run {paper}` logs what is missing without training again.",
            file=sys.stderr,
        )
    environment |= {"seconds": {entry["record"]["settings_hash"]: entry["seconds"] for entry in entries}}
    environment |= {"wall_seconds": round(time.perf_counter() - begun, 1)}
    beside = RESULTS / "environment" / profile.name / f"{paper}.json"
    runs.write_atomically(beside, json.dumps(environment, indent=1, sort_keys=True).encode())
    for record in (entry["record"] for entry in entries if entry["record"]["status"] != "ok"):
        print(
            f"failed: {paper}/{record['variant']} seed {record['seed']}: {record['reason']}", file=sys.stderr
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


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m replications", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute the runs of one paper")
    run.add_argument("paper")
    run.add_argument("--params", default=PARAMS_FILE, help="settings file (default: %(default)s)")
    run.add_argument("--profile", help="profile to use in place of the one that the file selects")
    options = parser.parse_args(arguments)
    try:
        run_paper(options.paper, options.params, options.profile)
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
