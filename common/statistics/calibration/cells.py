"""The papers that the calibration makes up: how accuracies are distributed, what is asked, where the truth lies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from common.statistics.deciding import CONTRADICTED, REPLICATED

CHANCE, DENSE, LEVEL, SPREAD = 0.1, 0.95, 0.8, 0.01
"""Accuracies of a collapsed run, of a dense one and of an arm, and the standard deviation of an arm over seeds."""
MARGIN = math.sqrt(2) * SPREAD
"""The effect that matters: one standard deviation of a difference of two arms."""
FAR = 3.0
"""Where a comparison or claim holds beyond doubt: so many margins from the null."""
RARE, FREQUENT = 0.1, 0.3  # how often runs collapse or diverge

# ------------------------------------------------------------------------------------------ accuracies

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
"""Accuracies of an arm, of a shape; NaN for a run that diverged."""


def _normal(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.normal(LEVEL, SPREAD, shape)


def _heavy(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return LEVEL + SPREAD / math.sqrt(3) * random.standard_t(3, shape)


def _skewed(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    mean, variance = math.exp(0.5), math.e * (math.e - 1)
    return LEVEL + SPREAD * (random.lognormal(size=shape) - mean) / math.sqrt(variance)


def _constant(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, LEVEL)


def _collapsing(rate: float, lift: float = 0.0) -> Draw:
    def draw(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        collapsed = random.random(shape) < rate
        return np.where(collapsed, random.normal(CHANCE, 0.003, shape), _normal(random, shape) + lift)

    return draw


def _diverging(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.where(random.random(shape) < RARE, np.nan, _normal(random, shape))


@dataclass(frozen=True)
class Outcome:
    """How the accuracies of both arms are distributed; equally, where `control` is not given.

    decimals: that accuracies are rounded to, None for none.
    """

    treatment: Draw
    control: Draw | None = None
    decimals: int | None = None
    margin: float = MARGIN

    def draw(self, random: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Accuracies of treatment and control, without what the truth adds to the treatment's."""
        return self.treatment(random, shape), (self.control or self.treatment)(random, shape)


# at equal means, so that what collapses is better elsewhere
_BETTER = _collapsing(RARE, lift=RARE * (LEVEL - CHANCE) / (1 - RARE))
OFTEN = "collapsing often"
EQUAL = {
    "normal": Outcome(_normal),
    "steps of 0.001": Outcome(lambda r, s: LEVEL + (_normal(r, s) - LEVEL) / 5, decimals=3, margin=0.003),
    "t3": Outcome(_heavy),
    "log-normal": Outcome(_skewed),
    "collapsing": Outcome(_collapsing(RARE)),
    "diverging": Outcome(_diverging),
    OFTEN: Outcome(_collapsing(FREQUENT)),
}
"""Both arms alike: the difference is symmetric about its mean."""
UNEQUAL = {
    "treatment collapses": Outcome(_BETTER, _normal),
    "control collapses": Outcome(_normal, _BETTER),
    "skewed to the right": Outcome(_skewed, _constant),
    "skewed to the left": Outcome(_constant, _skewed),
}
"""Arms of equal means, not alike: here no test of a mean can hold its level, and none is asked to."""

# ------------------------------------------------------------------------------------------------ cells


@dataclass(frozen=True)
class Question:
    """A test with a truth, the mean difference in margins, and the answers that are counted there.

    matters: whether the claim states the margin as what matters. The value of a threshold is the margin too.
    """

    test: str
    truth: float
    answers: tuple[str, ...] = (REPLICATED, CONTRADICTED)
    matters: bool = False

    @property
    def name(self) -> str:
        """The test, and where the truth is: with L, U and `matters` d as in CLAIMS.md."""
        stated = " with matters" if self.matters and self.test == "superiority" else ""
        return f"{self.test}{stated}, truth {self.truth:g}"


NULLS = (
    Question("superiority", 0),
    Question("superiority", 0, (REPLICATED,), matters=True),
    Question("superiority", 1, (CONTRADICTED,), matters=True),
    Question("noninferiority", -1, matters=True),
    Question("equivalence", 1, matters=True),
    Question("difference", 0, (REPLICATED,), matters=True),
    Question("difference", 1, (CONTRADICTED,), matters=True),
    Question("threshold", 1),
    Question("trend", 0),
)
POWERS = (
    (Question("superiority", 1, (REPLICATED,)), 0.8),
    (Question("superiority", -1, (CONTRADICTED,)), 0.8),
    (Question("noninferiority", 0, (REPLICATED,), matters=True), 0.8),
    (Question("noninferiority", -2, (CONTRADICTED,), matters=True), 0.8),
    (Question("threshold", 2, (REPLICATED,)), 0.8),
    (Question("trend", 1, (REPLICATED,)), 0.8),
    (Question("equivalence", 0, (REPLICATED,), matters=True), 0.6),
    (Question("difference", 0, (CONTRADICTED,), matters=True), 0.6),
    # an error of 5 % on two sides: the exact power of the two-sided t-test is .69
    (Question("difference", 1, (REPLICATED,)), None),
)
"""Truths at one standard deviation from the null, or at the middle of the margins, and the power asked for."""


