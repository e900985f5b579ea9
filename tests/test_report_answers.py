"""What the page says first: headlines with their verdicts, why claims are open, and the numbers that decided."""

import csv
import io
import json
import re

import pytest
from reporting import Structure, arguments, judge, small_project
from synthetic import SEEDS, Maker, claim

from common.report import command, judged, places, runs
from common.report.numbers import decided_interval, deciding_p
from common.statistics.claims import Claim
from common.statistics.opening import COLLAPSES, MIXED, NEEDS, STRUCTURAL

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def drawn_here(monkeypatch):
    """Other processes take longer to start than this one to draw so few figures."""
    monkeypatch.setattr(command, "WORKERS", 1)


@pytest.fixture
def project(reported):
    return reported


@pytest.fixture
def page(project):
    return (project / "report" / "index.html").read_text()


@pytest.fixture
def verdicts(project):
    return json.loads((project / "verdicts.json").read_text())["papers"]


def test_the_page_begins_with_the_headlines_and_their_verdicts(page, verdicts):
    answers = page[page.index('<section id="answers">') : page.index("</section>")]
    headline = next(entry for entry in verdicts["restarts"]["claims"] if entry["role"] == "headline")
    assert headline["statement"] in answers and headline["verdict"] in answers
    comparison = headline["comparisons"][headline["deciding"]]
    assert f"{100 * comparison['estimate']:+.2f} pp".replace("-", "−") in answers
    assert "80, 90, 98" in answers and f"{comparison['n']} seeds" in answers
    assert answers.count("<tr data-row>") == 3  # a headline, and two papers without one
    assert "No claim of this paper is marked as its headline" in answers
    assert page.index('<section id="answers">') < page.index('<section id="restarts">')


def test_kinds_of_open_and_untested_claims_are_counted_and_explained(page, verdicts):
    claims = [entry for paper in verdicts.values() for entry in paper["claims"]]
    needs = sum(entry["kind"] == NEEDS for entry in claims)
    missing = sum(entry["verdict"] == "not tested" and "no run of" in entry["reason"] for entry in claims)
    assert needs and f"<b>{needs}</b> open, <b>{NEEDS}</b>: {judged.KINDS[NEEDS]}" in page
    assert missing and f"<b>{missing}</b> not tested, <b>runs are missing</b>" in page
    assert set(judged.KINDS) == {NEEDS, MIXED, COLLAPSES, STRUCTURAL}


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("not tested: no run of a with a seed above 15; the others had been seen", "no new seeds"),
        ("not tested: no run of a, b", "runs are missing"),
        ("not tested: 3 pairs, and no verdict comes from fewer than 5", "too few seeds"),
        ("not tested: the arm a (digits, mlp) is unsound: at chance", "an arm never trained"),
        ("not tested: the precondition, a not worse than b, is not met", "a precondition is not met"),
        ("not tested: metrics of different units are not compared: a, b", "not comparable"),
    ],
)
def test_a_claim_is_untested_for_one_of_a_few_kinds_of_reason(reason, kind):
    assert judged.kind({"verdict": "not tested", "reason": reason}) == kind
    assert kind in judged.REASONS


def test_the_p_shown_is_the_one_that_decided():
    both = {"p_holm": 0.9, "p_against_holm": 0.004}
    assert deciding_p({**both, "verdict": "contradicted"}) == "0.004 against"
    assert deciding_p({**both, "verdict": "replicated"}) == "0.9"
    assert deciding_p({**both, "verdict": "open"}) == "0.9 for, 0.004 against"
    assert deciding_p({"p_holm": None, "p_against_holm": None, "verdict": "replicated"}) == ""


def test_a_headline_names_its_source_and_what_matters(page):
    card = page[page.index('<article class="headline" id="restarts-h1"') :]
    card = card[: card.index("</article>")]
    assert "Claimed in: the abstract." in card
    assert "What matters: 0.50 pp, half a point is what readers look for." in card
    assert "<svg" in card, "its picture stands in the page"


