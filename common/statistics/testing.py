"""Puts a comparison to its test at one look: from records to numbers and p-values, not yet to verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Protocol

import numpy as np

from common.statistics import inference
from common.statistics.comparisons import Comparison, Point
from common.statistics.evidence import Evidence, known
from common.statistics.flips import interquartile_mean, mcnemar
from common.statistics.records import Quantity, Records, place
from common.statistics.sample import Sample, gather
from common.statistics.soundness import problem

FEWEST_PAIRS = 5
"""Fewer than these have no verdict, but for a count."""
_LEAST = {"count": 1, "diversity": 3}  # seeds without which a test says nothing at all; 2 for all others
T, FLIPS, RANKS = "t", "sign-flip", "Wilcoxon"


class Procedure(Protocol):
    """One-sided tests of a null, in the claimed direction."""

    name: str

    def p(self, null: float, alternative: str) -> float: ...


@dataclass(frozen=True)
class Answer:
    """What must be shown of a mean: that it lies above a null, below one, or both; with `either`, one of the two."""

    above: float | None = None
    below: float | None = None
    either: bool = False

    def p(self, procedure: Procedure) -> float:
        """Intersection-union of the one-sided tests; twice the smaller p where either will do."""
        found = [] if self.above is None else [procedure.p(self.above, "greater")]
        found += [] if self.below is None else [procedure.p(self.below, "less")]
        return min(1.0, 2 * min(found)) if self.either else max(found)

    def holds(self, low: float, high: float) -> bool:
        """Whether an interval, turned to the claimed direction, shows it."""
        found = [] if self.above is None else [low > self.above]
        found += [] if self.below is None else [high < self.below]
        return any(found) if self.either else all(found)

    def per_end(self, level: float) -> float:
        """The level of each of its one-sided tests."""
        return level / 2 if self.either else level


@dataclass(frozen=True)
class Test:
    """A comparison's test: both answers, in values turned to the claimed direction.

    below: the answer that its effect is less than what matters, None where that is no question.
    """

    procedure: Procedure
    replicated: Answer
    contradicted: Answer | None
    below: Answer | None = None


def answers(comparison: Comparison) -> tuple[Answer, Answer | None, Answer | None]:
    """What replicates, what contradicts, and what is below what matters; see the table in replications/CLAIMS.md."""
    claim = comparison.claim
    ratio = claim.scale == "ratio"
    matters = comparison.matters or 0.0
    d = math.log1p(matters) if ratio else matters
    if claim.test == "noninferiority":
        return Answer(above=-d), Answer(below=-d), None
    if claim.test == "equivalence":
        return Answer(above=-d, below=d), Answer(above=d, below=-d, either=True), None
    if claim.test == "difference":
        within = Answer(above=-d, below=d) if d else None
        return Answer(above=0.0, below=0.0, either=True), within, within
    if claim.test == "threshold":
        value = known(claim.value)
        c = comparison.sign * (math.log(value) if ratio else value)
        return Answer(above=c), Answer(below=c), None
    null = d if claim.margin and claim.test == "superiority" else 0.0
    return Answer(above=null), Answer(below=d), Answer(below=d) if d > null else None


def examine(
    comparison: Comparison, records: Records, seeds: list[int], factor: float = 1.0, decides: str = T
) -> Evidence:
    """What these seeds say.

    factor: what matters is multiplied by it; decides: the test that stands where the t-test would (for stability).
    """
    found = Evidence(seeds=seeds, n=len(seeds))
    if factor != 1 and comparison.claim.test != "sign":
        comparison = replace(comparison, claim=comparison.claim.scaled(factor))
    if comparison.claim.test == "sign":
        _cells(found, comparison, records, seeds)
        return found
    sample = gather(comparison, comparison.points, records, seeds)
    found.seeds, found.lost, found.n = sample.seeds, sample.lost, len(sample.seeds)
    fewest = _LEAST.get(comparison.claim.test, 2)
    found.problem = _too_few(comparison, found, fewest, records) if found.n < fewest else None
    # an arm is judged by all its runs, also those that a comparison loses
    found.problem = found.problem or problem(comparison, records, seeds)
    if found.problem:
        return found
    found.bar = _bar(comparison, sample)
    found.too_few = found.bar is not None and not sample.without_chance and comparison.claim.test != "count"
    if comparison.claim.test == "diversity":
        _vectors(found, comparison, sample)
    else:
        _numbers(found, comparison, sample, records, decides)
    return found


def _bar(comparison: Comparison, sample: Sample) -> str | None:
    """What keeps a comparison open, whatever its test says."""
    if bar := _without_chance(len(sample.without_chance), comparison.dataset):
        return bar
    if comparison.claim.test == "count":
        n = len(sample.failed)
        return f"{n} failed run{'s keep' if n != 1 else ' keeps'} no bound" if n else None
    n = len(sample.seeds)
    return f"{n} pairs, and no verdict comes from fewer than {FEWEST_PAIRS}" if n < FEWEST_PAIRS else None


def _without_chance(runs: int, dataset: str | None) -> str | None:
    if not runs:
        return None
    return f"{runs} run{'s' * (runs != 1)} diverged, and no record says what chance is on {dataset}"


def _too_few(comparison: Comparison, found: Evidence, fewest: int, records: Records) -> str:
    for quantity in comparison.quantities:
        if not records.seeds(quantity):
            return f"no run of {place(quantity)}"
    reasons = list(dict.fromkeys(lost["reason"] for lost in found.lost))
    text = f"{found.n} usable seed{'s' * (found.n != 1)} where at least {fewest} are needed"
    return "; ".join([text, *reasons[:2]])


# ----------------------------------------------------------------------------------------------- numbers


def _numbers(found: Evidence, comparison: Comparison, sample: Sample, records: Records, decides: str) -> None:
    claim = comparison.claim
    back = np.exp if claim.scale == "ratio" else np.asarray
    found.treatment_mean, found.control_mean = sample.means()
    contrasts = sample.contrasts(claim.scale)
    values = contrasts[:, 0]
    if claim.test == "trend":
        x = [known(point.x) for point in comparison.points]
        found.point_means = contrasts.mean(axis=0).tolist()
        values = inference.slopes(contrasts, x)
        found.p_page = inference.page(contrasts, x, "less" if comparison.sign < 0 else "greater")
    found.values = back(values).tolist()
    mean = float(values.mean())
    # a mean that is nothing but rounding error is zero
    found.estimate = float(back(mean if abs(mean) > 1e-12 * float(np.abs(values).max()) else 0.0))
    if claim.test == "count":
        found.count = _count(comparison, found)
        found.reference, found.test_name = (
            [known(claim.value)],
            "every run against the bound, no chance in it",
        )
        ends = (min(found.values), max(found.values))
        found.ends = lambda level: ends
        return
    turned = comparison.sign * values
    floor = _floor(comparison, sample, records)
    procedure: Procedure
    found.by_flips = _why_flips(sample, turned, floor)
    if found.by_flips or decides == FLIPS:
        flips = inference.Flips(turned)
        procedure, ends_of = flips, flips.ends
        found.sd = 0.0 if inference.is_constant(values) else float(values.std(ddof=1))
    else:
        student = inference.Student(turned, floor)
        procedure, ends_of = student, student.ends
        found.sd = student.sd
    if decides == RANKS and not found.by_flips:
        procedure = inference.Ranks(turned)
    _collapses(found, sample, values, back)
    found.test = Test(procedure, *answers(comparison))
    found.ends = _turned_back(ends_of, comparison.sign, back)
    found.reference = _reference(found.test, comparison.sign, back)
    found.p = found.test.replicated.p(procedure)
    found.p_against = found.test.contradicted.p(procedure) if found.test.contradicted else 1.0
    paired = "paired " if sample.paired and claim.test != "trend" else ""
    sides = {"equivalence": "two one-sided ", "difference": "two-sided "}.get(claim.test, "one-sided ")
    found.test_name = f"{sides}{paired if procedure.name == T else ''}{procedure.name}" + (
        " on slopes" if claim.test == "trend" else ""
    )


def _why_flips(sample: Sample, values: np.ndarray, floor: float) -> str | None:
    """Why a t-test does not decide here, None if it does."""
    if any(any(sides) for sides in sample.collapsed):
        return "runs collapsed"
    if sample.at_an_end:
        return "a value is at the floor or cap of its metric"
    if inference.is_constant(values) and not floor:
        return "all values are equal"
    return None


def _floor(comparison: Comparison, sample: Sample, records: Records) -> float:
    """Least standard deviation of the values: one image rounded, where they come from accuracies."""
    metrics = [part.metric for part in comparison.quantities]
    if not any("accuracy" in metric for metric in metrics) or comparison.dataset is None:
        return 0.0
    images = records.images(comparison.dataset, metrics[0])
    if not images:
        return 0.0
    step = 1 / images / math.sqrt(12)
    if comparison.claim.test == "trend":
        x = np.array([known(point.x) for point in comparison.points])
        return step / math.sqrt(float(((x - x.mean()) ** 2).sum()))
    if comparison.claim.scale == "ratio":
        return step / float(np.mean(sample.treatment))
    return step


def _collapses(found: Evidence, sample: Sample, values: np.ndarray, back: Callable) -> None:
    if not any(any(sides) for sides in sample.collapsed):
        return
    treatment, control = zip(*sample.collapsed, strict=True)
    found.collapsed = {"treatment": sum(treatment)}
    if sample.paired:
        found.collapsed |= {"control": sum(control), "p": mcnemar(treatment, control)}
    found.median = float(back(np.median(values)))
    found.interquartile_mean = float(back(interquartile_mean(values)))


def _turned_back(
    ends: Callable[[float], tuple[float, float]], sign: float, back: Callable
) -> Callable[[float], tuple[float, float]]:
    def turned(level: float) -> tuple[float, float]:
        low, high = ends(level)
        low, high = (low, high) if sign > 0 else (-high, -low)
        return float(back(low)) + 0.0, float(back(high)) + 0.0  # no negative zero

    return turned


def _reference(test: Test, sign: float, back: Callable) -> list[float]:
    """What the estimate is held against, for drawing: each null once."""
    nulls = {null for answer in (test.replicated, test.contradicted) if answer for null in _nulls(answer)}
    return sorted(float(back(sign * null)) for null in nulls)


def _nulls(answer: Answer) -> list[float]:
    return [null for null in (answer.above, answer.below) if null is not None]


def _count(comparison: Comparison, found: Evidence) -> str:
    met = bound_met(comparison, found)
    return "replicated" if met == found.n else "open" if met else "contradicted"


def bound_met(comparison: Comparison, found: Evidence) -> int:
    """How many values of a count keep the claimed bound."""
    bound = known(comparison.claim.value)
    slack = 1e-12 * abs(bound)
    if comparison.sign < 0:
        return sum(value <= bound + slack for value in found.values)
    return sum(value >= bound - slack for value in found.values)


# --------------------------------------------------------------------------------------- vectors and cells


def _vectors(found: Evidence, comparison: Comparison, sample: Sample) -> None:
    treatment, control = ([row[0] for row in side] for side in (sample.treatment, sample.control))
    if len({len(vector) for vector in treatment}) > 1:
        found.problem = f"{comparison.claim.metric} has different lengths over the seeds"
        return
    first, second = inference.mean_correlations(treatment), inference.mean_correlations(control)
    found.values = (first - second).tolist()
    found.treatment_mean, found.control_mean = float(np.tanh(first.mean())), float(np.tanh(second.mean()))
    found.estimate = float(first.mean() - second.mean())
    sides = (control, treatment) if comparison.sign < 0 else (treatment, control)
    procedure = inference.Correlations(*sides)
    _own_test(found, procedure, 0.0)
    found.ends = _turned_back(procedure.ends, comparison.sign, np.asarray)
    found.p_permutation = found.p


def _cells(found: Evidence, comparison: Comparison, records: Records, seeds: list[int]) -> None:
    """One value per network in a cell, its mean contrast over targets and seeds; the estimate is the share that agrees."""
    claim = comparison.claim
    points = sorted(comparison.points, key=_cell)
    unknown: dict[str, int] = {}
    for cell, group in groupby(points, key=_cell):
        inside = replace(comparison, points=list(group), dataset=cell[0], architecture=cell[1])
        sample = gather(inside, inside.points, records, seeds)
        found.lost += sample.lost
        if sample.without_chance:
            unknown[cell[0]] = unknown.get(cell[0], 0) + len(sample.without_chance)
        if reason := problem(inside, records, seeds):
            found.lost.append({"seed": None, "reason": reason})
        elif sample.seeds:
            mean = float(sample.contrasts(claim.scale).mean())
            found.values.append(math.exp(mean) if claim.scale == "ratio" else mean)
    found.n = len(found.values)
    if not found.n:
        found.problem = _too_few(comparison, found, 1, records)
        return
    found.bar = _without_chance(sum(unknown.values()), " or ".join(unknown))
    neutral = 1.0 if claim.scale == "ratio" else 0.0
    agreeing = sum(comparison.sign * value > comparison.sign * neutral for value in found.values)
    opposing = sum(comparison.sign * value < comparison.sign * neutral for value in found.values)
    procedure = inference.Cells(agreeing, opposing, found.n)
    _own_test(found, procedure, 0.5)
    found.ends = procedure.ends
    found.estimate = agreeing / found.n


def _cell(point: Point) -> tuple[str, str]:
    quantity: Quantity = point.treatment
    return str(quantity.dataset), str(quantity.architecture)


def _own_test(found: Evidence, procedure: Procedure, null: float) -> None:
    """A test that has no margins, in both directions."""
    found.test = Test(procedure, Answer(above=null), Answer(below=null))
    found.p, found.p_against = procedure.p(null, "greater"), procedure.p(null, "less")
    found.reference, found.test_name = [null], procedure.name


# ----------------------------------------------------------------------------------------------- checks


def add_checks(comparison: Comparison) -> None:
    """The same hypothesis by other tests and the effect in standard deviations, which decide nothing."""
    found = comparison.shown
    if (
        found is None
        or found.test is None
        or not isinstance(found.test.procedure, (inference.Student, inference.Flips))
    ):
        return
    ratio = comparison.claim.scale == "ratio"
    values = np.log(found.values) if ratio else np.array(found.values)
    turned = comparison.sign * values
    found.p_permutation = found.test.replicated.p(inference.Flips(turned))
    if comparison.claim.test != "trend":
        found.p_wilcoxon = found.test.replicated.p(inference.Ranks(turned))
    if not inference.is_constant(values):
        centre = found.test.replicated.above if comparison.claim.test == "threshold" else 0.0
        found.effect_size = inference.effect_size(values, comparison.sign * known(centre))
