"""The tests behind the verdicts: plain functions of arrays, one number per seed.

SciPy and statsmodels do the mathematics. What is written out here, and in `flips`, is what they lack: the sign-flip
test with a tolerance for ties, and the comparison of two sets of vectors.

`alternative` is `greater`, `less` or `two-sided`, as in SciPy. One-dimensional arguments `values` have shape
[n], n >= 2, and are finite. A t-test of values that are all equal is undefined (`is_constant`); the exact
sign-flip test is not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.special import gammaln
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from common.statistics.flips import ENUMERATED, patterns
from common.statistics.flips import sign_flip as sign_flip

ALPHA = 0.05
CONFIDENCE = 1 - ALPHA
POWER = 0.8
_ROUNDING = 1e-12  # relative size below which a difference of two measurements is rounding error


def differences(treatment: ArrayLike, control: ArrayLike) -> np.ndarray:
    """treatment - control, [n], free of rounding error, so that equal differences are equal numbers."""
    treatment, control = np.asarray(treatment, float), np.asarray(control, float)
    largest = max(np.abs(treatment).max(), np.abs(control).max())
    if largest == 0:
        return treatment - control
    return np.round(treatment - control, -math.floor(math.log10(largest * _ROUNDING)))


def is_constant(values: ArrayLike) -> bool:
    """Whether all values are the same, up to rounding."""
    values = np.asarray(values, float)
    return bool(np.ptp(values) <= _ROUNDING * np.abs(values).max())


def _shifted(values: ArrayLike, null: float) -> np.ndarray:
    return differences(values, np.full(len(np.asarray(values)), null))


def opposite(alternative: str) -> str:
    """`less` for `greater` and the other way round."""
    return {"greater": "less", "less": "greater"}[alternative]


def t_test(values: ArrayLike, null: float, alternative: str) -> float:
    """p of Student's one-sample t-test of the mean against `null`. Not for constant values."""
    return float(stats.ttest_1samp(values, null, alternative=alternative).pvalue)


def interval(values: ArrayLike) -> tuple[float, float]:
    """95% t interval of the mean; constant values give that value twice."""
    values = np.asarray(values, float)
    mean = float(values.mean())
    if is_constant(values):
        return mean, mean
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=stats.sem(values))
    return float(low), float(high)


def _permutation_p(statistics: np.ndarray, size: float, alternative: str) -> float:
    """Share of `statistics` at least as extreme as the first, which is the observed one.

    With random assignments, this share (the observed one among them) is a valid p too.
    """
    if alternative == "two-sided":
        statistics = np.abs(statistics)
    elif alternative == "less":
        statistics = -statistics
    return float(np.mean(statistics >= statistics[0] - _ROUNDING * size))


def wilcoxon(values: ArrayLike, null: float, alternative: str) -> float:
    """p of Wilcoxon's signed-rank test; 1 when every value equals `null`.

    Values equal to `null` are left out. Up to ENUMERATED values it is the exact sign-flip test of the signed ranks, with
    mid-ranks for ties: what SciPy finds for ties too, but only by its general and slow permutation test.
    """
    shifted = _shifted(values, null)
    shifted = shifted[shifted != 0]
    if not len(shifted):
        return 1.0
    if len(shifted) <= ENUMERATED:
        return sign_flip(np.sign(shifted) * stats.rankdata(np.abs(shifted)), 0.0, alternative)
    return float(stats.wilcoxon(shifted, alternative=alternative).pvalue)


def tost(values: ArrayLike, low: float, high: float, test: Callable[..., float] = t_test) -> float:
    """p that the mean lies between `low` and `high`: the larger p of two one-sided tests.

    test: `t_test`, or one of the others that take (values, null, alternative).
    """
    return max(test(values, low, "greater"), test(values, high, "less"))


def effect_size(values: ArrayLike, null: float = 0.0) -> float:
    """(mean - null) / sd, for paired differences Cohen's d_z, with Hedges' exact correction for small n.

    Not for constant values.
    """
    values = np.asarray(values, float)
    freedom = len(values) - 1
    if freedom < 2:
        return math.nan  # the correction needs two degrees of freedom
    correction = math.exp(gammaln(freedom / 2) - gammaln((freedom - 1) / 2)) / math.sqrt(freedom / 2)
    return float((values.mean() - null) / values.std(ddof=1) * correction)