def test_deviations_that_were_run_are_a_ledger(page, verdicts):
    ids = [entry["id"] for entry in verdicts["restarts"]["claims"]]
    assert "D1" in ids and "D2" not in ids
    ledger = page[page.index("Ledger of deviations") :]
    ledger = ledger[: ledger.index("</table>")]
    found = next(entry for entry in verdicts["restarts"]["claims"] if entry["id"] == "D1")
    comparison = found["comparisons"][found["deciding"]]
    assert "ties broken at random" in ledger
    assert f"{100 * comparison['estimate']:+.2f} pp".replace("-", "−") in ledger
    assert "never run" not in page


def test_what_settings_fix_is_shown_as_numbers_without_a_verdict(page):
    table = page[page.index("Fixed by the settings") :]
    table = table[: table.index("</table>")]
    assert "Scoring passes over the data once." in table and "612,000" in table and "chip" not in table


def test_seeds_that_shaped_the_claims_are_named(tmp_path):
    folder = small_project(tmp_path)
    paper = Maker(folder, "gates")
    paper.grid(("random", "gated"), (0.5,), SEEDS)
    paper.write()
    paper.claims([claim("G1", "gated", "random")], seen=3)
    judge(folder)
    assert command.main(arguments(folder)) == 0
    page = (folder / "report" / "index.html").read_text()
    assert "Seeds up to 3 had been seen when the claims were made" in page and "; n 6" not in page
    assert "<small>n 6</small>" in page


def test_everything_but_answers_and_claims_is_folded(page, verdicts):
    structure = Structure()
    structure.feed(page)
    for text in (
        "Cost of the networks, digits",
        "python -m common.statistics",
        "8x8 digits",
        "params.variant",
    ):
        assert text in page and text not in structure.unfolded
    for entry in verdicts["restarts"]["claims"]:
        assert (entry["statement"] in structure.unfolded) == (entry["role"] != "probe")


def test_the_page_is_light(project, page):
    assert len(page.encode()) < 1e6
    structure = Structure()
    structure.feed(page)
    assert structure.count < 15_000


def test_each_figure_has_its_values_as_tidy_csv(project, verdicts):
    found = next(entry for entry in verdicts["restarts"]["claims"] if entry["id"] == "H2")
    rows = list(csv.DictReader((project / "report/figures/restarts-claim-h2.csv").open()))
    expected = [100 * value for one in found["comparisons"] for value in one["values"]]
    assert [float(row["value"]) for row in rows] == pytest.approx(expected)
    assert {row["of"] for row in rows} <= {f"seed {seed}" for seed in SEEDS}
    rows = list(csv.DictReader((project / "report/figures/gates-digits-vgg-target.csv").open()))
    assert len(rows) == 9 and set(rows[0]) == {"variant", "target", "seed", "test_accuracy"}
    curves = list(csv.DictReader((project / "report/figures/gates-digits-vgg-training.csv").open()))
    assert set(curves[0]) == {"variant", "seed", "epoch", "validation_accuracy", "train_loss"}
    assert {row["seed"] for row in curves} == {row["seed"] for row in rows}
    for path in (project / "report" / "figures").glob("*.svg"):
        assert len(list(csv.reader(io.StringIO(path.with_suffix(".csv").read_text())))) > 1


def test_a_single_file_needs_nothing_beside_it(project, tmp_path):
    assert command.main([*arguments(project), "--single-file", str(tmp_path / "whole.html")]) == 0
    page = (tmp_path / "whole.html").read_text()
    structure = Structure()
    structure.feed(page)
    assert all(address.startswith(("#", "data:text/csv,")) for address in structure.addresses)
    assert len(set(structure.ids)) == len(structure.ids)
    assert "<img" not in page and page.count("<svg") == len(list((project / "report/figures").glob("*.svg")))


