"""The sign-flip test of paired differences and its inversion; what else is shown where runs collapse.

Flipping the signs of the differences less a null m, in a subset of the pairs, makes their sum at least as large as the
observed one exactly where the mean of that subset is at most m. So one set of subset means has both the p of every m
and the ends of the interval (typical values: Hartigan, "Using subsample values as typical values", JASA 1969), and
the two agree without a search.

`values` have shape [n], n >= 1, and are finite.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

ENUMERATED = 16
"""Up to this many pairs all patterns of flips are enumerated; beyond, as many are drawn, seed fixed."""
_TIE = 1e-12  # relative size below which a difference of two means is rounding error


@functools.lru_cache(maxsize=8)
def patterns(n: int) -> np.ndarray:
    """Which of n pairs are flipped, 0 or 1, [rows, n]: every pattern, or 2**ENUMERATED of them; none in the first row."""
    if n <= ENUMERATED:
        return ((np.arange(2**n)[:, None] >> np.arange(n)) & 1).astype(float)
    drawn = np.random.default_rng(0).integers(0, 2, size=(2**ENUMERATED - 1, n))
    return np.vstack([np.zeros(n), drawn])


@functools.lru_cache(maxsize=8)
def _averages(n: int) -> tuple[np.ndarray, int]:
    """Weights that average over each flipped subset that is not empty, [rows, n], and the number of empty ones."""
    flipped = patterns(n)
    sizes = flipped.sum(axis=1)
    return flipped[sizes > 0] / sizes[sizes > 0, None], int((sizes == 0).sum())


def _bounds(values: np.ndarray) -> tuple[np.ndarray, int]:
    """The least null for which each non-empty subset, flipped, is as large as what was observed; number of empty ones.

    A tie counts as being as large.
    """
    weights, empty = _averages(len(values))
    return weights @ values - _TIE * np.abs(values).max(), empty


def sign_flip(values: ArrayLike, null: float, alternative: str) -> float:
    """p of the sign-flip permutation test that `values` are symmetric about `null`.

    alternative: `greater`, `less` or `two-sided` (twice the smaller one-sided p). Exact up to ENUMERATED values: no
    one-sided p is below 2**-n. With drawn flips, the observed one among them, it is a valid p too.
    """
    values = np.asarray(values, float)
    if alternative == "two-sided":
        return min(1.0, 2 * min(sign_flip(values, null, side) for side in ("greater", "less")))
    if alternative == "less":
        values, null = -values, -null
    bounds, empty = _bounds(values)
    return float((empty + np.count_nonzero(bounds <= null)) / (empty + len(bounds)))


def flip_interval(values: ArrayLike, level: float) -> tuple[float, float]:
    """The nulls that one-sided sign-flip tests at `level`, 0 < level < 1, keep: (low, high).

    p `greater` of a null is at most `level` exactly where the null is below `low`, p `less` where it is above `high`.
    An end is infinite where no p is as small as `level`: with n values, where 2**-n exceeds it.
    """
    values = np.asarray(values, float)
    return _low(values, level), -_low(-values, level)


def _low(values: np.ndarray, level: float) -> float:
    bounds, empty = _bounds(values)
    # the number of rows is a power of two, so this is exact
    spared = math.floor(level * (empty + len(bounds))) - empty
    return float(np.partition(bounds, spared)[spared]) if spared >= 0 else -math.inf


def mcnemar(treatment: Sequence[bool] | np.ndarray, control: Sequence[bool] | np.ndarray) -> float:
    """Exact two-sided p of McNemar's test that paired events, [n] each, are as frequent on both sides."""
    first, second = np.asarray(treatment, bool), np.asarray(control, bool)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    if not only_first + only_second:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second).pvalue)


def interquartile_mean(values: ArrayLike) -> float:
    """Mean of the middle half: a quarter of the values, rounded down, is left out at each end.

    Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice", NeurIPS 2021.
    """
    return float(stats.trim_mean(np.asarray(values, float), 0.25))
