"""What the figures show, as plain data: a panel is one figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from common.statistics.flips import interquartile_mean

CONFIDENCE = 0.95
RESAMPLES = 1000
"""Of a bootstrap."""
VERDICTS = {"replicated": "✓", "contradicted": "✗", "open": "?", "not tested": "–"}
"""The verdicts in the order of every listing, with the sign that stands for each beside its colour."""


@dataclass(frozen=True)
class Point:
    """Finished runs of one variant at one target: one x and one y a seed, seeds ascending."""

    target: float
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    seeds: tuple[int, ...]


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
    """What every figure has.

    name: file name without suffix; heading: the figures that it stands among; title: what is found in it; caption: what
    is drawn.
    """

    name: str
    heading: str
    title: str
    caption: str


@dataclass(frozen=True)
class TargetPanel(Panel):
    """Test accuracy (%) against the target; the x of the points is not used.

    centre: what stands for all seeds of a point, `mean` or `interquartile mean`.
    """

    lines: tuple[Line, ...]
    centre: str


@dataclass(frozen=True)
class CostPanel(Panel):
    """Test accuracy (%) against a cost, on a logarithmic axis."""

    lines: tuple[Line, ...]
    centre: str
    axis: str
    unit: str


@dataclass(frozen=True)
class Curve:
    """One variant's training: each seed's measures, [seeds, measures, epochs], and their mean and interval, [measures, epochs].

    NaN where unknown.
    """

    label: str
    look: int | None
    epochs: tuple[int, ...]
    seeds: tuple[int, ...]
    values: np.ndarray
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

    values: one a pair of seeds; names: what each is of, such as `seed 3`. low, high: of the interval that decides, None
    for an infinite end. band: the effects that do not matter. bounds: what it is held against besides no effect.
    """

    label: str
    verdict: str
    values: tuple[float, ...]
    names: tuple[str, ...]
    estimate: float | None
    low: float | None
    high: float | None
    band: tuple[float, float] | None
    bounds: tuple[float, ...]


@dataclass(frozen=True)
class ClaimPanel(Panel):
    """What a claim compares.

    null: where there is no effect, if anywhere.
    """

    effects: tuple[Effect, ...]
    axis: str
    null: float | None
    logarithmic: bool
    paper_value: float | None


@dataclass(frozen=True)
class Profile:
    """One method's share of runs that keep at least so much accuracy. shares, lows, highs: [levels], in %."""

    label: str
    look: int | None
    shares: np.ndarray
    lows: np.ndarray
    highs: np.ndarray


@dataclass(frozen=True)
class ProfilesPanel(Panel):
    """Performance profiles: share of runs (%) at or above each accuracy (%)."""

    levels: np.ndarray
    profiles: tuple[Profile, ...]


@dataclass(frozen=True)
class ImprovementPanel(Panel):
    """Probability that a run of each method beats one of another. rows: (method, look, value, low, high).

    low and high are None where there are too few seeds for an interval.
    """

    other: str
    rows: tuple[tuple[str, int | None, float, float | None, float | None], ...]


@dataclass(frozen=True)
class ScaleCell:
    """A headline at one scale. estimate and interval are text, empty where nothing was tested."""

    verdict: str | None
    """None where the scale does not judge the claim."""
    estimate: str
    interval: str


@dataclass(frozen=True)
class ScalesPanel(Panel):
    """Headlines down, profiles across: rows of (paper, statement, a cell a profile)."""

    profiles: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[ScaleCell, ...]], ...]


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of the 95 % t-interval; low and high are NaN below two values."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    if n < 2:
        return mean, math.nan, math.nan
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * float(values.std(ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def interquartile_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """(interquartile mean, low, high) of the 95 % bootstrap interval over seeds; NaN ends below two values.

    A quarter of the sorted values is left out at each end (Agarwal et al. 2021, the statistic of rliable).
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        return mean_interval(values)
    drawn = values[np.random.default_rng(0).integers(0, n, (RESAMPLES, n))]
    low, high = np.quantile(interquartile_mean(drawn), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(interquartile_mean(values)), float(low), float(high)


def percent(target: float) -> str:
    """A target as text: 0.95 -> `95 %`."""
    return f"{100 * target:.4g} %"
