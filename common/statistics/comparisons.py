"""What a claim compares, found in the records: one Comparison for each test that it asks for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from common.statistics.claims import Claim, Selection
from common.statistics.evidence import Evidence, Why, known
from common.statistics.records import Quantity, Records, place


@dataclass(frozen=True)
class Point:
    """A treatment with its control, if any, at one place of a comparison's axis."""

    treatment: Quantity
    control: Quantity | None
    x: float | None = None

    def quantities(self) -> list[Quantity]:
        both = [self.treatment, *([self.control] if self.control else [])]
        return [part for quantity in both for part in quantity.parts]


@dataclass(frozen=True)
class OverImages:
    """The second interval: over seeds and test images. holds: whether it bears the answer out, None where there is none."""

    low: float
    high: float
    holds: bool | None


@dataclass
class Comparison:
    """One test inside a claim: what it compares, and what became of it.

    `problem` says why it cannot be tested at all. What follows it is filled in by `deciding` and `opening`.
    """

    claim: Claim
    points: list[Point]
    dataset: str | None = None
    architecture: str | None = None
    target: float | None = None
    problem: str | None = None
    looks: list[Evidence] = field(default_factory=list)
    """What was found at each look that could be judged, in order."""
    shown: Evidence | None = None
    """What the verdict rests on: the look at which it was reached, else the last one."""
    verdict: str = ""
    graded: str = ""
    """The verdict by Holm's correction inside the claim."""
    below: bool = False
    """Whether what is replicated is surely less than what matters."""
    level: float | None = None
    """Each end of the interval is one-sided at this level."""
    low: float | None = None
    high: float | None = None
    over_images: OverImages | None = None
    detectable: float | None = None
    why: Why | None = None

    @property
    def matters(self) -> float | None:
        return self.claim.matters_for(self.dataset)

    @property
    def sign(self) -> float:
        """What turns values to the claimed direction; what `lower` is not, is `higher`."""
        return -1.0 if self.claim.direction == "lower" else 1.0

    @property
    def quantities(self) -> list[Quantity]:
        """All quantities of all points, each once."""
        return list(dict.fromkeys(quantity for point in self.points for quantity in point.quantities()))


def find(claim: Claim, records: Records) -> list[Comparison]:
    """What the claim compares in these records, not yet tested. Never empty.

    Seeds that had been seen when the claim was made are left out.
    """
    found = [
        comparison
        for treatment, control in claim.pairs()
        for comparison in _of_pair(claim, treatment, control, records)
    ]
    if claim.test != "sign":
        return found
    cells = [comparison for comparison in found if not comparison.problem]
    points = [point for comparison in cells or found for point in comparison.points]
    return [Comparison(claim, points, problem=None if cells else found[0].problem)]


def _of_pair(
    claim: Claim, treatment: Selection, control: Selection | None, records: Records
) -> Iterator[Comparison]:
    variants = {treatment.variant} if treatment.variant else set()
    variants |= {step.variant for step in claim.steps or () if step.variant}
    unseen = records.above(claim.seen)
    run = [
        (dataset, architecture)
        for dataset, architecture in unseen.cells(variants)
        if treatment.dataset in (None, dataset) and treatment.architecture in (None, architecture)
    ]
    covered = [cell for cell in run if claim.covers(*cell)]
    if not covered:
        nowhere = _Cell(claim, treatment, control, unseen, None, None)
        names = " or ".join(sorted(variants))
        problem = f"no run of {names}"
        if run:
            problem = f"{names} was run only where the claim is not made: {_cells(run)}"
        elif records.cells(variants):
            problem += f" with a seed above {claim.seen}; the others had been seen when the claim was made"
        yield nowhere.comparison(nowhere.points(treatment.target), problem)
    for dataset, architecture in covered:
        yield from _Cell(claim, treatment, control, unseen, dataset, architecture).comparisons()


def _cells(cells: list[tuple[str, str]]) -> str:
    return "; ".join(", ".join(cell) for cell in cells)


def _resolve(selection: Selection, base: Quantity) -> Quantity:
    """The quantity that a selection means, taking what it leaves out from `base`."""
    own = selection.model_dump(exclude={"minus", "x"}, exclude_none=True)
    found = replace(base, minus=None, **own)
    return replace(found, minus=_resolve(selection.minus, found)) if selection.minus else found


@dataclass(frozen=True)
class _Cell:
    """One pair of selections in one (dataset, architecture) cell."""

    claim: Claim
    treatment: Selection
    control: Selection | None
    records: Records
    dataset: str | None
    architecture: str | None

    def points(self, target: float | None) -> list[Point]:
        """What is compared at a target: one point, or one for every step."""
        if not self.claim.steps:
            return [self.point(self.treatment, target)]
        points = []
        for number, step in enumerate(self.claim.steps, start=1):
            given = {key: value for key, value in step if value is not None and key != "x"}
            merged = self.treatment.model_copy(update=given)
            points.append(self.point(merged, target, number if step.x is None else step.x))
        return points

    def point(self, treatment: Selection, target: float | None, x: float | None = None) -> Point:
        cell = Quantity(None, self.dataset, self.architecture, target, self.claim.metric)
        first = _resolve(treatment, cell)
        return Point(first, _resolve(self.control, first) if self.control else None, x)

    def comparisons(self) -> Iterator[Comparison]:
        open_to = [point.treatment for point in self.points(None) if point.treatment.target is None]
        if not open_to:
            yield self.comparison(self.points(None))
            return
        run = self.records.targets(open_to[0])
        shared = [t for t in run if not self.missing(t)]
        targets = self.claim.targets_for(known(self.dataset)) or shared
        if self.claim.test == "trend" and not self.claim.steps:
            yield self.trend(targets)
        elif targets:
            yield from (self.comparison(self.points(target)) for target in targets)
        else:
            yield self.comparison(self.points(None), self.no_shared_target(open_to[0], run))

    def missing(self, target: float) -> list[Quantity]:
        """What was not run of all that a comparison at this target needs."""
        needed = [quantity for point in self.points(target) for quantity in point.quantities()]
        return [quantity for quantity in needed if not self.records.seeds(quantity)]

    def comparison(self, points: list[Point], problem: str | None = None) -> Comparison:
        targets = {point.treatment.target for point in points}
        target = targets.pop() if len(targets) == 1 else None
        return Comparison(self.claim, points, self.dataset, self.architecture, target, problem)

    def no_shared_target(self, first: Quantity, run: list[float]) -> str:
        if not run:
            return f"no run of {place(first)}"
        other = self.missing(run[0])[0]
        others = self.records.targets(other)
        where = f"only at {_listed(others)}" if others else "not at all"
        return (
            f"no target at which both sides were run: {first.variant} at {_listed(run)}; "
            f"{other.variant} ({other.dataset}, {other.architecture}) {where}"
        )

    def trend(self, targets: Sequence[float]) -> Comparison:
        problem = None
        logit = self.claim.x == "logit"
        if len(targets) < 2:
            found = f"only at target {targets[0]:g}" if targets else "at none that both sides share"
            problem = f"a trend needs at least two targets; runs are {found}"
        elif logit and not all(0 < target < 1 for target in targets):
            problem = f"the logit of a target of 0 or 1 is infinite; targets: {_listed(targets)}"
        if problem:
            return self.comparison(self.points(None), problem)
        x = [math.log(target / (1 - target)) if logit else target for target in targets]
        return self.comparison([self.point(self.treatment, t, at) for t, at in zip(targets, x, strict=True)])


def _listed(targets: Sequence[float]) -> str:
    return ", ".join(f"{target:g}" for target in targets)
