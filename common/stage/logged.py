"""How a run of the suite becomes one of MLflow: its parameters, metrics, curves and tags, within the limits of the store."""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset as MlflowDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag

from common.records import Entry, Record

_NONE: Mapping[str, Any] = MappingProxyType({})
# limits of the store
_ENTITIES_PER_CALL, _PARAMS_PER_CALL, _VALUE_LENGTH, _NAME_LENGTH = 1000, 100, 6000, 250

Point = tuple[str, float, int, int]
"""A metric: name, value, moment in milliseconds, step."""


@dataclass(frozen=True)
class Run:
    """A finished run as MLflow has it, with names and texts that the store takes; moments are in milliseconds."""

    name: str
    started: int
    ended: int
    status: str
    tags: dict[str, str]
    run_key: str
    """One more tag: the key by which a run that is whole is found again."""
    params: Mapping[str, str]
    points: Sequence[Point]
    inputs: Sequence[DatasetInput]


def described(entry: Entry, parent: str, shared: Mapping[str, str], run_key: str, names: Names) -> Run:
    """What is logged of an entry, below the run of its stage, which has the tags `shared`."""
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
    params = {**dict(_flat("", record.settings)), **_trained(entry), **_identity(record)}
    called = names.all("parameter", params)
    # as numbers, too, since MLflow compares params as text
    numbers = {"target": record.target, "seed": float(record.seed), "seconds": entry.seconds}
    numbers |= {**_numbers("", record.metrics), **_numbers("cost.", record.cost)}
    numbers |= _numbers("measured.", entry.measured or {})
    steps = [
        (f"curve/{key}", value, step)
        for step, row in enumerate(entry.curves)
        for key, value in _numbers("", row).items()
        if key != "epoch"
    ]
    source, context = json.dumps(record.settings.get("data")), [InputTag("mlflow.data.context", "train")]
    return Run(
        name=_text(name),
        started=milliseconds(ended - entry.seconds),
        ended=milliseconds(ended),
        status="FINISHED" if record.status == "ok" else "FAILED",
        tags={names.clean("tag", key): _text(value) for key, value in tags.items()},
        run_key=run_key,
        params={called[key]: _text(value) for key, value in params.items()},
        points=points(names, numbers, steps),
        inputs=[
            DatasetInput(MlflowDataset(record.dataset, fingerprint[:32], "local", source), context)
            for fingerprint in record.data
        ],
    )


def by_client(client: MlflowClient, experiment: str, run: Run) -> str:
    """Log a finished run to any store, whole or not at all; returns its id. Raises what the store does."""
    run_id = client.create_run(experiment, run.started, run.tags, run.name).info.run_id
    try:
        if run.inputs:
            client.log_inputs(run_id, list(run.inputs))
        # the key comes last: half a run is never taken for a whole one
        send(client, run_id, run.points, run.params, {"run_key": run.run_key})
        client.set_terminated(run_id, run.status, run.ended)
    except Exception:
        with suppress(Exception):  # what is half logged is deleted next time, if not now
            client.delete_run(run_id)
        raise
    return run_id


def send(
    client: MlflowClient,
    run_id: str,
    points: Sequence[Point],
    params: Mapping[str, str] = _NONE,
    tags: Mapping[str, str] = _NONE,
) -> None:
    """Send everything in as few calls as the store's limits allow, the tags in the last one."""
    metrics = [Metric(*point) for point in points]
    texts = [Param(key, value) for key, value in params.items()]
    if len(texts) > _PARAMS_PER_CALL or len(metrics) + len(texts) + len(tags) > _ENTITIES_PER_CALL:
        client.log_batch(run_id, metrics, texts)  # the client makes several calls of it
        metrics, texts = [], []
    client.log_batch(run_id, metrics, texts, [RunTag(key, value) for key, value in tags.items()])


def points(
    names: Names, metrics: Mapping[str, float], steps: Sequence[tuple[str, float, int]]
) -> list[Point]:
    """Metrics that were measured once, and more with their steps, as they are logged now."""
    now = milliseconds(time.time())
    rows = [*((key, value, 0) for key, value in metrics.items()), *steps]
    called = names.all("metric", (key for key, _, _ in rows))
    return [(called[key], value, now, step) for key, value, step in rows]


def log_network(client: MlflowClient, run_id: str, network: Path) -> None:
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
        if isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    }


def _text(value: Any) -> str:
    """What the store keeps of a text: so long, and characters only."""
    return str(value)[:_VALUE_LENGTH].encode("utf-8", "replace").decode()


@lru_cache(10_000)
def _plain(name: str) -> str:
    known = re.sub(r"[^/\w.\- :]", "_", name)[:_NAME_LENGTH]
    parts = [part for part in known.split("/") if part not in ("", ".", "..")]
    return re.sub(r"^\.\.", "__", "/".join(parts)) or "_"


class Names:
    """Names that the store takes: others are changed, and each such change is said once."""

    def __init__(self) -> None:
        self._told = set[str]()

    def clean(self, kind: str, name: str, taken: Collection[str] = ()) -> str:
        """The name by which something is logged: none of those that are taken, unless it needs no change."""
        plain = found = _plain(name)
        for count in itertools.count(1):
            if found == name or found not in taken:
                break
            found = plain[: _NAME_LENGTH - count] + "_" * count
        if found != name and name not in self._told:
            self._told.add(name)
            print(f"MLflow: {kind} {name!r} is logged as {found!r}, a name that it takes", file=sys.stderr)
        return found

    def all(self, kind: str, names: Iterable[str]) -> dict[str, str]:
        """Each name with the one by which it is logged, all of them different."""
        given = dict.fromkeys(names)
        taken, found = set(given), dict[str, str]()
        for name in given:
            found[name] = self.clean(kind, name, taken)
            taken.add(found[name])
        return found


def milliseconds(moment: float) -> int:
    """A moment (`time.time()`) as MLflow has it."""
    return int(1000 * moment)
