"""Whether a verdict hangs on a choice: the same records judged again on other terms.

Each seed is left out (of more than 100 only some, evenly among them), sign flips and signed ranks stand for the t-test, what matters is halved and doubled, the error is
.01 and .10, and validation accuracy stands for test accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from common.statistics.claims import Claim, Selection
from common.statistics.deciding import ANSWERS, CONTRADICTED, REPLICATED, Judged
from common.statistics.judging import Terms, judge_claims
from common.statistics.records import Records
from common.statistics.testing import FEWEST_PAIRS, FLIPS, RANKS

ACCURACY, VALIDATION = "test_accuracy", "validation_accuracy"
_LEFT_OUT = 10_000
"""Seeds left out, one after another, times all seeds, at most: each time all the others are judged anew."""
_OPPOSITE = {REPLICATED: CONTRADICTED, CONTRADICTED: REPLICATED}


def of(
    claims: Sequence[Claim], judged: Sequence[Judged], records: Records, terms: Terms
) -> dict[str, dict[str, Any] | None]:
    """Claim -> what became of its verdict on other terms, None for one without a verdict.

    `tried`, `held`: how many other terms, and on how many the verdict was the same. `reversed`, `lost` (though so few
    seeds could have kept it) and `cannot tell` name the others; `first_reversal` is the first of the reversed.
    """
    found: dict[str, dict[str, Any] | None] = {
        one.claim.id: {"tried": 0, "held": 0, "reversed": [], "lost": [], "cannot tell": []}
        if one.verdict in ANSWERS
        else None
        for one in judged
    }
    for name, varied, others in _variations(claims, judged, terms):
        for one, other in zip(judged, judge_claims(varied, records, others), strict=True):
            entry = found[one.claim.id]
            if entry is None or not _concerns(name, one, others):
                continue
            entry["tried"] += 1
            if other.verdict == one.verdict:
                entry["held"] += 1
            elif other.verdict == _OPPOSITE[one.verdict]:
                entry["reversed"].append(name)
            else:
                entry["lost" if _attainable(other, one.verdict, others) else "cannot tell"].append(name)
    for entry in found.values():
        if entry is not None:
            entry["first_reversal"] = entry["reversed"][0] if entry["reversed"] else None
    return found


def _variations(
    claims: Sequence[Claim], judged: Sequence[Judged], terms: Terms
) -> Iterator[tuple[str, Sequence[Claim], Terms]]:
    seeds = sorted({s for one in judged for c in one.comparisons if c.shown for s in c.shown.seeds})
    for seed in seeds[:: -(-(len(seeds) ** 2) // _LEFT_OUT) or 1]:
        yield f"without seed {seed}", claims, replace(terms, without=seed)
    yield "by sign flips", claims, replace(terms, decides=FLIPS)
    yield "by signed ranks", claims, replace(terms, decides=RANKS)
    yield "what matters halved", claims, replace(terms, factor=0.5)
    yield "what matters doubled", claims, replace(terms, factor=2.0)
    yield "alpha .01", claims, replace(terms, alpha=0.01)
    yield "alpha .10", claims, replace(terms, alpha=0.10)
    yield "on validation images", [_validated(claim) for claim in claims], terms


def _concerns(name: str, judged: Judged, terms: Terms) -> bool:
    """Whether a variation changes anything of a claim by itself; others change it by Holm's correction only."""
    claim = judged.claim
    if terms.without is not None:
        return any(terms.without in c.shown.seeds for c in judged.comparisons if c.shown)
    if terms.factor != 1:
        return bool(claim.matters or claim.margin)
    if terms.decides != "t":
        return claim.test not in ("sign", "diversity", "count")
    if name == "on validation images":
        return _validated(claim) != claim
    return claim.test != "count"


def _validated(claim: Claim) -> Claim:
    """The claim with validation accuracy in place of test accuracy."""

    def on_validation(selection: Selection) -> Selection:
        update: dict[str, Any] = {}
        if selection.metric == ACCURACY:
            update["metric"] = VALIDATION
        if selection.minus:
            update["minus"] = on_validation(selection.minus)
        return selection.model_copy(update=update) if update else selection

    def each(selections: Sequence[Selection] | None) -> Any:
        return selections and tuple(on_validation(selection) for selection in selections)

    sides = {name: each(getattr(claim, name)) for name in ("treatment", "control", "steps")}
    metric = VALIDATION if claim.metric == ACCURACY else claim.metric
    return claim.model_copy(update={**sides, "metric": metric})


def _attainable(judged: Judged, answer: str, terms: Terms) -> bool:
    """Whether these seeds could have given the answer on these terms, whatever they had measured."""
    if judged.claim.test == "count":
        return True
    level = judged.levels[answer]
    for comparison in judged.comparisons:
        found = comparison.shown
        if found is None or found.test is None or found.n < FEWEST_PAIRS and judged.claim.test != "sign":
            return False
        stated = found.test.replicated if answer == REPLICATED else found.test.contradicted
        exact = (
            terms.decides != "t" or found.by_flips is not None or judged.claim.test in ("sign", "diversity")
        )
        faced = level * terms.shares[found.number]
        if stated is None or (exact and 2.0**-found.n > stated.per_end(faced)):
            return False
    return True
