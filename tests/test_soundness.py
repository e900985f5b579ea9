"""The rules of replications/CLAIMS.md on made-up records: few pairs, odd shapes, refusals and preconditions."""

import json
import math

import numpy as np
import pytest
from made_up import CHANCE, claim, dense, draws, failed, judge, judge_one, pair, record, runs

# ------------------------------------------------------------------------- 6: small n and odd shapes


@pytest.mark.parametrize(("n", "verdict"), [(2, "open"), (4, "open"), (5, "replicated")])
def test_no_verdict_comes_from_fewer_than_five_pairs(n, verdict):
    found = judge(claim(), pair(0.05, n=n, sd=0.0005))
    assert found["verdict"] == verdict and found["comparisons"][0]["p"] < 0.02
    if n < 5:
        assert found["kind"] == "needs n seeds" and found["needs"] == 5


def test_equal_differences_in_all_seeds_are_evidence():
    old = 0.8 + np.arange(8) / 1000
    settings = {"data": {"test": 1000}}
    records = runs("new", old + 0.002, settings=settings) + runs("old", old, settings=settings)
    found = judge_one(claim(), records)
    assert found["verdict"] == "replicated" and found["sd"] == pytest.approx(0.001 / math.sqrt(12))
    assert found["p"] < 1e-6 and found["test_name"] == "one-sided paired t"
    # one seed that differs by one image changes little
    other = old + 0.002
    other[0] += 0.001
    close = judge_one(claim(), runs("new", other, settings=settings) + runs("old", old, settings=settings))
    assert close["p"] < 1e-4


def test_equal_slopes_in_all_seeds_are_evidence_too():
    settings = {"data": {"test": 1000}}
    records = [
        r
        for target, gain in ((0.5, 0.001), (0.9, 0.003))
        for r in runs("new", 0.8 + np.arange(8) / 1000 + gain, target=target, settings=settings)
    ]
    found = judge_one(claim("trend", control=None), records)
    assert found["sd"] == pytest.approx(0.001 / math.sqrt(12) / math.hypot(0.2, 0.2))
    assert (found["verdict"], found["test_name"]) == ("replicated", "one-sided t on slopes")


def test_an_accuracy_of_1_7_is_no_accuracy():
    def masked(variant, values):
        return [record(variant, s, 0.9, metrics={"pruned_accuracy": value}) for s, value in enumerate(values)]

    a_claim, control = (
        claim(metric="pruned_accuracy"),
        masked("old", [0.8, 0.79, 0.81, 0.8, 0.8, 0.78, 0.8, 0.8]),
    )
    found = judge_one(a_claim, masked("new", [1.7] + 7 * [0.9]) + control)
    assert found["n"] == 7 and "1.7, not in [0, 1]" in found["lost"][0]["reason"]
    assert "not in [0, 1]" in judge(a_claim, masked("new", range(90, 98)) + control)["reason"]


def test_metrics_of_different_units_are_not_compared():
    records = [record("new", s, 0.9, metrics={"test_loss": 0.4}, cost={"macs": 5}) for s in range(8)]
    for metric in ("test_loss", "cost.macs"):
        found = judge(claim(control={"metric": metric}), records)
        assert found["verdict"] == "not tested" and "different units" in found["reason"]


@pytest.mark.parametrize(
    ("changed", "refused"),
    [({"epochs": 60}, True), ({"data": {"split_seed": 4}}, False), ({"trials": [1]}, False), ({}, False)],
)
def test_runs_of_one_arm_have_the_same_settings(changed, refused):
    first = {"epochs": 30, "data": {"split_seed": 0}, "trials": [0, 1]}
    records = pair(0.02, n=8, settings=first)
    records[3] = records[3].model_copy(update={"settings": first | changed})
    found = judge(claim(), records)
    assert found["verdict"] == ("not tested" if refused else "replicated")
    if refused:
        assert "seeds 0 and 3 differ in settings epochs" in found["reason"]
    # settings that a record does not have are unknown
    records[3] = records[3].model_copy(update={"settings": {}})
    assert judge(claim(), records)["verdict"] == "replicated"


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("device", "cpu", "cuda"),
        ("precision", "float32", "bfloat16"),
        ("torch", "2.11", "2.12"),
        ("data", ["a" * 64], ["b" * 64]),
    ],
)
def test_pairs_of_other_conditions_are_lost(name, one, other):
    records = pair(0.02, n=8, **{name: one})
    records[0] = records[0].model_copy(update={name: other})
    found = judge_one(claim(), records)
    assert found["n"] == 7 and found["lost"][0]["seed"] == 0 and "no pair" in found["lost"][0]["reason"]
    records[0] = records[0].model_copy(update={name: [] if name == "data" else None})
    assert judge_one(claim(), records)["n"] == 8


