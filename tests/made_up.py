"""Made-up records and claims of known truth, judged by the real engine."""

import numpy as np

from common.statistics import verdicts
from common.statistics.claims import Claim, ClaimsFile
from common.statistics.records import Record, Records

DIRECTED = ("superiority", "noninferiority", "threshold", "trend", "sign", "diversity", "count")


def draws(count, n, mean=0.0, sd=1.0, seed=0):
    return np.random.default_rng(seed).normal(mean, sd, size=(count, n))


def record(
    variant, seed, accuracy=None, target=0.9, status="ok", dataset="digits", architecture="mlp", **parts
):
    metrics = {} if accuracy is None else {"test_accuracy": accuracy}
    metrics |= parts.pop("metrics", {})
    place = {"paper": "demo", "variant": variant, "dataset": dataset, "architecture": architecture}
    return Record(**place, target=target, seed=seed, status=status, metrics=metrics, **parts)


def runs(variant, accuracies, **fields):
    return [record(variant, seed, accuracy, **fields) for seed, accuracy in enumerate(accuracies)]


def failed(variant, seed, failure="diverged", **fields):
    return record(variant, seed, status="failed", failure=failure, reason=f"it {failure}", **fields)


CHANCE = {"chance": 0.1}


def dense(n, accuracy=0.95, **fields):
    return runs("dense", [accuracy] * n, target=0.0, cost={"compression": 1}, **CHANCE, **fields)


def claim(test="superiority", treatment="new", control="old", **fields):
    if test in DIRECTED:
        fields = {"direction": "higher"} | fields
    selections = {
        "treatment": {"variant": treatment} if isinstance(treatment, str) else treatment,
        "control": {"variant": control} if isinstance(control, str) else control,
    }
    given = {key: value for key, value in selections.items() if value is not None}
    return Claim(**{"id": "C", "statement": "so it is", "test": test} | given | fields)


def judge_all(claims, records, **terms):
    """What verdicts.json says of the paper."""
    file = ClaimsFile("demo", tuple(claims), "0" * 64, None)
    return verdicts.judge([file], {"demo": Records(records)}, **terms)["papers"]["demo"]


def judge_paper(claims, records, **terms):
    return judge_all(claims, records, **terms)["claims"]


def judge(a_claim, records, **terms):
    return judge_paper([a_claim], records, **terms)[0]


def judge_one(a_claim, records, **terms):
    (comparison,) = judge(a_claim, records, **terms)["comparisons"]
    return comparison


def pair(difference, n=10, sd=0.005, seed=0, **fields):
    """Runs of `new` and `old` whose paired differences have exactly this mean and sd."""
    noise = draws(2, n, seed=seed)
    spread = (noise[0] - noise[0].mean()) / noise[0].std(ddof=1) * sd
    old = 0.8 + 0.03 * noise[1]
    return runs("new", old + difference + spread, **fields) + runs("old", old, **fields)


def sample(mean, n=10, sd=0.005, seed=0):
    """Differences with exactly this mean and sd."""
    noise = draws(1, n, seed=seed)[0]
    return mean + (noise - noise.mean()) / noise.std(ddof=1) * sd
