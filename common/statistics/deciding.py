"""From p-values to answers: one p a claim, Holm's correction over the claims of a role, and planned looks.

An error of `alpha` is spent on each answer, replicated and contradicted, in each family apart. Over looks it is split by
the union bound: what is tested at look j is p / share_j, and the smallest of these so far is a valid p at every time.
Holm's correction of these sequential p-values is group-sequential (Tamhane, Xi and Gou, "Group sequential Holm and
Hochberg procedures", Statistics in Medicine 2021): by closed testing, a true claim is ever rejected with probability
alpha at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.statistics import inference
from common.statistics.claims import Claim
from common.statistics.comparisons import Comparison
from common.statistics.evidence import Evidence
from common.statistics.testing import Answer

REPLICATED, CONTRADICTED, OPEN, NOT_TESTED = "replicated", "contradicted", "open", "not tested"
VERDICTS = (REPLICATED, CONTRADICTED, OPEN, NOT_TESTED)
ANSWERS = (REPLICATED, CONTRADICTED)
_FIRST_SHARE = 0.4


def shares(looks: int) -> list[float]:
    """The part of the error that each of the planned looks may spend: two fifths for the first, the rest equally."""
    if looks == 1:
        return [1.0]
    return [_FIRST_SHARE] + [(1 - _FIRST_SHARE) / (looks - 1)] * (looks - 1)


@dataclass
class Judged:
    """A claim on its way to a verdict.

    level: what Holm's correction leaves the claim for each answer, when it was decided or at the end. p: of the whole
    claim, for each answer, the smallest over its looks so far, each divided by the look's share.
    """

    claim: Claim
    comparisons: list[Comparison]
    verdict: str = OPEN
    family: int = 0
    """Claims whose error is held together with its own, itself among them; 0 for a count."""
    level: dict[str, float] = field(default_factory=dict)
    p: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ANSWERS, 1.0))
    p_holm: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ANSWERS, 1.0))
    _lowest: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lowest = [dict.fromkeys(ANSWERS, 1.0) for _ in self.comparisons]

    @property
    def decided(self) -> bool:
        return self.verdict in ANSWERS

    def divisor(self, answer: str) -> int:
        """By how much a comparison's level is below the claim's: 1 where all must show the answer, else their number."""
        everything = (answer == REPLICATED) == (self.claim.require == "all")
        return 1 if everything else len(self.comparisons)

    @property
    def levels(self) -> dict[str, float]:
        """What each comparison faces for each answer."""
        return {answer: self.level[answer] / self.divisor(answer) for answer in ANSWERS}

    def comparison_p(self, number: int, answer: str) -> float:
        return self._lowest[number][answer]

    def take(self, number: int, found: Evidence, share: float) -> None:
        """Note what a comparison shows at a look."""
        if not found.usable:
            return
        lowest = self._lowest[number]
        for answer in ANSWERS:
            lowest[answer] = min(lowest[answer], sequential(found, answer, share))

    def combine(self, answer: str) -> float:
        """One p of all comparisons: the largest where all must show it, Bonferroni's where one will do."""
        found = [lowest[answer] for lowest in self._lowest]
        everything = self.divisor(answer) == 1
        self.p[answer] = max(found) if everything else min(1.0, len(found) * min(found))
        return self.p[answer]

    def forbid_what_is_replicated(self, level: float) -> None:
        """A comparison that is itself replicated does not speak against the claim."""
        for lowest in self._lowest:
            if lowest[REPLICATED] <= level / self.divisor(REPLICATED):
                lowest[CONTRADICTED] = 1.0


def sequential(found: Evidence, answer: str, share: float) -> float:
    """The p of a look, as a p of all looks."""
    p = found.p if answer == REPLICATED else found.p_against
    return 1.0 if p is None else min(1.0, p / share)


class Family:
    """Claims whose error is held together; `count` claims have none and are in no family."""

    def __init__(self, claims: Sequence[Judged], alpha: float):
        self.claims, self.alpha = claims, alpha
        for claim in claims:
            claim.family = len(claims)

    def level(self, claim: Judged, answer: str) -> float:
        """What Holm's correction leaves a claim, all others that have the answer rejected."""
        others = sum(other is not claim and other.verdict == answer for other in self.claims)
        return self.alpha / (len(self.claims) - others)

    def judge(self) -> None:
        """Give each answer to the claims that by now deserve it."""
        before = self._undecided()
        self._step_down(REPLICATED)
        for claim in self._undecided():
            claim.forbid_what_is_replicated(self.level(claim, REPLICATED))
        self._step_down(CONTRADICTED)
        for claim in before:
            claim.level = {answer: self.level(claim, answer) for answer in ANSWERS}

    def _step_down(self, answer: str) -> None:
        for claim in self._undecided():
            claim.combine(answer)
        while rejected := [c for c in self._undecided() if c.p[answer] <= self.level(c, answer)]:
            for claim in rejected:
                claim.verdict = answer

    def _undecided(self) -> list[Judged]:
        return [claim for claim in self.claims if not claim.decided]

    def adjust(self) -> None:
        """Holm's corrected p of each claim, for each answer."""
        for answer in ANSWERS:
            found = inference.holm([claim.p[answer] for claim in self.claims])
            for claim, p in zip(self.claims, found, strict=True):
                claim.p_holm[answer] = p