def shares_of(values, variant="new"):
    return [record(variant, s, 0.8, metrics={"share": v, "n": s}) for s, v in enumerate(values)]


def test_what_is_at_its_cap_or_floor_goes_to_the_sign_flips():
    free = [0.31, 0.27, 0.4123, 0.35, 0.29, 0.33, 0.37, 0.3]
    fields = {"metric": "share", "control": None, "value": 0.2}
    assert judge_one(claim("threshold", **fields), shares_of(free))["by_flips"] is None
    capped = [0.7313] * 3 + free[3:]
    found = judge_one(claim("threshold", **fields), shares_of(capped))
    assert (found["test_name"], found["p"]) == ("one-sided sign-flip", 2**-8)
    bounded = judge_one(claim("threshold", **fields, bounds=[None, 0.4123]), shares_of(free))
    assert "floor or cap" in bounded["by_flips"]
    full = judge_one(
        claim(), runs("new", [1.0, *[0.95 + s / 999 for s in range(7)]]) + runs("old", [0.9] * 8)
    )
    assert "floor or cap" in full["by_flips"]


# -------------------------------------------------------------------------------- 7: preconditions


def test_two_sides_that_diverged_in_every_seed_are_not_compared():
    records = [failed(name, seed) for name in ("new", "old") for seed in range(8)]
    found = judge(claim("equivalence", matters=0.01), [*records, *dense(8)])
    assert found["verdict"] == "not tested" and "no run of either side has finished" in found["reason"]


def test_the_same_run_twice_is_not_compared():
    new = [record("new", s, 0.9 + s / 100, metrics={"test_loss": s / 9}) for s in range(8)]
    old = [r.model_copy(update={"variant": "old"}) for r in new]
    found = judge(claim("noninferiority", matters=0.01), new + old)
    assert found["verdict"] == "not tested" and "equal in all metrics in every seed" in found["reason"]
    old[3] = record("old", 3, 0.93, metrics={"test_loss": 0.5})
    assert judge(claim("noninferiority", matters=0.01), new + old)["verdict"] == "replicated"
    # two metrics of one run are no two runs
    same = [record("new", s, 0.9 + s / 1000, metrics={"before": 0.9 + s / 1000}) for s in range(8)]
    assert (
        judge(claim("noninferiority", control={"metric": "before"}, matters=0.01), same)["verdict"]
        == "replicated"
    )


def arm(variant, accuracies_by_target, n=8):
    noise = draws(1, n, seed=len(variant), sd=0.002)[0]
    return [
        r
        for target, accuracy in accuracies_by_target.items()
        for r in runs(variant, accuracy + noise * (target + 1), target=target, **CHANCE)
    ]


@pytest.mark.parametrize(
    ("accuracies", "unsound"),
    [
        ({0.9: 0.1, 0.98: 0.1}, True),  # at chance at each of two targets
        ({0.9: 0.5, 0.98: 0.1}, False),  # a collapse at a high target is a result
        ({0.98: 0.1}, False),
        ({0.0: 0.1, 0.98: 0.1}, True),
        ({0.0: 0.9, 0.9: 0.1, 0.98: 0.1}, False),
    ],
)
def test_an_arm_that_never_trained_is_unsound(accuracies, unsound):
    records = dense(8) + arm("old", {0.9: 0.8, 0.98: 0.7}) + arm("new", accuracies)
    a_claim = claim(direction="lower", targets=[0.98])
    found = judge(a_claim, records)
    assert found["verdict"] == ("not tested" if unsound else "replicated"), found["reason"]
    if unsound:
        assert "the arm new (digits, mlp) is unsound" in found["reason"]
        declared = judge(claim(direction="lower", targets=[0.98], meant_to_fail="new"), records)
        assert declared["verdict"] == "replicated"


@pytest.mark.parametrize(("at_chance", "verdict"), [(3, "replicated"), (4, "not tested")])
def test_half_the_finished_runs_at_chance_make_an_arm_unsound(at_chance, verdict):
    accuracies = [0.1] * at_chance + [0.9] * (8 - at_chance)
    records = dense(8) + arm("old", {0.98: 0.7}) + runs("new", accuracies, target=0.0, **CHANCE)
    records += arm("new", {0.98: 0.3})
    assert judge(claim(direction="lower", targets=[0.98]), records)["verdict"] == verdict


