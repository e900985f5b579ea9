"""Puts a comparison to its test: from records to numbers, not yet to verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.statistics import inference
from common.statistics.claims import Claim
from common.statistics.comparisons import Comparison, Point, known
from common.statistics.records import Lost, Quantity, Records, place

_FEWEST = {"count": 1, "diversity": 3}  # seeds without which a test says nothing; 2 for all others


def test(comparison: Comparison, records: Records) -> None:
    """Fill in all but verdict, reason and Holm's correction; `problem` where nothing can be tested."""
    if comparison.problem:
        return
    if comparison.claim.test == "sign":
        _test_cells(comparison, records)
        return
    sample = _gather(comparison.claim, comparison.points, records)
    comparison.seeds, comparison.lost, comparison.n = sample.seeds, sample.lost, len(sample.seeds)
    fewest = _FEWEST.get(comparison.claim.test, 2)
    if comparison.n < fewest:
        comparison.problem = _too_few(comparison, fewest, records)
    elif comparison.claim.test == "diversity":
        _test_vectors(comparison, sample)
    else:
        _test_numbers(comparison, sample)


# ---------------------------------------------------------------------------------------------- sampling


@dataclass
class _Sample:
    """What the seeds measured.

    treatment, control: [seeds][points], each a number or a vector; None for a control that is not there.
    """

    seeds: list[int] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)
    treatment: list[list[Any]] = field(default_factory=list)
    control: list[list[Any]] = field(default_factory=list)

    def means(self) -> tuple[float, float | None]:
        """Means of both sides, None for a missing control."""
        return float(np.mean(self.treatment)), float(np.mean(self.control)) if self.paired else None

    @property
    def paired(self) -> bool:
        return self.control[0][0] is not None

    def contrasts(self, scale: str) -> np.ndarray:
        """treatment - control, or the treatment alone, [seeds, points]; of logarithms if scale is ratio."""
        sides = [
            np.array(side, float)
            for side in ([self.treatment, self.control] if self.paired else [self.treatment])
        ]
        if scale == "ratio":
            sides = [np.log(side) for side in sides]
        return inference.differences(*sides) if self.paired else sides[0]


def _gather(claim: Claim, points: list[Point], records: Records) -> _Sample:
    """Every seed that has all it takes at every point; one that lacks something is lost, with the reason."""
    sample = _Sample()
    for seed in sorted({seed for point in points for q in point.quantities() for seed in records.seeds(q)}):
        try:
            pairs = [_measured(claim, point, seed, records) for point in points]
        except Lost as reason:
            sample.lost.append({"seed": seed, "reason": str(reason)})
        else:
            sample.seeds.append(seed)
            sample.treatment.append([treatment for treatment, _ in pairs])
            sample.control.append([control for _, control in pairs])
    return sample


def _measured(claim: Claim, point: Point, seed: int, records: Records) -> tuple[Any, Any]:
    vector = claim.test == "diversity"

    def measured(quantity: Quantity | None) -> Any:
        if quantity is None:
            return None
        value = records.measure(quantity, seed, vector)
        if claim.scale == "ratio" and value <= 0:
            raise Lost(
                f"{quantity.metric} of {place(quantity)} is {value:g}: no ratio of what is not positive"
            )
        return value

    treatment, control = measured(point.treatment), measured(point.control)
    if vector and len(treatment) != len(control):
        raise Lost(f"{claim.metric} has {len(treatment)} numbers on one side and {len(control)} on the other")
    return treatment, control


def _too_few(comparison: Comparison, fewest: int, records: Records) -> str:
    for point in comparison.points:
        for quantity in point.quantities():
            if not records.seeds(quantity):
                return f"no run of {place(quantity)}"
    reasons = list(dict.fromkeys(lost["reason"] for lost in comparison.lost))
    found = f"{comparison.n} usable seed{'' if comparison.n == 1 else 's'} where at least {fewest} are needed"
    return "; ".join([found, *reasons[:2]])


# ----------------------------------------------------------------------------------------------- numbers


def _test_numbers(comparison: Comparison, sample: _Sample) -> None:
    claim = comparison.claim
    back = np.exp if claim.scale == "ratio" else np.asarray
    comparison.treatment_mean, comparison.control_mean = sample.means()
    contrasts = sample.contrasts(claim.scale)
    values = _slopes(comparison, contrasts) if claim.test == "trend" else contrasts[:, 0]
    comparison.values = back(values).tolist()
    comparison.estimate = float(back(values.mean()))
    if claim.test == "count":
        comparison.low, comparison.high = min(comparison.values), max(comparison.values)
        comparison.reference, comparison.test_name = (
            [known(claim.value)],
            "every run against the bound, no chance in it",
        )
        return
    comparison.low, comparison.high = (float(back(end)) for end in inference.interval(values))
    comparison.constant = inference.is_constant(values)
    comparison.sd = 0.0 if comparison.constant else float(values.std(ddof=1))
    nulls = _nulls(comparison)
    comparison.reference = [float(back(null)) for null in nulls]
    _decide(comparison, values, nulls, "paired t" if sample.paired and claim.test != "trend" else "t")
    if not comparison.constant:
        centre = nulls[0] if claim.test == "threshold" else 0.0
        comparison.effect_size = inference.effect_size(values, centre)
        comparison.smallest_effect = float(
            back(inference.smallest_effect(comparison.n, known(comparison.sd)))
        )


