"""The second interval: its variance against an analysis of variance, its coverage, and where it is shown."""

import json

import numpy as np
import pandas
import pytest
from made_up import claim, failed, record
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from common.core.identity import canonical
from common.predictions import Predictions, packed, predictions_file
from common.report.evidence import Paper
from common.report.judged import views
from common.statistics import verdicts
from common.statistics.__main__ import main
from common.statistics.claims import ClaimsFile
from common.statistics.images import crossed_interval, crossed_variance
from common.statistics.records import Records

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


@pytest.mark.slow
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


# ------------------------------------------------------------------------------------------ from records to words

IMAGES = 200
LABELS = np.arange(IMAGES) % 10
CLAIMS = """
paper: demo
claims:
- {id: C, statement: so it is, treatment: {variant: new}, control: {variant: old}, test: superiority, direction: higher}
"""


def _arm(variant, right, labels=LABELS, **fields):
    """Records of runs that have these images right, [seeds, images], and their predictions."""
    predicted = [Predictions.of(labels, np.where(own, labels, (labels + 1) % 10)) for own in right]
    records = [
        record(variant, seed, one.accuracy, predictions=one.digest, **fields)
        for seed, one in enumerate(predicted)
    ]
    return records, predicted


def _two_arms(image, seeds=8, seed=3):
    """Correctness of two arms, [seeds, images]; image: how much their difference depends on the image."""
    treatment, control, _ = predictions(np.random.default_rng(seed), seeds, IMAGES, 0.0, image, 0.02)
    return treatment, control


def _judged_claim(a_claim, *arms):
    records = [one for runs, _ in arms for one in runs]
    found = {one.digest: one for _, predicted in arms for one in predicted}
    file = ClaimsFile("demo", (a_claim,), "0" * 64, None)
    return verdicts.judge([file], {"demo": Records(records, None, found)})["papers"]["demo"]["claims"][0]


def _judged(a_claim, *arms):
    return _judged_claim(a_claim, *arms)["comparisons"][0]


@pytest.mark.parametrize("direction", ["higher", "lower"])
def test_the_second_interval_is_shown_at_the_level_of_the_first_and_decides_nothing(direction):
    treatment, control = _two_arms(1.5, seed=5)
    if direction == "lower":
        treatment, control = control, treatment
    wanted = claim(direction=direction, scale="points")
    found = _judged(wanted, _arm("new", treatment), _arm("old", control))
    alone = _judged(wanted, (_arm("new", treatment)[0], []), (_arm("old", control)[0], []))
    low, high = crossed_interval(treatment, control, found["level"])
    assert found["over_images"] == {"low": pytest.approx(low), "high": pytest.approx(high), "holds": False}
    assert low < found["low"] < found["high"] < high and low < 0 < high
    text = f"over other test images too {100 * low:.3g} to {100 * high:.3g}, which leaves it open"
    assert text in found["reason"]
    assert alone["over_images"] is None and "test images" not in alone["reason"]
    same = [key for key in found if key not in ("over_images", "reason")]
    assert found["verdict"] == "replicated" and [found[key] for key in same] == [alone[key] for key in same]


@pytest.mark.parametrize(
    ("a_claim", "verdict", "holds"),
    [
        (claim(), "replicated", True),
        (claim(direction="lower"), "contradicted", True),
        (claim("noninferiority", matters=0.01), "replicated", True),
        (claim("equivalence", matters=0.2), "replicated", True),
        (claim("difference"), "replicated", True),
        (claim("threshold", value=0.0), "replicated", True),
        (claim(matters=2.0), "replicated", True),
        (claim(margin=0.04), "open", None),
    ],
)
def test_where_images_do_not_tell_the_arms_apart_it_bears_the_answer_out(a_claim, verdict, holds):
    random = np.random.default_rng(0)
    treatment, control = random.random((8, IMAGES)) < 0.9, random.random((8, IMAGES)) < 0.8
    if a_claim.margin:
        treatment = random.random((8, IMAGES)) < 0.84
    found = _judged(a_claim, _arm("new", treatment), _arm("old", control))
    assert (found["verdict"], found["over_images"]["holds"]) == (verdict, holds)
    ends = crossed_interval(treatment, control, found["level"])
    assert (found["over_images"]["low"], found["over_images"]["high"]) == pytest.approx(ends)
    assert "leaves it open" not in found["reason"] and "over other test images too" in found["reason"]


