"""The tests behind the verdicts: plain functions of arrays, one number per seed.

SciPy does the mathematics. What is written out here, and in `flips`, is what it lacks, or what it does a hundred times
slower: t-tests with a floor under the standard deviation, Holm's correction, the comparison of two sets of vectors.

`alternative` is `greater` or `less`, as in SciPy. One-dimensional arguments `values` have shape [n], n >= 2, and are
finite. A `level` is one-sided. A t-test of values that are all equal is undefined where there is no floor
(`is_constant`); the exact sign-flip test is not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtrc, betaincinv, gammaln, nctdtr, nctdtrinc, ndtr, stdtr, stdtrit

from common.statistics.flips import ENUMERATED, flip_interval, patterns, sign_flip

ALPHA = 0.05
POWER = 0.8
_ROUNDING = 1e-12  # relative size below which a difference of two measurements is rounding error


def differences(treatment: ArrayLike, control: ArrayLike) -> np.ndarray:
    """treatment - control, [n], free of rounding error, so that equal differences are equal numbers.

    Nothing below 1e-300 is told from zero.
    """
    treatment, control = np.asarray(treatment, float), np.asarray(control, float)
    largest = max(np.abs(treatment).max(), np.abs(control).max())
    return np.round(treatment - control, -math.floor(math.log10(max(largest * _ROUNDING, 1e-300))))


def is_constant(values: ArrayLike) -> bool:
    """Whether all values are the same, up to rounding."""
    values = np.asarray(values, float)
    return bool(np.ptp(values) <= _ROUNDING * np.abs(values).max())


@functools.lru_cache(maxsize=4096)
def quantile(freedom: int, level: float) -> float:
    """The value that Student's t exceeds with probability `level`."""
    return float(stdtrit(freedom, 1 - level))


class Student:
    """One-sample t-tests of the mean, and the interval that is their inversion.

    floor: least standard deviation to reckon with, which rounding to steps of floor * sqrt(12) would cause alone. Without
    one, constant values have no t-test.
    """

    name = "t"

    def __init__(self, values: np.ndarray, floor: float = 0.0):
        self.n, self.mean = len(values), float(values.mean())
        self.sd = max(float(values.std(ddof=1)), floor)
        self._error = self.sd / math.sqrt(self.n)

    def p(self, null: float, alternative: str) -> float:
        """p that the mean is above (`greater`) or below (`less`) the null."""
        t = (self.mean - null) / self._error
        return float(stdtr(self.n - 1, -t if alternative == "greater" else t))

    def ends(self, level: float) -> tuple[float, float]:
        """The nulls between which neither test is significant at `level`."""
        half = quantile(self.n - 1, level) * self._error
        return self.mean - half, self.mean + half


class Flips:
    """The same by the sign-flip test, whose p cannot go below 2**-n: ends are infinite where the level does."""

    name = "sign-flip"

    def __init__(self, values: np.ndarray):
        self.values = values

    def p(self, null: float, alternative: str) -> float:
        return sign_flip(self.values, null, alternative)

    def ends(self, level: float) -> tuple[float, float]:
        return flip_interval(self.values, level)


class Ranks:
    """Wilcoxon's signed ranks: p only."""

    name = "Wilcoxon"

    def __init__(self, values: np.ndarray):
        self.values = values

    def p(self, null: float, alternative: str) -> float:
        return wilcoxon(self.values, null, alternative)


class Cells:
    """The exact sign test that more than half of all cells agree, and Clopper and Pearson's interval of their share."""

    name = "exact sign test over cells"

    def __init__(self, agreeing: int, opposing: int, n: int):
        self.agreeing, self.opposing, self.n = agreeing, opposing, n

    def p(self, null: float, alternative: str) -> float:
        hits = self.agreeing if alternative == "greater" else self.opposing
        return float(bdtrc(hits - 1, self.n, 0.5))

    def ends(self, level: float) -> tuple[float, float]:
        k, n = self.agreeing, self.n
        low = float(betaincinv(k, n - k + 1, level)) if k else 0.0
        high = float(betaincinv(k + 1, n - k, 1 - level)) if k < n else 1.0
        return low, high


class Correlations:
    """Exchange of labels within seeds for the mean correlation of vectors, and a jackknife interval over seeds.

    treatment, control: [n, k], the same seed in the same row. Correlations are compared as Fisher's z.
    """

    name = "permutation of labels within seeds"

    def __init__(self, treatment: ArrayLike, control: ArrayLike):
        self.sides = np.asarray(treatment, float), np.asarray(control, float)

    def p(self, null: float, alternative: str) -> float:
        return compare_correlations(*self.sides, alternative)

    def ends(self, level: float) -> tuple[float, float]:
        return correlation_interval(*self.sides, level)


