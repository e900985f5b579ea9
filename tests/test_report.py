"""The report: every seed and failure shows, nothing points outside, the same input gives the same bytes."""

import ast
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from synthetic import SEEDS, Maker, claim

from common.records import Record
from common.report import command, equal_footing, evidence, figures, gathering, panels
from common.statistics import __main__ as statistics
from common.statistics.claims import Claim
from common.statistics.verdicts import VERDICTS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
TARGETS = (0.8, 0.9, 0.98)
VARIANTS = ("ft", "lrw", "slr", "clr", "llr", "allr", "gmp", "dpf", "lamp")
README = """# Restarts: a made-up paper

## Deviations
- **Scale**: 8x8 digits, see [the paper](https://example.org/abs/1).
- <script>alert(1)</script> stays text.

## Options
- none of this is a deviation
"""
SVG = "{http://www.w3.org/2000/svg}"


def make(folder: Path) -> None:
    """Three papers: one with many variants, failures and gaps; one small; one that nobody ran."""
    restarts = Maker(folder, "restarts")
    restarts.grid(VARIANTS, TARGETS, SEEDS[:5])
    for record in restarts.records:
        if record["variant"] == "dpf" and record["target"] == 0.98 and record["seed"] == 3:
            record |= {"status": "failed", "reason": "the loss is nan in epoch 3", "metrics": {}, "cost": {}}
        if record["variant"] == "gmp" and record["target"] == 0.9:
            record["metrics"]["test_accuracy"] = (
                None if record["seed"] == 1 else float("nan") if record["seed"] == 2 else 0.9
            )
    trial = {"variant": "tuning-slr-2", "seed": 1000, "status": "failed", "reason": "the loss is inf"}
    restarts.records.append(
        {**restarts.records[0], **trial, "failure": "diverged", "metrics": {}, "cost": {}}
    )
    restarts.write()
    restarts.claims(
        [
            claim(
                "H1",
                "slr",
                ["ft", "lrw"],
                paper_value={"value": 2.0, "unit": "points", "source": "abstract of version 1"},
            ),
            claim("H2", "slr", "gmp", test="noninferiority", margin=0.01, note="A remark."),
            claim("H3", "slr", "lamp", test="equivalence", direction=None, margin=0.015),
            claim("H4", "slr", "ft", test="trend", x="logit"),
            claim("H5", "nobody", "ft"),
            claim(
                "H6",
                "slr",
                {"variant": "dense", "target": 0.0},
                metric="cost.theoretical_speedup",
                scale="ratio",
            ),
            claim("H7", "slr", None, test="threshold", value=0.5),
            claim("H8", "dpf", ["allr", "llr", "clr"]),
        ],
        README,
    )
    gates = Maker(folder, "gates")
    for architecture in ("vgg", "resnet"):
        gates.grid(("random", "gated"), (0.5,), SEEDS[:3], architecture=architecture)
    gates.write(environment=False)
    gates.claims([claim("G1", "gated", "random")])
    Maker(folder, "unrun").claims([claim("U1", "this", "that")], "# Unrun\n")
    judge(folder)


def judge(folder: Path) -> None:
    arguments = ["--records", str(folder / "results" / "digits"), "--claims", str(folder / "replications")]
    assert statistics.main([*arguments, "--out", str(folder / "verdicts.json")]) == 0


