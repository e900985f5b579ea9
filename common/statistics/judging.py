"""Judges the claims of a paper on given terms: look by look, from what each comparison's seeds say to verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.statistics import inference
from common.statistics.claims import Claim, ClaimsFile
from common.statistics.comparisons import Comparison, find
from common.statistics.deciding import (
    NOT_TESTED,
    OPEN,
    Judged,
    combined_count,
    count_verdict,
    families,
    settle,
    shares,
)
from common.statistics.records import Records
from common.statistics.sample import planned
from common.statistics.soundness import gates
from common.statistics.testing import T, examine


@dataclass(frozen=True)
class Terms:
    """On which terms is judged. looks: planned numbers of seeds, ascending; none: one look at all seeds.

    The rest is varied for stability: the error of each answer, a seed left out, what matters times `factor`, the test
    that stands for the t-test.
    """

    looks: tuple[int, ...] = ()
    alpha: float = inference.ALPHA
    without: int | None = None
    factor: float = 1.0
    decides: str = T

    @property
    def sizes(self) -> tuple[int | None, ...]:
        """Number of seeds of each look, None for all."""
        return self.looks or (None,)

    @property
    def shares(self) -> list[float]:
        """The part of the error that each look may spend."""
        return shares(len(self.sizes))


def judge_file(file: ClaimsFile, records: Records, terms: Terms) -> list[Judged]:
    """The claims of a paper with their verdicts, in order; without those on deviations that were not run."""
    claims = [claim for claim in file.claims if claim.deviation is None or _run(claim, records)]
    return judge_claims(claims, records, terms)


def _run(claim: Claim, records: Records) -> bool:
    """Whether what the claim compares was run; deviations are measured in profiles of their own."""
    return any(comparison.problem is None for comparison in find(claim, records))


def judge_claims(claims: Sequence[Claim], records: Records, terms: Terms) -> list[Judged]:
    """The claims with their verdicts, in order."""
    judged = [Judged(claim, find(claim, records)) for claim in claims]
    together = families(judged, terms.alpha)
    for number, (size, share) in enumerate(zip(terms.sizes, terms.shares, strict=True)):
        for claim in judged:
            if not claim.decided:
                _look(claim, records.above(claim.claim.seen), terms, number, size, share)
        for family in together:
            family.judge()
    for family in together:
        family.adjust()
    for claim in judged:
        for comparison in claim.comparisons:
            _note_missed(comparison, terms)
        settle(claim, terms.shares)
        if claim.claim.test == "count":
            claim.verdict = combined_count(claim)
    return judged


def _look(
    judged: Judged, records: Records, terms: Terms, number: int, size: int | None, share: float
) -> None:
    for index, comparison in enumerate(judged.comparisons):
        if comparison.problem:
            continue
        seeds = planned(comparison, records, size, gates(comparison, records))
        if seeds is None:
            continue
        seen = records if size is None else records.until(seeds[-1])
        seeds = [seed for seed in seeds if seed != terms.without]
        found = examine(comparison, seen, seeds, terms.factor, terms.decides)
        found.number = number
        comparison.looks.append(found)
        judged.take(index, found, share)
    if judged.claim.test == "count":
        verdicts = [count_verdict(c.looks[-1]) if c.looks else NOT_TESTED for c in judged.comparisons]
        if all(verdict not in (NOT_TESTED, OPEN) for verdict in verdicts) and len(set(verdicts)) == 1:
            judged.verdict = verdicts[0]


def _note_missed(comparison: Comparison, terms: Terms) -> None:
    if not comparison.problem and not comparison.looks:
        comparison.problem = (
            f"the first look is at {terms.sizes[0]} seeds, and the runs of its first {terms.sizes[0]} are not "
            "all recorded"
        )
