"""Statistics: every test against an independent route."""

import itertools
import math

import numpy as np
import pytest
from made_up import draws
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from common.statistics import inference
from common.statistics.flips import sign_flip
from common.statistics.testing import Answer

VALUES = np.array([0.012, 0.009, -0.003, 0.016, 0.008, 0.021])
VECTORS = np.random.default_rng(5).normal(size=(2, 4, 6)) + np.arange(6)


# --------------------------------------------------------------------------------- inference, one by one


@pytest.mark.parametrize("null", [0.0, 0.005])
def test_t_test_and_interval_agree_with_the_closed_form(null):
    n, error = len(VALUES), VALUES.std(ddof=1) / math.sqrt(len(VALUES))
    t = (VALUES.mean() - null) / error
    student = inference.Student(VALUES)
    assert student.p(null, "greater") == pytest.approx(stats.t.sf(t, n - 1))
    assert student.p(null, "less") == pytest.approx(stats.t.cdf(t, n - 1))
    half = stats.t.isf(0.025, n - 1) * error
    assert student.ends(0.025) == pytest.approx((VALUES.mean() - half, VALUES.mean() + half))


def test_the_standard_deviation_has_a_floor():
    equal = np.full(8, 0.002)
    t = 0.002 / (0.001 / math.sqrt(12) / math.sqrt(8))
    assert inference.Student(equal, 0.001 / math.sqrt(12)).p(0.0, "greater") == pytest.approx(
        stats.t.sf(t, 7)
    )
    assert inference.Student(VALUES, 1e-9).ends(0.05) == inference.Student(VALUES).ends(0.05)


def test_the_interval_covers_the_truth_in_95_of_100_samples():
    ends = [inference.Student(sample).ends(0.025) for sample in draws(2000, 6, mean=0.3)]
    assert np.mean([low <= 0.3 <= high for low, high in ends]) == pytest.approx(0.95, abs=0.015)


def test_tost_agrees_with_statsmodels():
    control = np.linspace(0.9, 0.93, len(VALUES))
    expected = ttost_paired(control + VALUES, control, -0.02, 0.015)[0]
    assert Answer(above=-0.02, below=0.015).p(inference.Student(VALUES)) == pytest.approx(expected)


def test_two_sides_are_twice_the_smaller_p():
    expected = stats.ttest_1samp(VALUES, 0.0).pvalue
    both = Answer(above=0.0, below=0.0, either=True)
    assert both.p(inference.Student(VALUES)) == pytest.approx(expected)
    assert both.per_end(0.05) == 0.025


@pytest.mark.parametrize("procedure", [inference.Student, inference.Flips])
def test_a_null_outside_the_interval_is_one_that_the_test_rejects(procedure):
    generator = np.random.default_rng(7)
    for _ in range(300):
        values = np.round(generator.normal(0.3, 1, size=generator.integers(5, 12)), 1)
        level, null = generator.choice([0.05, 0.05 / 7, 0.02, 1 / 64]), round(generator.normal(), 1)
        if inference.is_constant(values):
            continue
        test = procedure(values)
        low, high = test.ends(level)
        assert (test.p(null, "greater") <= level) == (null < low)
        assert (test.p(null, "less") <= level) == (null > high)


def signs_by_hand(n):
    return list(itertools.product([1, -1], repeat=n))


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
@pytest.mark.parametrize("thousandths", [[12, 9, -3, 16, 8, 21], [10, -10, 20, -20], [5, 5, 5], [0, 0, 7]])
def test_sign_flips_agree_with_an_enumeration_in_whole_numbers(thousandths, alternative):
    extreme = {"greater": lambda s: s, "less": lambda s: -s, "two-sided": abs}[alternative]
    observed = extreme(sum(thousandths))
    flipped = [
        extreme(sum(map(int.__mul__, signs, thousandths))) for signs in signs_by_hand(len(thousandths))
    ]
    expected = np.mean([value >= observed for value in flipped])
    # as accuracies come: differences of numbers with rounding error
    differences = inference.differences(0.9 + np.array(thousandths) / 1000, np.full(len(thousandths), 0.9))
    assert sign_flip(differences, 0.0, alternative) == expected