def arguments(folder: Path, profile: str = "digits") -> list[str]:
    found = ["--profile", profile, "--results", str(folder / "results" / "digits")]
    found += ["--replications", str(folder / "replications"), "--verdicts", str(folder / "verdicts.json")]
    return [*found, "--out", str(folder / "report")]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    make(folder)
    assert command.main(arguments(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def page(project):
    return (project / "report" / "index.html").read_text()


def marks(path: Path, name: str) -> list[tuple[float, float]]:
    """Positions of the markers of one named group of an SVG file."""
    for group in ET.parse(path).getroot().iter(f"{SVG}g"):
        if group.get("id") == name:
            return [(float(use.get("x")), float(use.get("y"))) for use in group.iter(f"{SVG}use")]
    return []


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
    positions = [figures._position(target) for target in (0.0, 0.5, 0.75, 0.875)]
    assert np.diff(positions) == pytest.approx([1, 1, 1])


def test_claims_show_each_pair_with_interval_and_margin(project):
    found = json.loads((project / "verdicts.json").read_text())["papers"]["restarts"]["claims"][1][
        "comparisons"
    ]
    path = project / "report" / "figures" / "restarts-claim-h2.svg"
    for number, comparison in enumerate(found):
        assert len(marks(path, f"pairs-{number}")) == comparison["n"] == len(comparison["values"])
    assert sum(comparison["n"] for comparison in found) < 15, "lost seeds have no point"
    assert "what matters" in path.read_text()


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
    looks = [figures._look(index) for index in range(2 * len(figures.PALETTE))]
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


class _Structure(HTMLParser):
    """Collects addresses, ids and fragments; asserts that elements are closed in order."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.addresses = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag, attrs):
        self._note(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def _note(self, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "action", "srcset", "data"):
                self.addresses.append(value)
            if name in ("style", "clip-path"):
                self.addresses += re.findall(r"url\((.*?)\)", value)


def test_the_page_is_whole_and_points_at_nothing_outside(page):
    structure = _Structure()
    structure.feed(page)
    assert structure.open == []
    assert len(set(structure.ids)) == len(structure.ids)
    assert structure.addresses and all(address.startswith("#") for address in structure.addresses)
    assert {address[1:] for address in structure.addresses} <= set(structure.ids)
    assert "http" not in page.replace("http-equiv", "") and "@import" not in page and "<script" not in page


def test_the_page_is_small_enough_to_send(project):
    assert (project / "report" / "index.html").stat().st_size < 5e6


def test_the_overview_counts_verdicts_and_leads_to_every_claim(project, page):
    verdicts = json.loads((project / "verdicts.json").read_text())
    for verdict, count in verdicts["counts"].items():
        assert f"<b>{count}</b>{panels.VERDICTS[verdict]} {verdict}" in page
    for paper in verdicts["papers"]:
        for entry in verdicts["papers"][paper]["claims"]:
            assert f'href="#{paper}-{entry["id"].lower()}"' in page
            assert entry["statement"] in page
    assert tuple(panels.VERDICTS) == VERDICTS


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


def test_the_experiment_is_the_one_that_tracking_writes():
    tree = ast.parse((ROOT / "common" / "stage" / "tracking.py").read_text())
    names = {
        t.id: n.value.value
        for n in tree.body
        if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)
        for t in n.targets
    }
    from common.report.page import EXPERIMENT

    assert names["EXPERIMENT"] == EXPERIMENT


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
    paper = Maker(tmp_path, "gates")
    paper.grid(("random", "gated"), (0.5,), SEEDS[:3])
    paper.write()
    paper.claims([claim("G1", "gated", "random")])
    judge(tmp_path)
    return tmp_path


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
    assert names == ["corpus-glyphs-convnet-training.png", "corpus-glyphs-convnet-training.svg"]


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
    assert "no paper to report" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(small, capsys):
    (small / "report").write_text("in the way")
    assert command.main(arguments(small)) == 2
    assert "report" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- equal footing


def footing(folder: Path, paper: str = "gates", **extra) -> Maker:
    maker = Maker(folder, paper)
    maker.grid(("random", "gated", "small-dense"), (0.5, 0.9), SEEDS[:6], **extra)
    return maker


def test_tagged_records_are_compared_on_common_axes(small):
    maker = footing(small, details={"equal_footing": True})
    maker.write()
    assert command.main(arguments(small)) == 0
    page = (small / "report" / "index.html").read_text()
    assert 'id="equal-footing"' in page and "Probability that a run" in page
    for cost in ("parameters", "macs"):
        path = small / "report" / "figures" / f"equal-footing-all-digits-convnet-{cost}.svg"
        assert len(marks(path, "seeds-small-dense")) == 12


def test_a_paper_of_that_name_is_compared_in_its_own_section(small):
    maker = footing(small, "equal_footing")
    maker.grid(("tuning-gated-0",), (0.5, 0.9), (1000,))
    maker.write()
    maker.claims([claim("E1", "gated", "random")])
    judge(small)
    assert command.main(arguments(small)) == 0
    page = (small / "report" / "index.html").read_text()
    # trials are not methods, and their seeds are others
    text = (small / "report/figures/equal-footing-all-digits-convnet-parameters.svg").read_text()
    assert ">gated<" in text and "tuning-gated" not in text
    assert page.count('id="equal-footing"') == 1 and page.count("All methods at common costs") == 1


def test_interpolated_accuracies_are_compared_apart_from_trained_networks(small):
    maker = footing(small, "equal_footing")
    for method in ("random", "gated"):
        for seed in SEEDS[:6]:
            maker.run(
                f"{method} @ MACs",
                0.5,
                seed,
                0.8 + 0.01 * seed,
                details={"interpolated": True},
                cost={"sparse_macs": 9},
            )
    maker.write()
    assert command.main(arguments(small)) == 0
    page = (small / "report" / "index.html").read_text()
    assert "at common targets" in page and "at common MACs, interpolated" in page
    text = (small / "report" / "figures" / "equal-footing-all-digits-convnet-macs.svg").read_text()
    assert ">gated<" in text and "@ MACs" not in text


def test_nothing_on_equal_footing_means_no_section(page):
    assert "equal-footing" not in page


def test_ranks_and_improvement_are_those_counted_by_hand():
    def record(variant, seed, accuracy):
        identity = {
            "paper": "p",
            "variant": variant,
            "dataset": "d",
            "architecture": "a",
            "target": 0.5,
            "seed": seed,
        }
        metrics = {"test_accuracy": accuracy}
        return Record(**identity, status="ok", settings_hash=f"{variant}{seed}", metrics=metrics)

    scores = {"a": (0.9, 0.8, 0.7, 0.9, 0.6), "b": (0.8, 0.8, 0.9, 0.5, 0.5), "c": (0.1, 0.2, 0.3, 0.4, 0.5)}
    found = [
        record(variant, seed, value)
        for variant, values in scores.items()
        for seed, value in enumerate(values)
    ]
    paper = evidence.Paper("p", "p", environment={"seconds": {"a0": 2.0, "a1": 4.0}})
    (footing,) = equal_footing.footings(found, [paper])
    assert [row.rank for row in footing.rows] == pytest.approx(
        [(1 + 1.5 + 2 + 1 + 1) / 5, (2 + 1.5 + 1 + 2 + 2.5) / 5, 2.9]
    )
    assert footing.rows[0].seconds == 3.0 and footing.rows[1].seconds is None
    wins = np.mean([(x > y) + 0.5 * (x == y) for x in scores["a"] for y in scores["b"]])
    improvement = footing.improvements[0][1]
    assert improvement.value == pytest.approx(wins)
    assert improvement.low < wins < improvement.high
    assert footing.improvements[1][0].value == pytest.approx(1 - wins)
    assert footing.improvements[0][0] is None


def test_too_few_seeds_carry_no_interval():
    found = equal_footing._improvement({0.5: {0: 90.0, 1: 91.0}}, {0.5: {0: 80.0, 1: 81.0}}, (0.5,))
    assert (found.value, found.low, found.high) == (1.0, None, None)
