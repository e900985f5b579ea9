"""Verdicts as documents: the content of verdicts.json, and of the metrics file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from common.statistics import opening, words
from common.statistics.arithmetic import values
from common.statistics.claims import ClaimsFile
from common.statistics.comparisons import Comparison
from common.statistics.deciding import (
    CONTRADICTED,
    NOT_TESTED,
    OPEN,
    REPLICATED,
    VERDICTS,
    Judged,
)
from common.statistics.evidence import Evidence
from common.statistics.images import add_images
from common.statistics.judging import Terms, judge_file
from common.statistics.records import Quantity, Records
from common.statistics.stability import of as stability_of
from common.statistics.testing import add_checks

_DIGITS = 10


def judge(
    files: Sequence[ClaimsFile],
    records: Mapping[str, Records],
    looks: Sequence[int] | None = None,
    checks: bool = False,
) -> dict[str, Any]:
    """The verdicts on all claims: the content of verdicts.json, in plain JSON values.

    looks: planned numbers of seeds, ascending: at each, the first so many seeds are judged; None for one look at all of
    them. checks: whether to find what decides nothing, too: the same hypotheses by other tests, and what becomes of each
    verdict on other terms (stability); it takes some twenty times as long. A paper without records has claims that are
    not tested.
    """
    terms = Terms(tuple(looks or ()))
    papers = {}
    for file in files:
        found = records.get(file.paper, Records([]))
        judged = judge_file(file, found, terms)
        again = stability_of([one.claim for one in judged], judged, found, terms) if checks else None
        papers[file.paper] = _paper(file, judged, found, terms, again)
    counts: Counter[str] = Counter()
    for paper in papers.values():
        counts.update(paper["counts"])
    plan = [
        {"seeds": "all" if size is None else size, "share": share}
        for size, share in zip(terms.sizes, terms.shares, strict=True)
    ]
    return _plain({"alpha": terms.alpha, "looks": plan, "counts": _counts(counts), "papers": papers})


def _paper(
    file: ClaimsFile,
    judged: Sequence[Judged],
    records: Records,
    terms: Terms,
    stability: Mapping[str, Any] | None,
) -> dict[str, Any]:
    claims = [_claim(one, records, terms, stability) for one in judged]
    return {
        "arithmetic": [values(entry, records) for entry in file.arithmetic],
        "claims": claims,
        "claims_digest": file.digest,
        "counts": _counts(Counter(claim["verdict"] for claim in claims)),
        "without_chance": sorted({name for one in judged for name in _without_chance(one, records)}),
    }


def _without_chance(judged: Judged, records: Records) -> set[str]:
    """Data sets of which no record says what chance is, so that collapses and unsound arms are not seen."""
    return {
        quantity.dataset
        for comparison in judged.comparisons
        for quantity in comparison.quantities
        if quantity.dataset and not records.knows_chance(quantity.dataset)
    }


def _counts(found: Mapping[str, int]) -> dict[str, int]:
    return {verdict: found.get(verdict, 0) for verdict in VERDICTS}


def _claim(
    judged: Judged, records: Records, terms: Terms, stability: Mapping[str, Any] | None
) -> dict[str, Any]:
    claim, comparisons = judged.claim, judged.comparisons
    for comparison in comparisons:
        add_images(comparison, records)
    if stability is not None:
        for comparison in comparisons:
            add_checks(comparison)
    opening.explain(judged, terms.shares[-1])
    deciding = _deciding(judged)
    why = opening.why_claim(judged, deciding)
    in_family = claim.test != "count"
    held = {"role", "id", "statement", "source", "matters_from", "deviation", "seen", "test", "metric"}
    held |= {"direction", "scale", "require", "note"}
    return {
        **claim.model_dump(include=held),
        "paper_value": claim.paper_value.model_dump() if claim.paper_value else None,
        "verdict": judged.verdict,
        "below_what_matters": judged.verdict == REPLICATED and _below(judged),
        "kind": why.kind if why else None,
        "needs": why.needs if why else None,
        "where_it_holds": words.where_it_holds(comparisons),
        "p": judged.p[REPLICATED] if in_family else None,
        "p_holm": judged.p_holm[REPLICATED] if in_family else None,
        "p_against": judged.p[CONTRADICTED] if in_family else None,
        "p_against_holm": judged.p_holm[CONTRADICTED] if in_family else None,
        "family": judged.family,
        "level": judged.level.get(REPLICATED),
        "level_against": judged.level.get(CONTRADICTED),
        "reason": words.claim_reason(judged, deciding, why),
        "stability": stability[claim.id] if stability is not None else None,
        "deciding": comparisons.index(deciding),
        "comparisons": [_comparison(judged, comparison, terms) for comparison in comparisons],
    }


def _below(judged: Judged) -> bool:
    """Whether what is replicated is less than what matters: somewhere, if it must hold everywhere."""
    found = [c.below for c in judged.comparisons if c.verdict == REPLICATED]
    return any(found) if judged.claim.require == "all" else all(found)


def _deciding(judged: Judged) -> Comparison:
    """The comparison that the claim's verdict hangs on: the weakest, or the one that settles it."""
    comparisons = judged.comparisons
    candidates = [c for c in comparisons if c.verdict == judged.verdict]
    if not candidates:  # open only because some comparison was not tested, or because others differ
        candidates = [c for c in comparisons if c.verdict == NOT_TESTED] or comparisons
    everything = judged.claim.require == "all"

    def p(comparison: Comparison) -> float:
        against = judged.verdict == CONTRADICTED
        found = comparison.shown
        value = None if found is None else found.p_against if against else found.p
        return 1.0 if value is None else value

    weakest = everything != (judged.verdict == CONTRADICTED)
    return (max if weakest else min)(candidates, key=p)


