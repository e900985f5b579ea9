"""What the papers of a cell were judged to be, and whether that meets the goal."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from common.statistics.calibration.cells import Cell
from common.statistics.inference import ALPHA

AGAIN = 10
"""A null cell above its goal is simulated again on this many times as many new papers, and those are what is shown.

A power cell has as many at once, as its goal is close."""


@dataclass
class Result:
    """How many of a cell's papers gave each answer.

    counts: to the first claim, or to any where all are on the null. inside: papers with a claim where any comparison on
    the null was given this answer, graded; only where a claim has several.
    """

    cell: Cell
    papers: int
    counts: Counter[str] = field(default_factory=Counter)
    inside: Counter[str] = field(default_factory=Counter)
    first: dict[str, Any] | None = None
    """Of a cell that was simulated again: what was found at first."""

    def goal(self) -> float | None:
        """The largest rate of a null cell's answers, the smallest of a power cell's."""
        if self.cell.kind == "null":
            return ALPHA + 2 * math.sqrt(ALPHA * (1 - ALPHA) / self.papers)
        return self.cell.power

    def rates(self) -> dict[str, float]:
        """The rate of each answer that is counted."""
        found = {answer: self.counts[answer] / self.papers for answer in self.cell.question.answers}
        if self.cell.family.comparisons > 1:
            found |= {
                f"{answer} inside": self.inside[answer] / self.papers for answer in self.cell.question.answers
            }
        return found

    def missed(self) -> list[str]:
        """The answers whose rate misses the goal."""
        goal = self.goal()
        if goal is None:
            return []
        if self.cell.kind == "null":
            return [answer for answer, rate in self.rates().items() if rate > goal]
        return [answer for answer, rate in self.rates().items() if rate < goal]
