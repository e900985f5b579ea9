"""MLflow: every run of a stage in one experiment per paper, nested under the stage's run.

Only one thread of the stage's own process writes, so workers cannot collide in the database. Logging is idempotent: a
run is found again by its key, so a resumed or repeated stage adds what is missing and no twin.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import queue
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_DO_NOT_TRACK", "true")

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset as MlflowDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run, RunTag
from sqlalchemy import event
from sqlalchemy.engine import Engine

from common.core.identity import digest
from common.naming import EXPERIMENT
from common.records import TRIAL, Entry, Record
from common.settings import ROOT, SettingsError
from common.stage import descriptions
from common.statistics.claims import CLAIMS_FILE, Claim, read

_DESCRIPTION = "mlflow.note.content"
_NONE: Mapping[str, Any] = MappingProxyType({})
_METRICS_PER_CALL, _PARAMS_PER_CALL, _VALUE_LENGTH = 1000, 100, 6000  # limits of the store


@event.listens_for(Engine, "connect")
def _no_waiting_for_the_disk(connection: Any, _: Any) -> None:
    """MLflow commits about nine times a run. A killed process still loses nothing; only a power cut could.

    What it could lose is a copy: the records are the truth, and a stage logs again what is missing.
    """
    if type(connection).__module__.startswith("sqlite3"):
        connection.execute("PRAGMA synchronous = OFF")


def store_uri() -> str:
    """The tracking server of MLFLOW_TRACKING_URI, or the project's own SQLite file."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


class StageLog:
    """Logs the runs of a stage while it goes on, from a thread of its own; use it as a context manager.

    environment: `code`, `machine` and `versions` as `common.stage.records.environment` returns them. A run that the store already
    holds is passed over. When the store cannot be reached, the stage goes on and `error` says why; runs that were not
    logged are logged the next time the stage is run.
    """

    def __init__(self, paper: str, profile: str, environment: Mapping[str, Any]):
        self.paper, self.profile, self.environment = paper, profile, environment
        self.error: Exception | None = None
        self._claims_file = ROOT / "replications" / paper / CLAIMS_FILE
        self._page = page_of(profile)
        self._accuracies: dict[tuple[str, int], list[float]] = {}
        self.added = 0
        self._entries: queue.SimpleQueue[tuple[Entry, Path | None] | None] = queue.SimpleQueue()
        self._seconds, self._count, self._failed = 0.0, 0, 0
        self._thread = threading.Thread(target=self._log, daemon=True)

    def __enter__(self) -> StageLog:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self._complete = kind is None
        self._entries.put(None)
        self._thread.join()

    def add(self, entry: Entry, network: Path | None = None) -> None:
        """Log one entry, and its network where that is in a file; returns at once."""
        self._entries.put((entry, network))

    def _log(self) -> None:
        try:
            self._drain()
        except Exception as error:  # tracking must never cost a stage its runs
            self.error = error

    def _drain(self) -> None:
        mlflow.set_tracking_uri(store_uri())
        client = MlflowClient()
        claims = _claims(self._claims_file)
        experiment = _experiment(client, self.paper)
        about = descriptions.of_experiment(self.paper, claims, self._page)
        client.set_experiment_tag(experiment, _DESCRIPTION, about)
        known = {
            run.data.tags["run_key"]: run.info.run_id
            for run in _search(
                client, experiment, f"tags.profile = '{self.profile}' and attributes.status != 'RUNNING'"
            )
            if "run_key" in run.data.tags
        }
        shared = {
            "profile": self.profile,
            "stage": self.paper,
            "origin": _origin(),
            "code": self.environment["code"],
        }
        shared |= _revision() | _source(self.paper)
        for group in ("machine", "versions"):
            shared |= {f"{group}.{key}": str(value) for key, value in self.environment[group].items()}
        parent = None
        while (found := self._entries.get()) is not None:
            entry, network = found
            self._seconds += entry.seconds
            self._count += 1
            self._failed += entry.record.status == "failed"
            self._note(entry.record)
            run_key = _run_key(entry.record, self.environment)
            if run_key not in known:
                parent = parent or _stage_run(client, experiment, self.paper, shared)
                text = descriptions.of_run(entry.record, claims, self._page)
                known[run_key] = _log_run(
                    client, experiment, parent, entry, {**shared, _DESCRIPTION: text}, run_key
                )
                self.added += 1
            if network and network.exists() and network.stat().st_size:
                _log_network(client, known[run_key], network)
        if parent and self._complete:
            totals = {"runs": self._count, "failed": self._failed, "seconds": self._seconds}
            _send(client, parent, metrics=totals, steps=self._averages())
            if self._claims_file.is_file():
                client.log_artifact(parent, str(self._claims_file))
            client.set_terminated(parent)

    def _note(self, record: Record) -> None:
        """Keep a test accuracy for the charts of the stage's run: one a variant, over its targets in %."""
        accuracy = record.metrics.get("test_accuracy")
        if accuracy is not None and not record.variant.startswith(TRIAL):
            name = f"accuracy/{record.dataset} {record.architecture}/{record.variant}"
            key = re.sub(r"[^\w\-. :/]", "_", name), round(100 * record.target)
            self._accuracies.setdefault(key, []).append(accuracy)

    def _averages(self) -> list[Metric]:
        now = _milliseconds(time.time())
        return [
            Metric(name, sum(values) / len(values), now, step)
            for (name, step), values in sorted(self._accuracies.items())
        ]


def page_of(profile: str) -> Path:
    """The report's page of a profile, where the pipeline writes it."""
    return Path("reports", profile, "index.html").resolve()


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