@dataclass(frozen=True)
class Design:
    """How many seeds a paper has, and the looks that are planned: None for one at all seeds."""

    seeds: int
    looks: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        return f"looks at {', '.join(map(str, self.looks))}" if self.looks else f"{self.seeds} seeds"


FIXED = tuple(Design(n) for n in (5, 8, 16, 32, 64))
LOOKED = Design(64, (8, 16, 32, 64))
FIVE, EIGHT = FIXED[:2]
SERIES = 20_000
"""Papers on the null that are judged look by look: what looking again and again could spoil is told to a third of a percent."""


@dataclass(frozen=True)
class Family:
    """How many claims a paper has and comparisons each of them, and where all but the first are.

    others: on the `null` too, or far `above` or `below` it.
    """

    claims: int = 1
    comparisons: int = 1
    require: str = "all"
    others: str = "null"

    @property
    def size(self) -> int:
        return self.claims * self.comparisons

    @property
    def name(self) -> str:
        if self.size == 1:
            return "one comparison"
        many = (
            f"{self.claims} claims"
            if self.claims > 1
            else f"{self.require} of {self.comparisons} comparisons"
        )
        return many + {"null": "", "above": ", others hold", "below": ", others fail"}[self.others]


@dataclass(frozen=True)
class Cell:
    """One kind of paper. kind: `null`, `power`, or `shown` for what has no goal; power: the goal, if any.

    papers: how many are made up, where not as many as of other cells.
    """

    kind: str
    question: Question
    outcome: str
    design: Design = EIGHT
    family: Family = Family()
    power: float | None = None
    papers: int | None = None

    @property
    def size(self) -> int:
        """Comparisons times seeds, of as many papers as other cells have or of its own."""
        return self.family.size * self.design.seeds * (self.papers or 1)

    @property
    def key(self) -> str:
        """What sets the cell apart, in words; its random stream is drawn from it."""
        return "; ".join(
            (self.kind, self.question.name, self.outcome, self.design.name, self.family.name),
        )


def cells() -> Iterator[Cell]:
    """All cells, in the order of the tables."""
    for question, outcome in itertools.product(NULLS, EQUAL):
        for design in _designs(question, outcome):
            looked = question is NULLS[0] and outcome == "normal" and design is LOOKED
            yield Cell("null", question, outcome, design, papers=SERIES if looked else None)
    several = [question for question in NULLS if question.test not in ("threshold", "trend")]
    for outcome, many, question in itertools.product(("normal", "collapsing", "diverging"), (3, 9), several):
        if (outcome, many) != ("diverging", 9):
            yield from (
                Cell("null", question, outcome, EIGHT, family) for family in _families(many, question)
            )
    for family in (Family(9), Family(comparisons=9), Family(9, others="above")):
        yield Cell("null", NULLS[0], "normal", LOOKED, family)
    for question, power in POWERS:
        yield Cell("power" if power else "shown", question, "normal", power=power)
    holds, half = Question("superiority", 1, (REPLICATED,)), Question("superiority", 0.5, (REPLICATED,))
    yield Cell("power", half, "normal", LOOKED, power=0.9)
    yield from (Cell("shown", holds, "collapsing", design) for design in (EIGHT, LOOKED))
    for question, outcome, design in itertools.product(NULLS, UNEQUAL, (EIGHT, LOOKED)):
        if len(question.answers) == 2 and question.test in ("superiority", "noninferiority", "equivalence"):
            yield Cell("shown", question, outcome, design)


def _designs(question: Question, outcome: str) -> tuple[Design, ...]:
    """All, but for what costs much and says little more: the same claims' other borders, slopes of every distribution."""
    if outcome == OFTEN or (question.test == "trend" and outcome not in ("normal", "collapsing")):
        return EIGHT, LOOKED
    if question.test == "superiority" and question.matters:
        return FIVE, EIGHT, LOOKED
    return *FIXED, LOOKED


def _families(many: int, question: Question) -> Iterator[Family]:
    yield from (Family(comparisons=many), Family(comparisons=many, require="any"), Family(claims=many))
    if question.test in ("superiority", "noninferiority") and len(question.answers) == 2:
        # the first alone on the null, and what comes first by Holm out of its way
        yield from (
            Family(comparisons=many, others="above"),
            Family(comparisons=many, require="any", others="below"),
        )
        yield from (Family(claims=many, others=others) for others in ("above", "below"))
