"""Calibration: its short form, and that what it makes up is what it says."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from common.statistics.calibrate import settled, simulate, simulate_all
from common.statistics.calibration.cells import (
    CHANCE,
    EQUAL,
    LOOKED,
    NULLS,
    POWERS,
    UNEQUAL,
    Cell,
    Family,
    cells,
)
from common.statistics.calibration.page import write
from common.statistics.calibration.papers import Papers
from common.statistics.calibration.results import AGAIN, Result
from common.statistics.claims import ClaimsFile
from common.statistics.judging import Terms, judge_claims
from common.statistics.records import Quantity
from common.statistics.verdicts import judge

PAPERS = 200
ALL = {cell.key: cell for cell in cells()}
# those that go wrong first: Holm left out, looks at 5 % each, a t-test of what collapsed, dropped runs
NINE = [Cell("null", NULLS[0], "normal", family=family) for family in (Family(9), Family(comparisons=9))]
SHORT = [
    Cell("null", NULLS[at], outcome)
    for at, outcome in ((0, "collapsing"), (3, "diverging"), (4, "steps of 0.001"))
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell", [*SHORT, *NINE, Cell("null", NULLS[0], "normal", LOOKED)], ids=lambda cell: cell.key
)
def test_no_answer_is_wrong_in_more_than_five_of_a_hundred_papers(cell):
    assert settled(cell, PAPERS).missed() == []


@pytest.mark.parametrize("question, power", POWERS[:3], ids=lambda value: getattr(value, "name", ""))
def test_what_holds_by_one_standard_deviation_is_found_by_eight_seeds(question, power):
    (rate,) = simulate(Cell("power", question, "normal", power=power), PAPERS).rates().values()
    assert rate >= power - 0.06  # two simulation errors


@pytest.mark.slow
def test_it_counts_the_verdicts_that_are_written():
    cell = Cell("null", NULLS[0], "diverging", LOOKED, Family(comparisons=3))
    for records in Papers(cell).draw(np.random.default_rng(3), 10):
        claims = Papers(cell).claims
        judged = judge_claims(claims, records, Terms(LOOKED.looks))
        file = ClaimsFile("made-up", claims, "", Path("claims.yaml"))
        written = judge([file], {"made-up": records}, looks=LOOKED.looks)["papers"]["made-up"]["claims"]
        assert [claim["verdict"] for claim in written] == [claim.verdict for claim in judged]
        graded = [comparison["graded"] for comparison in written[0]["comparisons"]]
        assert graded == [comparison.graded for comparison in judged[0].comparisons]


@pytest.mark.slow
def test_the_same_papers_on_every_run_and_with_any_number_of_processes():
    some = [SHORT[0], NINE[1]]
    alone, together = (simulate_all(some, 20, jobs) for jobs in (1, 2))
    assert alone == together
    assert simulate(some[0], 20, stream=1) != alone[0]


def test_cells_differ_and_leave_nothing_out():
    assert len(ALL) == len(list(cells()))
    found = {(cell.question.test, cell.outcome) for cell in ALL.values() if cell.kind == "null"}
    assert found == {(question.test, outcome) for question in NULLS for outcome in EQUAL}
    assert {cell.design.seeds for cell in ALL.values()} == {5, 8, 16, 32, 64}


@pytest.mark.parametrize("name", [*EQUAL, *UNEQUAL])
def test_both_arms_have_the_same_mean(name):
    treatment, control = {**EQUAL, **UNEQUAL}[name].draw(np.random.default_rng(0), (200_000,))
    assert np.nanmean(treatment) == pytest.approx(np.nanmean(control), abs=0.003)
    assert np.nanmean(np.isnan(treatment)) == pytest.approx(0.1 * (name == "diverging"), abs=0.003)
    collapsed = "coll" in name
    assert (min(treatment.min(), control.min()) < CHANCE + 0.05) == collapsed


def test_papers_are_records_whose_accuracies_are_what_the_truth_adds():
    cell = ALL["null; noninferiority, truth -1; normal; 8 seeds; all of 3 comparisons, others hold"]
    made = Papers(cell)
    margin = made.outcome.margin
    arms = [
        [
            Quantity(f"{side} 0", "made-up", "none", target, "test_accuracy")
            for side in ("treatment", "control")
        ]
        for target in made.targets
    ]
    differences = [
        records.measure(treatment, seed) - records.measure(control, seed)
        for records in made.draw(np.random.default_rng(0), 200)
        for treatment, control in arms
        for seed in range(8)
    ]
    first, *others = np.mean(np.reshape(differences, (200, 3, 8)), axis=(0, 2)) / margin
    assert (first, *others) == (pytest.approx(-1, abs=0.1), *[pytest.approx(2, abs=0.1)] * 2)


def test_a_cell_above_its_goal_is_simulated_again_on_new_papers():
    wrong = Cell("null", POWERS[0][0], "normal")  # not a null: it holds
    found = settled(wrong, 20)
    assert found.papers == 20 * AGAIN and found.first["papers"] == 20
    assert found.missed() == ["replicated"]


def test_the_page_shows_what_misses_its_goal(tmp_path):
    results = [Result(cell, 100, Counter(replicated=4, contradicted=3)) for cell in ALL.values()]
    results[0].counts["replicated"] = 30
    write(results, tmp_path)
    content = json.loads((tmp_path / "calibration.json").read_text())
    assert [entry["missed"] for entry in content[:2]] == [["replicated"], []]
    readme = (tmp_path / "README.md").read_text()
    assert "| superiority, truth 0 | normal | **30.0** / 3.0 |" in readme
    assert (
        "- 100 papers of one comparison (superiority, truth 0, normal), judged by looks at 8, 16, 32, 64: 4.00"
        in readme
    )
    assert (tmp_path / "calibration.png").stat().st_size > 10_000


def test_a_cell_may_have_a_number_of_papers_of_its_own():
    assert settled(Cell("null", NULLS[4], "normal", papers=30), 20).papers in (30, 30 * AGAIN)


def test_what_diverges_is_shifted_like_all_other_outcomes_of_its_arm():
    made = Papers(ALL["null; noninferiority, truth -1; diverging; 64 seeds; one comparison"])
    (records,) = made.draw(np.random.default_rng(0), 1)
    arms = [
        Quantity(f"{side} 0", "made-up", "none", 0.1, "test_accuracy") for side in ("treatment", "control")
    ]
    values = [[records.measure(arm, seed) for seed in range(64)] for arm in arms]
    assert [min(side) for side in values] == pytest.approx([CHANCE - made.outcome.margin, CHANCE])
    assert {run.status for run in records.seeds(arms[0]).values()} == {"ok", "failed"}
