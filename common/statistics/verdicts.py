"""From tested comparisons to verdicts, each with its reason, and to the documents that are written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from common.statistics import inference, words
from common.statistics.claims import Claim, ClaimsFile
from common.statistics.comparisons import Comparison, find, known
from common.statistics.records import Quantity, Records
from common.statistics.testing import test

REPLICATED, CONTRADICTED, INCONCLUSIVE, NOT_TESTED = (
    "replicated",
    "contradicted",
    "inconclusive",
    "not tested",
)
VERDICTS = (REPLICATED, CONTRADICTED, INCONCLUSIVE, NOT_TESTED)
_BY_INTERVAL = ("noninferiority", "equivalence", "difference")
_DIGITS = 10


def judge(files: Sequence[ClaimsFile], records: Mapping[str, Records]) -> dict[str, Any]:
    """The verdicts on all claims: the content of verdicts.json, in plain JSON values.

    Holm's correction runs over all comparisons of a paper. A paper without records has claims that are not
    tested.
    """
    papers = {file.paper: _paper(file, records.get(file.paper, Records([]))) for file in files}
    counts: Counter[str] = Counter()
    for paper in papers.values():
        counts.update(paper["counts"])
    return _plain({"alpha": inference.ALPHA, "counts": _counts(counts), "papers": papers})


def _paper(file: ClaimsFile, records: Records) -> dict[str, Any]:
    compared = [(claim, find(claim, records)) for claim in file.claims]
    comparisons = [comparison for _, found in compared for comparison in found]
    for comparison in comparisons:
        test(comparison, records)
    _correct(comparisons)
    for comparison in comparisons:
        comparison.verdict = _verdict(comparison)
        comparison.reason = words.reason(comparison)
    claims = [_claim(claim, found) for claim, found in compared]
    return {
        "claims": claims,
        "claims_digest": file.digest,
        "counts": _counts(Counter(claim["verdict"] for claim in claims)),
    }


def _counts(found: Mapping[str, int]) -> dict[str, int]:
    return {verdict: found.get(verdict, 0) for verdict in VERDICTS}


def _correct(comparisons: Sequence[Comparison]) -> None:
    """Holm's correction of the stated tests, and apart from it of the opposite tests that can contradict."""
    stated = [c for c in comparisons if c.p is not None]
    for comparison, p in zip(stated, inference.holm([known(c.p) for c in stated]), strict=True):
        comparison.p_holm = float(p)
    opposite = [c for c in stated if c.claim.test not in _BY_INTERVAL]
    for comparison, p in zip(opposite, inference.holm([known(c.p_opposite) for c in opposite]), strict=True):
        comparison.p_opposite_holm = float(p)


def _verdict(comparison: Comparison) -> str:
    if comparison.problem:
        return NOT_TESTED
    if comparison.claim.test == "count":
        return _count_verdict(comparison)
    if known(comparison.p_holm) < inference.ALPHA:
        return REPLICATED
    if comparison.claim.test in _BY_INTERVAL:
        # one-sided p below alpha / 2 is the same as: the 95% interval lies wholly on the wrong side
        contradicted = comparison.p_opposite is not None and comparison.p_opposite < inference.ALPHA / 2
    else:
        contradicted = known(comparison.p_opposite_holm) < inference.ALPHA
    return CONTRADICTED if contradicted else INCONCLUSIVE


def _count_verdict(comparison: Comparison) -> str:
    met = comparison.bound_met()
    return REPLICATED if met == comparison.n else INCONCLUSIVE if met else CONTRADICTED


def _claim(claim: Claim, comparisons: list[Comparison]) -> dict[str, Any]:
    verdict = combine([comparison.verdict for comparison in comparisons], claim.require)
    deciding = _deciding(verdict, comparisons, claim.require)
    return {
        **claim.model_dump(
            include={"id", "statement", "test", "metric", "direction", "scale", "require", "note"}
        ),
        "paper_value": claim.paper_value.model_dump() if claim.paper_value else None,
        "verdict": verdict,
        "reason": words.claim_reason(comparisons, deciding),
        "deciding": comparisons.index(deciding),
        "comparisons": [_comparison(comparison) for comparison in comparisons],
    }


def combine(verdicts: Sequence[str], require: str) -> str:
    """The verdict on a claim from those on its comparisons.

    all: contradicted if any is, replicated if every one is. any: replicated if any is, contradicted if every
    tested one is. In both: not tested if none was, else inconclusive.
    """
    tested = {verdict for verdict in verdicts if verdict != NOT_TESTED}
    if not tested:
        return NOT_TESTED
    if require == "any":
        if REPLICATED in tested:
            return REPLICATED
        return CONTRADICTED if tested == {CONTRADICTED} else INCONCLUSIVE
    if CONTRADICTED in tested:
        return CONTRADICTED
    return REPLICATED if set(verdicts) == {REPLICATED} else INCONCLUSIVE


def _deciding(verdict: str, comparisons: list[Comparison], require: str) -> Comparison:
    """The comparison that the claim's verdict hangs on: the weakest, or the one that settles it."""
    candidates = [c for c in comparisons if c.verdict == verdict]
    if not candidates:  # inconclusive only because some comparison was not tested
        candidates = [c for c in comparisons if c.verdict == NOT_TESTED]

    if verdict == CONTRADICTED:
        return min(candidates, key=lambda comparison: _or_one(comparison.p_opposite))
    chosen = max if require == "all" else min
    return chosen(candidates, key=lambda comparison: _or_one(comparison.p_holm))


def _or_one(p: float | None) -> float:
    return 1.0 if p is None else p


_INTERNAL = {"claim", "points", "problem", "constant", "p_opposite", "point_means"}


def _comparison(comparison: Comparison) -> dict[str, Any]:
    points = zip(comparison.points, comparison.point_means, strict=False)
    return {
        "label": words.label(comparison),
        "treatment": _side([point.treatment for point in comparison.points]),
        "control": _side([point.control for point in comparison.points]),
        "value": comparison.claim.value,
        "points": [
            {"mean": mean, "target": point.treatment.target, "variant": point.treatment.variant, "x": point.x}
            for point, mean in points
        ],
        "margin": comparison.margin,
        **{
            field.name: getattr(comparison, field.name)
            for field in fields(comparison)
            if field.name not in _INTERNAL
        },
    }


def _side(side: list[Quantity | None]) -> dict[str, Any] | None:
    """One side of a comparison; what differs between its points is null."""
    if side[0] is None:
        return None
    quantities = [quantity for quantity in side if quantity is not None]
    found: dict[str, Any] = {}
    for name in ("variant", "dataset", "architecture", "target", "metric"):
        values = {getattr(quantity, name) for quantity in quantities}
        found[name] = values.pop() if len(values) == 1 else None
    minus = _side([quantity.minus for quantity in quantities])
    return found | ({"minus": minus} if minus else {})


def _plain(value: Any) -> Any:
    """JSON values only, floats rounded to 10 significant digits, NaN and infinities as null."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def metrics(verdicts: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers for `dvc metrics show`: counts of verdicts by paper, estimate and p of what decides a claim."""
    found = {}
    for name, paper in verdicts["papers"].items():
        found[name] = {verdict.replace(" ", "_"): count for verdict, count in paper["counts"].items()}
        for claim in paper["claims"]:
            deciding = claim["comparisons"][claim["deciding"]]
            values = {"estimate": deciding["estimate"], "p_holm": deciding["p_holm"]}
            found[name][claim["id"]] = {key: value for key, value in values.items() if value is not None}
    return found
