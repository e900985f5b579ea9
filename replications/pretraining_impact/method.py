"""The paper's algorithm: take over a pre-trained trunk or start afresh, train, then prune and retrain level by level.

Hubens et al. 2020 (arXiv 2112.08227). The full text could not be obtained; README.md says what is known, what the first
author's later code does and what was chosen here.

    (1) start   fine-tuned: trunk = that of the network trained on the corpus, head fresh; scratch: both fresh
    (2) score   s_i = sum |w_i| over filter i of a layer, on the input channels that the layers before it keep
    (3) count   a layer of n filters loses the floor(f n) of least score at the filter fraction f
    (4) level   for a parameter reduction r the smallest f with 1 - P(f) / P(0) >= r, the same in all layers
    (5) loop    train; for each level f_1 < f_2 < ...: remove filters by (2) and (3), train on

What is compared is what pruning costs a network that started either way: D(r) of README.md, from measures.py. Filters and
shapes are in filters.py, the trunk in transfer.py, pruning while training in gradual.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common.core.data import Batches
from common.core.models import ChannelGroup, weight_of
from common.core.pruning import channels
from common.settings import SettingsError, Strict
from replications.pretraining_impact import transfer
from replications.pretraining_impact.filters import filter_groups, filter_widths

GRID = 100
"""Filter fractions are looked for in steps of 1/100."""
Retrained = TypeVar("Retrained")

# ---------------------------------------------------------------------------------------- (1) start


def fine_tuned(model: nn.Module, trunk: Mapping[str, Tensor], shuffle: torch.Generator | None = None) -> None:
    """(1): put a trained trunk into a fresh network, whose head stays. From scratch nothing is put in.

    shuffle: permutes the entries inside each tensor: the values without the features.
    """
    tensors = trunk if shuffle is None else transfer.shuffled(trunk, shuffle)
    model.load_state_dict(dict(tensors), strict=False)


# ---------------------------------------------------------------------------------------- (2) score

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


def group_scores(model: nn.Module, group: ChannelGroup) -> Tensor:
    """mean|producer filter| + mean|depthwise slice| + mean|consumer slice| of each channel, [n]."""
    weight = weight_of(model, group.name).detach()
    total = filter_scores("l1_mean", weight)
    for name in group.followers:
        if isinstance(follower := model.get_submodule(name), nn.Conv2d):
            total = total + filter_scores("l1_mean", follower.weight)
    for name in group.consumers:
        # behind a flattened map several columns belong to a channel
        reader = weight_of(model, name).detach().unflatten(1, (len(weight), -1))
        total = total + filter_scores("l1_mean", reader.transpose(0, 1))
    return total


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


def leave_gradient(model: nn.Module, batches: Batches) -> None:
    """Put the gradient of the mean loss over `batches` into the parameters; nothing else changes."""
    model.eval()
    model.zero_grad(set_to_none=True)
    for images, labels in batches.epoch(0):
        (cross_entropy(model(images), labels, reduction="sum") / len(batches.labels)).backward()


# ---------------------------------------------------------------------------------------- (3) count

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


# ---------------------------------------------------------------------------------------- (4) level


def pruned_widths(widths: Sequence[int], fraction: float, rule: str = "floor") -> list[int]:
    """Filters left in layers of `widths` at a filter fraction, ranked inside each layer.

    Raises SettingsError when a legacy rule leaves none in a layer.
    """
    left = [n - removal_count(n, fraction, rule) for n in widths]
    for n, rest in zip(widths, left):
        if rest < 1:
            raise SettingsError(f"rule {rule!r} at fraction {fraction:g} removes all {n} filters of a layer")
    return left


def fractions_for_reductions(
    parameters: Callable[[list[int]], int],
    widths: Sequence[int],
    targets: Sequence[float],
    rule: str = "floor",
) -> list[float]:
    """For each target the smallest filter fraction, in hundredths, whose parameter reduction reaches it.

    parameters: of the network with given widths. targets: ascending. Raises SettingsError naming a target
    that no fraction reaches and the largest reduction that one does.
    """
    found: list[float] = []
    whole, reduction = parameters(list(widths)), 0.0
    for step in range(GRID):
        reduction = 1 - parameters(pruned_widths(widths, step / GRID, rule)) / whole
        while len(found) < len(targets) and reduction >= targets[len(found)]:
            found.append(step / GRID)
        if len(found) == len(targets):
            return found
    raise SettingsError(
        f"target {targets[len(found)]:g}: no fraction removes more than {reduction:.4f} of the parameters"
    )


# ---------------------------------------------------------------------------------------- which filters stay


class FilterSelection(Strict):
    """How the filters to remove are chosen."""

    criterion: Literal["random", FilterCriterion] = "l1_sum"
    context: Literal["local", "global"] = "local"
    """Rank inside each layer, or over all layers at once. Sums across layers collapse; use a mean there."""
    rule: CountRule = "floor"
    inputs: Literal["surviving", "all"] = "surviving"
    """Input channels that count: those that the layers before keep at the same event, or all there are."""
    score: Literal["producer", "group"] = "producer"
    """The producing filter's score, or mean |w| of all that belongs to the channel."""