def test_the_page_shows_it():
    wanted = claim(scale="points")
    for image, seed, ending in ((1.5, 5, " pp: open"), (1.0, 10, " pp")):
        treatment, control = _two_arms(image, seed=seed)
        judged = _judged_claim(wanted, _arm("new", treatment), _arm("old", control))
        (view,) = views(Paper("demo", "demo", (wanted,), judged={"C": judged}), "digits")
        low, high = (100 * end for end in crossed_interval(treatment, control, 0.05))
        text = f"{low:+.2f} to {high:+.2f}{ending}".replace("-", "−")
        assert view.comparisons[0]["over_images"] == text
    del judged["comparisons"][0]["over_images"]  # verdicts of an earlier revision
    assert (
        views(Paper("demo", "demo", (wanted,), judged={"C": judged}), "digits")[0].comparisons[0][
            "over_images"
        ]
        == ""
    )


def test_what_pruning_costs_each_has_it_too():
    (treatment, control), (dense, _) = _two_arms(0.5), _two_arms(0.5, seed=4)
    wanted = claim(
        treatment={"variant": "new", "target": 0.9, "minus": {"target": 0.0}},
        control={"variant": "old", "minus": {"variant": "new", "target": 0.0}},
    )
    found = _judged(
        wanted,
        _arm("new", treatment),
        _arm("old", control),
        _arm("new", dense, target=0.0),
        _arm("old", dense, target=0.0),
    )
    low, high = crossed_interval(treatment, control, found["level"])
    assert found["over_images"]["low"] == pytest.approx(low) and found["n"] == 8


def test_without_all_predictions_of_the_same_images_there_is_none():
    treatment, control = _two_arms(0.5)
    new, old = _arm("new", treatment), _arm("old", control)
    assert _judged(claim(), new, old)["over_images"]
    assert _judged(claim(), new, (old[0], old[1][1:]))["over_images"] is None
    assert _judged(claim(), new, _arm("old", control, LABELS[::-1]))["over_images"] is None
    assert _judged(claim(scale="ratio"), new, old)["over_images"] is None
    assert _judged(claim("threshold", control=None, value=0.1), new, old)["over_images"] is None
    assert _judged(claim(metric="validation_accuracy"), new, old)["over_images"] is None
    chance = [one.model_copy(update={"chance": 0.1}) for one in old[0]]
    with_one_diverged = ([*chance[1:], failed("old", 0)], old[1])
    found = _judged(claim(), new, with_one_diverged)
    assert found["n"] == 8 and found["over_images"] is None


def test_the_command_finds_predictions_beside_the_records(tmp_path):
    treatment, control = _two_arms(0.5)
    (new, one), (old, other) = _arm("new", treatment), _arm("old", control)
    file, out = tmp_path / "demo.jsonl", tmp_path / "verdicts.json"
    file.write_text("".join(canonical(row.content()) + "\n" for row in (*new, *old)))
    (tmp_path / "claims.yaml").write_text(CLAIMS)
    command = ["--records", str(file), "--claims", str(tmp_path / "claims.yaml"), "--out", str(out)]

    def found():
        assert main(command) == 0
        return json.loads(out.read_text())["papers"]["demo"]["claims"][0]["comparisons"][0]

    without = found()
    predictions_file(file).write_bytes(packed([*one, *other]))
    with_them = found()
    assert without["over_images"] is None and with_them["over_images"]["low"] < with_them["estimate"]
    assert {**without, "over_images": 0, "reason": 0} == {**with_them, "over_images": 0, "reason": 0}


@pytest.mark.parametrize("content", [b"no archive", packed([])], ids=["damaged", "of other runs"])
def test_the_command_names_predictions_that_are_not_those_of_the_records(tmp_path, capsys, content):
    rows, _ = _arm("new", _two_arms(0.5)[0])
    file = tmp_path / "demo.jsonl"
    file.write_text("".join(canonical(row.content()) + "\n" for row in rows))
    predictions_file(file).write_bytes(content)
    (tmp_path / "claims.yaml").write_text(CLAIMS)
    command = [
        "--records",
        str(file),
        "--claims",
        str(tmp_path / "claims.yaml"),
        "--out",
        str(tmp_path / "v"),
    ]
    assert main(command) == 2
    assert f"error: {predictions_file(file)}: " in capsys.readouterr().err
