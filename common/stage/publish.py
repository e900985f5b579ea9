"""`python -m common.stage.publish`: hangs the report and the verdicts of a profile on the stages' runs in MLflow.

The stage `publish` of the pipeline. A copy for readers of MLflow: when the store cannot be reached, it says so and the
pipeline goes on.
"""

from __future__ import annotations

from common import commandline

if __name__ == "__main__":
    commandline.listen()  # before what takes long to load

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from common.naming import EXPERIMENT
from common.reading import name_option
from common.stage.mlflow_store import PATIENCE, StoreError, await_answer, await_logging, store_uri
from common.stage.papers import papers


def publish(profile: str, files: Sequence[Path]) -> list[str]:
    """Log the files as artifacts of the last run of each paper's stage; returns the papers.

    Raises MlflowException, and StoreError where the store does not answer for `PATIENCE`.
    """
    done, failed = list[str](), list[Exception]()
    moved = [time.monotonic()]

    def work() -> None:
        try:
            _publish(profile, files, done, moved)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    if not await_logging(thread, lambda: moved[-1], lambda: PATIENCE):
        raise StoreError(f"{store_uri()} does not answer")
    for error in failed:
        raise error
    return done


def _publish(profile: str, files: Sequence[Path], done: list[str], moved: list[float]) -> None:
    """As `publish`, with the papers and the moments of the store's answers in the lists."""
    import mlflow
    from mlflow import MlflowClient

    await_answer(store_uri())
    mlflow.set_tracking_uri(store_uri())
    client = MlflowClient()
    for paper in papers():
        experiment = client.get_experiment_by_name(EXPERIMENT.format(paper=paper))
        if experiment is None:
            continue
        found = client.search_runs(
            [experiment.experiment_id],
            f"tags.profile = '{profile}' and params.variant IS NULL and attributes.status = 'FINISHED'",
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        for run in found:
            for file in files:
                client.log_artifact(run.info.run_id, str(file))
                moved.append(time.monotonic())
            done.append(paper)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m common.stage.publish", description=__doc__)
    parser.add_argument("--profile", required=True, type=name_option, help="name of the profile")
    parser.add_argument("files", type=Path, nargs="+", help="what to log as artifacts")
    options = parser.parse_args(arguments)
    if missing := [file for file in options.files if not file.is_file()]:
        print(f"error: {missing[0]}: no such file", file=sys.stderr)
        return 2
    try:
        done = publish(options.profile, options.files)
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed here: nothing is published in MLflow", file=sys.stderr)
    except Exception as error:  # a copy must never cost the pipeline its end
        print(f"publishing in MLflow failed ({type(error).__name__}: {error})", file=sys.stderr)
    else:
        print(f"published with the runs of {', '.join(done) or 'no stage'}")
    return 0


if __name__ == "__main__":
    commandline.run(main)
