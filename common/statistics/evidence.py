"""What the seeds of a comparison say at one look: measured, not yet judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

Known = TypeVar("Known")


def known(value: Known | None) -> Known:
    """What a claim gives, or a test has found; a test that does not is not asked for it."""
    if value is None:
        raise TypeError("a value is asked for that this claim or test does not have")
    return value


@dataclass(frozen=True)
class Why:
    """Why a comparison or claim is open. kind: `needs n seeds`, `mixed`, `collapses` or `structural`."""

    kind: str
    needs: int | None
    """Seeds that would decide it with power 0.8 if the rest are like these; None where that says nothing."""
    text: str


@dataclass
class Evidence:
    """What a comparison's seeds say at one look. What could not be measured stays None.

    values, estimate are differences, slopes or the metric itself in the metric's units, or ratios if the claim's scale
    is `ratio`; sd is that of the values, or of their logarithms.
    """

    n: int = 0
    seeds: list[int] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)
    problem: str | None = None
    """Why nothing can be tested."""
    bar: str | None = None
    """Why there is no verdict, whatever the test says."""
    too_few: bool = False
    """Whether that is only that there are too few pairs."""
    values: list[float] = field(default_factory=list)
    treatment_mean: float | None = None
    control_mean: float | None = None
    estimate: float | None = None
    median: float | None = None
    interquartile_mean: float | None = None
    sd: float | None = None
    reference: list[float] = field(default_factory=list)
    test_name: str | None = None
    by_flips: str | None = None
    """Why the sign-flip test decides and not the t-test."""
    collapsed: dict[str, Any] | None = None
    """Collapsed runs of both sides with McNemar's exact p, where there are any."""
    p: float | None = None
    p_against: float | None = None
    p_permutation: float | None = None
    p_wilcoxon: float | None = None
    p_page: float | None = None
    effect_size: float | None = None
    point_means: list[float] = field(default_factory=list)
    """Mean contrast at each point of a trend."""
    number: int = 0
    """Of the look, from 0."""
    test: Any = None
    """The `testing.Test` that p came from, None for counts."""
    count: str | None = None
    """The verdict of a count."""
    ends: Callable[[float], tuple[float, float]] | None = None
    """Both ends of the interval, in units of the values, each one-sided at a level."""

    @property
    def usable(self) -> bool:
        """Whether it may decide."""
        return self.p is not None and self.bar is None
