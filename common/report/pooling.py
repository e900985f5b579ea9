"""One estimate from several independent cells: random effects, for description alone.

The heterogeneity is Paule and Mandel's (1982); the interval is the modified one of Hartung and Knapp, whose variance is
never made smaller than that of known heterogeneity (Röver, Knapp and Friede, BMC Medical Research Methodology 2015); the
prediction interval is that of Higgins, Thompson and Spiegelhalter (JRSS A 2009) with the same variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import chdtrc, stdtrit

FEWEST_CELLS = 5
"""Below this many cells heterogeneity is not estimated, and nothing is pooled."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Pooled:
    """What k cells say together: interval of their mean effect, and of the effect in one more cell.

    tau: standard deviation of the true effects; i2: share of the variance between cells that is not noise; p: Cochran's
    test of equal effects.
    """

    cells: int
    estimate: float
    low: float
    high: float
    predicted_low: float
    predicted_high: float
    tau: float
    i2: float
    p: float


def pool(effects: Sequence[float], errors: Sequence[float]) -> Pooled | None:
    """The effects of independent cells with their standard errors (> 0), None with fewer than FEWEST_CELLS."""
    k = len(effects)
    if k < FEWEST_CELLS:
        return None
    from scipy.optimize import brentq  # takes its time to load

    y, variance = np.asarray(effects, float), np.square(np.asarray(errors, float))

    def excess(tau2: float) -> float:
        weights = 1 / (variance + tau2)
        return float(weights @ np.square(y - weights @ y / weights.sum())) - (k - 1)

    q = excess(0.0) + k - 1
    most = float(np.square(np.ptp(y))) * k + float(variance.max())
    tau2 = brentq(excess, 0.0, most) if excess(0.0) > 0 else 0.0
    weights = 1 / (variance + tau2)
    mean = float(weights @ y / weights.sum())
    spread = max(1.0, float(weights @ np.square(y - mean)) / (k - 1)) / float(weights.sum())
    half = float(stdtrit(k - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(spread)
    ahead = float(stdtrit(k - 2, (1 + CONFIDENCE) / 2)) * math.sqrt(tau2 + spread)
    return Pooled(
        k,
        mean,
        mean - half,
        mean + half,
        mean - ahead,
        mean + ahead,
        math.sqrt(tau2),
        max(0.0, (q - (k - 1)) / q) if q else 0.0,
        float(chdtrc(k - 1, q)),
    )
