"""The rules of replications/CLAIMS.md on made-up records whose answers are known."""

import json
import math

import numpy as np
import pytest
from made_up import claim, draws, failed, judge, judge_all, judge_one, judge_paper, pair, record, runs
from scipy import stats

from common.statistics.deciding import shares

CHANCE = {"chance": 0.1}


def dense(n, accuracy=0.95, **fields):
    return runs("dense", [accuracy] * n, target=0.0, cost={"compression": 1}, **CHANCE, **fields)


def sample(mean, n=10, sd=0.005, seed=0):
    """Differences with exactly this mean and sd."""
    noise = draws(1, n, seed=seed)[0]
    return mean + (noise - noise.mean()) / noise.std(ddof=1) * sd


# ----------------------------------------------------------------- 1: one interval decides, three answers

HALF = 0.005 / math.sqrt(10) * stats.t.isf(0.05, 9)  # of the interval at level .05 of `pair`
WIDE = 0.005 / math.sqrt(10) * stats.t.isf(0.025, 9)
HAIR = 1e-6


@pytest.mark.parametrize(
    ("test", "fields", "edge", "above", "below"),
    [
        # the mean at which an end of the interval meets a null, and the verdicts a hair above and below it
        ("superiority", {}, HALF, "replicated", "open"),
        ("superiority", {}, -HALF, "open", "contradicted"),
        ("superiority", {"matters": 0.01}, 0.01 - HALF, "replicated", "replicated"),
        ("superiority", {"matters": 0.01}, HALF, "replicated", "contradicted"),
        ("superiority", {"margin": 0.01}, 0.01 + HALF, "replicated", "open"),
        ("superiority", {"margin": 0.01}, 0.01 - HALF, "open", "contradicted"),
        ("noninferiority", {"matters": 0.01}, -0.01 + HALF, "replicated", "open"),
        ("noninferiority", {"matters": 0.01}, -0.01 - HALF, "open", "contradicted"),
        ("equivalence", {"matters": 0.01}, 0.01 - HALF, "open", "replicated"),
        ("equivalence", {"matters": 0.01}, -0.01 + HALF, "replicated", "open"),
        ("equivalence", {"matters": 0.01}, 0.01 + WIDE, "contradicted", "open"),
        ("equivalence", {"matters": 0.01}, -0.01 - WIDE, "open", "contradicted"),
        ("difference", {}, WIDE, "replicated", "open"),
        ("difference", {}, -WIDE, "open", "replicated"),
        ("difference", {"matters": 0.01}, WIDE, "replicated", "contradicted"),
        ("threshold", {"value": 0.01}, 0.01 + HALF, "replicated", "open"),
        ("threshold", {"value": 0.01}, 0.01 - HALF, "open", "contradicted"),
    ],
)
@pytest.mark.parametrize("direction", ["higher", "lower"])
def test_a_verdict_changes_where_an_end_of_the_interval_meets_its_null(
    test, fields, edge, above, below, direction
):
    turn = 1
    if test not in ("equivalence", "difference"):
        fields = fields | {"direction": direction}
        turn = 1 if direction == "higher" else -1
        if test == "threshold":
            fields["value"] = turn * fields["value"]
    for mean, verdict in ((edge + HAIR, above), (edge - HAIR, below)):
        found = judge_one(claim(test, **fields), pair(turn * mean))
        assert found["verdict"] == verdict, found["reason"]


@pytest.mark.parametrize("direction", ["higher", "lower"])
def test_ratios_are_held_against_the_logarithm_of_one_and_what_matters(direction):
    turn = 1 if direction == "higher" else -1
    half = 0.1 / math.sqrt(10) * stats.t.isf(0.05, 9)
    for edge, above, below in (
        (half, "replicated", "contradicted"),
        (math.log(1.25) + half, "replicated", "replicated"),
        (-half, "contradicted", "contradicted"),
    ):
        for mean, verdict in ((edge + HAIR, above), (edge - HAIR, below)):
            logs = turn * sample(mean, sd=0.1)
            records = [record("new", s, cost={"macs": 1e6 * math.exp(v)}) for s, v in enumerate(logs)]
            records += [record("old", s, cost={"macs": 1e6}) for s in range(10)]
            fields = {"metric": "cost.macs", "scale": "ratio", "direction": direction, "matters": 0.25}
            found = judge_one(claim(**fields), records)
            assert found["verdict"] == verdict, found["reason"]
            assert found["below_what_matters"] == (verdict == "replicated" and mean + half < math.log(1.25))