def _stage_run(client: MlflowClient, experiment: str, paper: str, tags: Mapping[str, str]) -> str:
    """The stage's own run: the one that a killed stage of this checkout left unfinished, or a new one.

    Runs that were half logged when the stage was killed are deleted; they will be logged whole.
    """
    unfinished = f"tags.profile = '{tags['profile']}' and tags.origin = '{tags['origin']}' and attributes.status = 'RUNNING'"
    parents = []
    for run in _search(client, experiment, unfinished):
        if "mlflow.parentRunId" in run.data.tags:
            client.delete_run(run.info.run_id)
        else:
            parents.append(run.info.run_id)
    if parents:
        return parents[0]
    return client.create_run(experiment, run_name=f"{paper} ({tags['profile']})", tags=dict(tags)).info.run_id


def _experiment(client: MlflowClient, paper: str) -> str:
    name = EXPERIMENT.format(paper=paper)
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    local = store_uri().startswith("sqlite:")
    artifacts = Path("mlartifacts").resolve().as_uri() if local else None
    # the UI then opens on the runs, not on its pages for language models
    kind = {"mlflow.experimentKind": "custom_model_development"}
    return client.create_experiment(name, artifact_location=artifacts, tags=kind)


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


def _log_run(
    client: MlflowClient,
    experiment: str,
    parent: str,
    entry: Entry,
    shared: Mapping[str, str],
    run_key: str,
) -> str:
    """Log a run and return its id."""
    record = entry.record
    # machine and versions stand at the stage's run, which is the parent, unless another machine executed this one
    own = {key: value for key, value in shared.items() if not key.startswith(("machine.", "versions."))}
    machine = {f"machine.{key}": str(value) for key, value in (entry.machine or {}).items()}
    own |= {key: value for key, value in machine.items() if shared.get(key) != value}
    tags = {**own, **{k: str(v) for k, v in record.identity.items()}, "mlflow.parentRunId": parent}
    for name in ("status", "settings_hash", "failure", "reason", "device", "precision"):
        if (value := getattr(record, name)) is not None:
            tags[name] = value[:_VALUE_LENGTH]
    name = f"{record.variant} {record.architecture} t={record.target:g} s={record.seed}"
    ended = time.time() if entry.ended is None else entry.ended
    started = _milliseconds(ended - entry.seconds)
    run_id = client.create_run(experiment, started, run_name=name, tags=tags).info.run_id
    params = {**dict(_flat("", record.settings)), **_trained(entry), **_identity(record)}
    # as numbers, too, since MLflow compares params as text
    numbers = {"target": record.target, "seed": float(record.seed), "seconds": entry.seconds}
    numbers |= {**_numbers("", record.metrics), **_numbers("cost.", record.cost)}
    numbers |= _numbers("measured.", entry.measured or {})
    # the key by which the run is found again comes last: half a run is never taken for a whole one
    _send(client, run_id, params=params, metrics=numbers, curves=entry.curves, tags={"run_key": run_key})
    source = json.dumps(record.settings.get("data"))
    inputs = [
        DatasetInput(
            MlflowDataset(record.dataset, fingerprint[:32], "local", source),
            [InputTag("mlflow.data.context", "train")],
        )
        for fingerprint in record.data
    ]
    if inputs:
        client.log_inputs(run_id, inputs)
    status = "FINISHED" if record.status == "ok" else "FAILED"
    client.set_terminated(run_id, status, _milliseconds(ended))
    return run_id


def _log_network(client: MlflowClient, run_id: str, network: Path) -> None:
    """Hang a network on its run, once."""
    if not client.list_artifacts(run_id, "network"):
        client.log_artifact(run_id, str(network), "network")


def _identity(record: Record) -> dict[str, Any]:
    """What names the run, as the filters on the report's page have it."""
    return {
        name: f"{v:g}" if isinstance(v, float) else v
        for name, v in record.identity.items()
        if name != "paper"
    }


def _trained(entry: Entry) -> dict[str, Any]:
    """What the run was trained with in the end, where its settings leave a choice: what tuning chose, epochs, rate."""
    chosen = entry.record.details.get("chosen")
    found = {} if chosen is None else dict(_flat("chosen", chosen))
    rates = [rate for row in entry.curves if isinstance(rate := row.get("lr"), (int, float))]
    if entry.curves:
        found["trained.epochs"] = len(entry.curves)
    if rates:
        found["trained.learning_rate"] = f"{max(rates):.6g}"
    return found


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), item)
    else:
        yield prefix, value


def _numbers(prefix: str, values: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{prefix}{key}": float(value)
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _send(
    client: MlflowClient,
    run_id: str,
    *,
    params: Mapping[str, Any] = _NONE,
    metrics: Mapping[str, float] = _NONE,
    curves: Sequence[Mapping[str, Any]] = (),
    steps: Sequence[Metric] = (),
    tags: Mapping[str, str] = _NONE,
) -> None:
    """Send everything in as few calls as the store's limits allow, the tags in the last one."""
    now = _milliseconds(time.time())
    rows = [*(Metric(key, value, now, 0) for key, value in metrics.items()), *steps]
    for step, row in enumerate(curves):
        rows += [
            Metric(f"curve/{key}", value, now, step)
            for key, value in _numbers("", row).items()
            if key != "epoch"
        ]
    texts = [Param(key, str(value)[:_VALUE_LENGTH]) for key, value in params.items()]
    while len(rows) > _METRICS_PER_CALL or len(texts) > _PARAMS_PER_CALL:
        client.log_batch(run_id, rows[:_METRICS_PER_CALL], texts[:_PARAMS_PER_CALL])
        rows, texts = rows[_METRICS_PER_CALL:], texts[_PARAMS_PER_CALL:]
    client.log_batch(run_id, rows, texts, [RunTag(key, value) for key, value in tags.items()])


def _milliseconds(moment: float) -> int:
    return int(1000 * moment)


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
