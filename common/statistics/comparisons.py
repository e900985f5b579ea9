"""What a claim compares, found in the records: one Comparison for each test that it asks for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from common.statistics.claims import Claim, Selection
from common.statistics.records import Quantity, Records, place

Known = TypeVar("Known")


def known(value: Known | None) -> Known:
    """What a claim gives, or a test has found; a test that does not is not asked for it."""
    if value is None:
        raise TypeError("a value is asked for that this claim or test does not have")
    return value


@dataclass(frozen=True)
class Point:
    """A treatment with its control, if any, at one place of a comparison's axis."""

    treatment: Quantity
    control: Quantity | None
    x: float | None = None

    def quantities(self) -> list[Quantity]:
        both = [self.treatment, *([self.control] if self.control else [])]
        return both + [quantity.minus for quantity in both if quantity.minus]


@dataclass
class Comparison:
    """One test of a claim. What is measured stays None where nothing could be tested; `problem` says why.

    values, estimate, low and high are differences, slopes or the metric itself in the metric's units, or
    ratios if the claim's scale is `ratio`; sd is that of the values, or of their logarithms.
    """

    claim: Claim
    points: list[Point]
    dataset: str | None = None
    architecture: str | None = None
    target: float | None = None
    problem: str | None = None
    n: int = 0
    seeds: list[int] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    treatment_mean: float | None = None
    control_mean: float | None = None
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    sd: float | None = None
    constant: bool = False
    """Whether all values are equal, so that the sign-flip test stands in for the t-test."""
    reference: list[float] = field(default_factory=list)
    test_name: str | None = None
    p: float | None = None
    p_opposite: float | None = None
    p_holm: float | None = None
    p_opposite_holm: float | None = None
    p_permutation: float | None = None
    p_wilcoxon: float | None = None
    p_page: float | None = None
    effect_size: float | None = None
    smallest_effect: float | None = None
    point_means: list[float] = field(default_factory=list)
    """Mean contrast at each point of a trend."""
    verdict: str = ""
    reason: str = ""

    @property
    def margin(self) -> float | None:
        return self.claim.margin_for(self.dataset) if self.dataset else None

    @property
    def alternative(self) -> str:
        """The claimed direction in SciPy's words; what `lower` is not, is `greater`."""
        return "less" if self.claim.direction == "lower" else "greater"

    def bound_met(self) -> int:
        """How many values of a count keep the claimed bound."""
        bound = known(self.claim.value)
        slack = 1e-12 * abs(bound)
        if self.claim.direction == "lower":
            return sum(value <= bound + slack for value in self.values)
        return sum(value >= bound - slack for value in self.values)


def find(claim: Claim, records: Records) -> list[Comparison]:
    """What the claim compares in these records, not yet tested. Never empty."""
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
    run = [
        (dataset, architecture)
        for dataset, architecture in records.cells(variants)
        if treatment.dataset in (None, dataset) and treatment.architecture in (None, architecture)
    ]
    covered = [cell for cell in run if claim.covers(*cell)]
    if not covered:
        nowhere = _Cell(claim, treatment, control, records, None, None)
        names = " or ".join(sorted(variants))
        problem = (
            f"{names} was run only where the claim is not made: {_cells(run)}"
            if run
            else f"no run of {names}"
        )
        yield nowhere.comparison(nowhere.points(treatment.target), problem)
    for dataset, architecture in covered:
        yield from _Cell(claim, treatment, control, records, dataset, architecture).comparisons()


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