def families(claims: Sequence[Judged], alpha: float) -> list[Family]:
    """Headline claims, supporting claims, and each probe for itself; tested or not."""
    tested = [judged for judged in claims if judged.claim.test != "count"]
    found = [[j for j in tested if j.claim.role == role] for role in ("headline", "supporting")]
    found += [[judged] for judged in tested if judged.claim.role == "probe"]
    return [Family(members, alpha) for members in found if members]


# ------------------------------------------------------------------------------------- after the last look


def settle(judged: Judged, spent: Sequence[float]) -> None:
    """Verdict, interval and grade of each comparison of a claim whose verdict is reached, and `not tested`.

    spent: the share of each planned look.
    """
    for number, comparison in enumerate(judged.comparisons):
        if comparison.problem or not comparison.looks:
            comparison.verdict = NOT_TESTED
            continue
        usable = [found for found in comparison.looks if found.usable]
        comparison.shown = (usable or comparison.looks)[-1]
        if judged.claim.test == "count":
            _settle_count(comparison)
        elif comparison.shown.problem:
            comparison.verdict = NOT_TESTED
        else:
            _settle_test(judged, number, comparison, spent)
    if all(comparison.verdict == NOT_TESTED for comparison in judged.comparisons):
        judged.verdict = NOT_TESTED
    _grade(judged)


def _settle_count(comparison: Comparison) -> None:
    for found in comparison.looks:
        comparison.shown = found
        comparison.verdict = count_verdict(found)
        if comparison.verdict in ANSWERS:
            break
    if comparison.shown and comparison.shown.ends:
        comparison.low, comparison.high = comparison.shown.ends(0.5)


def count_verdict(found: Evidence) -> str:
    """The verdict of a count, which knows no chance: runs that failed keep no bound, so that others alone do not show it."""
    if found.problem or found.count is None:
        return NOT_TESTED
    return OPEN if found.bar and found.count == REPLICATED else found.count


def combined_count(judged: Judged) -> str:
    """The verdict on a count's claim from those on its comparisons."""
    found = {comparison.verdict for comparison in judged.comparisons}
    one, everything = (
        (CONTRADICTED, REPLICATED) if judged.claim.require == "all" else (REPLICATED, CONTRADICTED)
    )
    if one in found:
        return one
    return everything if found == {everything} else NOT_TESTED if found == {NOT_TESTED} else OPEN


def _settle_test(judged: Judged, number: int, comparison: Comparison, spent: Sequence[float]) -> None:
    levels = judged.levels
    comparison.verdict = OPEN
    for answer in ANSWERS:
        if judged.comparison_p(number, answer) <= levels[answer]:
            comparison.verdict = answer
            reached = (
                found
                for found in comparison.looks
                if found.usable and sequential(found, answer, spent[found.number]) <= levels[answer]
            )
            comparison.shown = next(reached)
            break
    found = comparison.shown
    if found is None or found.test is None or found.ends is None:
        return
    share = spent[found.number]
    if comparison.verdict == CONTRADICTED:
        ends = [_per_end(found.test.contradicted, share * levels[CONTRADICTED])]
    elif comparison.verdict == REPLICATED:
        ends = [_per_end(found.test.replicated, share * levels[REPLICATED])]
        comparison.below = _is_below(found, ends[0])
    else:
        ends = [_per_end(found.test.replicated, share * levels[REPLICATED])]
        ends += [_per_end(found.test.contradicted, share * levels[CONTRADICTED])]
    comparison.level = min(ends)
    comparison.low, comparison.high = found.ends(comparison.level)


def _per_end(answer: Answer | None, level: float) -> float:
    return math.inf if answer is None else answer.per_end(level)


def _is_below(found: Evidence, level: float) -> bool:
    below = found.test.below
    return below is not None and bool(below.p(found.test.procedure) <= level)


def _grade(judged: Judged) -> None:
    """Where a claim holds: Holm's correction over its comparisons, at the level that the claim faces."""
    for comparison in judged.comparisons:
        comparison.graded = comparison.verdict
    if len(judged.comparisons) == 1 or judged.claim.test == "count" or judged.verdict == NOT_TESTED:
        return
    whole = REPLICATED if judged.claim.require == "all" else CONTRADICTED
    if judged.verdict == whole:
        return  # all comparisons have the claim's answer
    corrected = {
        answer: inference.holm([judged.comparison_p(i, answer) for i in range(len(judged.comparisons))])
        for answer in ANSWERS
    }
    for number, comparison in enumerate(judged.comparisons):
        if comparison.verdict == NOT_TESTED:
            continue
        comparison.graded = OPEN
        for answer in ANSWERS:
            if corrected[answer][number] <= judged.level[answer]:
                comparison.graded = answer
                break
