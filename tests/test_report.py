"""The report: every seed and failure shows, nothing points outside, the same input gives the same bytes."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from reporting import SVG, Structure, arguments, contents, judge, marks, small_project
from scipy import stats
from synthetic import SEEDS, Maker, claim

from common.report import accuracy_figures, canvas, command, evidence, gathering, panels
from common.statistics.claims import Claim
from common.statistics.verdicts import VERDICTS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


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


def records(project: Path, paper: str) -> list[dict]:
    return [
        json.loads(line)
        for line in (project / "results" / "digits" / f"{paper}.jsonl").read_text().splitlines()
    ]


# ------------------------------------------------------------------------------------------- figures


def test_every_seed_is_a_point_of_the_figures(project):
    expected: dict[str, int] = {}
    for record in records(project, "restarts"):
        accuracy = record["metrics"].get("test_accuracy")
        if accuracy is not None and accuracy == accuracy:
            expected[record["variant"]] = expected.get(record["variant"], 0) + 1
    assert expected["gmp"] == 13 and expected["dpf"] == 14 and expected["slr"] == 15
    drawn = {}
    for path in (project / "report" / "figures").glob("restarts-digits-convnet-*-target.svg"):
        for variant in expected:
            if found := marks(path, f"seeds-{variant}"):
                drawn[variant] = found
    assert {variant: len(found) for variant, found in drawn.items()} == expected
    for found in drawn.values():
        assert len(set(found)) == len(found), "two seeds lie on the same spot"


def test_points_stand_where_the_measurements_are(project):
    """Heights in the SVG are a straight-line function of the accuracies, for all variants together."""
    path = project / "report" / "figures" / "gates-digits-vgg-target.svg"
    heights, accuracies = [], []
    for variant in ("dense", "random", "gated"):
        found = [
            r for r in records(project, "gates") if (r["variant"], r["architecture"]) == (variant, "vgg")
        ]
        accuracies += [
            record["metrics"]["test_accuracy"] for record in sorted(found, key=lambda r: r["seed"])
        ]
        heights += [y for _, y in marks(path, f"seeds-{variant}")]
    assert len(heights) == 9
    assert np.corrcoef(heights, accuracies)[0, 1] == pytest.approx(-1, abs=1e-4)


def test_the_target_axis_opens_up_the_high_end():
    positions = [accuracy_figures.position(target) for target in (0.0, 0.5, 0.75, 0.875)]
    assert np.diff(positions) == pytest.approx([1, 1, 1])


def test_claims_show_each_pair_with_interval_and_margin(project):
    found = json.loads((project / "verdicts.json").read_text())["papers"]["restarts"]["claims"][1][
        "comparisons"
    ]
    path = project / "report" / "figures" / "restarts-claim-h2.svg"
    for number, comparison in enumerate(found):
        assert len(marks(path, f"pairs-{number}")) == comparison["n"] == len(comparison["values"])
    assert sum(comparison["n"] for comparison in found) < 15, "lost seeds have no point"
    assert "does not matter" in path.read_text()


def test_no_figure_has_more_lines_than_can_be_told_apart(project):
    for path in (project / "report" / "figures").glob("restarts-digits-*-target.svg"):
        groups = [
            g.get("id")
            for g in ET.parse(path).getroot().iter(f"{SVG}g")
            if (g.get("id") or "").startswith("seeds-")
        ]
        assert 2 <= len(groups) <= gathering.MOST_LINES + 1


def test_portions_keep_a_claim_together_and_leave_out_what_none_names():
    variants = [f"v{i}" for i in range(20)]
    claims = [
        Claim.model_validate(claim("A", "v3", ["v9", "v17"])),
        Claim.model_validate(claim("B", "v3", ["v1", "v2"])),
    ]
    claims.append(Claim.model_validate(claim("C", "v0", [f"v{i}" for i in range(4, 10)])))
    found = gathering.portions(variants, claims)
    named = {variant for entry in claims for variant in gathering.used_variants(entry)}
    assert {variant for portion in found for variant in portion.variants} == named
    assert all(len(portion.variants) <= gathering.MOST_LINES for portion in found)
    for entry in claims:
        assert any(set(gathering.used_variants(entry)) <= set(portion.variants) for portion in found)
    wanted = gathering.looks(variants, found)
    for portion in found:
        assert len(set(gathering.distinct(portion.variants, wanted).values())) == len(portion.variants)
    without = gathering.portions(variants, [])
    assert [variant for portion in without for variant in portion.variants] == variants


def test_looks_differ_in_colour_or_marker():
    looks = [canvas.look_of(index) for index in range(2 * len(canvas.PALETTE))]
    assert len({(look["color"], look["marker"], look["markerfacecolor"]) for look in looks}) == len(looks)


def test_training_curves_average_over_seeds_and_name_phases(project):
    found = evidence.load(
        "digits", *(project / part for part in ("results/digits", "replications", "verdicts.json", "none"))
    )
    paper = next(paper for paper in found.papers if paper.name == "gates")
    panel = next(p for p in gathering.paper_panels(paper, found.curves) if isinstance(p, panels.CurvesPanel))
    curve = next(curve for curve in panel.curves if curve.label == "gated")
    runs = [
        found.curves[r.settings_hash]
        for r in paper.records
        if r.variant == "gated" and r.architecture == "vgg"
    ]
    assert curve.phases == ((1, "prune"), (3, "retrain"))
    assert curve.epochs == tuple(range(1, 11))
    assert curve.means[0][4] == pytest.approx(100 * np.mean([run[4]["validation_accuracy"] for run in runs]))
    assert "starts a new phase (prune, retrain)" in panel.caption


def test_mean_interval_is_students():
    values = [0.91, 0.95, 0.92, 0.97, 0.9]
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert panels.mean_interval(values) == pytest.approx((np.mean(values), low, high))
    assert np.isnan(panels.mean_interval([0.5])[1:]).all()


# ---------------------------------------------------------------------------------------------- page


def test_the_page_is_whole_and_points_at_nothing_outside(project, page):
    structure = Structure()
    structure.feed(page)
    assert structure.open == []
    assert len(set(structure.ids)) == len(structure.ids)
    inside = {address[1:] for address in structure.addresses if address.startswith("#")}
    beside = {address for address in structure.addresses if not address.startswith("#")}
    assert inside and inside <= set(structure.ids)
    assert beside and all((project / "report" / address).is_file() for address in beside)
    assert "http" not in page.replace("http-equiv", "") and "@import" not in page
    assert page.count("<script") == page.count("<script>") == 1


def test_the_counts_are_those_of_the_verdicts_and_lead_to_every_claim(project, page):
    verdicts = json.loads((project / "verdicts.json").read_text())
    counts = ", ".join(
        f"{count} {verdict}" for verdict, count in sorted(verdicts["counts"].items(), key=_place)
    )
    assert f"All claims: {counts}." in page
    for paper in verdicts["papers"]:
        for entry in verdicts["papers"][paper]["claims"]:
            assert f'id="{paper}-{entry["id"].lower()}"' in page
            assert entry["statement"] in page
    assert tuple(panels.VERDICTS) == VERDICTS


def _place(count: tuple[str, int]) -> int:
    return VERDICTS.index(count[0])


def test_numbers_of_a_claim_are_those_of_the_verdicts(project, page):
    comparison = json.loads((project / "verdicts.json").read_text())["papers"]["gates"]["claims"][0][
        "comparisons"
    ][0]
    assert f"{100 * comparison['estimate']:+.2f} pp".replace("-", "−") in page
    assert f"{100 * comparison['treatment_mean']:.2f} %" in page
    assert f"{comparison['effect_size']:+.2f}" in page


def test_failed_runs_lost_seeds_and_gaps_are_named(page):
    assert "dpf, digits, convnet, target 0.98, seed 3" in page and "the loss is nan in epoch 3" in page
    assert "Not tested: no run of nobody" in page
    assert "n 4, 1 failed" in page  # dpf at 0.98
    assert re.search(r"Settings that lost [^.]*<code>tuning-slr-2, [^<]*</code>\.", page)
    assert "the loss is inf" not in page  # it is no failure of the paper's
    assert "Seed 1 lost" in page  # gmp without a number
    assert "There are no records of this paper in profile digits" in page


def test_the_papers_number_is_shown_only_where_given_and_never_as_a_test(page):
    assert page.count("The paper's number:") == 1
    shown = page[page.index("The paper's number:") :][:600]
    assert "2 points" in shown and "abstract of version 1" in shown
    assert "tests the direction and not the number" in shown


def test_the_papers_number_is_drawn_at_full_scale_alone(project, tmp_path):
    assert "paper's number" not in (project / "report" / "figures" / "restarts-claim-h1.svg").read_text()
    full = arguments(project, profile="paper")
    full[full.index("--out") + 1] = str(tmp_path)
    assert command.main(full) == 0
    assert "paper's number" in (tmp_path / "figures" / "restarts-claim-h1.svg").read_text()
    assert "paper's number" not in (tmp_path / "figures" / "restarts-claim-h2.svg").read_text()
    assert "tests the direction and not the number" not in (tmp_path / "index.html").read_text()


def test_deviations_come_from_the_readme_as_text(page):
    assert "8x8 digits" in page and "the paper (example.org/abs/1)" in page
    assert "&lt;script&gt;" in page
    assert "none of this is a deviation" not in page
    assert page.count("has no section <code>Deviations</code>") == 2


def test_the_page_says_how_to_reproduce(project, page):
    digest = json.loads((project / "verdicts.json").read_text())["papers"]["restarts"]["claims_digest"]
    assert digest in page
    assert "dvc repro restarts" in page and "python -m common.statistics" in page
    assert "pruning-replications/restarts" in page
    assert "python 3.11.9" in page


def test_tables_hold_mean_spread_n_and_detectable_effect(project, page):
    found = [
        r["metrics"]["test_accuracy"]
        for r in records(project, "restarts")
        if r["variant"] == "slr" and r["target"] == 0.98
    ]
    mean, sd = 100 * np.mean(found), 100 * np.std(found, ddof=1)
    assert f"{mean:.2f} ± {sd:.2f}<small>n 5, detects " in page


def test_variants_that_no_claim_names_are_in_a_table_of_their_own(small):
    tuned = Maker(small, "gates")
    tuned.grid(("random", "gated", *(f"tuning-{i}" for i in range(8))), (0.5,), SEEDS[:3])
    tuned.write()
    judge(small)
    assert command.main(arguments(small)) == 0
    page = (small / "report" / "index.html").read_text()
    assert "8 variants that no claim names" in page
    assert not marks(small / "report" / "figures" / "gates-digits-convnet-target.svg", "seeds-tuning-0")
    assert marks(small / "report" / "figures" / "gates-digits-convnet-target.svg", "seeds-dense")


def test_rows_for_dvc_plots_are_the_finished_runs(project):
    rows = json.loads((project / "report" / "plots" / "accuracy.json").read_text())
    assert len(rows) == 5 * (1 + 9 * 3) - 3 + 3 * 2 * (1 + 2)
    assert set(rows[0]) == {"paper", "variant", "dataset", "architecture", "target", "seed", "test_accuracy"}


# ------------------------------------------------------------------------------------------ behaviour


def test_a_second_run_in_another_process_gives_the_same_bytes(project):
    before = contents(project / "report")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    run = [sys.executable, "-m", "common.report", *arguments(project)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert contents(project / "report") == before


def test_the_report_needs_no_torch():
    code = (
        "import sys, common.report.command; sys.exit(bool({'torch', 'mlflow', 'dvc'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.fixture
def small(tmp_path):
    return small_project(tmp_path)


def test_another_paper_appears_by_itself_and_goes_without_trace(small):
    assert command.main(arguments(small)) == 0
    sixth = Maker(small, "sixth")
    sixth.grid(("a", "b"), (0.5, 0.9), SEEDS[:3])
    sixth.write()
    sixth.claims([claim("S1", "a", "b")])
    judge(small)
    assert command.main(arguments(small)) == 0
    assert 'id="sixth-s1"' in (small / "report" / "index.html").read_text()
    assert (small / "report" / "figures" / "sixth-digits-convnet-target.svg").exists()
    for path in [
        *(small / "results" / "digits").glob("sixth*"),
        *(small / "replications" / "sixth").glob("*"),
    ]:
        path.unlink()
    judge(small)
    assert command.main(arguments(small)) == 0
    assert not [name for name in contents(small / "report") if "sixth" in name]


def test_claims_changed_after_judging_are_pointed_out(small):
    path = small / "replications" / "gates" / "claims.yaml"
    path.write_text(path.read_text() + "# changed\n")
    assert command.main(arguments(small)) == 0
    assert "judged on other claims" in (small / "report" / "index.html").read_text()


def test_records_without_claims_and_one_seed_are_drawn(small):
    lonely = Maker(small, "lonely")
    lonely.grid(("only",), (0.5, 0.9), (0,))
    lonely.write()
    assert command.main(arguments(small)) == 0
    assert len(marks(small / "report" / "figures" / "lonely-digits-convnet-target.svg", "seeds-only")) == 2


def test_runs_without_compression_alone_need_no_target_figure(small):
    corpus = Maker(small, "corpus")
    corpus.grid((), (), (0, 1), dataset="glyphs")
    corpus.write()
    assert command.main(arguments(small)) == 0
    names = [name for name in contents(small / "report" / "figures") if name.startswith("corpus")]
    assert names == ["corpus-glyphs-convnet-training.csv", "corpus-glyphs-convnet-training.svg"]


def _damage(path: Path, text: str):
    return lambda folder: (folder / path).write_text(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "verdicts.json").unlink(), ["verdicts.json", "no verdicts"]),
        (_damage(Path("verdicts.json"), "{"), ["verdicts.json", "not valid JSON"]),
        (_damage(Path("verdicts.json"), "[]"), ["verdicts.json", "papers"]),
        (
            _damage(Path("results/digits/gates.jsonl"), '{"paper": "gates", "vari'),
            ["gates.jsonl, line 1", "not valid JSON"],
        ),
        (
            _damage(Path("results/digits/gates.jsonl"), '\n{"paper": "gates"}\n'),
            ["gates.jsonl, line 2", "variant"],
        ),
        (
            _damage(Path("results/digits/gates.curves.jsonl"), "{}"),
            ["gates.curves.jsonl, line 1", "settings_hash"],
        ),
        (
            _damage(Path("replications/gates/claims.yaml"), "paper: gates\nclams: []\n"),
            ["claims.yaml", "clams"],
        ),
        (_damage(Path("results/environment/digits/gates.json"), "{"), ["gates.json", "not valid JSON"]),
    ],
)
def test_bad_input_is_one_clear_line(small, capsys, change, words):
    change(small)
    assert command.main(arguments(small)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert all(word in printed for word in words)
    assert not (small / "report").exists()


def test_no_paper_at_all_is_an_error(tmp_path, capsys):
    (tmp_path / "verdicts.json").write_text('{"papers": {}}')
    assert command.main(arguments(tmp_path)) == 2
    assert "results/digits: no such folder" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(small, capsys):
    (small / "report").write_text("in the way")
    assert command.main(arguments(small)) == 2
    assert "report" in capsys.readouterr().err
