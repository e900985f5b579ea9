"""A second interval for a difference of accuracies: over seeds and over test images. It is shown and never decides.

The interval over seeds says what other seeds would give on these test images. Where it is known which images each run
has right, both can be taken as drawn: seeds crossed with images, as readers are with cases in radiology. Obuchowski and
Rockette, "Hypothesis testing of diagnostic accuracy for multiple readers and multiple tests", Communications in
Statistics 1995; Hillis, "A marginal-mean ANOVA approach for analyzing multireader multicase radiological imaging data",
Statistics in Medicine 2014.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from common.predictions import Predictions
from common.statistics.comparisons import Comparison, OverImages
from common.statistics.deciding import CONTRADICTED, REPLICATED
from common.statistics.records import Quantity, Records


def crossed_variance(treatment: ArrayLike, control: ArrayLike) -> tuple[float, float]:
    """Variance of the difference of mean accuracies over seeds and images, and its degrees of freedom.

    treatment, control: whether each run has each test image right, [seeds, images], at least two of both; the same seed
    in the same row, the same image in the same column. With the mean squares of the two-way table of differences,

        V = (MS_seed + max(MS_image - MS_residual, 0)) / (seeds * images),

    where MS_image - MS_residual is what images have in common over seeds, and degrees of freedom are Satterthwaite's.
    They are infinite where nothing varies. Raises ValueError for other shapes.
    """
    table = _differences(treatment, control)
    seeds, images = table.shape
    mean, by_seed, by_image = table.mean(), table.mean(axis=1), table.mean(axis=0)
    seed = images * by_seed.var(ddof=1)
    image = seeds * by_image.var(ddof=1)
    rest = table - by_seed[:, None] - by_image + mean
    residual = (rest**2).sum() / ((seeds - 1) * (images - 1))
    total, spread = seed, seed**2 / (seeds - 1)
    if image > residual:
        total += image - residual
        spread += image**2 / (images - 1) + residual**2 / ((seeds - 1) * (images - 1))
    return float(total / (seeds * images)), float(total**2 / spread) if spread else math.inf


def crossed_interval(treatment: ArrayLike, control: ArrayLike, level: float) -> tuple[float, float]:
    """Interval of the difference of mean accuracies over seeds and images: each end one-sided at `level`.

    Arguments and errors as of `crossed_variance`. Where no difference varies, both ends are the difference itself.
    """
    variance, freedom = crossed_variance(treatment, control)
    mean = float(_differences(treatment, control).mean())
    half = float(stdtrit(freedom, 1 - level)) * math.sqrt(variance)
    return mean - half, mean + half


def add_images(comparison: Comparison, records: Records) -> None:
    """The interval over seeds and test images, at the level of the one that decides, where records hold predictions."""
    found = comparison.shown
    if found is None or found.test is None or comparison.level is None:
        return
    if (tables := correctness(comparison, found.seeds, records)) is None:
        return
    low, high = crossed_interval(*tables, comparison.level)
    turned = (low, high) if comparison.sign > 0 else (-high, -low)
    given = {REPLICATED: found.test.replicated, CONTRADICTED: found.test.contradicted}.get(comparison.verdict)
    comparison.over_images = OverImages(low, high, given.holds(*turned) if given else None)


def correctness(
    comparison: Comparison, seeds: Sequence[int], records: Records
) -> tuple[np.ndarray, np.ndarray] | None:
    """Whether both sides have each test image right, [seeds, images] each, less what is subtracted from them.

    None unless the comparison is of test accuracies in one place, on their own scale, and all its runs have predictions
    for the same images.
    """
    (point, *others), claim = comparison.points, comparison.claim
    metrics = {part.metric.removeprefix("metrics.") for part in point.quantities()}
    if others or point.control is None or claim.scale == "ratio" or metrics != {"test_accuracy"}:
        return None
    if claim.test in ("trend", "sign", "count"):
        return None
    runs: dict[Quantity, list[Predictions]] = {}
    for part in point.quantities():
        found = [records.predictions(records.of(part, seed)) for seed in seeds]
        runs[part] = [predictions for predictions in found if predictions is not None]
    every = [predictions for own in runs.values() for predictions in own]
    if len(every) < len(runs) * len(seeds) or min(len(seeds), len(every[0].labels)) < 2:
        return None
    if any(not np.array_equal(one.labels, every[0].labels) for one in every):
        return None

    def side(quantity: Quantity) -> np.ndarray:
        right = np.array([one.correct for one in runs[quantity]]).astype(float)
        return right - side(quantity.minus) if quantity.minus else right

    return side(point.treatment), side(point.control)


def _differences(treatment: ArrayLike, control: ArrayLike) -> np.ndarray:
    first, second = np.asarray(treatment, float), np.asarray(control, float)
    if first.shape != second.shape or first.ndim != 2 or min(first.shape) < 2:
        raise ValueError(
            f"correctness of the shapes {first.shape} and {second.shape}: both must be [seeds, images], "
            "with the same seeds and images, at least two of both"
        )
    return first - second
