"""`python -m replications run PAPER`: the stage of a paper, from settings to records.

What `dvc repro` calls; see `dvc.yaml`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from common import runs
from common.settings import PARAMS_FILE, SettingsError, load
from common.training import Compute

RESULTS = Path("results")


def run_paper(paper: str, params: str, profile_name: str | None) -> None:
    """Execute all runs of a paper in a profile, write its records and log them. Raises SettingsError, StageError."""
    profile = load(paper, params, profile_name)
    protocol = importlib.import_module(f"replications.{paper}.protocol")
    planned = protocol.runs(profile)
    # a comparison of papers names the folders whose code it runs
    code = getattr(protocol, "PAPERS", (paper,))
    store = runs.Store(runs.SCRATCH / profile.name / paper, code)
    entries = runs.execute(planned, store, profile.execution, paper)
    environment = runs.environment(entries, Compute.choose(profile.execution.device, profile.execution.precision))
    environment |= {"code": runs.code_digest(code)}
    runs.write_results(profile, paper, entries, RESULTS)
    beside = RESULTS / "environment" / profile.name / f"{paper}.json"
    runs.write_atomically(beside, json.dumps(environment, indent=1, sort_keys=True).encode())
    failed = [entry["record"] for entry in entries if entry["record"]["status"] != "ok"]
    for record in failed:
        print(f"failed: {paper}/{record['variant']} seed {record['seed']}: {record['reason']}", file=sys.stderr)
    _track(paper, profile.name, entries, environment)


def _track(paper: str, profile: str, entries: list[dict], environment: dict) -> None:
    try:
        from common import tracking
    except ModuleNotFoundError as missing:
        print(f"{missing.name} is not installed here: nothing is logged to MLflow", file=sys.stderr)
        return
    try:
        tracking.log_stage(paper, profile, entries, environment)
    except Exception as error:  # tracking must never cost a finished stage
        command = f"python -m replications run {paper}"
        print(f"MLflow logging failed ({type(error).__name__}: {error}); the records are complete. "
              f"`{command}` logs what is missing without training again.", file=sys.stderr)


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
        print(f"error: {error.filename}: {error.strerror}; finished runs are kept in {runs.SCRATCH}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
