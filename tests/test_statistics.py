"""Statistics: every test against an independent route, and verdicts on made-up records of known truth."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.weightstats import ttost_paired

from common.statistics import inference, verdicts
from common.statistics.claims import Claim, ClaimsFile
from common.statistics.records import Record, Records

VALUES = np.array([0.012, 0.009, -0.003, 0.016, 0.008, 0.021])
VECTORS = np.random.default_rng(5).normal(size=(2, 4, 6)) + np.arange(6)


def draws(count, n, mean=0.0, sd=1.0, seed=0):
    return np.random.default_rng(seed).normal(mean, sd, size=(count, n))


# --------------------------------------------------------------------------------- inference, one by one


@pytest.mark.parametrize("null", [0.0, 0.005])
def test_t_test_and_interval_agree_with_the_closed_form(null):
    n, error = len(VALUES), VALUES.std(ddof=1) / math.sqrt(len(VALUES))
    t = (VALUES.mean() - null) / error
    assert inference.t_test(VALUES, null, "greater") == pytest.approx(stats.t.sf(t, n - 1))
    assert inference.t_test(VALUES, null, "less") == pytest.approx(stats.t.cdf(t, n - 1))
    assert inference.t_test(VALUES, null, "two-sided") == pytest.approx(2 * stats.t.sf(abs(t), n - 1))
    half = stats.t.isf(0.025, n - 1) * error
    assert inference.interval(VALUES) == pytest.approx((VALUES.mean() - half, VALUES.mean() + half))


def test_the_interval_covers_the_truth_in_95_of_100_samples():
    covered = [low <= 0.3 <= high for low, high in map(inference.interval, draws(2000, 6, mean=0.3))]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_tost_agrees_with_statsmodels():
    control = np.linspace(0.9, 0.93, len(VALUES))
    expected = ttost_paired(control + VALUES, control, -0.02, 0.015)[0]
    assert inference.tost(VALUES, -0.02, 0.015) == pytest.approx(expected)


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
    assert inference.sign_flip(differences, 0.0, alternative) == expected


def test_sign_flips_beyond_the_enumeration_are_close_to_it_and_repeatable():
    values = draws(1, 17, mean=0.45)[0]
    enumerated = 1.0 - 2.0 * ((np.arange(2**17)[:, None] >> np.arange(17)) & 1)
    exact = np.mean(enumerated @ values >= values.sum() - 1e-9)
    found = inference.sign_flip(values, 0.0, "greater")
    assert found == pytest.approx(exact, abs=0.003)
    assert found == inference.sign_flip(values, 0.0, "greater")


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


def test_the_smallest_effect_is_shown_in_80_of_100_samples():
    effect = inference.smallest_effect(8, sd=2.0)
    shift = effect / 2.0 * math.sqrt(8)
    assert stats.nct.sf(stats.t.isf(0.05, 7), 7, shift) == pytest.approx(0.8, abs=1e-4)
    shown = [
        inference.t_test(sample, 0.0, "greater") < 0.05 for sample in draws(1500, 8, mean=effect, sd=2.0)
    ]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.03)


def test_holm_by_hand():
    assert inference.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert len(inference.holm([])) == 0


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


def test_the_sign_test_agrees_with_the_closed_form():
    p, low, high = inference.sign_test(5, 6)
    assert p == pytest.approx((6 + 1) / 64)
    assert (low, high) == pytest.approx((stats.beta.ppf(0.025, 5, 2), stats.beta.ppf(0.975, 6, 1)))
    assert inference.sign_test(4, 4)[0] == 0.0625


def mean_correlation(vectors):
    return np.mean([np.corrcoef(a, b)[0, 1] for a, b in itertools.combinations(vectors, 2)])


def test_correlations_are_compared_as_by_enumeration():
    treatment, control = VECTORS
    assert inference.mean_correlations(treatment).mean() == pytest.approx(mean_correlation(treatment))
    found = []
    for signs in signs_by_hand(len(treatment)):
        first = [t if sign > 0 else c for sign, t, c in zip(signs, treatment, control)]
        second = [c if sign > 0 else t for sign, t, c in zip(signs, treatment, control)]
        found.append(mean_correlation(first) - mean_correlation(second))
    assert found[0] == mean_correlation(treatment) - mean_correlation(control)
    less = np.mean([difference <= found[0] + 1e-12 for difference in found])
    assert inference.compare_correlations(treatment, control, "less") == pytest.approx(less)
    more = np.mean([difference >= found[0] - 1e-12 for difference in found])
    assert inference.compare_correlations(treatment, control, "greater") == pytest.approx(more)


def test_the_interval_of_correlations_covers_the_truth():
    generator = np.random.default_rng(3)
    common = generator.normal(size=200)
    covered = []
    for _ in range(200):
        # population correlations 0.5 and 0.8 between vectors that share `common`
        treatment = common + generator.normal(size=(10, 200))
        control = common + generator.normal(size=(10, 200)) * 0.5
        low, high = inference.correlation_interval(treatment, control)
        truth = common.var() / (common.var() + 1) - common.var() / (common.var() + 0.25)
        covered.append(low <= truth <= high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.045)


# ------------------------------------------------------------------------- verdicts on a known truth


def record(
    variant, seed, accuracy=None, target=0.9, status="ok", dataset="digits", architecture="mlp", **parts
):
    metrics = {} if accuracy is None else {"test_accuracy": accuracy}
    metrics |= parts.pop("metrics", {})
    place = {"paper": "demo", "variant": variant, "dataset": dataset, "architecture": architecture}
    return Record(**place, target=target, seed=seed, status=status, metrics=metrics, **parts)


def runs(variant, accuracies, **fields):
    return [record(variant, seed, accuracy, **fields) for seed, accuracy in enumerate(accuracies)]


def claim(test="superiority", treatment="new", control="old", **fields):
    if test in ("superiority", "noninferiority", "threshold", "trend", "sign", "diversity", "count"):
        fields = {"direction": "higher"} | fields
    selections = {
        "treatment": {"variant": treatment} if isinstance(treatment, str) else treatment,
        "control": {"variant": control} if isinstance(control, str) else control,
    }
    given = {key: value for key, value in selections.items() if value is not None}
    return Claim(**{"id": "C", "statement": "so it is", "test": test} | given | fields)


def judge_paper(claims, records):
    file = ClaimsFile("demo", tuple(claims), "0" * 64, None)
    return verdicts.judge([file], {"demo": Records(records)})["papers"]["demo"]["claims"]


def judge(a_claim, records):
    return judge_paper([a_claim], records)[0]


def judge_one(a_claim, records):
    (comparison,) = judge(a_claim, records)["comparisons"]
    return comparison


def pair(difference, n=10, sd=0.005, seed=0, **fields):
    """Runs of `new` and `old` whose paired differences have exactly this mean and sd."""
    noise = draws(2, n, seed=seed)
    spread = (noise[0] - noise[0].mean()) / noise[0].std(ddof=1) * sd
    old = 0.8 + 0.03 * noise[1]
    return runs("new", old + difference + spread, **fields) + runs("old", old, **fields)


@pytest.mark.parametrize(
    ("a_claim", "difference", "verdict"),
    [
        (claim(), 0.02, "replicated"),
        (claim(), -0.02, "contradicted"),
        (claim(), 0.0, "inconclusive"),
        (claim(direction="lower"), -0.02, "replicated"),
        (claim(direction="lower"), 0.02, "contradicted"),
        (claim(margin={"other": 0.01}), 0.02, "replicated"),
        (claim(margin={"other": 0.03}), 0.02, "contradicted"),
        (claim(margin={"other": 0.02}), 0.02, "inconclusive"),
        (claim("difference"), -0.02, "replicated"),
        (claim("difference"), 0.001, "inconclusive"),
        (claim("difference", margin={"other": 0.01}), 0.0, "contradicted"),
        (claim("noninferiority", margin={"other": 0.01}), 0.0, "replicated"),
        (claim("noninferiority", margin={"other": 0.01}), -0.02, "contradicted"),
        (claim("noninferiority", margin={"other": 0.01}), -0.011, "inconclusive"),
        (claim("noninferiority", margin={"other": 0.01}, direction="lower"), 0.0, "replicated"),
        (claim("noninferiority", margin={"other": 0.01}, direction="lower"), 0.02, "contradicted"),
        (claim("equivalence", margin={"other": 0.01}), 0.001, "replicated"),
        (claim("equivalence", margin={"other": 0.01}), 0.02, "contradicted"),
        (claim("equivalence", margin={"other": 0.01}), -0.02, "contradicted"),
        (claim("equivalence", margin={"other": 0.01}), 0.009, "inconclusive"),
        (claim("threshold", value=0.01), 0.02, "replicated"),
        (claim("threshold", value=0.01, direction="lower"), 0.02, "contradicted"),
    ],
)
def test_a_verdict_follows_the_truth(a_claim, difference, verdict):
    found = judge_one(a_claim, pair(difference))
    assert found["verdict"] == verdict, found["reason"]
    assert found["n"] == 10 and found["estimate"] == pytest.approx(difference, abs=1e-9)
    assert found["low"] <= found["estimate"] <= found["high"]
    assert found["sd"] == pytest.approx(0.005) and found["control_mean"] == pytest.approx(0.8, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("a_claim", "truth"),
    [
        (claim(), 0.0),
        (claim(margin={"other": 0.01}), 0.01),
        (claim("noninferiority", margin={"other": 0.01}), -0.01),
        (claim("equivalence", margin={"other": 0.01}), 0.01),
        (claim("difference"), 0.0),
    ],
)
def test_a_false_claim_is_rarely_replicated_and_one_on_its_edge_rarely_contradicted(
    a_claim, truth, monkeypatch
):
    monkeypatch.setattr(
        "gc.collect", int
    )  # statsmodels collects garbage at every correction, which takes long
    found = dict.fromkeys(verdicts.VERDICTS, 0)
    repeats = 300
    for differences in draws(repeats, 6, mean=truth, sd=0.002, seed=2):
        found[judge(a_claim, runs("new", 0.5 + differences) + runs("old", np.full(6, 0.5)))["verdict"]] += 1
    assert found["replicated"] / repeats <= 0.085  # 0.05 and three standard errors
    assert found["contradicted"] / repeats <= 0.085


@pytest.mark.slow
def test_holm_keeps_the_rate_of_any_false_verdict_in_a_paper(monkeypatch):
    monkeypatch.setattr("gc.collect", int)
    claims = [claim(id=f"C{number}", control=f"old{number}") for number in range(5)]
    wrong, repeats = 0, 150
    for new, *olds in np.random.default_rng(4).normal(0.8, 0.01, size=(repeats, 6, 6)):
        records = runs("new", new) + [r for number, old in enumerate(olds) for r in runs(f"old{number}", old)]
        wrong += any(found["verdict"] == "replicated" for found in judge_paper(claims, records))
    assert wrong / repeats <= 0.11  # 0.05 and three standard errors


def test_holm_counts_every_comparison_of_a_papers_claims_and_no_opposite_test():
    two = [claim(id="A"), claim(id="B", control="older")]
    records = pair(0.003, seed=1) + runs("older", [0.7, 0.9] * 5)
    alone, together = judge(two[0], records), judge_paper(two, records)[0]
    assert alone["comparisons"][0]["p_holm"] == alone["comparisons"][0]["p"]
    assert together["comparisons"][0]["p_holm"] == pytest.approx(2 * alone["comparisons"][0]["p"])
    untested = claim(id="D", control="nobody")
    assert judge_paper([two[0], untested], records)[0]["comparisons"] == alone["comparisons"]


def test_claims_that_an_interval_contradicts_do_not_weigh_on_the_opposite_tests():
    better = claim(id="A", direction="lower")
    others = [claim("equivalence", id="B", margin={"other": 0.01}), claim("difference", id="C")]
    alone, together = (judge_paper(claims, pair(0.003))[0] for claims in ([better], [better, *others]))
    (one,), (other,) = alone["comparisons"], together["comparisons"]
    assert one["p_opposite_holm"] == other["p_opposite_holm"] < 0.05


def test_targets_are_the_same_up_to_rounding_error():
    found = judge_one(claim(targets={"other": [0.3]}), pair(0.02, target=0.1 + 0.2))
    assert found["verdict"] == "replicated"


def test_the_weakest_comparison_decides_what_all_must_show_and_the_strongest_what_one_may():
    records = pair(0.02, target=0.5) + pair(0.01, target=0.9, seed=1) + pair(0.03, target=0.95, seed=2)
    for require, target in (("all", 0.9), ("any", 0.95)):
        found = judge(claim(require=require), records)
        assert found["verdict"] == "replicated" and f"target {target}:" in found["reason"]
        assert found["comparisons"][found["deciding"]]["target"] == target


def test_the_numbers_of_a_comparison_by_hand():
    found = judge_one(claim(scale="points"), runs("new", [0.92, 0.93, 0.97]) + runs("old", [0.9, 0.92, 0.94]))
    differences = np.array([0.02, 0.01, 0.03])
    assert found["values"] == pytest.approx(differences) and found["seeds"] == [0, 1, 2]
    assert found["estimate"] == 0.02 and found["sd"] == pytest.approx(0.01)
    assert found["p"] == pytest.approx(stats.t.sf(0.02 / 0.01 * math.sqrt(3), 2), rel=1e-8)
    assert found["p_permutation"] == found["p_wilcoxon"] == 0.125
    assert found["effect_size"] == pytest.approx(
        2 * math.gamma(1) / (math.sqrt(1) * math.gamma(0.5)), rel=1e-8
    )
    assert found["smallest_effect"] == pytest.approx(0.01 * 2.29727, rel=1e-4)
    assert found["label"] == "new vs old, digits, mlp, target 0.9"
    assert found["reason"].startswith(
        "3 of 3 seeds: test accuracy of new is 2 points higher than that of old (95% interval -0.484 to 4.48"
    )


def test_ratios_are_compared_as_logarithms():
    a_claim = claim(metric="cost.macs", scale="ratio", direction="lower", margin={"other": 0.25})
    macs = [50, 60, 55, 52, 58]
    records = [record("new", seed, cost={"macs": 1000.0 * value}) for seed, value in enumerate(macs)]
    records += [record("old", seed, cost={"macs": 100_000}) for seed in range(5)]
    found = judge_one(a_claim, records)
    logs = np.log(np.array(macs) / 100)
    assert found["estimate"] == pytest.approx(np.exp(logs.mean()))
    assert found["p"] == pytest.approx(
        stats.ttest_1samp(logs, -math.log(1.25), alternative="less").pvalue, rel=1e-8
    )
    assert found["reference"] == [pytest.approx(1 / 1.25)]
    assert found["values"] == pytest.approx(np.array(macs) / 100)
    assert found["verdict"] == "replicated" and "0.549 times that of old" in found["reason"]


def test_what_is_not_positive_has_no_ratio_and_its_seed_is_lost():
    found = judge_one(claim(scale="ratio"), runs("new", [0.0, 0.9, 0.95]) + runs("old", [0.5, 0.6, 0.7]))
    assert found["seeds"] == [1, 2] and "not positive" in found["lost"][0]["reason"]


@pytest.mark.parametrize(
    ("n", "difference", "verdict", "p"),
    [(10, 0.01, "replicated", 2**-10), (4, 0.01, "inconclusive", 2**-4), (8, 0.0, "inconclusive", 1)],
)
def test_equal_differences_are_judged_by_the_exact_test(n, difference, verdict, p):
    control = np.linspace(0.8, 0.9, n)
    found = judge_one(claim(), runs("new", control + difference) + runs("old", control))
    assert (found["verdict"], found["p"], found["sd"], found["effect_size"]) == (verdict, p, 0, None)
    assert "the same in every seed" in found["reason"]
    if n == 4:
        assert "with 4 seeds this exact test cannot go below p = 0.062" in found["reason"]


def test_two_equal_differences_do_not_contradict_an_equivalence():
    a_claim = claim("equivalence", margin={"other": 0.01})
    assert judge(a_claim, runs("new", [0.9, 0.8]) + runs("old", [0.7, 0.6]))["verdict"] == "inconclusive"


def test_lost_seeds_are_named_with_their_reason():
    records = runs("new", [0.91, 0.93, 0.92, None, math.nan]) + runs("old", [0.9, 0.9, 0.9, 0.9, 0.9, 0.9])
    records += [record("new", 5, status="failed", reason="the loss became NaN"), record("new", 6, 0.9)]
    found = judge_one(claim(), records)
    assert found["seeds"] == [0, 1, 2] and found["n"] == 3
    reasons = {lost["seed"]: lost["reason"] for lost in found["lost"]}
    assert "missing or null" in reasons[3] and "nan, not a finite number" in reasons[4]
    assert reasons[5] == "the run of new (digits, mlp, target 0.9) failed: the loss became NaN"
    assert reasons[6] == "no run of old (digits, mlp, target 0.9)"
    assert "4 seeds lost" in found["reason"]


@pytest.mark.parametrize(
    ("a_claim", "records", "reason"),
    [
        (claim(), [], "no run of new"),
        (claim(), runs("new", [0.9, 0.8]), "old (digits, mlp) not at all"),
        (
            claim(),
            runs("new", [0.9, 0.8]) + runs("old", [0.9, 0.8], target=0.0),
            "old (digits, mlp) only at 0",
        ),
        (claim(targets={"other": [0.5]}), pair(0.1), "no run of new (digits, mlp, target 0.5)"),
        (claim(), runs("new", [0.9]) + runs("old", [0.8]), "1 usable seed where at least 2"),
        (
            claim(metric="details.width"),
            pair(0.1),
            "details.width of new (digits, mlp, target 0.9) is missing",
        ),
        (claim(metric="test_accuracy.deeper"), pair(0.1), "is missing"),
        (claim(where={"dataset": "cifar10"}), pair(0.1), "only where the claim is not made: digits, mlp"),
        (claim("equivalence", margin={"cifar10": 0.1}), pair(0.1), "only where the claim is not made"),
        (claim("trend"), pair(0.1), "at least two targets; runs are only at target 0.9"),
        (claim("trend", x="logit"), pair(0.1) + pair(0.1, target=0.0), "logit of a target of 0"),
        (
            claim("trend", steps=[{"variant": "new"}, {"variant": "newer"}]),
            pair(0.1),
            "newer (digits, mlp) not at all",
        ),
        (claim("sign", control="nobody"), pair(0.1), "nobody (digits, mlp) not at all"),
        (claim("diversity"), pair(0.1), "not a list of at least two numbers"),
        (
            claim(treatment={"variant": "new", "minus": {"variant": "dense", "target": 0.0}}),
            pair(0.1),
            "dense",
        ),
    ],
)
def test_what_nobody_ran_is_not_tested_and_said_so(a_claim, records, reason):
    found = judge(a_claim, records)
    assert found["verdict"] == "not tested" and found["comparisons"][0]["p"] is None
    assert reason in found["reason"]


@pytest.mark.parametrize(
    ("verdicts_of_comparisons", "of_all", "of_any"),
    [
        ("rr", "replicated", "replicated"),
        ("rc", "contradicted", "replicated"),
        ("ri", "inconclusive", "replicated"),
        ("rn", "inconclusive", "replicated"),
        ("cc", "contradicted", "contradicted"),
        ("cn", "contradicted", "contradicted"),
        ("ci", "contradicted", "inconclusive"),
        ("ii", "inconclusive", "inconclusive"),
        ("in", "inconclusive", "inconclusive"),
        ("nn", "not tested", "not tested"),
    ],
)
def test_how_comparisons_make_the_verdict_of_a_claim(verdicts_of_comparisons, of_all, of_any):
    words = [
        {verdict[0]: verdict for verdict in verdicts.VERDICTS}[letter] for letter in verdicts_of_comparisons
    ]
    assert verdicts.combine(words, "all") == of_all
    assert verdicts.combine(words, "any") == of_any


def test_every_cell_and_shared_target_is_a_comparison_and_the_reason_names_the_one_that_decides():
    records = pair(0.02) + pair(-0.02, target=0.98, seed=1) + pair(0.02, architecture="cnn", seed=2)
    records += runs("new", [0.1] * 10, target=0.5)  # not run for `old`
    found = judge(claim(), records)
    places = [(c["architecture"], c["target"], c["verdict"]) for c in found["comparisons"]]
    assert places == [("cnn", 0.9, "replicated"), ("mlp", 0.9, "replicated"), ("mlp", 0.98, "contradicted")]
    assert found["verdict"] == "contradicted"
    assert found["reason"].startswith(
        "3 comparisons (1 contradicted, 2 replicated), decided by new vs old, digits, mlp, target 0.98:"
    )
    only = judge(claim(where={"architecture": "cnn"}), records)
    assert [c["architecture"] for c in only["comparisons"]] == ["cnn"] and only["verdict"] == "replicated"
    assert judge(claim(require="any"), records)["verdict"] == "replicated"
    assert len(judge(claim(targets={"digits": [0.98]}), records)["comparisons"]) == 2


def test_lists_are_compared_in_order_and_a_single_selection_with_each():
    records = [
        r
        for name, level in zip("abcd", (0.9, 0.8, 0.7, 0.6))
        for r in runs(name, draws(1, 9)[0] * 0.001 + level)
    ]

    def labels(**lists):
        return [c["label"].split(",")[0] for c in judge(claim(**lists), records)["comparisons"]]

    a, b, c, d = ({"variant": name} for name in "abcd")
    assert labels(treatment=[a, b], control=[c, d]) == ["a vs c", "b vs d"]
    assert labels(treatment=a, control=[b, c]) == ["a vs b", "a vs c"]
    assert labels(treatment=[a, b], control=d) == ["a vs d", "b vs d"]


def test_a_control_takes_what_it_leaves_out_from_the_treatment():
    dense = runs("dense", [0.95, 0.96, 0.97], target=0.0)
    pruned = [record("new", s, 0.9 + s / 100, metrics={"before": 0.91 + s / 100}) for s in range(3)]
    against_dense = judge_one(claim(control={"variant": "dense", "target": 0.0}), dense + pruned)
    assert against_dense["values"] == pytest.approx([-0.05] * 3) and against_dense["control"]["target"] == 0
    assert "dense (target 0)" in against_dense["reason"]
    before = judge_one(claim(control={"metric": "before"}), dense + pruned)
    assert before["values"] == pytest.approx([-0.01] * 3) and before["control"]["variant"] == "new"
    assert before["label"] == "new test accuracy vs new before, digits, mlp, target 0.9"


def test_minus_makes_a_difference_of_differences():
    levels = {
        ("new", 0.0): [0.95, 0.96, 0.97],
        ("new", 0.9): [0.94, 0.955, 0.96],
        ("old", 0.0): [0.9, 0.91, 0.9],
        ("old", 0.9): [0.8, 0.85, 0.86],
    }
    records = [
        r for (variant, target), values in levels.items() for r in runs(variant, values, target=target)
    ]
    less = {"minus": {"target": 0.0}}
    found = judge_one(
        claim(
            treatment={"variant": "new"} | less, control={"variant": "old"} | less, targets={"other": [0.9]}
        ),
        records,
    )
    by_hand = [(0.94 - 0.95) - (0.8 - 0.9), (0.955 - 0.96) - (0.85 - 0.91), (0.96 - 0.97) - (0.86 - 0.9)]
    assert found["values"] == pytest.approx(by_hand)
    assert found["control"]["minus"]["target"] == 0


@pytest.mark.parametrize(
    ("x", "scale"), [("target", [0.5, 0.9, 0.98]), ("logit", [0, math.log(9), math.log(49)])]
)
def test_a_trend_is_the_slope_of_each_seed_over_targets(x, scale):
    noise = draws(10, 3, sd=0.002)
    gap = 0.01 + 0.02 * np.array(scale) + noise
    records = [
        r
        for k, t in enumerate((0.5, 0.9, 0.98))
        for r in runs("new", 0.6 + gap[:, k], target=t) + runs("old", np.full(10, 0.6), target=t)
    ]
    found = judge_one(claim("trend", x=x), records)
    slopes = [np.polyfit(scale, row, 1)[0] for row in gap]
    assert found["values"] == pytest.approx(slopes, rel=1e-6) and found["verdict"] == "replicated"
    assert found["p"] == pytest.approx(stats.ttest_1samp(slopes, 0, alternative="greater").pvalue, rel=1e-4)
    assert found["p_page"] < 0.001 and found["target"] is None
    assert [point["mean"] for point in found["points"]] == pytest.approx(gap.mean(axis=0))
    assert judge(claim("trend", x=x, direction="lower"), records)["verdict"] == "contradicted"


def test_a_trend_over_variants():
    records = [
        r for k in (1, 2, 3) for r in runs(f"imp{k}", 0.8 + 0.01 * k + draws(1, 8, sd=0.002, seed=k)[0])
    ]
    steps = [{"variant": "imp1", "x": 1}, {"variant": "imp2", "x": 5}, {"variant": "imp3", "x": 10}]
    found = judge_one(claim("trend", treatment={"target": 0.9}, control=None, steps=steps), records)
    assert found["verdict"] == "replicated" and [point["x"] for point in found["points"]] == [1, 5, 10]
    assert "imp1, imp2, imp3" in found["reason"] and found["treatment"]["variant"] is None
    both = records + [
        r for k in (1, 2, 3) for r in runs(f"imp{k}", 0.7 - 0.01 * k + draws(1, 8, sd=0.002)[0], target=0.98)
    ]
    by_target = judge(claim("trend", treatment={}, control=None, steps=steps), both)["comparisons"]
    assert [(c["target"], c["verdict"]) for c in by_target] == [(0.9, "replicated"), (0.98, "contradicted")]


def test_a_sign_test_counts_cells_and_four_are_never_enough():
    cells = [pair(0.001, architecture=f"net{k}", seed=k) for k in range(6)]
    six = judge_one(claim("sign"), [r for cell in cells for r in cell])
    assert (six["n"], six["p"], six["verdict"], six["estimate"]) == (6, 1 / 64, "replicated", 1)
    four = judge_one(claim("sign"), [r for cell in cells[:4] for r in cell])
    assert (four["p"], four["verdict"]) == (0.0625, "inconclusive")
    assert "with 4 cells this exact test cannot go below p = 0.062" in four["reason"]
    assert (
        judge(claim("sign", direction="lower"), [r for cell in cells for r in cell])["verdict"]
        == "contradicted"
    )


def test_diversity_compares_the_vectors_of_seeds():
    generator = np.random.default_rng(0)
    shape = np.linspace(0.2, 0.9, 8)

    def widths(variant, spread):
        return [
            record(variant, s, details={"widths": (shape + spread * generator.normal(size=8)).tolist()})
            for s in range(8)
        ]

    records = widths("new", 0.3) + widths("old", 0.03)
    a_claim = claim("diversity", metric="widths", direction="lower")
    found = judge_one(a_claim, records)
    assert found["verdict"] == "replicated" and found["p"] == 2**-8 and found["high"] < 0
    assert found["treatment_mean"] < found["control_mean"]
    assert judge(claim("diversity", metric="widths"), records)["verdict"] == "contradicted"
    constant = [record("new", 0, details={"widths": [1, 1, 1]})] + records[1:]
    assert "constant" in judge_one(a_claim, constant)["lost"][0]["reason"]
    longer = records[:7] + [record("new", 7, details={"widths": [1, 2]})] + records[8:]
    assert "2 numbers on one side and 8 on the other" in judge_one(a_claim, longer)["lost"][0]["reason"]


@pytest.mark.parametrize(
    ("values", "direction", "verdict"),
    [
        ([0.07] * 3, "lower", "replicated"),
        ([0.1] * 3, "lower", "replicated"),
        ([0.2] * 3, "lower", "contradicted"),
        ([0.07, 0.2], "lower", "inconclusive"),
        ([0.07], "higher", "contradicted"),
        ([0.07], "lower", "replicated"),
    ],
)
def test_a_count_needs_no_chance(values, direction, verdict):
    found = judge_one(claim("count", control=None, value=0.1, direction=direction), runs("new", values))
    assert found["verdict"] == verdict and found["p"] is None and found["p_holm"] is None


def test_verdicts_do_not_depend_on_the_order_of_records_and_are_plain_json():
    records = pair(0.02) + pair(0.01, target=0.98, seed=1)
    once, again = judge(claim(), records), judge(claim(), records[::-1])
    assert json.dumps(once, allow_nan=False) == json.dumps(again, allow_nan=False)


def test_five_differences_computed_elsewhere():
    """Five paired differences; expected values from an independent computation."""
    values = [
        0.04934353015075377,
        0.043066331658291546,
        0.04902650753768856,
        0.04440295226130653,
        0.05516312818090456,
    ]
    assert inference.interval(values) == pytest.approx((0.04227006395986079, 0.05413091593963675), rel=1e-8)
    assert inference.t_test(values, 0.0, "greater") == pytest.approx(1.1419267169461701e-05, rel=1e-7)
    assert inference.tost(values, -0.02, 0.02) == pytest.approx(0.9999049282165596, rel=1e-9)
    assert inference.wilcoxon(values, 0.0, "greater") == inference.sign_flip(values, 0.0, "greater") == 1 / 32
