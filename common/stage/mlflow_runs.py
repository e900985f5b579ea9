"""MLflow: every run of a stage in one experiment per paper, nested under the stage's run.

Only one thread of the stage's own process writes, so workers cannot collide in the database. Logging is idempotent: a
run is found again by its key, so a resumed or repeated stage adds what is missing and no twin.
"""

from __future__ import annotations

import getpass
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_DO_NOT_TRACK", "true")

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Run
from mlflow.exceptions import MlflowException
from sqlalchemy import event
from sqlalchemy.engine import Engine

from common.core.identity import digest
from common.naming import EXPERIMENT
from common.records import TRIAL, Record
from common.settings import ROOT, SettingsError
from common.stage import descriptions, rows
from common.stage.logged import Names, by_client, described, log_network, points, send
from common.stage.mlflow_store import (
    ARTIFACTS,
    await_answer,
    checkout,
    ready,
    store_uri,
)
from common.stage.tracking import StageLog, goes_on
from common.statistics.claims import CLAIMS_FILE, Claim, read

_DESCRIPTION = "mlflow.note.content"


@event.listens_for(Engine, "connect")
def _no_waiting_for_the_disk(connection: Any, _: Any) -> None:
    """Every run is a commit. A killed process still loses nothing; only a power cut could.

    What it could lose is a copy: the records are the truth, and a stage logs again what is missing.
    """
    if type(connection).__module__.startswith("sqlite3"):
        connection.execute("PRAGMA synchronous = OFF")


class Writer:
    """Writes what a stage's log is given."""

    def __init__(self, log: StageLog):
        self.log = log
        self._claims_file = ROOT / "replications" / log.paper / CLAIMS_FILE
        self._page = page_of(log.profile)
        self._accuracies: dict[tuple[str, int], list[float]] = {}
        self._names = Names()
        self._name = f"{log.paper} ({log.profile})"
        """Of the runs of stages."""
        self._seconds, self._count, self._failed = 0.0, 0, 0

    def write(self) -> None:
        """Log all entries until the stage ends. Raises StoreError and what MLflow does."""
        if mended := ready(self.log.uri):
            print(mended, file=sys.stderr)
        self.log.moves()
        self.log.making = False
        await_answer(self.log.uri)
        self.log.moves()
        mlflow.set_tracking_uri(self.log.uri)
        client = MlflowClient()
        claims = _claims(self._claims_file)
        experiment = _experiment(client, self.log.paper)
        about = descriptions.of_experiment(self.log.paper, claims, self._page)
        client.set_experiment_tag(experiment, _DESCRIPTION, about)
        known = {run.data.tags["run_key"]: run for run in self._ended(client, experiment)}
        ids = {key: run.info.run_id for key, run in known.items()}
        shared = {
            "profile": self.log.profile,
            "stage": self.log.paper,
            "origin": _origin(),
            "process": self.log.signature,
            "code": self.log.environment["code"],
        }
        shared |= _revision() | _source(self.log.paper)
        for group in ("machine", "versions"):
            shared |= {f"{group}.{key}": str(value) for key, value in self.log.environment[group].items()}
        parent = _unfinished(client, experiment, shared)
        quick = rows.write if self.log.uri.startswith("sqlite:") else by_client
        while (found := self.log.entries.get()) is not None:
            entry, network = found
            self._seconds += entry.seconds
            self._count += 1
            self._failed += entry.record.status == "failed"
            self._note(entry.record)
            run_key = _run_key(entry.record, self.log.environment)
            before = known.get(run_key)
            # a run that had failed may have been tried again
            if before is None or before.info.status == "FAILED" and entry.record.status == "ok":
                if parent is None:
                    parent = client.create_run(experiment, run_name=self._name, tags=shared).info.run_id
                text = descriptions.of_run(entry.record, claims, self._page)
                tags = {**shared, _DESCRIPTION: text}
                log = lambda way: ids.update(
                    {run_key: way(client, experiment, described(entry, parent, tags, run_key, self._names))}
                )
                if self._tried(partial(log, quick), partial(log, by_client)):
                    if before:
                        client.delete_run(before.info.run_id)
                    self.log.added += 1
            if network and run_key in ids and network.exists() and network.stat().st_size:
                self._tried(lambda: log_network(client, ids[run_key], network))
        if parent and self.log.complete:
            self._tried(lambda: self._end(client, experiment, parent))

    def _tried(self, log: Callable[[], object], again: Callable[[], object] | None = None) -> bool:
        """Whether something could be logged; it is tried a second time. Otherwise it is counted as missing."""
        try:
            log()
        except Exception:
            try:
                (again or log)()
            except Exception as error:
                self.log.error = self.log.error or error
                self.log.missing += 1
                return False
        self.log.moves()
        return True

    def _end(self, client: MlflowClient, experiment: str, parent: str) -> None:
        """Complete the run of the stage, and leave one of the runs that other writers have logged meanwhile as well."""
        totals = {"runs": self._count, "failed": self._failed, "seconds": self._seconds}
        send(client, parent, points(self._names, totals, self._averages()))
        if self._claims_file.is_file():
            client.log_artifact(parent, str(self._claims_file))
        client.set_terminated(parent)
        if len(list(_search(client, experiment, f"attributes.run_name = '{self._name}'"))) == 1:
            return  # nobody else has ever logged here, and to see that by the runs takes seconds
        first: dict[str, str] = {}
        for run in sorted(self._ended(client, experiment), key=lambda run: run.info.run_id):
            if first.setdefault(run.data.tags["run_key"], run.info.run_id) != run.info.run_id:
                with suppress(MlflowException):  # the other writer does the same
                    client.delete_run(run.info.run_id)

    def _ended(self, client: MlflowClient, experiment: str) -> Iterator[Run]:
        """The runs of the profile that the store holds whole."""
        text = f"tags.profile = '{self.log.profile}' and attributes.status != 'RUNNING'"
        for run in _search(client, experiment, text):
            self.log.moves()
            if "run_key" in run.data.tags:
                yield run

    def _note(self, record: Record) -> None:
        """Keep a test accuracy for the charts of the stage's run: one a variant, over its targets in %."""
        accuracy = record.metrics.get("test_accuracy")
        if accuracy is not None and not record.variant.startswith(TRIAL):
            name = f"accuracy/{record.dataset} {record.architecture}/{record.variant}"
            self._accuracies.setdefault((name, round(100 * record.target)), []).append(accuracy)

    def _averages(self) -> list[tuple[str, float, int]]:
        return [
            (name, sum(values) / len(values), step)
            for (name, step), values in sorted(self._accuracies.items())
        ]


