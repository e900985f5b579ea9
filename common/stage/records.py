"""What a run leaves in the results, and what stands beside the records."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common.core.compute import Compute
from common.core.identity import canonical
from common.core.run import Outcome, Run
from common.settings import Profile
from common.stage.store import code_digest, data_prints, write_atomically


def record_of(
    run: Run, status: str, outcome: Outcome | None = None, reason: str | None = None
) -> dict[str, Any]:
    """The record of a run that ended as `status` (ok or failed) says."""
    record = {**run.identity, "status": status, "settings": run.settings, "settings_hash": run.settings_hash}
    record |= {"data": data_prints(run), "metrics": {}, "cost": {}, "details": {}}
    if outcome is not None:
        record |= {"metrics": outcome.metrics, "cost": outcome.cost, "details": outcome.details}
    return record | ({"reason": reason} if reason else {})


def entry_of(
    record: Mapping, seconds: float, curves: Sequence = (), has_state: bool = False
) -> dict[str, Any]:
    """A record with what is kept beside it."""
    return _plain({"record": record, "curves": curves, "seconds": seconds, "has_state": has_state})


def _plain(value: Any) -> Any:
    """JSON values only: NaN and infinities become null, tuples lists."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def environment(runs: Sequence[Run], compute: Compute) -> dict[str, Any]:
    """What the records leave out: code, machine and versions."""
    return {
        "code": code_digest(runs),
        "machine": machine(compute),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "precision": str(compute.autocast or torch.float32).removeprefix("torch."),
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


def write_results(profile: Profile, paper: str, entries: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write `<paper>.jsonl` (records) and `<paper>.curves.jsonl` into `folder`/<profile>; returns the records' path."""
    target = folder / profile.name / f"{paper}.jsonl"
    records = [canonical(entry["record"]) for entry in entries]
    curves = [
        canonical({"settings_hash": e["record"]["settings_hash"], "curves": e["curves"]}) for e in entries
    ]
    write_atomically(target, "".join(line + "\n" for line in records).encode())
    write_atomically(target.with_suffix(".curves.jsonl"), "".join(line + "\n" for line in curves).encode())
    return target
