"""Why a comparison or a claim is open, and how many seeds would decide it.

Power is that of t-tests at the level that the comparison faces, for the effect and spread that were seen.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import stdtr

from common.statistics import inference
from common.statistics.comparisons import Comparison
from common.statistics.deciding import (
    ANSWERS,
    CONTRADICTED,
    NOT_TESTED,
    OPEN,
    REPLICATED,
    Judged,
)
from common.statistics.evidence import Evidence, Why
from common.statistics.testing import FEWEST_PAIRS, Answer

NEEDS, MIXED, COLLAPSES, STRUCTURAL = "needs n seeds", "mixed", "collapses", "structural"
MOST_SEEDS = 10_000
"""What would need more is a tie, which no number of seeds decides."""
_MOST_LOG = 700.0  # the logarithm of about the largest number of double precision


def explain(judged: Judged, last_share: float) -> None:
    """Fill in why each open comparison of a claim is open, and the smallest effect that each could have shown.

    last_share: the part of the level that a last look may spend.
    """
    if judged.claim.test == "count":
        for comparison in judged.comparisons:
            if comparison.verdict == OPEN:
                comparison.why = _why_count(comparison)
        return
    levels = {answer: level * last_share for answer, level in judged.levels.items()}
    for comparison in judged.comparisons:
        found = comparison.shown
        if comparison.verdict == NOT_TESTED or found is None or found.test is None:
            continue
        comparison.detectable = _detectable(comparison, found, levels)
        if comparison.verdict == OPEN:
            comparison.why = _why(comparison, found, levels)


def why_claim(judged: Judged, deciding: Comparison) -> Why | None:
    """Why a claim is open; of a contradicted one, whether it holds somewhere all the same."""
    if judged.verdict not in (OPEN, CONTRADICTED):
        return None
    graded = {comparison.graded for comparison in judged.comparisons}
    somewhere = REPLICATED if judged.claim.require == "all" else CONTRADICTED
    if somewhere in graded and graded & ({OPEN, REPLICATED, CONTRADICTED} - {somewhere}):
        needs = deciding.why.needs if deciding.why else None
        return Why(MIXED, needs, "it does not hold everywhere alike")
    if judged.verdict == CONTRADICTED:
        return None
    return deciding.why or Why(STRUCTURAL, None, "a comparison has not been tested")


def _why_count(comparison: Comparison) -> Why:
    bar = comparison.shown.bar if comparison.shown else None
    return Why(STRUCTURAL, None, bar) if bar else Why(MIXED, None, "some runs keep the bound and some do not")


def _why(comparison: Comparison, found: Evidence, levels: dict[str, float]) -> Why:
    procedure = found.test.procedure
    if found.bar and not found.too_few:
        return Why(STRUCTURAL, None, found.bar)
    if isinstance(procedure, inference.Cells):
        cells = _fewest(levels[REPLICATED], found.test.replicated)
        short = f"an exact test needs at least {cells}" if found.n < cells else "these do not agree enough"
        return Why(STRUCTURAL, None, f"more seeds add no cells, and {short}")
    if isinstance(procedure, inference.Correlations):
        fewest = max(FEWEST_PAIRS, _fewest(levels[REPLICATED], found.test.replicated))
        if fewest <= found.n:
            return Why(NEEDS, None, "more seeds are needed; how many, no formula tells")
        return Why(NEEDS, fewest, f"an exact test needs at least {fewest} seeds")
    needs = _needed(found, levels)
    if needs is None:
        return Why(STRUCTURAL, None, f"a tie that no {MOST_SEEDS:,} seeds would decide")
    if found.by_flips:
        floor = _fewest(min(levels.values()), found.test.replicated)
        needs = floor if found.n < floor else max(needs, floor)
        text = f"{found.by_flips}, so that an exact test decides, which needs at least {floor} seeds"
        return Why(COLLAPSES if found.collapsed else NEEDS, needs, text)
    return Why(NEEDS, needs, found.bar or f"{needs} seeds would decide it with power {inference.POWER:g}")


def _fewest(level: float, answer: Answer) -> int:
    """Pairs or cells without which no exact one-sided p is as small as the level of each test."""
    return math.ceil(-math.log2(answer.per_end(level)) - 1e-9)


def _spread(found: Evidence) -> tuple[float, float]:
    """Mean and standard deviation of the values, turned to the claimed direction."""
    procedure = found.test.procedure
    if isinstance(procedure, inference.Student):
        return procedure.mean, procedure.sd
    return float(np.mean(procedure.values)), float(np.std(procedure.values, ddof=1))


def _needed(found: Evidence, levels: dict[str, float]) -> int | None:
    """The least number of seeds that would decide with power 0.8, None if more than MOST_SEEDS."""
    mean, sd = _spread(found)
    tests = [(answer, levels[name]) for name in ANSWERS if (answer := getattr(found.test, name)) is not None]

    def enough(n: int) -> bool:
        if sd == 0:
            return sum(_holds(answer, mean) for answer, _ in tests) > 0
        return sum(_power(answer, mean, sd, n, level) for answer, level in tests) >= inference.POWER

    low, high = FEWEST_PAIRS, MOST_SEEDS
    if not enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def _holds(answer: Answer, mean: float) -> bool:
    found = [] if answer.above is None else [mean > answer.above]
    found += [] if answer.below is None else [mean < answer.below]
    return any(found) if answer.either else all(found)


def _power(answer: Answer, mean: float, sd: float, n: int, level: float) -> float:
    level, count = answer.per_end(level), np.array([n])
    found = [] if answer.above is None else [inference.power((mean - answer.above) / sd, count, level)[0]]
    found += [] if answer.below is None else [inference.power((answer.below - mean) / sd, count, level)[0]]
    if answer.either or len(found) == 1:
        return float(sum(found))
    return max(0.0, float(sum(found)) - 1)


def _detectable(comparison: Comparison, found: Evidence, levels: dict[str, float]) -> float | None:
    """The smallest effect that these seeds could have shown, at the level faced; in units of the values."""
    procedure = found.test.procedure
    if not isinstance(procedure, inference.Student):
        return None
    level = found.test.replicated.per_end(levels[REPLICATED])
    effect = procedure.sd * inference.detectable(found.n, level)
    return float(np.exp(min(effect, _MOST_LOG))) if comparison.claim.scale == "ratio" else effect


def predicted(found: Evidence, seeds: int, levels: dict[str, float]) -> float | None:
    """Probability that a later look of `seeds` seeds decides, given what this one saw; None without a t-test.

    Predictive, for normal values of the spread seen: the mean to come differs from the one seen by Student's t times
    sd * sqrt(1 / n - 1 / seeds). It stops nothing: futility is for whoever buys seeds.
    """
    if found.test is None or not isinstance(found.test.procedure, inference.Student) or seeds <= found.n:
        return None
    student: inference.Student = found.test.procedure
    wide = student.sd * math.sqrt(1 / found.n - 1 / seeds)
    total = 0.0
    for name in ANSWERS:
        answer: Answer | None = getattr(found.test, name)
        if answer is None:
            continue
        half = inference.quantile(seeds - 1, answer.per_end(levels[name])) * student.sd / math.sqrt(seeds)
        ends = []
        if answer.above is not None:
            ends.append(float(stdtr(found.n - 1, (student.mean - answer.above - half) / wide)))
        if answer.below is not None:
            ends.append(float(stdtr(found.n - 1, (answer.below - student.mean - half) / wide)))
        total += sum(ends) if answer.either or len(ends) == 1 else max(0.0, sum(ends) - 1)
    return min(1.0, total)
