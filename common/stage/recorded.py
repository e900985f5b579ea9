"""What the results hold of a stage already, and what of it counts as done, so that nothing is trained twice."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.core.run import Run
from common.predictions import beside, predictions_file
from common.reading import json_value, read_text
from common.records import Curves, Entry, Record, curves_file, read
from common.settings import SettingsError, validated
from common.stage.records import Beside, environment_file
from common.stage.store import Store, data_prints


@dataclass(frozen=True)
class Recorded:
    """Runs whose records are in the results. file: of the records; records: by the hash of their settings; environment:
    beside them."""

    file: Path
    records: Mapping[str, Record]
    environment: dict[str, Any]

    @property
    def hashes(self) -> set[str]:
        """Of the settings of the runs."""
        return set(self.records)

    @property
    def unfinished(self) -> int:
        """How many runs of the stage are not among them, as results say that were imported before it was complete."""
        return self.environment.get("unfinished", 0)

    def machine(self, settings_hash: str) -> dict[str, Any]:
        """The machine that executed a run."""
        return self.environment.get("elsewhere", {}).get(settings_hash, self.environment["machine"])

    def devices(self, hashes: Iterable[str]) -> Counter[str]:
        """How many of these runs were executed on which device."""
        return Counter(str(self.machine(each)["device"]) for each in hashes)


def recorded(results: Path, profile: str, paper: str, code: str) -> Recorded | None:
    """What a stage has left in the results, None where there is nothing that this code has left. Raises SettingsError."""
    environment = _environment(results, profile, paper, code)
    if environment is None:
        return None
    file = results / profile / f"{paper}.jsonl"
    return Recorded(file, {record.settings_hash: record for _, record in read(file, Record)}, environment)


def _environment(results: Path, profile: str, paper: str, code: str) -> dict[str, Any] | None:
    """What stands beside the records that this code has left; None where there are none. Raises SettingsError."""
    about = results / environment_file(profile, paper)
    if not (results / profile / f"{paper}.jsonl").exists() or not about.exists():
        return None
    try:
        environment = json_value(read_text(about))
    except ValueError as error:
        raise SettingsError(f"{about}: not valid JSON: {error}") from None
    if not isinstance(environment, Mapping) or environment.get("code") != code:
        return None
    return validated(Beside, environment, str(about)).model_dump()


def take_over(
    results: Path, profile: str, paper: str, runs: Sequence[Run], store: Store, about: Mapping[str, Any]
) -> set[str]:
    """Have the store count as finished what the results hold of these runs; returns the settings hashes of all such.

    A record counts if settings, code, data and the settings of the execution are those of now. One that was executed on
    this machine must also have the device kind, precision and torch version of now; one of another machine counts as it
    is, unless it was imported before its stage was complete. A run that may not fail another time is not done. about: the environment of now. Files that are damaged
    count for nothing, and are named on stderr.
    """
    try:
        environment = _environment(results, profile, paper, about["code"])
        if environment is None or environment.get("execution") != about["execution"]:
            return set()
        ours = [run for run in runs if run.settings_hash in environment["seconds"]]
        if all(store.holds(run) for run in ours):  # nothing is to be taken, so not all of it is read
            return {run.settings_hash for run in ours}
        found = recorded(results, profile, paper, about["code"])
        if found is None or not _whole(found):
            return set()
        curves = {line.settings_hash: line.curves for _, line in read(curves_file(found.file), Curves)}
        predictions = beside(found.file, found.records.values())
        if lacking := found.hashes - (curves.keys() & found.environment["seconds"].keys()):
            raise SettingsError(f"{found.file}: the curves or the seconds of {min(lacking)} are missing")
    except SettingsError as error:
        print(f"{error}; no record there counts", file=sys.stderr)
        return set()
    conditions = (about["numerics"][0], about["precision"], str(about["versions"]["torch"]))
    states = set(found.environment["states"])
    taken = set()
    for run in runs:
        name = run.settings_hash
        record = found.records.get(name)
        if record is None or record.may_pass or record.data != data_prints(run):
            continue
        machine = found.machine(name)
        elsewhere = machine != about["machine"]
        same = (record.device, record.precision, record.torch) == conditions
        if not (elsewhere and not found.unfinished or not elsewhere and same):
            continue
        if store.load(run) is None:
            entry = Entry(
                record=record,
                curves=curves[name],
                seconds=found.environment["seconds"][name],
                ended=found.environment.get("ended", {}).get(name),
                has_state=name in states,
                machine=machine,
                predictions=record.predictions and predictions[record.predictions].text,
                measured=found.environment.get("measured", {}).get(name),
            )
            store.take_over(run, entry, elsewhere)
        taken.add(name)
    return taken


def _whole(found: Recorded) -> bool:
    """Whether the files are those that the stage has left."""
    for file in (found.file, curves_file(found.file), predictions_file(found.file)):
        there = file.exists() and hashlib.sha256(file.read_bytes()).hexdigest()
        if there != found.environment["sha256"].get(file.name):
            print(f"{file}: damaged or changed: no record there counts as done", file=sys.stderr)
            return False
    return True
