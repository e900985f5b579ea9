"""The second interval: its variance against an analysis of variance, its coverage on made-up predictions."""

import numpy as np
import pandas
import pytest
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from common.statistics.images import crossed_interval, crossed_variance

ACCURACY = (1.5, 1.4)  # probits of the treatment and of the control on an image of middling difficulty


def predictions(random, seeds, images, image, arm, seed):
    """Correctness of both arms and the true difference of accuracies: a probit model with crossed random effects.

    image, arm, seed: standard deviations of what an image is for both arms, for one arm, and of a seed's skill.
    """
    difficulty = random.normal(0, image, images)
    right = [
        mean
        + difficulty
        + random.normal(0, arm, images)
        + random.normal(0, seed, (seeds, 1))
        + random.normal(size=(seeds, images))
        > 0
        for mean in ACCURACY
    ]
    spread = np.sqrt(1 + image**2 + arm**2 + seed**2)
    return *right, float(np.subtract(*stats.norm.cdf(np.array(ACCURACY) / spread)))


@pytest.mark.parametrize("arm", [0.0, 1.0])
def test_the_variance_is_that_of_an_analysis_of_variance(arm):
    treatment, control, _ = predictions(np.random.default_rng(4), 5, 12, 1.0, arm, 0.2)
    cells = [
        {"difference": value, "seed": seed, "image": image}
        for (seed, image), value in np.ndenumerate(treatment.astype(float) - control)
    ]
    found = anova_lm(ols("difference ~ C(seed) + C(image)", pandas.DataFrame(cells)).fit())
    squares = (found["sum_sq"] / found["df"]).to_dict()
    seed, image, rest = squares["C(seed)"], squares["C(image)"], squares["Residual"]
    assert (image > rest) == (arm > 0)
    parts = {4: seed, 11: image, 44: -rest} if image > rest else {4: seed}
    total = sum(parts.values())
    freedom = total**2 / sum(part**2 / degrees for degrees, part in parts.items())
    variance, found_freedom = crossed_variance(treatment, control)
    assert (variance, found_freedom) == (pytest.approx(total / 60), pytest.approx(freedom))
    half = stats.t.isf(0.05, freedom) * np.sqrt(total / 60)
    mean = treatment.mean() - control.mean()
    assert crossed_interval(treatment, control, 0.05) == pytest.approx((mean - half, mean + half))


@pytest.mark.parametrize("image, arm, seed", [(1.0, 1.0, 0.01), (1.0, 0.5, 0.1), (0.5, 0.0, 0.2)])
def test_it_covers_the_truth_over_seeds_and_images(image, arm, seed):
    random = np.random.default_rng(9)
    covered, plain = [], []
    for _ in range(800):
        treatment, control, truth = predictions(random, 8, 200, image, arm, seed)
        low, high = crossed_interval(treatment, control, 0.025)
        covered.append(low <= truth <= high)
        by_seed = treatment.mean(axis=1) - control.mean(axis=1)
        plain.append(abs(by_seed.mean() - truth) <= stats.t.isf(0.025, 7) * stats.sem(by_seed))
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)
    if arm == 1:
        assert np.mean(plain) < 0.8  # what the interval over seeds misses where images differ between arms


def test_equal_runs_have_no_spread():
    right = np.random.default_rng(1).random((3, 7)) < 0.8
    assert crossed_interval(right, right, 0.05) == (0.0, 0.0)
    assert crossed_interval(np.ones((3, 7), bool), np.zeros((3, 7), bool), 0.05) == (1.0, 1.0)


def test_other_shapes_are_refused():
    for treatment, control in (((4, 9), (4, 8)), ((1, 9), (1, 9)), ((4, 1), (4, 1)), ((9,), (9,))):
        with pytest.raises(ValueError, match=r"\[seeds, images\]"):
            crossed_variance(np.ones(treatment), np.ones(control))
