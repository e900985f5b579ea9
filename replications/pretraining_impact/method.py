"""Filter pruning: how filters are scored, how many go and which, and the schedules of pruning while training.

The full text of the paper could not be obtained; README.md says what is known, what the first author's later
code does and what was chosen here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------- scores

GRANULARITIES: dict[str, tuple[int, ...]] = {
    "weight": (),
    "kernel": (2, 3),
    "filter": (1, 2, 3),
    "row": (3,),
    "column": (2,),
    "channel": (1,),
    "shared_kernel": (0, 2, 3),
    "shared_weight": (0,),
    "layer": (0, 1, 2, 3),
}
"""Axes of a convolution's weight [out, in, height, width] that are averaged into one score."""


def granular_scores(values: Tensor, granularity: str) -> Tensor:
    """Mean |value| over the axes of `granularity`, broadcastable to `values` [out, in, height, width]."""
    axes = GRANULARITIES[granularity]
    return values.abs().mean(axes, keepdim=True) if axes else values.abs()


FilterCriterion = Literal[
    "l1_sum",
    "l1_mean",
    "l2_sq_mean",
    "taylor_sq_mean",
    "taylor_abs_sum",
    "movement_mean",
    "magnitude_increase_mean",
]
NEEDS_WEIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "l1_sum": lambda w: w.abs().sum(1),
    "l1_mean": lambda w: w.abs().mean(1),
    "l2_sq_mean": lambda w: w.square().mean(1),
}
NEEDS_GRADIENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "taylor_sq_mean": lambda w, g: (w * g).square().mean(1),
    "taylor_abs_sum": lambda w, g: (w * g).sum(1).abs(),
}
NEEDS_INITIAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "movement_mean": lambda w, w0: (w - w0).abs().mean(1),
    "magnitude_increase_mean": lambda w, w0: (w.abs() - w0.abs()).mean(1),
}


def filter_scores(
    criterion: str, weight: Tensor, gradient: Tensor | None = None, initial: Tensor | None = None
) -> Tensor:
    """Score [out] of each filter (first axis) of `weight` [out, ...]; the lowest go first.

    gradient, initial: of the same shape, for the criteria that need them (ValueError without). Sums compare
    filters of one layer, means also filters of different layers.
    """
    flat = weight.detach().flatten(1)
    if criterion in NEEDS_WEIGHT:
        return NEEDS_WEIGHT[criterion](flat)
    if criterion in NEEDS_GRADIENT:
        return NEEDS_GRADIENT[criterion](flat, _given(gradient, criterion, "gradient"))
    if criterion in NEEDS_INITIAL:
        return NEEDS_INITIAL[criterion](flat, _given(initial, criterion, "initial weight"))
    raise ValueError(f"unknown criterion {criterion!r}; known: {', '.join(get_args(FilterCriterion))}")


def _given(values: Tensor | None, criterion: str, what: str) -> Tensor:
    if values is None:
        raise ValueError(f"criterion {criterion!r} needs the {what}")
    return values.detach().flatten(1)


# ---------------------------------------------------------------------------------------- selection

CountRule = Literal["floor", "round", "gt_sorted_2019", "ge_sorted_2020", "quantile_2021", "kth_0_4_1"]
COUNT_RULES: dict[str, Callable[[int, float], int]] = {
    "floor": lambda n, f: math.floor(f * n + 1e-9),
    "round": lambda n, f: math.floor(f * n + 0.5 + 1e-9),
    # threshold rules of the first author's code, as the number of filters with distinct scores they remove
    "gt_sorted_2019": lambda n, f: int(n * f) + 1,
    "ge_sorted_2020": lambda n, f: int(n * f),
    "quantile_2021": lambda n, f: math.ceil(f * (n - 1)),
    "kth_0_4_1": lambda n, f: max(1, int(n * f)) - 1,
}
EXACT_RULES = ("floor", "round")


def removal_count(width: int, fraction: float, rule: str = "floor") -> int:
    """How many of `width` filters are removed at filter fraction `fraction` in [0, 1).

    The exact rules leave at least one filter; the legacy rules may ask for all of them.
    """
    count = COUNT_RULES[rule](width, fraction)
    return min(max(count, 0), width - 1) if rule in EXACT_RULES else count


