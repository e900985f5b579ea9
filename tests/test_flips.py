"""Sign flips: the interval is the test's inversion, exactly, and both agree with enumerations in whole numbers."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as mcnemar_of_a_table

from common.statistics.flips import flip_interval, interquartile_mean, mcnemar, sign_flip

LEVELS = (0.4, 0.25, 0.05, 0.05 / 3, 0.01, 1 / 64, 0.001)


def samples():
    """Differences as accuracies give them: without ties, in steps with many, with one collapse, all equal."""
    random = np.random.default_rng(3)
    for n in (1, 2, 3, 5, 8, 11):
        yield random.normal(0.01, 0.02, n)
        yield (0.9 + np.round(random.normal(0.002, 0.003, n), 3)) - 0.9
        yield np.append(random.normal(0.01, 0.002, n - 1), -0.8)
        yield (0.7 + np.full(n, 0.002)) - 0.7
    yield np.zeros(6)
    yield random.normal(1e6, 1, 7)


def nulls(values, ends):
    """Nulls on the ends and closely beside them, and wherever p changes."""
    subsets = itertools.chain.from_iterable(
        itertools.combinations(values, k) for k in range(1, len(values) + 1)
    )
    means = [float(np.mean(subset)) for subset in itertools.islice(subsets, 300)]
    near = [float(np.nextafter(end, end + side)) for end in ends if math.isfinite(end) for side in (-1, 1)]
    return [0.0, 0.002, *means, *(end for end in ends if math.isfinite(end)), *near]


@pytest.mark.parametrize("values", list(samples()), ids=lambda values: f"{len(values)}")
def test_a_null_is_outside_the_interval_exactly_where_its_p_is_at_most_the_level(values):
    for level in LEVELS:
        low, high = flip_interval(values, level)
        for null in nulls(values, (low, high)):
            assert (sign_flip(values, null, "greater") <= level) == (null < low)
            assert (sign_flip(values, null, "less") <= level) == (null > high)


@pytest.mark.parametrize("n", [17, 32])
def test_drawn_flips_are_inverted_exactly_too(n):
    values = np.random.default_rng(n).normal(0.4, 1, n)
    for level in LEVELS:
        low, high = flip_interval(values, level)
        for null in (low, high, np.nextafter(low, -1), np.nextafter(high, 9), 0.0, 0.3):
            assert (sign_flip(values, null, "greater") <= level) == (null < low)
            assert (sign_flip(values, null, "less") <= level) == (null > high)


def by_hand(thousandths, null):
    """One-sided p that the mean is greater, of whole numbers and a Fraction."""
    shifted = [value - null for value in thousandths]
    flipped = [
        sum(sign * value for sign, value in zip(signs, shifted))
        for signs in itertools.product([1, -1], repeat=len(shifted))
    ]
    return np.mean([value >= sum(shifted) for value in flipped])


@pytest.mark.parametrize(
    "thousandths", [[12, 9, -3, 16, 8, 21], [10, -10, 20, -20], [5, 5, 5], [1, 2, 4, 7, 7]]
)
def test_p_agrees_with_an_enumeration_in_whole_numbers_at_every_null_where_it_changes(thousandths):
    values = (0.9 + np.array(thousandths) / 1000) - 0.9
    for size in range(1, len(values) + 1):
        for subset in itertools.combinations(thousandths, size):
            null = Fraction(sum(subset), size)
            assert sign_flip(values, float(null) / 1000, "greater") == by_hand(thousandths, null)


def test_the_two_sided_p_is_that_of_the_absolute_sum():
    for values in np.random.default_rng(7).normal(0.3, 1, (20, 7)):
        found = [abs(np.dot(signs, values)) for signs in itertools.product([1, -1], repeat=7)]
        expected = np.mean([value >= abs(values.sum()) - 1e-12 for value in found])
        assert sign_flip(values, 0.0, "two-sided") == expected


def test_no_end_where_so_few_pairs_reach_no_such_level():
    values = np.linspace(0.01, 0.02, 5)
    assert flip_interval(values, 1 / 33) == (-math.inf, math.inf)
    assert flip_interval(values, 1 / 32) == (pytest.approx(0.01), pytest.approx(0.02))


def test_one_collapsed_control_does_not_hide_what_the_other_seeds_say():
    values = np.append(np.linspace(-0.012, -0.008, 7), -0.6)
    low, high = flip_interval(values, 0.05)
    assert high < 0
    assert stats.t.interval(0.9, 7, values.mean(), stats.sem(values))[1] > 0
    assert low < -0.2


def test_the_interval_covers_a_symmetric_centre_at_its_level():
    random = np.random.default_rng(11)
    for draw in (random.normal(size=(1500, 8)), random.standard_t(2, (1500, 8))):
        missed = np.mean([flip_interval(values, 0.05)[0] > 0 for values in draw])
        assert missed == pytest.approx(0.05, abs=0.017)


def test_mcnemar_agrees_with_statsmodels():
    random = np.random.default_rng(2)
    for rate in (0.1, 0.5, 0.9):
        treatment, control = random.random(20) < rate, random.random(20) < 0.4
        table = [[np.sum(treatment & control), np.sum(treatment & ~control)]]
        table.append([np.sum(~treatment & control), np.sum(~treatment & ~control)])
        assert mcnemar(treatment, control) == pytest.approx(mcnemar_of_a_table(table, exact=True).pvalue)
    assert mcnemar([True] * 5 + [False], [False] * 6) == pytest.approx(2 / 32)
    assert mcnemar([True, False], [True, False]) == 1.0


def test_the_interquartile_mean_leaves_a_quarter_out_at_each_end():
    assert interquartile_mean([0.9, 0.1, 0.7, 0.8]) == pytest.approx(0.75)
    assert interquartile_mean([5, 1, 2, 3, 100, 4, 6, 7]) == pytest.approx(4.5)
    assert interquartile_mean([0, 1, 2, 3, 4]) == pytest.approx(2)
