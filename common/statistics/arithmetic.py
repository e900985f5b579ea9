"""Numbers that settings fix before anything is trained: shown beside the claims, never judged."""

from __future__ import annotations

from typing import Any

from common.statistics.claims import Arithmetic
from common.statistics.records import Lost, Quantity, Records


def values(entry: Arithmetic, records: Records) -> dict[str, Any]:
    """The entry with what its runs have, cell by cell and target by target: least and largest value over the seeds."""
    places = []
    for dataset, architecture in records.cells({entry.variant}):
        cell = Quantity(entry.variant, dataset, architecture, None, entry.metric)
        targets = records.targets(cell) if entry.target is None else [entry.target]
        for target in targets:
            quantity = Quantity(entry.variant, dataset, architecture, target, entry.metric)
            if found := _measured(quantity, records):
                place = {"dataset": dataset, "architecture": architecture, "target": target}
                places.append({**place, "low": min(found), "high": max(found)})
    return {**entry.model_dump(exclude={"target"}), "values": places}


def _measured(quantity: Quantity, records: Records) -> list[float]:
    found = []
    for seed in records.seeds(quantity):
        try:
            found.append(float(records.measure(quantity, seed)))
        except Lost:  # a run without the number says nothing of it
            continue
    return found
