"""Titles of figures: what is seen in them, in one sentence that the drawn numbers give."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.report.panels import Curve, Line, Point, percent
from common.statistics.flips import interquartile_mean

NEAR = 1.0
"""Percentage points below the reference at which an accuracy still counts as kept."""
_COSTS = {
    "parameters": ("with {:.3g} times fewer non-zero parameters", lambda dense, x: dense / x),
    "speed-up": ("at a {:.3g}-fold theoretical speed-up", lambda dense, x: x),
    "macs": ("with {:.3g} times fewer MACs", lambda dense, x: dense / x),
}


def at_targets(lines: Sequence[Line], centre: str, place: str) -> str:
    """Which variant is ahead at which targets: `Most accurate: slr at 90, 95 %; gmp at 98 % (digits · mlp)`.

    centre: what the figure shows of all seeds, `mean` or `interquartile mean`.
    """
    compared = [line for line in lines if line.look is not None]
    targets = sorted({point.target for line in compared for point in line.points if point.target})
    if len(compared) < 2 or not targets:
        return f"Accuracy against target, {place}"
    ahead: dict[str, list[float]] = {}
    for target in targets:
        means = {
            line.label: _centre(point, centre)
            for line in compared
            for point in line.points
            if point.target == target
        }
        if len(means) > 1:
            ahead.setdefault(max(means, key=lambda label: means[label]), []).append(target)
    if not ahead:
        return f"Accuracy against target, {place}"
    parts = [f"{label} at {_listed(found)}" for label, found in ahead.items()]
    return f"Most accurate: {'; '.join(parts)} ({place})"


def at_costs(lines: Sequence[Line], centre: str, cost: str, place: str) -> str:
    """How far each variant can go and keep the accuracy of the reference."""
    words, factor = _COSTS[cost]
    dense = next((line.points[0] for line in lines if line.look is None), None)
    if dense is None:
        return f"Accuracy against {cost}, {place}"
    kept = [
        (factor(float(np.mean(dense.xs)), float(np.mean(point.xs))), line.label)
        for line in lines
        if line.look is not None
        for point in line.points
        if _centre(point, centre) >= _centre(dense, centre) - NEAR
    ]
    if not kept:
        return f"No compressed network is within {NEAR:g} point of the dense one ({place})"
    most, label = max(kept)
    return f"Within {NEAR:g} point of dense {words.format(most)}: {label} ({place})"


def of_training(curves: Sequence[Curve], target: str | None, place: str) -> str:
    """Which variant's training ends highest."""
    aim = f"Training for {target}" if target else "Training"
    ends = {curve.label: curve.means[0][-1] for curve in curves if curve.look is not None}
    ends = {label: end for label, end in ends.items() if np.isfinite(end)}
    if len(ends) < 2:
        return f"{aim} ({place})"
    best = max(ends, key=lambda label: ends[label])
    return f"{aim} ends highest with {best}, {ends[best]:.1f} % in validation ({place})"


def _centre(point: Point, centre: str) -> float:
    return float(np.mean(point.ys) if centre == "mean" else interquartile_mean(point.ys))


def _listed(targets: Sequence[float]) -> str:
    names = [percent(target).removesuffix(" %") for target in targets]
    return f"{', '.join(names)} %"