def test_sign_flips_beyond_the_enumeration_are_close_to_it_and_repeatable():
    values = draws(1, 17, mean=0.45)[0]
    enumerated = 1.0 - 2.0 * ((np.arange(2**17)[:, None] >> np.arange(17)) & 1)
    exact = np.mean(enumerated @ values >= values.sum() - 1e-9)
    found = sign_flip(values, 0.0, "greater")
    assert found == pytest.approx(exact, abs=0.003)
    assert found == sign_flip(values, 0.0, "greater")


def test_wilcoxon_agrees_with_an_enumeration():
    ranks = stats.rankdata(np.abs(VALUES))
    observed = ranks[VALUES > 0].sum()
    sums = [sum(rank for rank, sign in zip(ranks, signs) if sign > 0) for signs in signs_by_hand(len(VALUES))]
    assert inference.wilcoxon(VALUES, 0.0, "greater") == pytest.approx(np.mean([s >= observed for s in sums]))
    assert inference.wilcoxon([0.1, 0.1], 0.1, "greater") == 1.0


def test_equal_differences_are_equal_numbers():
    control = np.linspace(0.1, 0.9, 9)
    treatment = control + 0.01
    assert len(set(treatment - control)) > 1
    assert len(set(inference.differences(treatment, control))) == 1
    assert inference.is_constant(inference.differences(treatment * 1e9, control * 1e9))
    assert not inference.is_constant([0.01, 0.01, 0.0101])


def test_the_effect_size_is_unbiased_and_without_correction_it_would_not_be():
    samples = draws(20000, 5, mean=0.8)
    assert np.mean([inference.effect_size(sample) for sample in samples]) == pytest.approx(0.8, abs=0.015)
    assert np.mean(samples.mean(axis=1) / samples.std(axis=1, ddof=1)) > 0.95


@pytest.mark.parametrize("level", [0.05, 0.05 / 20])
def test_the_detectable_effect_is_shown_in_80_of_100_samples(level):
    effect = inference.detectable(8, level)
    assert stats.nct.sf(stats.t.isf(level, 7), 7, effect * math.sqrt(8)) == pytest.approx(0.8, abs=1e-6)
    assert inference.power(effect, np.array([8]), level) == pytest.approx([0.8])
    shown = [inference.Student(sample).p(0.0, "greater") < level for sample in draws(1500, 8, mean=effect)]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.03)


def test_power_has_no_gaps():
    n = np.arange(5, 3000)
    for effect, level in ((0.78, 0.0007), (-0.78, 1e-5), (2.0, 0.05), (5.0, 1e-5), (-0.2, 1e-5)):
        found = inference.power(effect, n, level)
        assert np.isfinite(found).all() and ((found >= 0) & (found <= 1 + 1e-12)).all()
        assert (np.diff(found) * np.sign(effect) > -1e-6).all()


def test_holm_agrees_with_statsmodels():
    assert inference.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    for p_values in np.random.default_rng(1).uniform(0, 0.2, size=(10, 6)) ** 2:
        assert inference.holm(list(p_values)) == pytest.approx(multipletests(p_values, method="holm")[1])
    assert inference.holm([]) == []


def test_slopes_are_those_of_a_fitted_line():
    x, values = np.array([0.5, 0.9, 0.98]), draws(4, 3)
    assert inference.slopes(values, x) == pytest.approx([np.polyfit(x, row, 1)[0] for row in values])
    assert inference.is_constant(inference.slopes([[0.1, 0.3, 0.2], [0.8, 1.0, 0.9]], x))


def test_page_agrees_with_an_enumeration_in_both_directions():
    values = np.array([[0.9, 0.8, 0.85], [0.95, 0.9, 0.7]])
    ranks = [stats.rankdata(row) for row in values]
    observed = sum(rank @ [1, 2, 3] for rank in ranks)
    orders = list(itertools.permutations([1, 2, 3]))
    all_of_them = [np.dot(a, [1, 2, 3]) + np.dot(b, [1, 2, 3]) for a in orders for b in orders]
    assert inference.page(values, [1, 2, 3], "greater") == pytest.approx(
        np.mean([s >= observed for s in all_of_them])
    )
    assert inference.page(values, [1, 2, 3], "less") == pytest.approx(
        np.mean([s <= observed for s in all_of_them])
    )
    # the columns are ordered by x, not by where they stand
    assert inference.page(values[:, ::-1], [3, 2, 1], "less") == inference.page(values, [1, 2, 3], "less")
    assert math.isnan(inference.page(values[:, :2], [1, 2], "less"))


