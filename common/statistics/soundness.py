"""What must hold before anything is judged: sound arms, sides that differ, comparable units, declared preconditions."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from common.reading import words
from common.records import Record
from common.statistics.claims import Precondition
from common.statistics.comparisons import Comparison
from common.statistics.evidence import known
from common.statistics.records import (
    PER_SEED,
    SHARE,
    Quantity,
    Records,
    accuracy_of,
    found_in,
    place,
    stripped,
    unit,
    value_in,
)

BEFORE_MASK = "accuracy_before_mask"
_NAMED = 5
"""Settings that a reason names."""


def problem(comparison: Comparison, records: Records, seeds: Collection[int]) -> str | None:
    """Why these seeds may not be judged, None if they may."""
    for check in (_units, _settings, _unsound, _the_same, _unmet):
        if found := check(comparison, records, seeds):
            return found
    return None


def _units(comparison: Comparison, records: Records, seeds: Collection[int]) -> str | None:
    units = {part.metric: unit(part.metric) for part in comparison.quantities}
    if SHARE in units.values():
        # beside it a metric whose name says nothing is a share too, unless its values say otherwise
        for part in comparison.quantities:
            if units[part.metric] is None and not _may_be_share(part, records, seeds):
                units[part.metric] = "no share"
    known_units = {found for found in units.values() if found}
    if len(known_units) > 1:
        names = ", ".join(f"{metric} is {found}" for metric, found in units.items() if found)
        return f"metrics of different units are not compared: {names}"
    return None


def _may_be_share(quantity: Quantity, records: Records, seeds: Collection[int]) -> bool:
    values = (
        found_in(run, quantity.metric) for seed, run in records.seeds(quantity).items() if seed in seeds
    )
    return all(value is None or abs(value) <= 1 for value in values)


def _settings(comparison: Comparison, records: Records, seeds: Collection[int]) -> str | None:
    for quantity in comparison.quantities:
        runs = {seed: run for seed, run in records.seeds(quantity).items() if seed in seeds and run.settings}
        found = {seed: records.settings(run) for seed, run in runs.items()}
        if len(set(found.values())) > 1:
            first = min(found)
            other = min(seed for seed in found if found[seed] != found[first])
            keys = sorted(
                key
                for key in {*runs[first].settings, *runs[other].settings}
                if key not in PER_SEED
                and stripped(runs[first].settings.get(key), PER_SEED)
                != stripped(runs[other].settings.get(key), PER_SEED)
            )
            more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
            return (
                f"the runs of {place(quantity)} are not of one arm: seeds {first} and {other} differ in "
                f"settings {', '.join(map(words, keys[:_NAMED]))}{more}"
            )
    return None


# ------------------------------------------------------------------------------------------------- arms


def _unsound(comparison: Comparison, records: Records, seeds: Collection[int]) -> str | None:
    excused = comparison.claim.meant_to_fail or ()
    arms = dict.fromkeys(
        (part.variant, part.dataset, part.architecture)
        for part in comparison.quantities
        if part.variant not in excused
    )
    for variant, dataset, architecture in arms:
        arm = Quantity(variant, dataset, architecture, None, "test_accuracy")
        kept = records.kept(arm)
        if (key := tuple(seeds)) not in kept:
            kept[key] = _at_chance(arm, records, seeds)
        if found := kept[key]:
            return f"the arm {variant} ({dataset}, {architecture}) is unsound: {found}"
    return None


def _at_chance(arm: Quantity, records: Records, seeds: Collection[int]) -> str | None:
    """In which way an arm never trained, None if it did.

    Judged before the mask where that is recorded, or at target 0; else it has to be at chance at every one of at least
    two targets, since collapse at a high target is a result.
    """
    by_target = {
        target: [
            run
            for seed, run in records.seeds(_at(arm, target)).items()
            if seed in seeds and run.status == "ok"
        ]
        for target in records.targets(arm)
    }
    before = [
        (run, value)
        for runs in by_target.values()
        for run in runs
        if (value := found_in(run, BEFORE_MASK)) is not None
    ]
    if before:
        return _share(before, records, "before the mask")
    if by_target.get(0.0):
        return _share(list(_accuracies(by_target[0.0])), records, "at target 0")
    found = [_share(list(_accuracies(runs)), records, "") for runs in by_target.values() if runs]
    if len(found) > 1 and all(found):
        return f"at least half its runs are at chance at each of {len(found)} targets"
    return None


def _at(arm: Quantity, target: float) -> Quantity:
    return Quantity(arm.variant, arm.dataset, arm.architecture, target, arm.metric)


def _accuracies(runs: list[Record]) -> Iterator[tuple[Record, float]]:
    for run in runs:
        if (accuracy := accuracy_of(run)) is not None:
            yield run, accuracy


def _share(accuracies: list[tuple[Record, float]], records: Records, where: str) -> str | None:
    bounds = [(value, records.bound(run)) for run, value in accuracies]
    at_chance = sum(bound is not None and value <= bound for value, bound in bounds)
    if not at_chance or 2 * at_chance < len(bounds):
        return None
    return f"{at_chance} of its {len(bounds)} finished runs are at chance {where}".rstrip()


# ------------------------------------------------------------------------------------- sides, preconditions


def _the_same(comparison: Comparison, records: Records, seeds: Collection[int]) -> str | None:
    """Whether both sides are one experiment under two names: equal in all metrics, at every point in every seed.

    And in what is compared, which may be a cost or a detail. So are sides of which no run has finished.
    """
    found, finished = False, False
    for point in comparison.points:
        if point.control is None or _place(point.treatment) == _place(point.control):
            return None
        first, second = records.seeds(point.treatment), records.seeds(point.control)
        for seed in seeds:
            one, other = first.get(seed), second.get(seed)
            finished |= any(run is not None and run.status == "ok" for run in (one, other))
            if one is None or other is None or "failed" in (one.status, other.status):
                continue
            compared = [value_in(one, point.treatment.metric), value_in(other, point.control.metric)]
            if not one.metrics or one.metrics != other.metrics or compared[0] != compared[1]:
                return None
            found = True
    if not finished:
        return "no run of either side has finished"
    return "treatment and control are equal in all metrics in every seed" if found else None


def _place(quantity: Quantity) -> tuple[str | float | None, ...]:
    return quantity.variant, quantity.dataset, quantity.architecture, quantity.target


def gates(comparison: Comparison, records: Records) -> list[Quantity]:
    """What preconditions read, as far as there are runs of it."""
    conditions = comparison.claim.precondition or ()
    found = (
        side for condition in conditions for sides in _sides(condition, comparison, records) for side in sides
    )
    return [side for side in found if records.seeds(side)]


def absent(comparison: Comparison, records: Records) -> list[str]:
    """What preconditions would read and no run has, so that they could not be met."""
    return [
        f"its precondition reads {place(side)}, which is not run"
        for condition in comparison.claim.precondition or ()
        for sides in _sides(condition, comparison, records)
        for side in sides
        if not records.seeds(side)
    ]


def _sides(condition: Precondition, comparison: Comparison, records: Records) -> list[list[Quantity]]:
    """Both variants of a precondition, in each place where something is compared."""
    places = dict.fromkeys(
        (point.treatment.dataset, point.treatment.architecture, point.treatment.target)
        for point in comparison.points
    )
    names = (condition.variant, condition.not_worse_than)
    return [
        [_nearest(Quantity(name, *where, "test_accuracy"), records) for name in names] for where in places
    ]


def _unmet(comparison: Comparison, records: Records, seeds: Collection[int]) -> str | None:
    for condition in comparison.claim.precondition or ():
        by = comparison.matters or 0.0 if condition.by is None else condition.by
        for sides in _sides(condition, comparison, records):
            runs = [{s: run for s, run in records.seeds(side).items() if s in seeds} for side in sides]
            both = [
                known(accuracy_of(runs[0][seed])) - known(accuracy_of(runs[1][seed]))
                for seed in runs[0].keys() & runs[1].keys()
                if accuracy_of(runs[0][seed]) is not None and accuracy_of(runs[1][seed]) is not None
            ]
            stated = f"precondition, {condition.variant} not worse than {condition.not_worse_than} by {by:g}"
            if not both:
                missing = next((side for side, found in zip(sides, runs, strict=True) if not found), sides[0])
                return f"{stated}, cannot be judged: no run of {place(missing)} in these seeds"
            mean = float(np.mean(both))
            if mean < -by * (1 + 1e-9):
                return f"{stated}, is not met: {place(sides[0])} is {-mean:.3g} below on average"
    return None


def _nearest(quantity: Quantity, records: Records) -> Quantity:
    """The quantity, at the only target where its variant was run if it was not run at the one asked for."""
    targets = records.targets(quantity)
    if records.seeds(quantity) or len(targets) != 1:
        return quantity
    return _at(quantity, targets[0])