def _slopes(comparison: Comparison, contrasts: np.ndarray) -> np.ndarray:
    x = [known(point.x) for point in comparison.points]
    comparison.point_means = contrasts.mean(axis=0).tolist()
    comparison.p_page = inference.page(contrasts, x, comparison.alternative)
    return inference.slopes(contrasts, x)


def _nulls(comparison: Comparison) -> list[float]:
    """What the test tests against: one value, or the two ends of a region around zero."""
    claim, margin = comparison.claim, comparison.margin or 0.0
    ratio = claim.scale == "ratio"
    if ratio:
        margin = math.log1p(margin)
    if claim.test == "threshold":
        value = known(claim.value)
        return [math.log(value) if ratio else value]
    if claim.test in ("equivalence", "difference"):
        return [-margin, margin] if margin else [0.0]
    worse = -margin if claim.direction == "higher" else margin
    return [worse if claim.test == "noninferiority" else -worse]


def _decide(comparison: Comparison, values: np.ndarray, nulls: list[float], student: str) -> None:
    """p of the stated test, of its opposite, and of the checks."""
    kind, alternative = comparison.claim.test, comparison.alternative
    main = inference.sign_flip if comparison.constant else inference.t_test

    def stated(test: Callable[..., float]) -> float:
        if kind == "equivalence":
            return inference.tost(values, nulls[0], nulls[-1], test)
        if kind == "difference":
            return test(values, 0.0, "two-sided")
        return test(values, nulls[0], alternative)

    comparison.p = stated(main)
    comparison.p_permutation = stated(inference.sign_flip)
    if kind != "trend":
        comparison.p_wilcoxon = stated(inference.wilcoxon)
    if kind == "equivalence":
        comparison.test_name = f"two one-sided {student} (TOST)"
        comparison.p_opposite = min(main(values, nulls[0], "less"), main(values, nulls[1], "greater"))
    elif kind == "difference":
        comparison.test_name = f"two-sided {student}"
        comparison.p_opposite = inference.tost(values, nulls[0], nulls[1], main) if len(nulls) == 2 else None
    else:
        comparison.test_name = f"one-sided {student}" + (" on slopes" if kind == "trend" else "")
        comparison.p_opposite = main(values, nulls[0], inference.opposite(alternative))
    if comparison.constant:
        comparison.test_name = "exact sign-flip, as all values are equal"


# --------------------------------------------------------------------------------------- vectors and cells


def _test_vectors(comparison: Comparison, sample: _Sample) -> None:
    treatment, control = ([row[0] for row in side] for side in (sample.treatment, sample.control))
    if len({len(vector) for vector in treatment}) > 1:
        comparison.problem = f"{comparison.claim.metric} has different lengths over the seeds"
        return
    alternative = comparison.alternative
    first, second = inference.mean_correlations(treatment), inference.mean_correlations(control)
    comparison.values = (first - second).tolist()
    comparison.treatment_mean, comparison.control_mean = float(first.mean()), float(second.mean())
    comparison.estimate = comparison.treatment_mean - comparison.control_mean
    comparison.low, comparison.high = inference.correlation_interval(treatment, control)
    comparison.reference = [0.0]
    comparison.p = comparison.p_permutation = inference.compare_correlations(treatment, control, alternative)
    comparison.p_opposite = inference.compare_correlations(
        treatment, control, inference.opposite(alternative)
    )
    comparison.test_name = "permutation of labels within seeds"


def _test_cells(comparison: Comparison, records: Records) -> None:
    """One value per cell, its mean contrast over seeds; the estimate is the share that agrees."""
    claim = comparison.claim
    for point in comparison.points:
        sample = _gather(claim, [point], records)
        comparison.lost += sample.lost
        if sample.seeds:
            mean = float(sample.contrasts(claim.scale).mean())
            comparison.values.append(math.exp(mean) if claim.scale == "ratio" else mean)
    comparison.n = len(comparison.values)
    if not comparison.n:
        comparison.problem = _too_few(comparison, 1, records)
        return
    neutral = 1.0 if claim.scale == "ratio" else 0.0
    higher = sum(value > neutral for value in comparison.values)
    lower = sum(value < neutral for value in comparison.values)
    agreeing, opposing = (lower, higher) if claim.direction == "lower" else (higher, lower)
    comparison.p, comparison.low, comparison.high = inference.sign_test(agreeing, comparison.n)
    comparison.p_opposite = inference.sign_test(opposing, comparison.n)[0]
    comparison.estimate, comparison.reference = agreeing / comparison.n, [0.5]
    comparison.test_name = "exact sign test over cells"