def test_what_is_replicated_below_what_matters_says_so():
    found = judge(claim(matters=0.02, scale="points"), pair(0.01))
    assert found["verdict"] == "replicated" and found["below_what_matters"]
    assert found["comparisons"][0]["high"] < 0.02 and "below what matters" in found["reason"]
    assert not judge(claim(matters=0.012), pair(0.01))["below_what_matters"]
    assert judge(claim("difference", matters=0.02), pair(-0.01))["below_what_matters"]


def test_a_tie_within_what_matters_is_an_answer():
    assert judge(claim(matters=0.01), pair(0.0))["verdict"] == "contradicted"
    assert judge(claim("difference", matters=0.01), pair(0.0))["verdict"] == "contradicted"
    tie = judge(claim(), pair(0.0))
    assert (tie["verdict"], tie["kind"], tie["needs"]) == ("open", "structural", None)


@pytest.mark.parametrize(
    "test", ["superiority", "noninferiority", "equivalence", "difference", "threshold", "trend"]
)
@pytest.mark.parametrize("collapse", [False, True])
def test_p_and_interval_give_the_same_answer(test, collapse):
    generator = np.random.default_rng(11)
    for _ in range(40):
        n, matters = int(generator.integers(5, 12)), float(generator.choice([0.004, 0.01]))
        fields = {"threshold": {"value": 0.01}, "trend": {}}.get(test, {"matters": matters})
        direction = (
            {}
            if test in ("equivalence", "difference")
            else {"direction": str(generator.choice(["higher", "lower"]))}
        )
        values = np.round(generator.normal(generator.choice([-0.01, 0, 0.01]), 0.006, size=(n, 2)), 3)
        records = dense(n) + [
            r
            for column, target in enumerate((0.5, 0.9))
            for r in runs("new", 0.7 + values[:, column], target=target, **CHANCE)
            + runs("old", [0.7] * n, target=target, **CHANCE)
        ]
        if collapse:
            records = [
                r
                if (r.variant, r.seed) != ("new", 0)
                else r.model_copy(update={"metrics": {"test_accuracy": 0.11}})
                for r in records
            ]
        a_claim = claim(test, targets=[0.5, 0.9] if test == "trend" else [0.9], **fields, **direction)
        found, other = judge_paper([a_claim, claim(id="D", control="nobody")], records)
        (c,) = found["comparisons"]
        assert bool(c["collapsed"]) == collapse
        sign = -1 if direction.get("direction") == "lower" else 1
        ends = [-math.inf if c["low"] is None else c["low"], math.inf if c["high"] is None else c["high"]]
        low, high = sorted(sign * end for end in ends)
        d = 0.0 if test == "trend" else matters
        value = sign * fields.get("value", 0)
        inside = {
            "superiority": (low > 0, high < d),
            "trend": (low > 0, high < 0),
            "noninferiority": (low > -d, high < -d),
            "equivalence": (-d < low and high < d, low > d or high < -d),
            "difference": (low > 0 or high < 0, -d < low and high < d),
            "threshold": (low > value, high < value),
        }[test]
        if c["verdict"] == "replicated":
            assert inside[0] and c["p"] <= found["level"]
        elif c["verdict"] == "contradicted":
            assert inside[1] and c["p_against"] <= found["level_against"]
        else:
            assert (
                c["verdict"] == "open" and c["p"] > found["level"] and c["p_against"] > found["level_against"]
            )
            assert not inside[0]  # an open comparison shows the wider interval


# --------------------------------------------------------------------------- 2, 3: one p a claim, graded


def on_the_margin(targets):
    """Differences of which none can be told from the margin."""
    return [r for k, t in enumerate(targets) for r in pair(-0.01, target=t, seed=k)]


