"""Records as the runs left them, and the numbers that a claim asks of them, seed by seed."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.records import Record, files, read
from common.settings import SettingsError

SECTIONS = ("metrics", "cost", "details")
_Place = tuple[str | None, str | None, str | None, float]
"""Variant, data set, architecture and target of runs that differ in their seed; None where a claim names nothing."""


@dataclass(frozen=True)
class Quantity:
    """One number (or vector) per seed: a metric of a variant in a cell, less another if `minus` is given."""

    variant: str | None
    dataset: str | None
    architecture: str | None
    target: float | None
    metric: str
    minus: Quantity | None = None


class Lost(Exception):
    """A seed without the number that is asked for; the message is the reason."""


def read_all(paths: list[Path]) -> dict[str, Records]:
    """The records of files, and of folders (`*.jsonl`, curves left aside), by paper.

    The same record given twice counts once. Raises SettingsError naming file and line for a damaged line and
    for two different records of one run.
    """
    found: dict[tuple[Any, ...], tuple[str, Record]] = {}
    for path in paths:
        for file in _files(path):
            for where, record in read(file, Record):
                key = (record.paper, *_run(record), record.seed)
                other, same = found.setdefault(key, (where, record))
                if _read(same) != _read(record):
                    raise SettingsError(f"{where}: another record of the run in {other}, with other results")
    papers: dict[str, list[Record]] = {}
    for _, record in found.values():
        papers.setdefault(record.paper, []).append(record)
    return {paper: Records(records) for paper, records in papers.items()}


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if not (found := files(path)):
        raise SettingsError(f"{path}: no records (*.jsonl) in this folder")
    return found


def _read(record: Record) -> tuple[Any, ...]:
    """What is read of a run's record."""
    return record.status, record.reason, *(getattr(record, section) for section in SECTIONS)


def _run(record: Record) -> _Place:
    return record.variant, record.dataset, record.architecture, _rounded(record.target)


def _rounded(target: float) -> float:
    return round(target, 9)


class Records:
    """The records of one paper, by run and seed."""

    def __init__(self, records: list[Record]):
        self._runs: dict[_Place, dict[int, Record]] = {}
        for record in records:
            self._runs.setdefault(_run(record), {})[record.seed] = record

    def cells(self, variants: set[str]) -> list[tuple[str, str]]:
        """(dataset, architecture) pairs in which one of the variants was run, sorted."""
        return sorted(
            {
                (record.dataset, record.architecture)
                for runs in self._runs.values()
                for record in runs.values()
                if record.variant in variants
            }
        )

    def targets(self, quantity: Quantity) -> list[float]:
        """Targets at which the quantity's variant was run in its cell, sorted."""
        place = (quantity.variant, quantity.dataset, quantity.architecture)
        return sorted(target for *run, target in self._runs if tuple(run) == place)

    def seeds(self, quantity: Quantity) -> dict[int, Record]:
        """seed -> record of the quantity's run."""
        target = math.nan if quantity.target is None else _rounded(quantity.target)
        return self._runs.get((quantity.variant, quantity.dataset, quantity.architecture, target), {})

    def measure(self, quantity: Quantity, seed: int, vector: bool = False) -> Any:
        """The quantity's number for a seed, or its vector (a list of numbers). Raises Lost."""
        record = self.seeds(quantity).get(seed)
        if record is None:
            raise Lost(f"no run of {place(quantity)}")
        if record.status == "failed":
            raise Lost(f"the run of {place(quantity)} failed: {record.reason or 'no reason given'}")
        value = _found(record, quantity.metric)
        if value is None:
            raise Lost(f"{quantity.metric} of {place(quantity)} is missing or null")
        if vector:
            return _vector(value, quantity)
        if not _is_number(value):
            raise Lost(f"{quantity.metric} of {place(quantity)} is {_shown(value)}, not a finite number")
        return value - self.measure(quantity.minus, seed) if quantity.minus else value


def _vector(value: Any, quantity: Quantity) -> list[float]:
    if not isinstance(value, list) or len(value) < 2 or not all(map(_is_number, value)):
        raise Lost(
            f"{quantity.metric} of {place(quantity)} is {_shown(value)}, not a list of at least two numbers"
        )
    if max(value) == min(value):
        raise Lost(f"{quantity.metric} of {place(quantity)} is constant: its correlation is undefined")
    return value


def _is_number(value: Any) -> bool:
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return numeric and abs(value) <= sys.float_info.max  # JSON has whole numbers that no float can hold


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _found(record: Record, path: str) -> Any:
    head, _, rest = path.partition(".")
    if head in SECTIONS and rest:
        return _at(getattr(record, head), rest)
    for section in SECTIONS:
        value = _at(getattr(record, section), path)
        if value is not None:
            return value
    return None


def _at(value: Any, path: str) -> Any:
    """The value at a dotted path; a key may itself contain dots (`drop.0.9`)."""
    if not isinstance(value, Mapping):
        return None
    if path in value:
        return value[path]
    head, _, rest = path.partition(".")
    return _at(value.get(head), rest) if rest else None


def place(quantity: Quantity) -> str:
    """A quantity's run in words."""
    parts = [str(quantity.variant)]
    parts += [name for name in (quantity.dataset, quantity.architecture) if name]
    parts += [f"target {quantity.target:g}"] if quantity.target is not None else []
    return f"{parts[0]} ({', '.join(parts[1:])})" if parts[1:] else parts[0]
