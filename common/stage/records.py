"""The records that runs leave in the results, and what stands beside them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, Field

from common.core.compute import Compute
from common.core.identity import canonical
from common.core.run import Context, Outcome, Run, tested_as
from common.predictions import Predictions, packed, predictions_file
from common.records import (
    MOST_REASON,
    Cause,
    Curves,
    Entry,
    Environment,
    Facts,
    Failure,
    Record,
    Seconds,
    curves_file,
)
from common.settings import DatasetSettings
from common.stage.store import Store, code_digest, data_prints, data_settings


def _with(*names: str) -> AfterValidator:
    def check(found: Facts) -> Facts:
        if missing := [name for name in names if not isinstance(found.get(name), str)]:
            raise ValueError(f"needs {missing[0]}, as text")
        return found

    return AfterValidator(check)


Machine = Annotated[Facts, _with("device")]


class Made(Environment):
    """What all that stages have left says of where and by what it was made."""

    code: str
    machine: Machine
    versions: Annotated[Facts, _with("python", "torch")]
    elsewhere: dict[str, Machine] = {}


class Beside(Made):
    """Of the file beside the records of a complete stage, as `results_files` makes it."""

    seconds: dict[str, Seconds] = Field(...)
    sha256: dict[str, str]
    states: list[str] = []


@dataclass(frozen=True)
class Failed:
    """Why a run cannot be completed: as of Record."""

    failure: Failure
    reason: str
    cause: Cause | None = None


def record_of(
    run: Run, compute: Compute, ended: Outcome | Failed, predictions: Predictions | None = None
) -> Record:
    """The record of a run that has come to this."""
    record = {**run.identity, "settings": run.settings, "settings_hash": run.settings_hash}
    record |= {"data": data_prints(run), "device": compute.device.type, "precision": precision(compute)}
    record |= {"torch": str(torch.__version__)}
    if isinstance(ended, Failed):
        # a device without memory left cannot hold the data, either
        compute = replace(compute, device=torch.device("cpu"))
        record |= {
            "status": "failed",
            "failure": ended.failure,
            "reason": ended.reason[:MOST_REASON],
            "cause": ended.cause,
        }
    else:
        record |= {"status": "ok", "metrics": ended.metrics, "cost": ended.cost, "details": ended.details}
        record |= {"predictions": predictions and predictions.digest}
    return Record.model_validate(_plain(record | {"chance": chance(run, compute)}))


def entry_of(
    record: Record,
    compute: Compute,
    seconds: float,
    curves: Sequence = (),
    has_state: bool = False,
    predictions: Predictions | None = None,
    measured: dict[str, float] | None = None,
) -> Entry:
    """A record with what is kept beside it."""
    beside = {"seconds": seconds, "ended": time.time(), "has_state": has_state, "machine": machine(compute)}
    beside |= {"predictions": predictions and predictions.text, "measured": measured}
    return Entry(record=record, curves=_plain(curves), **beside)


def predictions_of(context: Context, outcome: Outcome, store: Store) -> Predictions | None:
    """What the network whose test accuracy and loss a run reports takes the test images for.

    It is one that the run has tested, the last of equals, or that of a run that it needs, whose results it takes over. None
    where the accuracy is of no network (interpolated, say).
    """
    tested = context.reported(outcome.metrics)
    if tested and tested.classes:
        return Predictions.of(tested.labels.cpu(), torch.cat(tested.classes).cpu())
    for need in taken_over(context, outcome):
        if (entry := store.load(need)) and entry.predictions:
            return Predictions.from_text(entry.predictions)
    return None


def taken_over(context: Context, outcome: Outcome) -> list[Run]:
    """The runs needed whose test accuracy and loss are those that a run reports."""
    reported = tested_as(outcome.metrics)
    pairs = zip(context.run.needs, context.needs, strict=True)
    return [
        need for need, left in pairs if reported[0] is not None and tested_as(left.record.metrics) == reported
    ]


def chance(run: Run, compute: Compute) -> float | None:
    """The share of the most frequent class among the test images.

    They are those of the first data set that the run's settings name; None where they name none, or where there is no
    memory for them.
    """
    if not (sources := data_settings(run)):
        return None
    if sources[0] not in _chances:
        # in a process that has trained the run, the data is there already
        try:
            labels = Context(run, compute, ()).dataset(sources[0]).labels["test"]
        except (MemoryError, torch.OutOfMemoryError):
            return None  # what ended the run ends this, too
        counts = labels.cpu().bincount()
        _chances[sources[0]] = counts.max().item() / len(labels)
    return _chances[sources[0]]


_chances: dict[DatasetSettings, float] = {}


def precision(compute: Compute) -> str:
    """The number format of convolutions and matrix products."""
    return str(compute.autocast or torch.float32).removeprefix("torch.")


def _plain(value: Any) -> Any:
    """JSON values only: NaN and infinities become null, tuples lists, and value objects tables."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def environment(runs: Sequence[Run], compute: Compute, store: Store) -> dict[str, Any]:
    """What the records leave out, and what a whole stage shares: code, machine, versions and numerics."""
    return {
        "code": code_digest(runs),
        "machine": machine(compute),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "precision": precision(compute),
        "numerics": store.numerics,
        "execution": store.execution,
    }


def machine(compute: Compute) -> dict[str, Any]:
    """The machine on which runs train."""
    on_gpu = compute.device.type == "cuda"
    processor = platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name(compute.device) if on_gpu else processor,
        "cores": os.cpu_count(),
        "system": platform.system(),
    }


def results_files(
    profile: str, paper: str, entries: Sequence[Entry], about: Mapping[str, Any]
) -> dict[Path, bytes]:
    """What a stage leaves, by path below the results folder: records, curves, predictions, and the environment of all.

    about: what the runs share, to which seconds and end of each, the machine of each run that is of another one (`elsewhere`), which runs
    have left a state for others to start from (`states`), what was measured of networks (`measured`), and the digests come
    by which one knows that the files are whole.
    """
    records = Path(profile, f"{paper}.jsonl")
    curves = [Curves(settings_hash=e.record.settings_hash, curves=e.curves) for e in entries]
    files = {
        records: _lines([entry.record.content() for entry in entries]),
        curves_file(records): _lines([line.model_dump(mode="json") for line in curves]),
        predictions_file(records): packed(
            Predictions.from_text(e.predictions) for e in entries if e.predictions
        ),
    }
    seconds = {entry.record.settings_hash: entry.seconds for entry in entries}
    elsewhere = {
        e.record.settings_hash: e.machine for e in entries if e.machine not in (None, about["machine"])
    }
    sha256 = {path.name: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    states = sorted(entry.record.settings_hash for entry in entries if entry.has_state)
    beside = {**about, "seconds": seconds, "elsewhere": elsewhere, "states": states, "sha256": sha256}
    if ended := {e.record.settings_hash: e.ended for e in entries if e.ended is not None}:
        beside["ended"] = ended
    if measured := {e.record.settings_hash: e.measured for e in entries if e.measured}:
        beside["measured"] = measured
    files[environment_file(profile, paper)] = json.dumps(beside, indent=1, sort_keys=True).encode()
    return files


def environment_file(profile: str, paper: str) -> Path:
    """Where the environment of a stage's runs is, below the results folder."""
    return Path("environment", profile, f"{paper}.json")


def _lines(lines: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(canonical(line) + "\n" for line in lines).encode()