def _permutation_p(statistics: np.ndarray, size: float, alternative: str) -> float:
    """Share of `statistics` at least as extreme as the first, which is the observed one.

    With random assignments, this share (the observed one among them) is a valid p too.
    """
    if alternative == "less":
        statistics = -statistics
    return float(np.mean(statistics >= statistics[0] - _ROUNDING * size))


def wilcoxon(values: ArrayLike, null: float, alternative: str) -> float:
    """p of Wilcoxon's signed-rank test; 1 when every value equals `null`.

    Values equal to `null` are left out. Up to ENUMERATED values it is the exact sign-flip test of the signed ranks, with
    mid-ranks for ties: what SciPy finds for ties too, but only by its general and slow permutation test.
    """
    shifted = differences(values, np.full(len(np.asarray(values)), null))
    shifted = shifted[shifted != 0]
    if not len(shifted):
        return 1.0
    if len(shifted) <= ENUMERATED:
        return sign_flip(np.sign(shifted) * ranks(np.abs(shifted)), 0.0, alternative)
    from scipy import stats  # a second to load

    return float(stats.wilcoxon(shifted, alternative=alternative).pvalue)


def ranks(values: ArrayLike) -> np.ndarray:
    """Ranks along the first axis, from 1, mid-ranks for ties."""
    values = np.asarray(values, float)
    others = values[:, None]
    return (others > values).sum(1) + ((others == values).sum(1) + 1) / 2


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


@functools.lru_cache(maxsize=4096)
def detectable(n: int, level: float = ALPHA) -> float:
    """Mean, in standard deviations, that n values show with power 0.8 in a one-sided t-test (non-central t)."""
    return float(nctdtrinc(n - 1, 1 - POWER, quantile(n - 1, level))) / math.sqrt(n)


def power(effect: ArrayLike, n: np.ndarray, level: float) -> np.ndarray:
    """Power of one-sided t-tests of n values, [k], for means of `effect` standard deviations ([k] or one for all)."""
    shift, t = np.asarray(effect) * np.sqrt(n), stdtrit(n - 1, 1 - level)
    missed = nctdtr(n - 1, shift, t)
    # far in its tails SciPy's function has gaps, where a normal approximation is as good as 0 or 1
    return 1 - np.where(np.isnan(missed), ndtr(t - shift), missed)


def holm(p_values: Sequence[float]) -> list[float]:
    """p after Holm's correction within one family, in the order given."""
    family = len(p_values)
    found, largest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (family - rank) * p_values[index]))
        found[index] = largest
    return found


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
    from scipy import stats  # a second to load

    return float(stats.page_trend_test(values).pvalue)


def fisher(correlations: np.ndarray) -> np.ndarray:
    """Fisher's z; a correlation of 1 is taken as far from 1 as numbers of double precision tell."""
    limit = 1 - 1e-12
    return np.arctanh(np.clip(correlations, -limit, limit))


def mean_correlations(vectors: ArrayLike) -> np.ndarray:
    """Mean Fisher's z of the Pearson correlations of each row of `vectors`, [n, k], with the others: [n].

    No constant rows.
    """
    matrix = fisher(np.corrcoef(np.asarray(vectors, float)))
    np.fill_diagonal(matrix, 0.0)
    return matrix.sum(axis=1) / (len(matrix) - 1)


def compare_correlations(treatment: ArrayLike, control: ArrayLike, alternative: str) -> float:
    """p that vectors of the treatment correlate more (`greater`) or less among themselves than the control's.

    Both have shape [n, k] with the same seed in the same row. Pairs of vectors are dependent, so the labels
    are exchanged: within seeds, because those are paired. The statistic is the difference of mean pairwise
    correlations, as Fisher's z.
    """
    both = fisher(np.corrcoef(np.vstack([np.asarray(treatment, float), np.asarray(control, float)])))
    np.fill_diagonal(both, 0.0)
    flipped = patterns(len(np.asarray(treatment)))
    first = np.hstack([1 - flipped, flipped])

    def within(members: np.ndarray) -> np.ndarray:
        return np.einsum("ij,ij->i", members @ both, members)

    statistics = within(first) - within(1 - first)
    return _permutation_p(statistics, float(np.abs(both).sum()), alternative)


def correlation_interval(treatment: ArrayLike, control: ArrayLike, level: float) -> tuple[float, float]:
    """Jackknife t interval, over seeds, of the difference of mean pairwise correlations as Fisher's z."""
    treatment, control = np.asarray(treatment, float), np.asarray(control, float)

    def difference(rows: np.ndarray) -> float:
        return float(np.mean(mean_correlations(treatment[rows]) - mean_correlations(control[rows])))

    seeds = np.arange(len(treatment))
    whole = difference(seeds)
    without = np.array([difference(np.delete(seeds, seed)) for seed in seeds])
    pseudo = len(seeds) * whole - (len(seeds) - 1) * without
    return (whole, whole) if is_constant(pseudo) else Student(pseudo).ends(level)
