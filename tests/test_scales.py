"""All profiles on one page: each headline at each scale, and one estimate from enough cells."""

import json
import math
import shutil

import numpy as np
import pytest
from reporting import Structure, arguments, judge
from scipy import stats
from synthetic import SEEDS, Maker, claim

from common.report import command, pooling, scales

pytestmark = pytest.mark.slow

HEADLINE = {"role": "headline", "source": "the abstract", "matters": 0.01, "matters_from": "a point"}


@pytest.fixture
def project(tmp_path):
    """One paper, judged as two profiles: one of two cells with few seeds, one of six cells."""
    paper = Maker(tmp_path, "gates")
    paper.claims([claim("G1", "gated", "random", **HEADLINE), claim("G2", "random", "gated")])
    for profile, networks, seeds in (("small", 2, 5), ("large", 6, 8)):
        paper.records, paper.curves = [], []
        for number in range(networks):
            paper.grid(("gated", "random"), (0.8, 0.95), SEEDS[:seeds], architecture=f"net{number}")
        paper.write()
        judge(tmp_path)
        (tmp_path / "reports" / profile).mkdir(parents=True)
        shutil.copy(tmp_path / "verdicts.json", tmp_path / "reports" / profile)
    return tmp_path


def _write(project) -> str:
    scales.write(project / "reports", project / "replications")
    return (project / "reports" / "index.html").read_text()


def test_headlines_stand_beside_each_other_at_every_scale(project):
    page = _write(project)
    assert page.count("gated reaches a higher accuracy") == 1 and "random reaches" not in page
    for profile in ("small", "large"):
        found = json.loads((project / "reports" / profile / "verdicts.json").read_text())
        entry = found["papers"]["gates"]["claims"][0]
        decided = entry["comparisons"][entry["deciding"]]
        assert f"{100 * decided['estimate']:+.2f} pp".replace("-", "−") in page
        assert entry["verdict"] in page and f'data-name="{profile}"' in page
    structure = Structure()
    structure.feed(page)
    assert structure.open == [] and structure.addresses == []
    assert "over 6 cells" in page and "older version" not in page
    assert (project / "reports" / "overview.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_of_a_profile_writes_it_and_is_linked(project):
    own = arguments(project, profile="large")
    own[own.index("--out") + 1] = str(project / "reports" / "large")
    assert command.main([*own, "--scales", str(project / "reports")]) == 0
    page = (project / "reports" / "index.html").read_text()
    assert 'href="large/index.html"' in page and 'href="small/index.html"' not in page


def test_verdicts_on_older_claims_are_marked_and_on_others_left_out(project):
    path = project / "replications" / "gates" / "claims.yaml"
    path.write_text(path.read_text() + "# changed\n")
    assert "older version of the claims" in _write(project)
    Maker(project, "gates").claims(
        [claim("G1", "gated", "random", **HEADLINE, metric="test_loss", scale="none")]
    )
    page = _write(project)
    assert page.count("not among its claims") == 2 and "not pooled" in page


def test_a_cell_counts_once_with_the_profile_of_most_seeds(project):
    judged = []
    for profile in ("small", "large"):
        found = json.loads((project / "reports" / profile / "verdicts.json").read_text())
        judged.append(found["papers"]["gates"]["claims"][0])
    cells = scales._cells(judged, ratio=False)
    assert len(cells) == 6
    own = [c for c in judged[1]["comparisons"] if c["architecture"] == "net0"]
    seeds = np.mean([c["values"] for c in own], axis=0)
    assert cells["digits", "net0"] == pytest.approx((seeds.mean(), stats.sem(seeds)))


def test_pooling_is_paule_mandel_with_the_modified_interval():
    effects, errors = [0.1, 0.3, 0.35, 0.65, 0.45, -0.2], [0.1, 0.1, 0.1, 0.1, 0.05, 0.1]
    found = pooling.pool(effects, errors)
    weights = 1 / (np.square(errors) + found.tau**2)
    y = np.array(effects)
    assert found.estimate == pytest.approx(np.average(y, weights=weights))
    # Paule and Mandel: the weighted squares equal their degrees of freedom
    assert weights @ (y - found.estimate) ** 2 == pytest.approx(5)
    half = stats.t.ppf(0.975, 5) / math.sqrt(weights.sum())
    assert (found.low, found.high) == pytest.approx((found.estimate - half, found.estimate + half))
    ahead = stats.t.ppf(0.975, 4) * math.sqrt(found.tau**2 + 1 / weights.sum())
    assert found.predicted_high == pytest.approx(found.estimate + ahead)
    fixed = 1 / np.square(errors)
    q = fixed @ (y - np.average(y, weights=fixed)) ** 2
    assert (found.i2, found.p) == pytest.approx(((q - 5) / q, stats.chi2.sf(q, 5)))


def test_equal_cells_do_not_shrink_the_interval_below_their_noise():
    found = pooling.pool([0.2] * 5, [0.1] * 5)
    assert found.tau == 0 and found.i2 == 0
    assert found.high - found.estimate == pytest.approx(stats.t.ppf(0.975, 4) * 0.1 / math.sqrt(5))


def test_fewer_than_five_cells_are_not_pooled():
    assert pooling.pool([0.1] * 4, [0.1] * 4) is None


def test_a_profile_that_measures_deviations_is_no_scale_but_a_ledger(project):
    paper = Maker(project, "gates")
    switches = [
        claim(f"D{n}", "gated", "random", role="probe", deviation=f"switch {n}", matters=0.01) for n in (1, 2)
    ]
    paper.claims([claim("G1", "gated", "random", **HEADLINE), *switches])
    paper.grid(("gated", "random"), (0.8,), SEEDS[:5], architecture="net0")
    paper.write()
    judge(project)
    (project / "reports" / "switches").mkdir()
    shutil.copy(project / "verdicts.json", project / "reports" / "switches")
    page = _write(project)
    assert 'data-name="switches"' not in page and 'data-name="large"' in page
    assert "What each deviation moves: switches" in page
    assert page.count("<td>switch 1</td>") == page.count("<td>switch 2</td>") == 1