def choose(
    model: nn.Module,
    fraction: float,
    original: Sequence[int],
    how: FilterSelection,
    *,
    initial: nn.Module | None = None,
    generator: torch.Generator | None = None,
    removed: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Indices, by group, of the filters that stay when `fraction` of the `original` widths is to be gone.

    initial: the network at the start of training, as narrow as `model`, for criteria that look back;
    gradients are those that the parameters hold. generator: of the random criterion. removed: boolean [n] by
    group, filters that are masked and go first.
    """
    groups = filter_groups(model)
    removed = removed or {}
    kept_inputs: dict[str, Tensor] = {}

    def scored(group: ChannelGroup) -> Tensor:
        scores = _scores(model, group, how, kept_inputs.get(group.name), initial, generator)
        return scores.masked_fill(removed[group.name], -torch.inf) if group.name in removed else scores

    widths = filter_widths(model)
    if how.context == "global":
        gone = sum(original) - sum(widths)
        count = max(removal_count(sum(original), fraction, how.rule) - gone, 0)
        chosen = kept_globally([scored(group) for group in groups], count)
        return {group.name: keep for group, keep in zip(groups, chosen)}
    keep = {}
    for group, width, before in zip(groups, widths, original, strict=True):
        count = max(removal_count(before, fraction, how.rule) - (before - width), 0)
        keep[group.name] = kept(scored(group), count)
        if how.inputs == "surviving":
            kept_inputs |= dict.fromkeys(group.consumers, keep[group.name])
    return keep


def _scores(
    model: nn.Module,
    group: ChannelGroup,
    how: FilterSelection,
    inputs: Tensor | None,
    initial: nn.Module | None,
    generator: torch.Generator | None,
) -> Tensor:
    weight = weight_of(model, group.name)
    if how.criterion == "random":
        return torch.rand(len(weight), generator=generator).to(weight.device)
    if how.score == "group":
        return group_scores(model, group)
    gradient, start = weight.grad, weight_of(initial, group.name) if initial is not None else None
    if inputs is None:
        return filter_scores(how.criterion, weight, gradient, start)
    return filter_scores(
        how.criterion,
        weight[:, inputs],
        None if gradient is None else gradient[:, inputs],
        None if start is None else start[:, inputs],
    )


# ---------------------------------------------------------------------------------------- (5) loop


def prune_and_retrain(
    model: nn.Module,
    fractions: Sequence[float],
    original: Sequence[int],
    how: FilterSelection,
    retrain: Callable[[float], Retrained],
    *,
    batches: Batches | None = None,
    initial: nn.Module | None = None,
    generator: torch.Generator | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[Retrained]:
    """(5) for a network that is trained: what `retrain`, given the fraction, returns of each level.

    fractions: of the `original` filters, ascending. batches: for criteria that need the gradient (ValueError without).
    initial, generator: as of `choose`. optimizer: one that goes on through the levels.
    """
    found = []
    for fraction in fractions:
        if how.criterion in NEEDS_GRADIENT:
            if batches is None:
                raise ValueError(f"criterion {how.criterion!r} needs batches")
            leave_gradient(model, batches)
        keep = choose(model, fraction, original, how, initial=initial, generator=generator)
        channels.remove(model, keep, optimizer)
        if initial is not None:
            channels.remove(initial, keep)
        found.append(retrain(fraction))
    return found