def test_nine_comparisons_on_the_margin_are_corrected_in_both_answers():
    targets = [0.1 * k for k in range(1, 10)]
    found = judge(claim("noninferiority", matters=0.01, targets=targets), on_the_margin(targets))
    assert found["verdict"] == "open" and len(found["comparisons"]) == 9
    # one of nine a little beyond what an uncorrected test needs
    slightly = 0.005 / math.sqrt(10) * stats.t.isf(0.04, 9)
    records = on_the_margin(targets[:8]) + pair(-0.01 - slightly, target=targets[8])
    found = judge(claim("noninferiority", matters=0.01, targets=targets), records)
    assert found["verdict"] == "open" and found["p_against"] == pytest.approx(9 * 0.04, rel=1e-6)
    assert (
        judge(claim("noninferiority", matters=0.01, targets=[targets[8]]), records)["verdict"]
        == "contradicted"
    )


def test_all_takes_the_largest_p_and_any_bonferroni():
    records = pair(0.001, target=0.5, seed=1) + pair(0.0015, target=0.9)
    one, other = (c["p"] for c in judge(claim(), records)["comparisons"])
    all_, any_ = judge(claim(), records), judge(claim(require="any"), records)
    assert all_["p"] == max(one, other) and any_["p"] == pytest.approx(2 * min(one, other))
    against = [c["p_against"] for c in judge(claim(), records)["comparisons"]]
    assert any_["p_against"] == max(against)
    # an answer's interval is at the level that it faces, the wider one is drawn of what is open
    assert [c["level"] for c in all_["comparisons"] + any_["comparisons"]] == [0.025] * 4
    records = pair(0.02, target=0.5, seed=1) + pair(0.02, target=0.9)
    levels = {
        r: [c["level"] for c in judge(claim(require=r), records)["comparisons"]] for r in ("all", "any")
    }
    assert levels == {"all": [0.05, 0.05], "any": [0.025, 0.025]}


def test_a_claim_says_where_it_holds():
    records = pair(0.02, target=0.9) + pair(0.02, target=0.95, seed=1) + pair(0.001, target=0.98, seed=2)
    found = judge(claim(), records)
    assert (found["verdict"], found["kind"]) == ("open", "mixed")
    assert found["where_it_holds"] == "replicated for target 0.9, target 0.95; open for target 0.98"
    # at .03 it is replicated by itself, but not beside two others
    close = 0.005 / math.sqrt(10) * stats.t.isf(0.03, 9)
    found = judge(claim(), pair(close, target=0.9) + pair(0.0, target=0.98, seed=2))
    first = found["comparisons"][0]
    assert (first["verdict"], first["graded"]) == ("replicated", "open")


def test_a_comparison_that_is_replicated_does_not_contradict():
    # every interval lies within (0, matters): replicated, below what matters, and not contradicted
    records = pair(0.01, target=0.5) + pair(0.01, target=0.9, seed=1)
    found = judge(claim(matters=0.05), records)
    assert (found["verdict"], found["p_against"]) == ("replicated", 1)
    mixed = judge(claim(matters=0.05), pair(0.01, target=0.5) + pair(-0.01, target=0.9, seed=1))
    assert mixed["verdict"] == "contradicted"


# ------------------------------------------------------------------- 4, 5: failures and collapses


def test_five_of_eight_diverged_runs_are_outcomes():
    new = [failed("new", s, **CHANCE) for s in range(5)]
    new += [record("new", s, 0.9 + s / 1000, **CHANCE) for s in range(5, 8)]
    records = dense(8) + new + runs("old", 0.8 + draws(1, 8)[0] / 100, **CHANCE)
    found = judge_one(claim(), records)
    assert found["n"] == 8 and found["lost"] == [] and found["values"][0] < -0.6
    assert found["verdict"] != "replicated" and found["collapsed"]["treatment"] == 5
    assert found["collapsed"]["p"] == pytest.approx(2 * 0.5**5) and found["median"] < 0 < found["values"][7]