def test_what_dvc_plots_are_the_headlines_and_their_training(project, verdicts):
    (row,) = json.loads((project / "report/plots/headlines.json").read_text())
    entry = next(entry for entry in verdicts["restarts"]["claims"] if entry["role"] == "headline")
    assert row["claim"] == f"restarts H1: {entry['verdict']}"
    assert row["estimate"] == entry["comparisons"][entry["deciding"]]["estimate"]
    rows = json.loads((project / "report/plots/curves.json").read_text())
    assert {row["line"].split(",")[0] for row in rows} == {"restarts slr", "restarts ft", "restarts lrw"}
    assert {row["epoch"] for row in rows} == set(range(1, 11))


# ----------------------------------------------------------------------------------------------- where


def _compared(control: str, target: float, verdict: str, dataset: str = "digits") -> dict:
    sides = {"treatment": {"variant": "a"}, "control": {"variant": control}}
    return {
        **sides,
        "dataset": dataset,
        "architecture": "mlp",
        "target": target,
        "verdict": verdict,
        "graded": verdict,
    }


def test_where_a_claim_holds_names_only_what_differs():
    gmp, dpf = [_compared("gmp", 0.9, "replicated"), _compared("gmp", 0.98, "open")], _compared
    text = places.summary([*gmp, dpf("dpf", 0.9, "replicated"), dpf("dpf", 0.98, "replicated")])
    assert (
        text.replace("\N{NO-BREAK SPACE}", " ")
        == "Replicated: vs gmp at 90 %, vs dpf at 90, 98 %; open: vs gmp at 98 %."
    )
    text = places.summary([_compared("gmp", 0.9, "open"), _compared("gmp", 0.9, "replicated", "glyphs")])
    assert (
        text.replace("\N{NO-BREAK SPACE}", " ")
        == "Replicated: on glyphs mlp at 90 %; open: on digits mlp at 90 %."
    )
    assert places.summary([_compared("gmp", 0.9, "open")]).startswith("Vs gmp at 90")


def test_filters_name_both_sides_and_the_seeds_that_were_used():
    found = {
        "treatment": {"variant": "a", "dataset": "digits", "architecture": "mlp", "target": 0.9},
        "control": {"variant": "b", "dataset": "digits", "architecture": "mlp", "target": 0.0},
        "points": [],
        "seeds": [2, 3, 5],
    }
    first, second = runs.filters(found, "digits")
    assert first == (
        "params.variant = 'a' and params.dataset = 'digits' and params.architecture = 'mlp' and params.target = '0.9' "
        "and tags.profile = 'digits' and metrics.seed >= 2 and metrics.seed <= 5 and params.seed != '4'"
    )
    assert "params.target = '0'" in second
    far = runs.filters({**found, "seeds": [2, 3, 5, 2**62]}, "digits")
    assert far[0] == first and far[1].endswith(f"metrics.seed >= {2**62} and metrics.seed <= {2**62}")
    assert len(far) == 4
    varying = {**found["treatment"], "target": None}
    trend = {
        **found,
        "treatment": varying,
        "control": None,
        "points": [{"variant": "a", "target": t} for t in (0.8, 0.9)],
    }
    assert [re.findall(r"target = '(.*?)'", one) for one in runs.filters(trend, "digits")] == [
        ["0.8"],
        ["0.9"],
    ]


def test_arms_that_were_not_trained_alike_are_named(tmp_path):
    project = small_project(tmp_path)
    file = project / "results" / "digits" / "gates.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        short = row["variant"] == "gated"
        row["settings"] |= {
            "training": {"epochs": 3 if short else 30, "stages": [{"epochs": 1}]},
            "data": {"train": 600},
        }
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge(project)
    assert command.main(arguments(project)) == 0
    said = re.findall("not trained alike: ([^<]*)<", (project / "report" / "index.html").read_text())
    assert said and set(said) == {"training.epochs 3 and 30"}


def test_an_interval_that_is_infinite_both_ways_says_so():
    points = Claim(**claim("C", "new", "old"))
    assert decided_interval(points, {"low": None, "high": None, "level": 0.005}) == "no bound (99 %)"
    assert decided_interval(points, {"low": None, "high": 0.01, "level": 0.05}) == "−∞ to +1.00 pp (90 %)"
