"""A whole run written to a local SQLite store at once, in a seventh of the time that MLflow's client takes there.

It leaves what `common.stage.logged.by_client` leaves, in MLflow's own tables and in one transaction: a run is there whole or
not at all. What those tables are belongs to a version of MLflow, so whoever writes this way falls back on the client.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import DatasetInput, LifecycleStage
from sqlalchemy import Connection, Row, select

from common.stage.logged import Run

_PATIENCE = 20000
"""Milliseconds for which another writer is waited for, as MLflow does."""


def write(client: MlflowClient, experiment: str, run: Run) -> str:
    """Log a finished run; returns its id. Raises anything, and leaves nothing then."""
    store, tables = client._tracking_client.store, _tables()
    run_id = uuid.uuid4().hex
    metrics = _metrics(store, run_id, run)
    texts = {**run.tags, "mlflow.runName": run.name, "run_key": run.run_key}
    inputs = dict[tuple[str, str], DatasetInput]()
    for one in run.inputs:
        inputs.setdefault((one.dataset.name, one.dataset.digest), one)
    with store.engine.begin() as connection:
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {_PATIENCE}")
        # from here on nobody else writes: what is read stays so
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        found = select(tables.SqlExperiment.experiment_id, tables.SqlExperiment.artifact_location).filter_by(
            experiment_id=int(experiment), lifecycle_stage=LifecycleStage.ACTIVE
        )
        place = connection.execute(found).one()
        _insert(connection, tables.SqlRun, [_run(place, run_id, run)])
        _insert(connection, tables.SqlTag, _texts(run_id, texts))
        _insert(connection, tables.SqlParam, _texts(run_id, run.params))
        _insert(connection, tables.SqlMetric, metrics)
        _insert(connection, tables.SqlLatestMetric, _latest(metrics))
        for one in inputs.values():
            _name_input(connection, tables, place.experiment_id, run_id, one)
    return run_id


def _tables() -> Any:
    # not at the top: another version may not have them, and a tracking server has no use for them
    from mlflow.store.tracking.dbmodels import models

    return models


def _insert(connection: Connection, table: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        connection.execute(table.__table__.insert(), rows)


def _run(place: Row[Any], run_id: str, run: Run) -> dict[str, Any]:
    from mlflow.utils.uri import append_to_uri_path

    return {
        "run_uuid": run_id,
        "experiment_id": place.experiment_id,
        "name": run.name,
        "artifact_uri": append_to_uri_path(place.artifact_location, run_id, "artifacts"),
        "user_id": run.tags.get("mlflow.user", "unknown"),
        "status": run.status,
        "start_time": run.started,
        "end_time": run.ended,
        "lifecycle_stage": LifecycleStage.ACTIVE,
        "source_type": "UNKNOWN",
        **dict.fromkeys(("source_name", "source_version", "entry_point_name"), ""),
    }


def _texts(run_id: str, texts: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"run_uuid": run_id, "key": key, "value": value} for key, value in texts.items()]


def _metrics(store: Any, run_id: str, run: Run) -> list[dict[str, Any]]:
    """Each point once."""
    found = dict[tuple[Any, ...], dict[str, Any]]()
    for key, given, moment, step in run.points:
        is_nan, value = store.sanitize_metric_value(given)
        row = {"key": key, "timestamp": moment, "step": step, "value": value, "is_nan": is_nan}
        found.setdefault(tuple(row.values()), row | {"run_uuid": run_id})
    return list(found.values())


def _latest(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each metric the point that MLflow shows as its value, the first where several are."""
    found = dict[str, Mapping[str, Any]]()
    for row in sorted(metrics, key=lambda row: (row["step"], row["timestamp"], row["value"]), reverse=True):
        found.setdefault(row["key"], row)
    return list(found.values())


def _name_input(connection: Connection, tables: Any, experiment: int, run_id: str, one: DatasetInput) -> None:
    """Add a data set to a run's inputs; an experiment has it once."""
    data, input_id = one.dataset, uuid.uuid4().hex
    named: dict[str, Any] = {"experiment_id": experiment, "name": data.name, "digest": data.digest}
    data_id = connection.execute(select(tables.SqlDataset.dataset_uuid).filter_by(**named)).scalar()
    if data_id is None:
        data_id = uuid.uuid4().hex
        about: dict[str, Any] = {"dataset_source_type": data.source_type, "dataset_source": data.source}
        about |= {"dataset_schema": data.schema, "dataset_profile": data.profile}
        _insert(connection, tables.SqlDataset, [{"dataset_uuid": data_id, **named, **about}])
    ends = {"source_type": "DATASET", "source_id": data_id}
    ends |= {"destination_type": "RUN", "destination_id": run_id}
    _insert(connection, tables.SqlInput, [{"input_uuid": input_id, **ends}])
    tags = [{"input_uuid": input_id, "name": tag.key, "value": tag.value} for tag in one.tags]
    _insert(connection, tables.SqlInputTag, tags)
