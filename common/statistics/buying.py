"""Which runs the next looks need: what open claims compare, with the seeds of the look that they wait for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from common.statistics.claims import Claim, ClaimsFile
from common.statistics.comparisons import Comparison, find
from common.statistics.deciding import OPEN, Judged
from common.statistics.judging import Terms, judge_file
from common.statistics.records import Place, Quantity, Records, place_of
from common.statistics.soundness import gates

_ROLES = ("headline", "supporting")
_NOT_BY_SEEDS = ("count", "sign")
"""Tests that more seeds do not decide: a count knows no chance, and a seed adds no cell."""


def wanted(
    file: ClaimsFile, records: Records, looks: Sequence[int], listed: Mapping[Place, Collection[int]]
) -> set[tuple[Place, int]]:
    """The runs (place and seed) that the claims wait for, recorded or not; none once nothing is open or all is there.

    looks: planned numbers of seeds, ascending. listed: the seeds of each place that can be run; those above a claim's
    `seen` are its looks, in ascending order. At the first look stands every claim, so one that was changed and begins
    with new seeds gets them; later ones are for open comparisons of open claims, headline and supporting, alone.
    """
    found: set[tuple[Place, int]] = set()
    for judged in judge_file(file, records, Terms(tuple(looks))):
        for comparison, number in _waiting(judged, records, len(looks)):
            if all(place_of(quantity) in listed for quantity in comparison.quantities):
                found.update(_runs(_read(comparison, records), judged.claim.seen, looks[number], listed))
    return found


def open_places(file: ClaimsFile, records: Records, looks: Sequence[int]) -> dict[str, set[Place]]:
    """What each open claim reads, by its id: the places of its open comparisons."""
    found = {}
    for judged in judge_file(file, records, Terms(tuple(looks))):
        if judged.verdict == OPEN:
            undecided = (one for one in judged.comparisons if one.verdict == OPEN)
            found[judged.claim.id] = {place for one in undecided for place in _read(one, records)}
    return found


def _read(comparison: Comparison, records: Records) -> set[Place]:
    read = {place_of(quantity) for quantity in (*comparison.quantities, *gates(comparison, records))}
    # whether an arm has trained is read where it is not pruned
    return read | {(variant, dataset, architecture, 0.0) for variant, dataset, architecture, _ in read}


def _waiting(judged: Judged, records: Records, looks: int) -> Iterator[tuple[Comparison, int]]:
    """What the claim compares, where another look is needed, and the number of that look."""
    seen = {_key(comparison): comparison for comparison in judged.comparisons}
    # of a claim that begins with new seeds, the runs of old ones say what there is to compare
    for comparison in find(judged.claim.model_copy(update={"seen": -1}), records):
        done = seen.get(_key(comparison))
        if comparison.problem:
            continue
        if done is None or not done.looks:
            yield comparison, 0
        elif _buys(judged) and done.verdict == OPEN and done.looks[-1].number + 1 < looks:
            yield comparison, done.looks[-1].number + 1


def _buys(judged: Judged) -> bool:
    claim: Claim = judged.claim
    return judged.verdict == OPEN and claim.role in _ROLES and claim.test not in _NOT_BY_SEEDS


def _key(comparison: Comparison) -> tuple[Quantity, ...]:
    return tuple(comparison.quantities)


def _runs(
    read: set[Place], seen: int, look: int, listed: Mapping[Place, Collection[int]]
) -> Iterator[tuple[Place, int]]:
    """The runs at these places, as far as they are listed, with the first `look` seeds above `seen`; none if there are fewer."""
    there = {place: set(listed[place]) for place in read if place in listed}
    seeds = sorted(seed for seed in set.intersection(*there.values()) if seed > seen)[:look]
    if len(seeds) == look:
        yield from ((place, seed) for place in there for seed in seeds)