def test_an_arm_is_judged_before_its_mask_and_diverged_runs_are_outcomes():
    old = arm("old", {0.9: 0.8})

    def masked(before):
        return [record("new", s, 0.1, metrics={"accuracy_before_mask": before}, **CHANCE) for s in range(8)]

    a_claim = claim(direction="lower")
    assert judge(a_claim, dense(8) + old + masked(0.9))["verdict"] == "replicated"
    assert "before the mask" in judge(a_claim, dense(8) + old + masked(0.1))["reason"]
    diverged = [failed("new", s, target=t, **CHANCE) for s in range(8) for t in (0.9, 0.98)]
    assert judge(a_claim, dense(8) + old + diverged)["verdict"] == "replicated"


def test_a_control_must_not_be_degenerate():
    stated = {"variant": "old", "not worse than": "uniform", "by": 0.05}
    records = pair(0.02, n=8)
    records += runs("uniform", [r.metrics["test_accuracy"] + 0.03 for r in records[8:]])
    assert judge(claim(precondition=stated), records)["verdict"] == "replicated"
    found = judge(claim(precondition=stated | {"by": 0.001}), records)
    assert found["verdict"] == "not tested" and "precondition, old not worse than uniform" in found["reason"]
    missing = judge(claim(precondition={"variant": "old", "not worse than": "nobody"}), records)
    assert missing["verdict"] == "not tested" and "no run of nobody" in missing["reason"]


def test_a_dense_network_has_converged_if_twice_as_long_gains_less_than_matters():
    records = pair(0.02, n=8) + dense(8, 0.9) + runs("dense-long", [0.905] * 8, target=0.0)
    stated = {"variant": "dense", "not worse than": "dense-long"}
    for matters, verdict in ((0.006, "replicated"), (0.004, "not tested")):
        assert judge(claim(matters=matters, precondition=stated), records)["verdict"] == verdict


# ---------------------------------------------------------- what an outside checker's records brought to light


def test_an_accuracy_before_the_mask_is_an_accuracy_too():
    def arm(variant, values):
        return [record(variant, s, 0.9, metrics={"accuracy_before_mask": v}) for s, v in enumerate(values)]

    old = arm("old", [0.7 + s / 100 for s in range(8)])
    a_claim = claim(metric="accuracy_before_mask")
    found = judge(a_claim, arm("new", [1.7 + s / 100 for s in range(8)]) + old)
    assert found["verdict"] == "not tested" and "1.7, not in [0, 1]" in found["reason"]
    # so diverged runs count
    records = arm("new", [0.9, 0.91, 0.92]) + [failed("new", s, **CHANCE) for s in range(3, 8)] + old
    found = judge_one(a_claim, records)
    assert found["n"] == 8 and found["verdict"] == "contradicted"
    # a difference of accuracies is none
    drops = [
        record(v, s, 0.9, metrics={"accuracy_drop": d})
        for s in range(8)
        for v, d in ((("old"), 0.1), ("new", -0.01 * s))
    ]
    assert judge_one(claim(metric="accuracy_drop"), drops)["n"] == 8


@pytest.mark.parametrize("metric", ["accuracy_percent", "top1"])
def test_percent_is_not_compared_with_shares(metric):
    records = [record("new", s, 0.9, metrics={metric: 94 + s * s / 10}) for s in range(8)]
    records += runs("old", 0.8 + np.arange(8) / 100)
    sides = {
        "treatment": {"variant": "new", "metric": metric},
        "control": {"variant": "old", "metric": "test_accuracy"},
    }
    found = judge(claim(**sides), records)
    assert (
        found["verdict"] == "not tested"
        and "different units" in found["reason"]
        and metric in found["reason"]
    )


def test_settings_that_are_equal_numbers_are_of_one_arm():
    records = [
        r.model_copy(update={"settings": {"epochs": 3 if r.seed % 2 else 3.0}}) for r in pair(0.02, n=8)
    ]
    assert judge(claim(), records)["verdict"] == "replicated"


def test_sides_that_differ_in_what_is_compared_are_two_experiments():
    sizes = [("new", 50 + s) for s in range(8)] + [("old", 100) for s in range(8)]
    records = [record(v, k % 8, 0.9, cost={"macs": macs}) for k, (v, macs) in enumerate(sizes)]
    found = judge(claim(metric="cost.macs", direction="lower"), records)
    assert found["verdict"] == "replicated", found["reason"]
    assert judge(claim(), records)["verdict"] == "not tested"


@pytest.mark.parametrize("scale", ["none", "ratio"])
@pytest.mark.parametrize("size", [1e308, 1e-300, 1e-315, 5e-324, 10**400])
def test_numbers_too_large_or_too_small_stop_nothing(size, scale):
    records = [record("new", s, metrics={"q": size}) for s in range(8)]
    records += [record("old", s, metrics={"q": -size if scale == "none" else 1 / 3}) for s in range(8)]
    found = judge(claim(metric="q", scale=scale), records, checks=True)
    json.dumps(found, allow_nan=False)
    assert len(found["reason"]) < 500