@pytest.mark.parametrize(
    ("fields", "counts"),
    [
        ({"failure": "diverged"}, True),
        ({"failure": None, "reason": "the loss is nan in epoch 3"}, True),
        ({"failure": None, "reason": "out of memory in finance"}, False),
        ({"failure": "resources"}, False),
        ({"failure": "unreachable", "reason": "diverges from the target"}, False),
        ({"failure": "needs"}, False),
    ],
)
def test_only_diverged_runs_count_and_only_for_accuracy(fields, counts):
    records = dense(8) + pair(0.02, n=8, **CHANCE)[1:]
    records.append(record("new", 0, status="failed", **CHANCE, **fields))
    found = judge_one(claim(), records)
    assert (0 in found["seeds"]) == counts and found["n"] == 7 + counts
    by_loss = [
        r.model_copy(update={"metrics": r.metrics | {"test_loss": 0.5 + r.seed / 100}}) for r in records
    ]
    assert judge_one(claim(metric="test_loss"), by_loss)["lost"][0]["seed"] == 0


def needs(variant, seed, cause):
    root = cause.identity | {"settings_hash": "", "failure": cause.failure}
    return record(variant, seed, status="failed", failure="needs", cause=root, **CHANCE)


def test_what_needs_a_diverged_run_counts_unless_both_sides_do():
    start, other = failed("start", 0, **CHANCE), failed("start", 0, "resources", **CHANCE)
    good = dense(8) + pair(0.02, n=8, **CHANCE)
    without = [r for r in good if r.seed or r.variant == "dense"]
    old = next(r for r in good if (r.variant, r.seed) == ("old", 0))
    assert 0 in judge_one(claim(), [*without, old, needs("new", 0, start)])["seeds"]
    assert 0 not in judge_one(claim(), [*without, old, needs("new", 0, other)])["seeds"]
    both = judge_one(claim(), [*without, needs("old", 0, start), needs("new", 0, start)])
    assert 0 not in both["seeds"] and "both sides start from" in both["lost"][0]["reason"]
    # also where one side is the run itself
    itself = claim(control={"variant": "start"})
    found = judge_one(
        itself,
        [
            *good[18:],
            *runs("start", [0.8] * 8, **CHANCE)[1:],
            start,
            needs("new", 0, start),
            *[r for r in good if r.variant == "new" and r.seed],
        ],
    )
    assert 0 not in found["seeds"]


def test_chance_is_taken_from_another_record_and_without_any_it_stays_open():
    records = pair(0.02, n=8)[1:] + [failed("new", 0)]
    found = judge(claim(), records)
    assert (found["verdict"], found["kind"]) == ("open", "structural")
    assert "no record says what chance is" in found["reason"]
    known = judge_one(claim(), [*records, record("elsewhere", 3, 0.8, **CHANCE)])
    assert known["values"][0] < -0.6 and known["n"] == 8


def test_records_say_whether_chance_is_known():
    assert judge_all([claim()], pair(0.02))["without_chance"] == ["digits"]
    assert judge_all([claim()], pair(0.02, **CHANCE))["without_chance"] == []


def test_one_collapsed_control_among_eight_does_not_hide_the_other_seven():
    new, old = 0.9 + sample(0.0, 8, seed=3), 0.85 + sample(0.0, 8, seed=4)
    old[2] = 0.12
    records = dense(8) + runs("new", new, **CHANCE) + runs("old", old, **CHANCE)
    assert stats.ttest_rel(new, old, alternative="greater").pvalue > 0.05
    found = judge_one(claim(), records)
    assert (found["verdict"], found["p"]) == ("replicated", 2**-8)
    assert found["test_name"] == "one-sided sign-flip" and found["collapsed"] == {
        "control": 1,
        "p": 1,
        "treatment": 0,
    }
    assert found["interquartile_mean"] == pytest.approx(0.05, abs=0.01)
    # seven claims beside it leave it a level that no eight seeds reach
    eight = judge_paper([claim(), *(claim(id=f"N{k}", control="nobody") for k in range(13))], records)[0]
    assert (eight["verdict"], eight["kind"], eight["needs"]) == ("open", "collapses", 9)
    assert eight["comparisons"][0]["low"] is None


@pytest.mark.parametrize(("accuracy", "collapsed"), [(0.1849, True), (0.1851, False)])
def test_collapsed_is_within_a_tenth_of_the_way_from_chance_to_dense(accuracy, collapsed):
    records = dense(8) + pair(0.02, n=8, **CHANCE)
    records[-1] = record("old", 7, accuracy, **CHANCE)
    assert bool(judge_one(claim(), records)["collapsed"]) == collapsed


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


