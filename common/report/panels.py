"""What the figures show, as plain data: a panel is one figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
VERDICTS = {"replicated": "✓", "contradicted": "✗", "open": "?", "not tested": "–"}
"""The verdicts in the order of every listing, with the sign that stands for each beside its colour."""


@dataclass(frozen=True)
class Point:
    """Finished runs of one variant at one target: one x and one y a seed, seeds ascending."""

    target: float
    xs: tuple[float, ...]
    ys: tuple[float, ...]


@dataclass(frozen=True)
class Line:
    """One variant of a panel.

    look: index of its colour, marker and dash; None for a reference such as the dense network.
    """

    label: str
    look: int | None
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """What every figure has. name: file name without suffix; heading: the figures that it stands among."""

    name: str
    heading: str
    title: str
    caption: str


@dataclass(frozen=True)
class TargetPanel(Panel):
    """Test accuracy (%) against the target; the x of the points is not used."""

    lines: tuple[Line, ...]


@dataclass(frozen=True)
class CostPanel(Panel):
    """Test accuracy (%) against a cost, on a logarithmic axis."""

    lines: tuple[Line, ...]
    axis: str
    unit: str


@dataclass(frozen=True)
class Curve:
    """One variant's training: mean and interval of each measure, [measures, epochs], NaN where unknown."""

    label: str
    look: int | None
    epochs: tuple[int, ...]
    means: np.ndarray
    lows: np.ndarray
    highs: np.ndarray
    phases: tuple[tuple[int, str], ...]
    """(first epoch, name) of each phase."""


@dataclass(frozen=True)
class CurvesPanel(Panel):
    """Validation accuracy (%) and training loss over the epochs of the runs."""

    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Effect:
    """One comparison of a claim, in units of the panel's axis.

    values: one a pair of seeds. low, high: of the interval that decides, None for an infinite end. bounds: what it is
    held against besides no effect: what matters, a bound.
    """

    label: str
    verdict: str
    values: tuple[float, ...]
    estimate: float | None
    low: float | None
    high: float | None
    bounds: tuple[float, ...]


@dataclass(frozen=True)
class ClaimPanel(Panel):
    """What a claim compares.

    null: where there is no effect, if anywhere. bound: what the bounds of its effects are called.
    """

    effects: tuple[Effect, ...]
    axis: str
    null: float | None
    bound: str
    logarithmic: bool
    paper_value: float | None


@dataclass(frozen=True)
class OverviewPanel(Panel):
    """Verdict on every claim: rows of (paper, ((claim id, verdict), ...))."""

    rows: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of the 95 % t-interval; low and high are NaN below two values."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    if n < 2:
        return mean, math.nan, math.nan
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * float(values.std(ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def percent(target: float) -> str:
    """A target as text: 0.95 -> `95 %`."""
    return f"{100 * target:.4g} %"


def slug(text: str) -> str:
    """Lower-case letters, digits and single dashes only, for file names and element names."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
