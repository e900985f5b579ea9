"""Claims that were made when results had been seen, numbers that are not judged, and the ledger of deviations."""

import yaml

from common.profiles import profile_blocks
from common.settings import ROOT
from common.stage.papers import load, papers
from common.statistics import verdicts
from common.statistics.claims import Arithmetic, ClaimsFile
from common.statistics.records import Records
from tests.made_up import claim, judge, judge_paper, pair, record, runs


def moved(records, by):
    return [one.model_copy(update={"seed": one.seed + by}) for one in records]


def test_only_seeds_above_those_seen_judge_a_claim():
    early, late = pair(0.02), moved(pair(-0.02, seed=1), 100)
    assert judge(claim(), early + late)["verdict"] == "open"
    found = judge(claim(seen=15), early + late)
    assert found["verdict"] == "contradicted"
    assert found["comparisons"][0]["seeds"] == list(range(100, 110))
    assert judge(claim(seen=15), early + late, looks=[8])["comparisons"][0]["seeds"] == list(range(100, 108))


def test_a_claim_whose_seeds_had_all_been_seen_is_not_tested_and_says_so():
    found = judge(claim(seen=15), pair(0.02))
    assert found["verdict"] == "not tested"
    assert (
        "no run of new with a seed above 15; the others had been seen when the claim was made"
        in found["reason"]
    )


def test_a_claim_changed_later_starts_on_newer_seeds_than_the_others():
    records = pair(0.02) + moved(pair(-0.02, seed=1), 100)
    first, second = judge_paper([claim(), claim(id="D", seen=99)], records)
    assert len(first["comparisons"][0]["seeds"]) == 20 and second["verdict"] == "contradicted"
    assert second["seen"] == 99


def test_a_deviation_is_in_the_ledger_where_it_was_run_and_left_out_elsewhere():
    deviation = claim(
        "difference", id="L", role="probe", deviation="rates", direction=None, treatment="other"
    )
    assert [found["id"] for found in judge_paper([claim(), deviation], pair(0.02))] == ["C"]
    records = pair(0.02) + runs("other", [0.7] * 10)
    assert judge_paper([claim(), deviation], records)[1]["deviation"] == "rates"


def test_numbers_that_settings_fix_are_shown_with_their_range_and_not_judged():
    made = [record("new", seed, 0.9, metrics={"search": 0.1 * (seed + 1)}) for seed in range(3)]
    made += [record("new", 0, 0.9, target=0.5, metrics={"search": 0.7}), record("new", 1, 0.9, target=0.5)]
    entry = Arithmetic(id="cost", statement="so much", variant="new", metric="search")
    file = ClaimsFile("demo", (claim(),), "0" * 64, None, (entry,))
    paper = verdicts.judge([file], {"demo": Records(made)})["papers"]["demo"]
    (found,) = paper["arithmetic"]
    assert [(v["target"], v["low"], round(v["high"], 6)) for v in found["values"]] == [
        (0.5, 0.7, 0.7),
        (0.9, 0.1, 0.3),
    ]
    assert sum(paper["counts"].values()) == 1


def test_no_profile_judges_by_seeds_that_shaped_the_claims():
    seen = {}
    for paper in papers():
        content = yaml.safe_load((ROOT / "replications" / paper / "claims.yaml").read_text())
        if "seen" not in content:
            continue  # a paper whose claims were made before any seed was seen
        seen[paper] = max([content["seen"], *(one.get("seen", -1) for one in content["claims"])])
        assert seen[paper] >= 15  # seeds 0 to 15 shaped all claims
    assert "halo" in seen
    blocks, _ = profile_blocks(ROOT / "params.yaml", None)
    for profile in blocks:
        for paper, highest in seen.items():
            settings = load(paper, ROOT / "params.yaml", profile).paper
            assert min(settings.seeds) > highest, (profile, paper)
            for cell in settings.cells:
                assert min(settings.changed(cell.settings, paper).seeds) > highest, (profile, paper)