def page_of(profile: str) -> Path:
    """The report's page of a profile, where the pipeline writes it."""
    return checkout() / "reports" / profile / "index.html"


def _claims(file: Path) -> tuple[Claim, ...]:
    """The claims for which runs are evidence; none where the file cannot be read, which the statistics will say."""
    try:
        return read(file).claims
    except SettingsError:
        return ()


def _source(paper: str) -> dict[str, str]:
    """Who ran what, in the words of MLflow's columns."""
    found = {"mlflow.source.name": f"python -m replications run {paper}", "mlflow.source.type": "LOCAL"}
    try:
        return found | {"mlflow.user": getpass.getuser()}
    except (KeyError, OSError):  # a user without a name
        return found


def _unfinished(client: MlflowClient, experiment: str, tags: Mapping[str, str]) -> str | None:
    """The stage's own run that a killed stage of this checkout has left unfinished, if there is one.

    Runs that were half logged when the stage was killed are deleted; they will be logged whole. Those of a process that goes
    on are left to it.
    """
    text = f"tags.profile = '{tags['profile']}' and tags.origin = '{tags['origin']}' and attributes.status = 'RUNNING'"
    parents = []
    for run in _search(client, experiment, text):
        if goes_on(run.data.tags.get("process", "")):
            continue
        if "mlflow.parentRunId" in run.data.tags:
            client.delete_run(run.info.run_id)
        else:
            parents.append(run.info.run_id)
    if not parents:
        return None
    client.set_tag(parents[0], "process", tags["process"])
    return parents[0]


def _experiment(client: MlflowClient, paper: str) -> str:
    name = EXPERIMENT.format(paper=paper)
    local = store_uri().startswith("sqlite:")
    artifacts = (checkout() / ARTIFACTS).as_uri() if local else None
    # the UI then opens on the runs, not on its pages for language models
    kind = {"mlflow.experimentKind": "custom_model_development"}
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts, tags=kind)
        except MlflowException:  # another process may have been the first
            if (found := client.get_experiment_by_name(name)) is None:
                raise
    if found.lifecycle_stage == LifecycleStage.DELETED:
        client.restore_experiment(found.experiment_id)
        print(f"MLflow: the deleted experiment {name} is restored, to log into it", file=sys.stderr)
    return found.experiment_id


def _run_key(record: Record, environment: Mapping[str, Any]) -> str:
    """What makes a run in the store the same as this one: settings, code and torch version."""
    return f"{record.settings_hash}-{environment['code'][:16]}-{environment['versions']['torch']}"


def _origin() -> str:
    """Names this checkout on this machine without disclosing either."""
    return digest([platform.node(), str(Path.cwd())])[:16]


def _search(client: MlflowClient, experiment: str, text: str) -> Iterator[Run]:
    token = None
    while True:
        page = client.search_runs([experiment], text, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _revision() -> dict[str, str]:
    def git(*arguments: str) -> str | None:
        found = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return found.stdout.strip() if found.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return {"git.commit": "unknown"}
    return {
        "mlflow.source.git.commit": commit,
        "git.commit": commit,
        "git.dirty": str(bool(git("status", "--porcelain"))),
    }
