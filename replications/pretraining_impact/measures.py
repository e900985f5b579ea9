"""What is measured on an accuracy curve: how much can be removed, what it costs, how few parameters suffice.

A curve is a sequence of parameter reductions R (ascending, from 0), the accuracies there, and for
`iso_parameters` the parameters that are left. Plain numbers in, plain numbers out. Records hold curves as tables with the columns
`reduction`, `accuracy` (test), `validation_accuracy` and `parameters`, a row for each level from the unpruned network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

# accuracies are ratios of small integers: a difference that equals tau must not fail by rounding
ROUNDING = 1e-12
TAUS = {"1": 0.01, "2": 0.02}
"""Tolerated losses of R*, by name: in points of accuracy."""
AREA = 0.9
"""The area under the accuracy curve reaches up to this reduction."""

Curve = Mapping[str, Sequence[float]]


def largest_reduction(
    reduction: Sequence[float],
    accuracy: Sequence[float],
    tau: float,
    mode: str = "interp",
    reference: float | None = None,
) -> float:
    """R*: the largest reduction whose accuracy is at most `tau` below the reference.

    reference: an accuracy (default: that of the unpruned network).
    strict: the last level before the first one that loses more. any: the largest level that does not. interp:
    as strict, and on from there in a straight line to the crossing. 0 when the first level already falls
    short. Raises ValueError for another mode.
    """
    floor = (accuracy[0] if reference is None else reference) - tau
    holds = [a >= floor - ROUNDING for a in accuracy]
    if mode == "any":
        return max((r for r, ok in zip(reduction, holds, strict=True) if ok), default=0.0)
    if mode not in ("strict", "interp"):
        raise ValueError(f"unknown mode {mode!r}; known: strict, any, interp")
    first = holds.index(False) if False in holds else len(holds)
    if first in (0, len(holds)):
        return 0.0 if first == 0 else reduction[-1]
    before = reduction[first - 1]
    if mode == "strict":
        return before
    share = (accuracy[first - 1] - floor) / (accuracy[first - 1] - accuracy[first])
    return before + max(share, 0.0) * (reduction[first] - before)


def stopping_level(accuracy: Sequence[float], tau: float, patience: int = 1) -> int:
    """The last level that is run if `patience` consecutive ones losing more than `tau` stop the pruning."""
    failures = 0
    for index, value in enumerate(accuracy):
        failures = failures + 1 if accuracy[0] - value > tau + ROUNDING else 0
        if failures == patience:
            return index
    return len(accuracy) - 1


def accuracy_drop(reduction: Sequence[float], accuracy: Sequence[float], at: float) -> float:
    """Unpruned accuracy minus the accuracy at reduction `at`, linear between levels."""
    return float(accuracy[0] - np.interp(at, reduction, accuracy))


def mean_accuracy(reduction: Sequence[float], accuracy: Sequence[float], up_to: float) -> float:
    """Area under the curve on [0, up_to] by the trapezoid rule, divided by `up_to`."""
    inside = [r for r in reduction if r < up_to]
    points = np.array([*inside, up_to])
    return float(np.trapezoid(np.interp(points, reduction, accuracy), points) / up_to)


def iso_parameters(parameters: Sequence[float], accuracy: Sequence[float], wanted: float) -> float | None:
    """Fewest parameters before the curve first falls below accuracy `wanted`.

    Linear in accuracy and logarithmic in parameters between levels; None when the unpruned network is below,
    the last level's parameters when none is.
    """
    first = next((i for i, a in enumerate(accuracy) if a < wanted - ROUNDING), None)
    if first == 0:
        return None
    if first is None:
        return float(parameters[-1])
    high, low = accuracy[first - 1], accuracy[first]
    share = min(max((high - wanted) / (high - low), 0.0), 1.0)
    logs = math.log(parameters[first - 1]), math.log(parameters[first])
    return math.exp(logs[0] + share * (logs[1] - logs[0]))


def extended(curve: Curve | None, point: Mapping[str, float]) -> dict[str, list[float]]:
    """The curve with one more row; None is the curve without any."""
    return {name: [*(curve[name] if curve else ()), value] for name, value in point.items()}


def begun(curve: Curve) -> dict[str, list[float]]:
    """The curve at the unpruned network alone."""
    return {name: list(values[:1]) for name, values in curve.items()}


def along(curve: Curve, floor: float, tau: float, patience: int) -> dict[str, float]:
    """What needs the whole curve. floor: as of `share_needed`. tau, patience: of the stopping rule."""
    reduction, accuracy = curve["reduction"], curve["accuracy"]
    mean = mean_accuracy(reduction, accuracy, AREA)
    stopped = stopping_level(curve["validation_accuracy"], tau, patience)
    found = {
        "mean_accuracy": mean,
        "mean_drop": accuracy[0] - mean,
        "stopping_reduction": reduction[stopped],
        "share_needed_own": share_needed(curve, accuracy[0] - TAUS["1"], floor),
    }
    return found | {f"r_star_{name}": largest_reduction(reduction, accuracy, t) for name, t in TAUS.items()}


def share_needed(curve: Curve, wanted: float, floor: float) -> float:
    """The share of its parameters that a network needs for accuracy `wanted`, in [floor, 1].

    floor: what the last level is to leave, below which nothing is known. 1 also where the unpruned network falls short.
    """
    parameters = curve["parameters"]
    enough = iso_parameters(parameters, curve["accuracy"], wanted)
    return 1.0 if enough is None else min(max(enough / parameters[0], floor), 1.0)