def kept(scores: Tensor, count: int) -> Tensor:
    """Indices, ascending, that stay when the `count` lowest of `scores` [n] go; of equals the first goes."""
    return scores.argsort(stable=True)[count:].sort().values


def kept_globally(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """As `kept`, with one ranking over all layers and at least one filter left in each.

    Of equals the earlier layer and the lower index go first. Fewer than `count` go where that floor does not
    allow more.
    """
    layer = torch.cat([torch.full((len(s),), i, device=s.device) for i, s in enumerate(scores)])
    order = torch.cat(list(scores)).argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    # walking up the ranking, the filter that a layer may not lose is its last one
    last = [rank[layer == i].max() for i in range(len(scores))]
    order = order[~torch.isin(order, order[torch.stack(last)])]
    stays = torch.ones(len(layer), dtype=torch.bool, device=order.device)
    stays[order[:count]] = False
    return [torch.nonzero(stays[layer == i])[:, 0] for i in range(len(scores))]


def per_class_counts(class_sizes: Sequence[int], amount: int | float) -> list[int]:
    """Training images of each class: `amount` of each, or the share `amount` < 1 of each, rounded down."""
    if isinstance(amount, int):
        return [amount] * len(class_sizes)
    return [math.floor(amount * n + 1e-9) for n in class_sizes]


# ---------------------------------------------------------------------------------------- schedules

ONE_CYCLE_ALPHA, ONE_CYCLE_BETA = 14.0, 5.0


def level(
    schedule: str,
    position: float,
    start: float = 0.0,
    end: float = 1.0,
    *,
    steps: int = 3,
    alpha: float = ONE_CYCLE_ALPHA,
    beta: float = ONE_CYCLE_BETA,
) -> float:
    """The level between `start` and `end` that a schedule asks for at `position` in [0, 1].

    steps: of `iterative`. alpha, beta: slope and offset of `one_cycle`, which does not begin at exactly
    `start`. Raises ValueError for an unknown schedule.
    """
    p = position
    if schedule == "one_shot":
        share = 1.0
    elif schedule == "iterative":
        share = math.ceil(p * steps) / steps
    elif schedule == "agp":
        share = 1 - (1 - p) ** 3
    elif schedule == "one_cycle":
        share = (1 + math.exp(-alpha + beta)) / (1 + math.exp(-alpha * p + beta))
    elif schedule == "cos":
        share = (1 - math.cos(math.pi * p)) / 2
    elif schedule == "lin":
        share = p
    elif schedule == "dsd":
        # there and back: dense, sparse, dense
        share = (1 - math.cos(2 * math.pi * p)) / 2
    else:
        raise ValueError(f"unknown schedule {schedule!r}")
    return start + (end - start) * share


def windowed(
    schedule: str, progress: float, begin: float = 0.0, finish: float = 1.0, **options: Any
) -> float:
    """The level at `progress` in [0, 1] of training for a schedule from `begin` to `finish`; 0 before it.

    options: as of `level`.
    """
    if progress < begin:
        return 0.0
    return level(schedule, min((progress - begin) / (finish - begin), 1.0), **options)


def event_steps(begin: int, finish: int, span: int, final: bool = True) -> list[int]:
    """The steps of gradual pruning's events: every `span` steps strictly between `begin` and `finish`.

    final: one more at `finish`, so that the last level is really reached. The first author's code of 2019 has
    none.
    """
    return list(range(begin + span, finish, span)) + ([finish] if final else [])


def one_cycle_policy(progress: float, peak: float) -> tuple[float, float]:
    """Learning rate and first momentum at `progress` in [0, 1] of one-cycle training.

    Cosine pieces: the rate goes from peak/25 to `peak` in the first quarter and then to peak/1e5; the
    momentum .95, .85, .95. Source: defaults of the library of the first author's later code.
    """
    if progress < 0.25:
        share, rates, momenta = progress / 0.25, (peak / 25, peak), (0.95, 0.85)
    else:
        share, rates, momenta = (progress - 0.25) / 0.75, (peak, peak / 1e5), (0.85, 0.95)
    return level("cos", share, *rates), level("cos", share, *momenta)
