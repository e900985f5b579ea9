"""What claims will compare in a profile, before anything is trained."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from common.core import loading
from common.core.data import SPLITS, Dataset
from common.settings import ROOT
from common.stage import foreseen, papers
from common.statistics import claims, inference
from tests.made_up import claim

IMAGES = {
    "npz": (8, 1, 50),
    "mnist": (28, 1, 10),
    "cifar10": (32, 3, 10),
    "cifar100": (32, 3, 100),
    "svhn": (32, 3, 10),
}
"""Of the sources that are not embedded (`npz`: the drawn corpus): height, channels, classes."""
COUNT = 50_000


class StandIn:
    """In place of data that is not here: its sizes and labels, without pixels."""

    def __init__(self, settings):
        self.settings = settings

    def drawn(self, seed):
        size, channels, classes = IMAGES[self.settings.source]
        size = self.settings.size or size
        train = self.settings.train or COUNT - self.settings.validation
        counts = dict(zip(SPLITS, (train, self.settings.validation, self.settings.test or 10_000)))
        return Dataset(
            self.settings.source,
            {
                k: torch.empty(n, size, size, channels, dtype=torch.uint8, device="meta")
                for k, n in counts.items()
            },
            {k: torch.from_numpy(np.arange(n) % classes) for k, n in counts.items()},
            classes,
            mean=(0.5,) * channels,
            std=(0.2,) * channels,
            augmentation=self.settings.augmentation,
        )


@pytest.fixture
def stand_ins(monkeypatch):
    real = loading.read
    monkeypatch.setattr(
        loading, "read", lambda settings: StandIn(settings) if settings.source in IMAGES else real(settings)
    )


@cache
def foreseen_in(paper, profile):
    loaded = papers.load(paper, ROOT / "params.yaml", profile)
    # what a claim lacks with some seeds it lacks with all
    paper_settings = loaded.paper.model_copy(update={"seeds": loaded.paper.seeds[:8]})
    loaded = loaded.model_copy(update={"paper": paper_settings})
    file = claims.read(ROOT / "replications" / paper / claims.CLAIMS_FILE)
    return foreseen.foreseen(paper, papers.runs(paper, loaded), file)


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["digits", "cifar10-cpu", "cifar10"])
@pytest.mark.parametrize("paper", papers.papers())
def test_headlines_have_their_runs_in_the_profiles_that_are_run(paper, profile, stand_ins):
    found = {one.claim: one for one in foreseen_in(paper, profile) if one.role == "headline"}
    assert 1 <= len(found) <= 3
    for one in found.values():
        assert not one.problems and one.seeds >= 5, one


@pytest.mark.parametrize("paper", papers.papers())
def test_no_claim_lacks_runs_in_the_profile_of_the_reference_results(paper, stand_ins):
    assert [one for one in foreseen_in(paper, "digits-decided") if one.problems] == []


@pytest.mark.parametrize("paper", papers.papers())
def test_the_embedded_profile_lacks_nothing_but_the_controls_of_two_probes(paper, stand_ins):
    found = {one.claim: one.role for one in foreseen_in(paper, "digits") if one.problems}
    assert found == ({"PT-controls": "probe", "PT-small": "probe"} if paper == "pretraining_impact" else {})


@pytest.mark.slow
@pytest.mark.parametrize("paper", [paper for paper in papers.papers() if paper != "equal_footing"])
def test_each_deviation_is_measured_in_the_profile_of_deviations(paper, stand_ins):
    file = claims.read(ROOT / "replications" / paper / claims.CLAIMS_FILE)
    named = {one.id for one in file.claims if one.deviation}
    if not named:
        pytest.skip("has no switch for a deviation")
    found = {one.claim: one for one in foreseen_in(paper, "digits-deviations")}
    assert named <= set(found)
    assert not [found[name] for name in named if found[name].problems]


def test_the_smallest_effect_is_that_of_the_level_which_the_claim_faces():
    run = papers.runs("halo", papers.load("halo", ROOT / "params.yaml", "digits"))[0]
    runs = [run_of(run, variant, seed) for variant in ("new", "old") for seed in range(6)]
    both = (claim(id="A"), claim(id="B", seen=0, control="absent"))
    one, other = foreseen.foreseen("demo", runs, claims.ClaimsFile("demo", both, "", None))
    assert (one.seeds, one.level, one.problems) == (6, 0.025, ())
    assert one.effect == inference.detectable(6, 0.025)
    assert other.problems and other.effect is None


def test_a_comparison_without_runs_is_named_where_others_of_the_claim_have_theirs():
    run = papers.runs("halo", papers.load("halo", ROOT / "params.yaml", "digits"))[0]
    runs = [run_of(run, variant, seed) for variant in ("new", "old") for seed in range(6)]
    made = claim(id="A", control=[{"variant": "old"}, {"variant": "absent"}], targets=[0.9])
    (one,) = foreseen.foreseen("demo", runs, claims.ClaimsFile("demo", (made,), "", None))
    assert (one.comparisons, one.seeds) == (2, 6)
    assert len(one.problems) == 1 and "no run of absent" in one.problems[0]


def test_too_few_seeds_for_any_verdict_are_named():
    run = papers.runs("halo", papers.load("halo", ROOT / "params.yaml", "digits"))[0]
    runs = [run_of(run, variant, seed) for variant in ("new", "old") for seed in range(3)]
    (one,) = foreseen.foreseen("demo", runs, claims.ClaimsFile("demo", (claim(id="A"),), "", None))
    assert (one.seeds, one.effect) == (3, None)
    assert one.problems == ("too few seeds: no verdict from fewer than 5",)


def run_of(run, variant, seed):
    return replace(run, variant=variant, seed=seed, target=0.9, needs=())
