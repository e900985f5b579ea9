"""The rules of replications/CLAIMS.md on made-up records whose answers are known: answers, failures, collapses."""

import math

import numpy as np
import pytest
from made_up import (
    CHANCE,
    claim,
    dense,
    draws,
    failed,
    judge,
    judge_all,
    judge_one,
    judge_paper,
    pair,
    record,
    runs,
    sample,
)
from scipy import stats

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
    one_open = judge(claim(matters=0.05), pair(0.01, target=0.5) + pair(0.01, target=0.9, seed=1, sd=0.08))
    assert (one_open["verdict"], one_open["kind"]) == ("open", "mixed") and one_open["p_against"] > 0.1
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
    assert "(McNemar p = 0.062), median -" in found["reason"] and "interquartile mean -" in found["reason"]
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


def test_dense_is_the_best_uncompressed_run_else_the_best_there():
    records = pair(0.02, n=8, **CHANCE)
    records[-1] = record("old", 7, 0.187, **CHANCE)
    better = runs("better", [0.99] * 8, **CHANCE)
    assert not judge_one(claim(), [*dense(8), *better, *records])["collapsed"]  # the bound is .185
    assert judge_one(claim(), [*better, *records])["collapsed"]  # .189


@pytest.mark.parametrize(("accuracy", "collapsed"), [(0.1849, True), (0.1851, False)])
def test_collapsed_is_within_a_tenth_of_the_way_from_chance_to_dense(accuracy, collapsed):
    records = dense(8) + pair(0.02, n=8, **CHANCE)
    records[-1] = record("old", 7, accuracy, **CHANCE)
    assert bool(judge_one(claim(), records)["collapsed"]) == collapsed


def test_without_chance_no_number_of_seeds_decides():
    """A comparison with diverged runs stays open, however few or many pairs are left; so does a sign claim."""
    few = runs("new", [0.95, 0.96, 0.97]) + [failed("new", s) for s in range(3, 8)]
    found = judge(claim(), few + runs("old", 0.8 + np.arange(8) ** 2 / 1000))
    assert (found["verdict"], found["kind"], found["needs"]) == ("open", "structural", None)
    cells = [
        r
        for name in "abcdef"
        for r in (*runs("new", [0.9, 0.9], architecture=name), *runs("old", [0.8, 0.8], architecture=name))
    ]
    assert judge(claim("sign"), cells)["verdict"] == "replicated"
    cells[0] = failed("new", 0, architecture="a")
    found = judge(claim("sign"), cells)
    assert (found["verdict"], found["kind"]) == ("open", "structural") and "what chance is" in found["reason"]


def test_a_tie_without_spread_is_not_called_the_opposite():
    records = [
        record(v, s, metrics={"q": 1.0, "other": v == "new"}) for v in ("new", "old") for s in range(8)
    ]
    found = judge(claim(metric="q", matters=0.1), records)
    assert found["verdict"] == "contradicted" and found["reason"].endswith("; less than what matters")


def test_old_reasons_say_that_a_run_diverged():
    for reason in ("nonfinite loss", "the loss is non-finite", "loss is NaN", "it diverged"):
        records = [failed("new", s, None, **CHANCE).model_copy(update={"reason": reason}) for s in range(8)]
        assert judge_one(claim(), records + runs("old", 0.8 + np.arange(8) / 100))["n"] == 8


def test_a_level_is_what_holm_leaves_in_that_direction_whatever_was_decided_first():
    names = {"new": "bad", "old": "other"}
    others = [r.model_copy(update={"variant": names[r.variant]}) for r in pair(-0.02, seed=1)]
    claims = [claim(), claim(id="D", treatment="bad", control="other")]
    found = judge_paper(claims, pair(0.02) + others)
    assert [f["verdict"] for f in found] == ["replicated", "contradicted"]
    assert [f["level_against"] for f in found] == [0.05, 0.025]
    assert [f["level"] for f in found] == [0.025, 0.05]
