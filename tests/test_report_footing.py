"""The comparison of all methods in the report: common axes, ranks, improvement and profiles."""

from pathlib import Path

import numpy as np
import pytest
from reporting import arguments, judge, marks, small_project
from synthetic import SEEDS, Maker, claim

from common.records import Record
from common.report import command, equal_footing, evidence, panels

pytestmark = pytest.mark.slow


@pytest.fixture
def small(tmp_path):
    return small_project(tmp_path)


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


def test_nothing_on_equal_footing_means_no_section(small):
    assert command.main(arguments(small)) == 0
    assert "equal-footing" not in (small / "report" / "index.html").read_text()


def test_profiles_are_the_share_of_runs_that_reach_an_accuracy(small):
    maker = footing(small, "equal_footing")
    maker.write()
    found = [Record.model_validate(record) for record in maker.records]
    panel = next(p for p in equal_footing.panels(found) if isinstance(p, panels.ProfilesPanel))
    line = next(line for line in panel.profiles if line.label == "gated")
    values = [100 * r.metrics["test_accuracy"] for r in found if r.variant == "gated"]
    expected = [100 * np.mean([value >= level for value in values]) for level in panel.levels]
    assert line.shares == pytest.approx(expected)
    assert (line.lows <= line.shares + 1e-9).all() and (line.shares <= line.highs + 1e-9).all()


def test_improvement_is_shown_against_the_method_of_the_best_rank(small):
    maker = footing(small, "equal_footing")
    maker.write()
    found = [Record.model_validate(record) for record in maker.records]
    panel = next(p for p in equal_footing.panels(found) if isinstance(p, panels.ImprovementPanel))
    (shown,) = equal_footing.footings(found, [])
    assert panel.other == min(shown.rows, key=lambda row: row.rank).method
    assert {row[0] for row in panel.rows} == {row.method for row in shown.rows} - {panel.other}
    assert all(row[2] <= 0.5 for row in panel.rows)


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
