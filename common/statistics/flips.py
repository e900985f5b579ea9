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
from scipy.special import bdtr

ENUMERATED = 16
"""Up to this many pairs all patterns of flips are enumerated; beyond, as many are drawn, seed fixed."""
_BLOCK = 8
_TIE = 1e-12  # relative size below which a difference of two means is rounding error


@functools.lru_cache(maxsize=8)
def _codes(n: int) -> np.ndarray:
    """Which of n pairs are flipped, a bit for each, as whole numbers of up to _BLOCK bits: [blocks, rows].

    Every pattern that flips a pair, or those among 2**ENUMERATED drawn ones.
    """
    widths = np.array([min(_BLOCK, n - start) for start in range(0, n, _BLOCK)])
    if n <= ENUMERATED:
        codes = np.arange(2**n) >> (_BLOCK * np.arange(len(widths)))[:, None]
    else:
        codes = np.random.default_rng(0).integers(0, 2**_BLOCK, size=(len(widths), 2**ENUMERATED))
        codes[:, 0] = 0  # what was observed
    codes &= (2**widths - 1)[:, None]
    return codes[:, codes.any(axis=0)]


@functools.lru_cache(maxsize=2 * _BLOCK)
def patterns(n: int) -> np.ndarray:
    """Which of n pairs are flipped, 0 or 1, [rows, n]: every pattern, or 2**ENUMERATED of them; none in the first row."""
    bits = np.hstack(list((_codes(n)[:, :, None] >> np.arange(_BLOCK)) & 1))[:, :n].astype(float)
    return np.vstack([np.zeros((_rows(n) - len(bits), n)), bits])


def _rows(n: int) -> int:
    return 2 ** min(n, ENUMERATED)


def _subset_sums(values: np.ndarray) -> np.ndarray:
    """Sum of the values that are flipped, by pattern: looked up by blocks, as a block has few patterns."""
    codes, total = _codes(len(values)), np.zeros(())
    for number, block in enumerate(np.split(values, range(_BLOCK, len(values), _BLOCK))):
        total = total + np.take(patterns(len(block)) @ block, codes[number])
    return total


@functools.lru_cache(maxsize=8)
def _sizes(n: int) -> np.ndarray:
    return _subset_sums(np.ones(n))


def _means(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean of the values that are flipped, by pattern that flips any, and by how much it may be off by rounding."""
    return _subset_sums(values) / _sizes(len(values)), _TIE * float(np.abs(values).max())


def sign_flip(values: ArrayLike, null: float, alternative: str) -> float:
    """p of the sign-flip permutation test that `values` are symmetric about `null`.

    alternative: `greater`, `less` or `two-sided` (twice the smaller one-sided p). Exact up to ENUMERATED values: no
    one-sided p is below 2**-n. With drawn flips, the observed one among them, it is a valid p too. A flip that ties with
    what was observed counts as being as large.
    """
    values = np.asarray(values, float)
    means, slack = _means(values)
    unlike = {
        "greater": np.count_nonzero(means - slack > null),
        "less": np.count_nonzero(means + slack < null),
    }
    found = {side: 1 - count / _rows(len(values)) for side, count in unlike.items()}
    return min(1.0, 2 * min(found.values())) if alternative == "two-sided" else found[alternative]


def flip_interval(values: ArrayLike, level: float) -> tuple[float, float]:
    """The nulls that one-sided sign-flip tests at `level`, 0 < level < 1, keep: (low, high).

    p `greater` of a null is at most `level` exactly where the null is below `low`, p `less` where it is above `high`.
    An end is infinite where no p is as small as `level`: with n values, where 2**-n exceeds it.
    """
    values = np.asarray(values, float)
    means, slack = _means(values)
    rows = _rows(len(values))  # a power of two, so that this is exact
    beyond = math.floor(level * rows) - (rows - len(means))
    if beyond < 0:
        return -math.inf, math.inf
    last = len(means) - 1 - beyond
    means.partition([beyond, last])
    return float(means[beyond] - slack), float(means[last] + slack)


def mcnemar(treatment: Sequence[bool] | np.ndarray, control: Sequence[bool] | np.ndarray) -> float:
    """Exact two-sided p of McNemar's test that paired events, [n] each, are as frequent on both sides."""
    first, second = np.asarray(treatment, bool), np.asarray(control, bool)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))


def interquartile_mean(values: ArrayLike) -> np.ndarray:
    """Mean of the middle half of the last axis: a quarter of the values, rounded down, is left out at each end.

    Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice", NeurIPS 2021.
    """
    values = np.asarray(values, float)
    n, out = values.shape[-1], values.shape[-1] // 4
    return np.partition(values, (out, n - out - 1), axis=-1)[..., out : n - out].mean(axis=-1)