def test_an_accuracy_of_1_7_is_no_accuracy():
    records = pair(0.02, n=8)
    records[0] = record("new", 0, 1.7)
    found = judge_one(claim(), records)
    assert found["n"] == 7 and "1.7, not in [0, 1]" in found["lost"][0]["reason"]
    percent = [record("new", s, 90 + s) for s in range(8)] + runs("old", [0.8] * 8)
    assert "not in [0, 1]" in judge(claim(), percent)["reason"]


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


# ------------------------------------------------------------------------------------------- 8: looks


def test_the_error_is_split_over_the_looks():
    assert [0.05 * share for share in shares(4)] == pytest.approx([0.02, 0.01, 0.01, 0.01])
    assert shares(1) == [1.0] and shares(2) == pytest.approx([0.4, 0.6])


def test_later_seeds_never_judge_again():
    first = pair(0.02, n=8)
    later = [record(v, s, a) for s in range(8, 40) for v, a in (("new", 0.5 + s / 1e4), ("old", 0.8))]
    alone, replayed = (judge(claim(), r, looks=(8, 16, 32)) for r in (first, first + later))
    assert json.dumps(alone) == json.dumps(replayed)
    assert alone["verdict"] == "replicated" and alone["comparisons"][0]["look"] == 8
    assert judge(claim(), first + later)["verdict"] == "contradicted"


def test_a_look_is_judged_only_when_its_runs_are_recorded_ok_or_failed():
    records = pair(0.0, n=16, sd=0.02, seed=2)
    at = {n: judge_one(claim(), [r for r in records if r.seed < n], looks=(8, 16)) for n in (7, 8, 12, 16)}
    assert at[7]["verdict"] == "not tested" and "first look is at 8 seeds" in at[7]["reason"]
    assert (at[8]["n"], at[12]["n"], at[16]["n"]) == (8, 8, 16)
    assert at[8]["values"] == at[12]["values"] and at[16]["look"] == 16
    lost = [
        failed("new", 3, "resources"),
        *(r for r in records[:8] + records[16:24] if (r.variant, r.seed) != ("new", 3)),
    ]
    assert judge_one(claim(), lost, looks=(8, 16))["n"] == 7
    # a seed that one side has not run keeps the look waiting
    assert judge_one(claim(), lost[1:], looks=(8, 16))["verdict"] == "not tested"


def test_an_interval_at_a_look_is_at_the_level_of_the_look():
    found = judge_one(claim(), pair(0.02, n=8), looks=(8, 16, 32, 64))
    half = 0.005 / math.sqrt(8) * stats.t.isf(0.02, 7)
    assert found["level"] == pytest.approx(0.02) and found["low"] == pytest.approx(0.02 - half)


def growing(mean_late, target, n_late=16, early=0.0):
    """Pairs that show nothing in the first eight seeds, and this mean in all."""
    values = np.concatenate(
        [sample(early, 8, sd=0.02, seed=1), sample(mean_late, n_late - 8, sd=0.004, seed=2)]
    )
    old = 0.8 + 0.01 * draws(1, n_late, seed=int(100 * target))[0]
    return runs("new", old + values, target=target) + runs("old", old, target=target)


def test_each_comparison_of_a_claim_crosses_at_its_own_look():
    late = growing(0.06, 0.9)
    turned = pair(0.02, n=8, target=0.5) + [
        record(v, s, a, target=0.5) for s in range(8, 16) for v, a in (("new", 0.6 + s / 1e4), ("old", 0.8))
    ]
    found = judge(claim(), late + turned, looks=(8, 16))
    assert found["verdict"] == "replicated"
    assert [(c["target"], c["look"]) for c in found["comparisons"]] == [(0.5, 8), (0.9, 16)]


def test_what_is_decided_leaves_its_level_to_others_at_later_looks():
    strong, weak = claim(id="A", targets=[0.5]), claim(id="B", targets=[0.9])
    records = pair(0.02, n=16, target=0.5) + growing(0.06, 0.9)
    first, second = judge_paper([strong, weak], records, looks=(8, 16))
    assert (first["comparisons"][0]["look"], second["comparisons"][0]["look"]) == (8, 16)
    assert second["level"] == 0.05 and second["comparisons"][0]["level"] == pytest.approx(0.05 * 0.6)