def smallest_effect(n: int, sd: float) -> float:
    """Mean that n values of this sd show with power 0.8 in a one-sided t-test at 0.05 (non-central t)."""
    return sd * _standardised_smallest_effect(n)


@functools.lru_cache
def _standardised_smallest_effect(n: int) -> float:
    return float(TTestPower().solve_power(nobs=n, alpha=ALPHA, power=POWER, alternative="larger"))


def holm(p_values: ArrayLike) -> np.ndarray:
    """p after Holm's correction within one family, [n]; an empty family gives an empty array."""
    p_values = np.asarray(p_values, float)
    return multipletests(p_values, method="holm")[1] if len(p_values) else p_values


def slopes(values: ArrayLike, x: ArrayLike) -> np.ndarray:
    """Least-squares slope of each row of `values`, [n, k], over `x`, [k] with distinct numbers in it."""
    values, x = np.asarray(values, float), np.asarray(x, float)
    centred = x - x.mean()
    found = values @ centred / (centred @ centred)
    # rows that differ by a constant have the same slope: no rounding error may tell them apart
    return differences(found, np.zeros(len(found)))


def page(values: ArrayLike, x: ArrayLike, alternative: str) -> float:
    """p of Page's test that `values`, [n, k], rise (`greater`) or fall (`less`) with `x`, [k].

    NaN for fewer than three columns, where the test does not exist.
    """
    values = np.asarray(values, float)[:, np.argsort(x)]
    if values.shape[1] < 3:
        return math.nan
    if alternative == "less":
        values = values[:, ::-1]
    return float(stats.page_trend_test(values).pvalue)


def sign_test(positive: int, n: int) -> tuple[float, float, float]:
    """p that more than half of all cells are positive, and the exact 95% interval of their share."""
    result = stats.binomtest(positive, n, alternative="greater")
    share = stats.binomtest(positive, n).proportion_ci(CONFIDENCE, method="exact")
    return float(result.pvalue), float(share.low), float(share.high)


def mean_correlations(vectors: ArrayLike) -> np.ndarray:
    """Mean Pearson correlation of each row of `vectors`, [n, k], with the others: [n]. No constant rows."""
    matrix = np.corrcoef(np.asarray(vectors, float))
    return (matrix.sum(axis=1) - 1) / (len(matrix) - 1)


def compare_correlations(treatment: ArrayLike, control: ArrayLike, alternative: str) -> float:
    """p that vectors of the treatment correlate more (`greater`) or less among themselves than the control's.

    Both have shape [n, k] with the same seed in the same row. Pairs of vectors are dependent, so the labels
    are exchanged: within seeds, because those are paired. The statistic is the difference of mean pairwise
    correlations.
    """
    both = np.corrcoef(np.vstack([np.asarray(treatment, float), np.asarray(control, float)]))
    flipped = patterns(len(np.asarray(treatment)))
    first = np.hstack([1 - flipped, flipped])

    def within(members: np.ndarray) -> np.ndarray:
        return np.einsum("ij,ij->i", members @ both, members)

    statistics = within(first) - within(1 - first)
    return _permutation_p(statistics, len(both) ** 2, alternative)


def correlation_interval(treatment: ArrayLike, control: ArrayLike) -> tuple[float, float]:
    """95% jackknife interval, over seeds, of the difference of mean pairwise correlations."""
    treatment, control = np.asarray(treatment, float), np.asarray(control, float)

    def difference(rows: np.ndarray) -> float:
        return float(np.mean(mean_correlations(treatment[rows]) - mean_correlations(control[rows])))

    seeds = np.arange(len(treatment))
    whole = difference(seeds)
    without = np.array([difference(np.delete(seeds, seed)) for seed in seeds])
    return interval(len(seeds) * whole - (len(seeds) - 1) * without)