def test_the_sign_test_agrees_with_the_closed_form_and_its_interval_is_its_inversion():
    cells = inference.Cells(5, 1, 6)
    assert cells.p(0.5, "greater") == pytest.approx((6 + 1) / 64) and cells.p(0.5, "less") == pytest.approx(
        63 / 64
    )
    assert cells.ends(0.025) == pytest.approx((stats.beta.ppf(0.025, 5, 2), stats.beta.ppf(0.975, 6, 1)))
    assert inference.Cells(4, 0, 4).p(0.5, "greater") == 0.0625
    for n, k, level in itertools.product(range(1, 12), range(12), (0.05, 0.01)):
        if k <= n:
            test = inference.Cells(k, n - k, n)
            assert (test.p(0.5, "greater") <= level) == (test.ends(level)[0] >= 0.5)
            assert (test.p(0.5, "less") <= level) == (test.ends(level)[1] <= 0.5)


def mean_z(vectors):
    return np.mean([np.arctanh(np.corrcoef(a, b)[0, 1]) for a, b in itertools.combinations(vectors, 2)])


def test_correlations_are_compared_as_fishers_z_as_by_enumeration():
    treatment, control = VECTORS
    assert inference.mean_correlations(treatment).mean() == pytest.approx(mean_z(treatment))
    found = []
    for signs in signs_by_hand(len(treatment)):
        first = [t if sign > 0 else c for sign, t, c in zip(signs, treatment, control)]
        second = [c if sign > 0 else t for sign, t, c in zip(signs, treatment, control)]
        found.append(mean_z(first) - mean_z(second))
    assert found[0] == mean_z(treatment) - mean_z(control)
    less = np.mean([difference <= found[0] + 1e-12 for difference in found])
    assert inference.compare_correlations(treatment, control, "less") == pytest.approx(less)
    more = np.mean([difference >= found[0] - 1e-12 for difference in found])
    assert inference.compare_correlations(treatment, control, "greater") == pytest.approx(more)


def test_equal_vectors_have_a_finite_z():
    same = np.tile(np.arange(6.0), (5, 1))
    assert np.isfinite(inference.mean_correlations(same)).all()
    assert inference.compare_correlations(same, VECTORS[0][[0, 1, 2, 3, 0]], "greater") < 0.1


def test_the_interval_of_correlations_covers_the_truth():
    generator = np.random.default_rng(3)
    common = generator.normal(size=200)
    covered = []
    for _ in range(200):
        # population correlations 0.5 and 0.8 between vectors that share `common`
        treatment = common + generator.normal(size=(10, 200))
        control = common + generator.normal(size=(10, 200)) * 0.5
        low, high = inference.correlation_interval(treatment, control, 0.025)
        truth = np.arctanh(common.var() / (common.var() + 1)) - np.arctanh(
            common.var() / (common.var() + 0.25)
        )
        covered.append(low <= truth <= high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.045)


def test_five_differences_computed_elsewhere():
    """Five paired differences; expected values from an independent computation."""
    values = np.array(
        [
            0.04934353015075377,
            0.043066331658291546,
            0.04902650753768856,
            0.04440295226130653,
            0.05516312818090456,
        ]
    )
    student = inference.Student(values)
    assert student.ends(0.025) == pytest.approx((0.04227006395986079, 0.05413091593963675), rel=1e-8)
    assert student.p(0.0, "greater") == pytest.approx(1.1419267169461701e-05, rel=1e-7)
    assert Answer(above=-0.02, below=0.02).p(student) == pytest.approx(0.9999049282165596, rel=1e-9)
    assert inference.wilcoxon(values, 0.0, "greater") == sign_flip(values, 0.0, "greater") == 1 / 32
