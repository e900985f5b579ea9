"""The seeds of a comparison with what each measured: pairs, failures as outcomes, and what is lost, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.records import Record
from common.statistics import inference
from common.statistics.comparisons import Comparison, Point
from common.statistics.records import Lost, Quantity, Records, WithoutChance, diverged, place, root

_SMALLEST = 1e-100
"""What is smaller is zero, of which there is no ratio."""
_CONDITIONS = ("device", "precision", "torch")


@dataclass
class Sample:
    """What the seeds measured.

    treatment, control: [seeds][points], each a number or a vector; None for a control that is not there. collapsed:
    [seeds], whether a run of the treatment, of the control is at or near chance.
    """

    seeds: list[int] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)
    treatment: list[list[Any]] = field(default_factory=list)
    control: list[list[Any]] = field(default_factory=list)
    collapsed: list[tuple[bool, bool]] = field(default_factory=list)
    at_an_end: bool = False
    """Whether a value is at the floor or cap of its metric."""
    without_chance: list[int] = field(default_factory=list)
    """Seeds that are lost only because nobody knows what chance is."""
    failed: list[int] = field(default_factory=list)
    """Seeds that are lost because a run failed."""

    @property
    def paired(self) -> bool:
        return self.control[0][0] is not None

    def means(self) -> tuple[float, float | None]:
        """Means of both sides, None for a missing control."""
        return float(np.mean(self.treatment)), float(np.mean(self.control)) if self.paired else None

    def contrasts(self, scale: str) -> np.ndarray:
        """treatment - control, or the treatment alone, [seeds, points]; of logarithms if scale is ratio."""
        sides = [
            np.array(side, float)
            for side in ([self.treatment, self.control] if self.paired else [self.treatment])
        ]
        if scale == "ratio":
            sides = [np.log(side) for side in sides]
        return inference.differences(*sides) if self.paired else sides[0]


def planned(
    comparison: Comparison, records: Records, seeds: int | None, gates: Sequence[Quantity] = ()
) -> list[int] | None:
    """The first `seeds` of the comparison's seeds in ascending order, all of them for None.

    None if they are not all recorded, ok or failed, for everything that the comparison and its `gates` read.
    """
    runs = [records.seeds(quantity) for quantity in comparison.quantities]
    order = sorted(set().union(*runs))
    if seeds is None:
        return order
    first = order[:seeds]
    runs += [records.seeds(gate) for gate in gates]
    whole = len(first) == seeds and all(seed in run for run in runs for seed in first)
    return first if whole else None


def gather(comparison: Comparison, points: list[Point], records: Records, seeds: Sequence[int]) -> Sample:
    """Each of these seeds that has all it takes at every point; one that lacks something is lost, with the reason."""
    claim, sample = comparison.claim, Sample()
    kept = records.kept((tuple(points), claim.test, claim.scale, claim.metric, claim.bounds))
    for seed in seeds:
        if seed not in kept:
            kept[seed] = _of_seed(comparison, points, records, seed)
        found: _Seed = kept[seed]
        if found.lost:
            sample.lost.append({"seed": seed, "reason": str(found.lost)})
            if isinstance(found.lost, WithoutChance):
                sample.without_chance.append(seed)
            if found.failed:
                sample.failed.append(seed)
            continue
        sample.seeds.append(seed)
        sample.treatment.append([treatment for treatment, _ in found.pairs])
        sample.control.append([control for _, control in found.pairs])
        sample.collapsed.append(found.collapsed)
        sample.at_an_end = sample.at_an_end or found.at_an_end
    return sample


@dataclass(frozen=True)
class _Seed:
    """What one seed measured at each point, or why it is lost; see `Sample`."""

    pairs: Sequence[tuple[Any, Any]] = ()
    collapsed: tuple[bool, bool] = (False, False)
    at_an_end: bool = False
    lost: Lost | None = None
    failed: bool = False


def _of_seed(comparison: Comparison, points: list[Point], records: Records, seed: int) -> _Seed:
    try:
        pairs = _measured(comparison, points, seed, records)
    except Lost as reason:
        failed = any(_failed(records, part, seed) for point in points for part in point.quantities())
        return _Seed(lost=reason.with_traceback(None), failed=failed)
    collapsed = _collapsed(points, 0, seed, records), _collapsed(points, 1, seed, records)
    return _Seed(pairs, collapsed, _at_an_end(comparison, points, seed, records))


def _sides(point: Point) -> list[Quantity]:
    return [point.treatment, *([point.control] if point.control else [])]


def _failed(records: Records, quantity: Quantity, seed: int) -> bool:
    record = records.seeds(quantity).get(seed)
    return record is not None and record.status == "failed"


def _collapsed(points: list[Point], side: int, seed: int, records: Records) -> bool:
    parts = [
        part for point in points for quantity in _sides(point)[side : side + 1] for part in quantity.parts
    ]
    return any(records.collapsed(records.of(part, seed)) for part in parts)


def _at_an_end(comparison: Comparison, points: list[Point], seed: int, records: Records) -> bool:
    if comparison.claim.test == "diversity":
        return False
    bounds = comparison.claim.bounds or (None, None)
    parts = [part for point in points for part in point.quantities()]
    return any(
        records.at_an_end(part, records.measure(Quantity(*_key(part)), seed), bounds)
        for part in parts
        if not _failed(records, part, seed)
    )


def _key(quantity: Quantity) -> tuple[Any, ...]:
    """All of a quantity but what is subtracted from it."""
    return quantity.variant, quantity.dataset, quantity.architecture, quantity.target, quantity.metric


def _measured(
    comparison: Comparison, points: list[Point], seed: int, records: Records
) -> list[tuple[Any, Any]]:
    claim, vector = comparison.claim, comparison.claim.test == "diversity"
    runs = {part: records.of(part, seed) for point in points for part in point.quantities()}
    _same_conditions(runs)

    def measured(quantity: Quantity | None, shared: set[Any]) -> Any:
        if quantity is None:
            return None
        value = records.measure(quantity, seed, vector, shared)
        if claim.scale == "ratio" and value < _SMALLEST:
            raise Lost(
                f"{quantity.metric} of {place(quantity)} is {value:g}: no ratio of what is not positive"
            )
        return value

    pairs = []
    for point in points:
        # what several sides start from says nothing about their difference
        roots = Counter(root(runs[part]) for part in point.quantities() if diverged(runs[part]))
        shared = {run for run, sides in roots.items() if sides > 1}
        treatment, control = measured(point.treatment, shared), measured(point.control, shared)
        if vector and len(treatment) != len(control):
            raise Lost(
                f"{claim.metric} has {len(treatment)} numbers on one side and {len(control)} on the other"
            )
        pairs.append((treatment, control))
    return pairs


def _same_conditions(runs: dict[Quantity, Record]) -> None:
    """Raises Lost if runs of one seed were made under conditions that are known to differ."""
    (first, one), *others = runs.items()
    for quantity, other in others:
        for name in _CONDITIONS:
            values = (getattr(one, name), getattr(other, name))
            if None not in values and values[0] != values[1]:
                raise Lost(
                    f"{name} is {values[0]} for {place(first)} and {values[1]} for {place(quantity)}: no pair"
                )
        # the first data set is the one that a run is tested on
        same_set = one.dataset == other.dataset and one.data and other.data
        if same_set and one.data[0] != other.data[0]:
            raise Lost(
                f"{place(first)} and {place(quantity)} were tested on other data of the same name: no pair"
            )
