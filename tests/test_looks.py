"""The rules of replications/CLAIMS.md on made-up records: looks, why a claim is open, stability."""

import json
import math

import numpy as np
import pytest
from made_up import (
    claim,
    draws,
    failed,
    judge,
    judge_one,
    judge_paper,
    pair,
    record,
    runs,
    sample,
)
from scipy import stats

from common.statistics.deciding import shares

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
    # nor where the comparison that decided is another
    others = [
        r
        for s in range(8)
        for r in (record("new", s, 0.5, target=0.5), record("old", s, 0.6 + s / 1e3, target=0.5))
    ]
    still_open = pair(0.0, n=8, sd=0.02, seed=2)
    both = [judge(claim(), others + still_open + r, looks=(8, 16, 32)) for r in ([], later)]
    assert [c["verdict"] for c in both[0]["comparisons"]] == ["contradicted", "open"]
    assert json.dumps(both[0]) == json.dumps(both[1])


def test_a_look_waits_for_the_runs_of_preconditions():
    """Else a claim that is decided could be undone by seeds of the look that come in late."""
    gated = claim(precondition={"variant": "broken", "not_worse_than": "dense", "by": 0.02})
    records = pair(0.02, n=8) + runs("dense", [0.9] * 8)
    found = judge(gated, records + runs("broken", [0.9] * 4), looks=(8, 16))
    assert found["verdict"] == "not tested" and "not all recorded" in found["reason"]
    assert judge(gated, records + runs("broken", [0.9] * 8), looks=(8, 16))["verdict"] == "replicated"
    found = judge(gated, records, looks=(8, 16))
    assert found["verdict"] == "not tested" and "no run of broken" in found["reason"]


def test_a_look_knows_nothing_of_later_seeds():
    """Neither that a value was no cap, nor of how many images accuracies are."""
    noise = draws(2, 12, seed=3)
    capped = [record("new", s, metrics={"q": 5.0 if s < 2 else 4.9 + noise[0, s] / 100}) for s in range(8)]
    capped += [record("old", s, metrics={"q": 4.7 + noise[1, s] / 20}) for s in range(8)]
    more = [
        record(v, s, metrics={"q": 6 + k * s / 7}) for s in range(8, 12) for k, v in enumerate(("new", "old"))
    ]
    stepped = [
        record(v, s, 0.8 + s % 3 / 100, metrics={"other": v == "new"})
        for s in range(8)
        for v in ("new", "old")
    ]
    finer = [record(v, s, 0.8 + s / 10_000) for s in range(8, 12) for v in ("new", "old")]
    for a_claim, first, later in (
        (claim(metric="q"), capped, more),
        (claim("noninferiority", matters=0.003), stepped, finer),
    ):
        alone, replayed = (judge(a_claim, r, looks=(8, 16)) for r in (first, first + later))
        assert json.dumps(alone) == json.dumps(replayed)


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


@pytest.mark.parametrize(("seeds", "left_out"), [(100, 100), (101, 51), (200, 50)])
def test_of_many_seeds_only_some_are_left_out(seeds, left_out):
    tried = judge(claim(), pair(0.02, n=seeds), checks=True)["stability"]["tried"]
    assert tried - judge(claim(), pair(0.02, n=5), checks=True)["stability"]["tried"] == left_out - 5


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