def test_what_a_later_look_would_decide_is_predicted():
    # the predictive mean differs from the one seen by t times sd sqrt(1/8 - 1/64)
    found = judge_one(claim(), pair(0.002, n=8, sd=0.005), looks=(8, 64))
    wide = 0.005 * math.sqrt(1 / 8 - 1 / 64)
    half = stats.t.isf(0.05 * 0.6, 63) * 0.005 / 8
    up, down = stats.t.cdf((0.002 - half) / wide, 7), stats.t.cdf((-0.002 - half) / wide, 7)
    assert found["verdict"] == "open" and found["predicted"] == pytest.approx(up + down, rel=1e-6)
    assert judge_one(claim(), pair(0.002, n=8))["predicted"] is None


# ------------------------------------------------------------------ 10, 11, 12: why open, stability, tests


def test_the_seeds_that_would_decide_have_power_80_at_the_level_faced():
    records = pair(0.003, n=8)
    for others in (0, 9):
        claims = [claim(), *(claim(id=f"N{k}", control="nobody") for k in range(others))]
        found = judge_paper(claims, records)[0]
        level, n = 0.05 / (1 + others), found["needs"]
        power = [stats.nct.sf(stats.t.isf(level, m - 1), m - 1, 0.6 * math.sqrt(m)) for m in (n - 1, n)]
        assert (found["verdict"], found["kind"]) == ("open", "needs n seeds") and power[0] < 0.8 < power[
            1
        ] + 1e-3
        detectable = found["comparisons"][0]["detectable"]
        shift = detectable / 0.005 * math.sqrt(8)
        assert stats.nct.sf(stats.t.isf(level, 7), 7, shift) == pytest.approx(0.8, abs=1e-4)


def test_stability_tells_reversed_from_lost_from_what_so_few_seeds_cannot_tell():
    steady = judge(claim(), pair(0.02), checks=True)["stability"]
    assert (steady["tried"], steady["held"], steady["first_reversal"]) == (15, 14, None)
    assert steady["cannot tell"] == ["on validation images"]  # which nobody measured
    records = [
        r.model_copy(
            update={"metrics": r.metrics | {"validation_accuracy": 0.9 - r.metrics["test_accuracy"]}}
        )
        for r in pair(0.02)
    ]
    found = judge(claim(), records, checks=True)["stability"]
    assert found["reversed"] == ["on validation images"] == [found["first_reversal"]]
    many = [claim(), *(claim(id=f"N{k}", control="nobody") for k in range(60))]
    few = judge_paper(many, pair(0.02, n=8), checks=True)[0]["stability"]
    assert {"by sign flips", "by signed ranks"} <= set(few["cannot tell"]) and few["lost"] == []
    weak = judge(claim(), pair(0.0035), checks=True)["stability"]
    assert "alpha .01" in weak["lost"] and judge(claim(), pair(0.0), checks=True)["stability"] is None
    four = judge(claim(), pair(0.02, n=5), checks=True)["stability"]
    assert [name for name in four["cannot tell"] if name.startswith("without seed")] == [
        f"without seed {s}" for s in range(5)
    ]


def test_what_matters_is_halved_and_doubled():
    found = judge(claim("noninferiority", matters=0.01), pair(-0.004), checks=True)
    assert found["verdict"] == "replicated" and found["stability"]["lost"] == ["what matters halved"]


def test_cells_of_a_sign_claim_are_independent_networks():
    cells = [pair(0.001, architecture=f"net{k}", seed=k, target=t) for k in range(5) for t in (0.5, 0.9)]
    found = judge_one(claim("sign", targets=[0.5, 0.9]), [r for cell in cells for r in cell])
    assert (found["n"], found["p"]) == (5, 2**-5)


def test_a_count_is_no_claim_of_its_family_and_runs_that_failed_keep_no_bound():
    records = [record("new", s, 0.9, details={"cost": 0.05}) for s in range(3)]
    count = claim("count", control=None, metric="cost", value=0.1, direction="lower", id="K")
    assert judge(count, records)["verdict"] == "replicated"
    some = judge(count, [*records[:2], failed("new", 2)])
    assert (some["verdict"], some["kind"]) == ("open", "structural")
    assert judge_paper([count, claim()], [*pair(0.02), *records])[1]["level"] == 0.05