def _comparison(judged: Judged, comparison: Comparison, terms: Terms) -> dict[str, Any]:
    found = comparison.shown or Evidence()
    points = zip(comparison.points, found.point_means, strict=False)
    measured = (
        *("n", "seeds", "lost", "values", "estimate", "median", "interquartile_mean", "sd", "reference"),
        *("treatment_mean", "control_mean", "test_name", "by_flips", "collapsed", "p", "p_against"),
        *("p_permutation", "p_wilcoxon", "p_page", "effect_size"),
    )
    predicted = None
    if terms.looks and comparison.verdict == OPEN and judged.claim.test != "count":
        levels = {answer: level * terms.shares[-1] for answer, level in judged.levels.items()}
        predicted = opening.predicted(found, terms.looks[-1], levels)
    return {
        "label": words.label(comparison),
        "treatment": _side([point.treatment for point in comparison.points]),
        "control": _side([point.control for point in comparison.points]),
        "dataset": comparison.dataset,
        "architecture": comparison.architecture,
        "target": comparison.target,
        "value": judged.claim.value,
        "matters": comparison.matters,
        "points": [
            {"mean": mean, "target": point.treatment.target, "variant": point.treatment.variant, "x": point.x}
            for point, mean in points
        ],
        **{name: getattr(found, name) for name in measured},
        "low": comparison.low,
        "high": comparison.high,
        "level": comparison.level,
        "over_images": asdict(comparison.over_images) if comparison.over_images else None,
        "look": terms.sizes[found.number] if comparison.shown else None,
        "detectable": comparison.detectable,
        "predicted": predicted,
        "verdict": comparison.verdict,
        "below_what_matters": comparison.below,
        "graded": comparison.graded,
        "why": asdict(comparison.why) if comparison.why else None,
        "reason": words.reason(comparison),
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
    """Numbers for `dvc metrics show`: how often each verdict on a headline was reached, and the headlines' estimates.

    Estimates are those of the comparison that decides, in the units of the claim (points of accuracy, say).
    """
    counts: Counter[str] = Counter()
    found: dict[str, Any] = {}
    for name, paper in verdicts["papers"].items():
        for claim in paper["claims"]:
            if claim["role"] != "headline":
                continue
            counts[claim["verdict"]] += 1
            estimate = claim["comparisons"][claim["deciding"]]["estimate"]
            if estimate is not None:
                factor = 100 if claim["scale"] == "points" else 1
                found.setdefault(name, {})[claim["id"]] = float(f"{factor * estimate:.4g}")
    headlines = {verdict.replace(" ", "_"): count for verdict, count in _counts(counts).items()}
    return {"headlines": headlines, **found}
