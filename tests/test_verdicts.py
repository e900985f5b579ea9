"""Verdicts on made-up records of known truth."""

import json
import math

import numpy as np
import pytest
from made_up import claim, draws, judge, judge_one, judge_paper, pair, record, runs
from scipy import stats


@pytest.mark.parametrize(
    ("a_claim", "difference", "verdict"),
    [
        (claim(), 0.02, "replicated"),
        (claim(), -0.02, "contradicted"),
        (claim(), 0.0, "open"),
        (claim(direction="lower"), -0.02, "replicated"),
        (claim(direction="lower"), 0.02, "contradicted"),
        (claim(margin={"other": 0.01}), 0.02, "replicated"),
        (claim(margin={"other": 0.03}), 0.02, "contradicted"),
        (claim(margin={"other": 0.02}), 0.02, "open"),
        (claim("difference"), -0.02, "replicated"),
        (claim("difference"), 0.001, "open"),
        (claim("difference", margin={"other": 0.01}), 0.0, "contradicted"),
        (claim("noninferiority", margin={"other": 0.01}), 0.0, "replicated"),
        (claim("noninferiority", margin={"other": 0.01}), -0.02, "contradicted"),
        (claim("noninferiority", margin={"other": 0.01}), -0.011, "open"),
        (claim("noninferiority", margin={"other": 0.01}, direction="lower"), 0.0, "replicated"),
        (claim("noninferiority", margin={"other": 0.01}, direction="lower"), 0.02, "contradicted"),
        (claim("equivalence", margin={"other": 0.01}), 0.001, "replicated"),
        (claim("equivalence", margin={"other": 0.01}), 0.02, "contradicted"),
        (claim("equivalence", margin={"other": 0.01}), -0.02, "contradicted"),
        (claim("equivalence", margin={"other": 0.01}), 0.009, "open"),
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


def test_holm_runs_over_the_claims_of_a_role_tested_or_not():
    two = [claim(id="A"), claim(id="B", control="older")]
    records = pair(0.003, seed=1) + runs("older", [0.7, 0.9] * 5)
    alone, (together, other) = judge(two[0], records), judge_paper(two, records)
    assert alone["p"] == alone["comparisons"][0]["p"] == together["p"] == alone["p_holm"]
    assert (alone["level"], together["level"], other["level"]) == (0.05, 0.025, 0.025)
    assert together["p_holm"] == pytest.approx(2 * alone["p"])
    untested = claim(id="D", control="nobody")
    assert judge_paper([two[0], untested], records)[0]["level"] == 0.025
    others = [claim(id="E", role="headline"), claim(id="F", role="probe"), claim(id="G", role="probe")]
    assert [c["level"] for c in judge_paper([*two, *others], records)] == [0.025, 0.025, 0.05, 0.05, 0.05]


def test_what_one_claim_has_spent_less_of_another_gets():
    records = pair(0.02) + [r for r in pair(0.0035, seed=1, target=0.5)]
    strong, weak = claim(id="A", targets=[0.9]), claim(id="B", targets=[0.5])
    first, second = judge_paper([strong, weak], records)
    assert 0.025 < second["p"] < 0.05 and second["verdict"] == "replicated" and second["level"] == 0.05
    assert (first["verdict"], first["level"]) == ("replicated", 0.05)
    assert (second["level_against"], judge(weak, records)["level_against"]) == (0.025, 0.05)


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
    found = judge_one(
        claim(scale="points"), runs("new", [0.92, 0.93, 0.97]) + runs("old", [0.9, 0.92, 0.94]), checks=True
    )
    differences, half = np.array([0.02, 0.01, 0.03]), 0.01 / math.sqrt(3) * stats.t.isf(0.05, 2)
    assert found["values"] == pytest.approx(differences) and found["seeds"] == [0, 1, 2]
    assert found["estimate"] == 0.02 and found["sd"] == pytest.approx(0.01)
    assert found["p"] == pytest.approx(stats.t.sf(0.02 / 0.01 * math.sqrt(3), 2), rel=1e-8)
    assert found["p_permutation"] == found["p_wilcoxon"] == 0.125 and found["verdict"] == "open"
    assert found["effect_size"] == pytest.approx(
        2 * math.gamma(1) / (math.sqrt(1) * math.gamma(0.5)), rel=1e-8
    )
    assert found["detectable"] == pytest.approx(0.01 * 2.29727, rel=1e-4)
    assert found["label"] == "new vs old, digits, mlp, target 0.9"
    assert found["reason"].startswith(
        "3 of 3 seeds: test accuracy of new is 2 points higher than that of old (90 % interval 0.314 to 3.69)"
    )
    assert (found["low"], found["high"]) == pytest.approx((0.02 - half, 0.02 + half), rel=1e-8)


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
    [(10, 0.01, "replicated", 2**-10), (4, 0.01, "open", 2**-4), (8, 0.0, "open", 1)],
)
def test_equal_differences_of_what_no_images_limit_are_judged_by_the_exact_test(n, difference, verdict, p):
    control = np.linspace(0.8, 0.9, n)
    found = judge_one(
        claim(metric="density"),
        [record("new", s, s / 100, metrics={"density": v + difference}) for s, v in enumerate(control)]
        + [record("old", s, s / 50, metrics={"density": v}) for s, v in enumerate(control)],
    )
    assert (found["verdict"], found["p"], found["sd"], found["effect_size"]) == (verdict, p, 0, None)
    assert "the same in every seed" in found["reason"] and found["by_flips"] == "all values are equal"


def test_two_equal_differences_do_not_contradict_an_equivalence():
    a_claim = claim("equivalence", margin={"other": 0.01})
    assert judge(a_claim, runs("new", [0.9, 0.8]) + runs("old", [0.7, 0.6]))["verdict"] == "open"


def test_lost_seeds_are_named_with_their_reason():
    records = runs("new", [0.91, 0.93, 0.92, None]) + runs("old", [0.9, 0.9, 0.9, 0.9, 0.9, 0.9])
    records += [record("new", 5, status="failed", reason="the loss became NaN"), record("new", 6, 0.9)]
    found = judge_one(claim(), records)
    assert found["seeds"] == [0, 1, 2] and found["n"] == 3
    reasons = {lost["seed"]: lost["reason"] for lost in found["lost"]}
    assert "missing or null" in reasons[3] and reasons[4] == "no run of new (digits, mlp, target 0.9)"
    assert reasons[5].startswith("the run of new (digits, mlp, target 0.9) failed: the loss became NaN")
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


EFFECTS = {"r": 0.02, "c": -0.02, "o": 0.0}


@pytest.mark.parametrize(
    ("of_comparisons", "of_all", "of_any"),
    [
        ("rr", "replicated", "replicated"),
        ("rc", "contradicted", "replicated"),
        ("ro", "open", "replicated"),
        ("rn", "open", "replicated"),
        ("cc", "contradicted", "contradicted"),
        ("cn", "contradicted", "open"),
        ("co", "contradicted", "open"),
        ("oo", "open", "open"),
        ("on", "open", "open"),
        ("nn", "not tested", "not tested"),
    ],
)
def test_how_comparisons_make_the_verdict_of_a_claim(of_comparisons, of_all, of_any):
    targets = [0.5, 0.9]
    records = [
        r
        for target, letter in zip(targets, of_comparisons)
        if letter != "n"
        for r in pair(EFFECTS[letter], target=target, seed=int(10 * target))
    ]
    records += pair(0.0, target=0.3) if of_comparisons == "nn" else []
    for require, verdict in (("all", of_all), ("any", of_any)):
        found = judge(claim(targets=targets, require=require), records)
        names = {"r": "replicated", "c": "contradicted", "o": "open", "n": "not tested"}
        assert [c["verdict"] for c in found["comparisons"]] == [names[letter] for letter in of_comparisons]
        assert found["verdict"] == verdict


def test_every_cell_and_shared_target_is_a_comparison_and_the_reason_names_the_one_that_decides():
    records = pair(0.02) + pair(-0.02, target=0.98, seed=1) + pair(0.02, architecture="cnn", seed=2)
    records += runs("new", [0.1] * 10, target=0.5)  # not run for `old`
    found = judge(claim(), records)
    places = [(c["architecture"], c["target"], c["verdict"]) for c in found["comparisons"]]
    assert places == [("cnn", 0.9, "replicated"), ("mlp", 0.9, "replicated"), ("mlp", 0.98, "contradicted")]
    assert found["verdict"] == "contradicted"
    assert found["reason"].startswith(
        "3 comparisons (1 contradicted, 2 replicated: replicated for cnn target 0.9, mlp target 0.9; contradicted for "
        "mlp target 0.98), decided by new vs old, digits, mlp, target 0.98:"
    )
    assert found["kind"] == "mixed"
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
    assert (four["p"], four["verdict"]) == (0.0625, "open")
    assert "needs at least 5" in four["reason"] and four["why"]["kind"] == "structural"
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
        ([0.07, 0.2], "lower", "open"),
        ([0.07], "higher", "contradicted"),
        ([0.07], "lower", "replicated"),
    ],
)
def test_a_count_needs_no_chance(values, direction, verdict):
    found = judge_one(claim("count", control=None, value=0.1, direction=direction), runs("new", values))
    assert found["verdict"] == verdict and found["p"] is None and found["level"] is None


def test_verdicts_do_not_depend_on_the_order_of_records_and_are_plain_json():
    records = pair(0.02) + pair(0.01, target=0.98, seed=1)
    once, again = judge(claim(), records), judge(claim(), records[::-1])
    assert json.dumps(once, allow_nan=False) == json.dumps(again, allow_nan=False)
