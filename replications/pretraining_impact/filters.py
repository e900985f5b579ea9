"""Choosing and removing the filters of a network: at once, or gradually while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.core.models import ChannelGroup, weight_of
from common.core.pruning import channels
from common.core.trainer import Hooks, Trainer
from common.settings import SettingsError, Strict
from replications.pretraining_impact import method

GRID = 100
"""Filter fractions are looked for in steps of 1/100."""


class FilterSelection(Strict):
    """How the filters to remove are chosen."""

    criterion: Literal["random", method.FilterCriterion] = "l1_sum"
    context: Literal["local", "global"] = "local"
    """Rank inside each layer, or over all layers at once. Sums across layers collapse; use a mean there."""
    rule: method.CountRule = "floor"
    inputs: Literal["surviving", "all"] = "surviving"
    """Input channels that count: those that the layers before keep at the same event, or all there are."""
    score: Literal["producer", "group"] = "producer"
    """The producing filter's score, or mean |w| of all that belongs to the channel."""


def filter_groups(model: nn.Module) -> list[ChannelGroup]:
    """The channels that convolutions produce; units of linear layers are never removed."""
    return [g for g in channels.groups_of(model) if isinstance(model.get_submodule(g.name), nn.Conv2d)]


def filter_widths(model: nn.Module) -> list[int]:
    """Filters of each group, front to back."""
    return [len(weight_of(model, group.name)) for group in filter_groups(model)]


def pruned_widths(widths: Sequence[int], fraction: float, rule: str = "floor") -> list[int]:
    """Filters left in layers of `widths` at a filter fraction, ranked inside each layer.

    Raises SettingsError when a legacy rule leaves none in a layer.
    """
    left = [n - method.removal_count(n, fraction, rule) for n in widths]
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


def group_scores(model: nn.Module, group: ChannelGroup) -> Tensor:
    """mean|producer filter| + mean|depthwise slice| + mean|consumer slice| of each channel, [n]."""
    weight = weight_of(model, group.name).detach()
    total = method.filter_scores("l1_mean", weight)
    for name in group.followers:
        if isinstance(follower := model.get_submodule(name), nn.Conv2d):
            total = total + method.filter_scores("l1_mean", follower.weight)
    for name in group.consumers:
        # behind a flattened map several columns belong to a channel
        reader = weight_of(model, name).detach().unflatten(1, (len(weight), -1))
        total = total + method.filter_scores("l1_mean", reader.transpose(0, 1))
    return total


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
        count = max(method.removal_count(sum(original), fraction, how.rule) - gone, 0)
        chosen = method.kept_globally([scored(group) for group in groups], count)
        return {group.name: keep for group, keep in zip(groups, chosen)}
    keep = {}
    for group, width, before in zip(groups, widths, original, strict=True):
        count = max(method.removal_count(before, fraction, how.rule) - (before - width), 0)
        keep[group.name] = method.kept(scored(group), count)
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
        return method.filter_scores(how.criterion, weight, gradient, start)
    return method.filter_scores(
        how.criterion,
        weight[:, inputs],
        None if gradient is None else gradient[:, inputs],
        None if start is None else start[:, inputs],
    )


@torch.no_grad()
def apply_masks(
    masks: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Set masked weights to zero, and the optimiser's moments of them when it is given."""
    for name, mask in masks.items():
        parameter = parameters[name]
        parameter.mul_(mask)
        for value in optimizer.state.get(parameter, {}).values() if optimizer else ():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.mul_(mask)


class KeepFiltersMasked(Hooks):
    """Holds weights at zero.

    after_step: weights and moments, after every step. before_forward: weights only, before every training
    batch, as in the first author's code of 2019; an evaluation between two batches then sees them slightly
    off zero.
    """

    def __init__(
        self, policy: Literal["after_step", "before_forward"], masks: Mapping[str, Tensor] | None = None
    ):
        self.policy, self.masks = policy, dict(masks or {})

    def weights(self, trainer: Trainer) -> None:
        """Nothing to replace: the stored weights themselves are masked."""
        if self.policy == "before_forward" and trainer.model.training:
            apply_masks(self.masks, dict(trainer.model.named_parameters()))

    def stepped(self, trainer: Trainer) -> None:
        if self.policy == "after_step":
            apply_masks(self.masks, dict(trainer.model.named_parameters()), trainer.optimizer)

    def state(self) -> dict[str, Any]:
        return {"masks": self.masks}

    def load_state(self, trainer: Trainer, state: dict[str, Any]) -> None:
        self.masks = dict(state["masks"])


class Gradual(Hooks):
    """Prunes while training, at given steps to given filter fractions.

    events: fraction by number of steps done. masks: None removes the filters for good at each event, so that
    training becomes cheaper; a KeepFiltersMasked hook keeps the network whole and holds them at zero, and
    `finish` removes them.
    """

    def __init__(
        self,
        model: nn.Module,
        events: Mapping[int, float],
        how: FilterSelection,
        *,
        initial: nn.Module | None = None,
        generator: torch.Generator | None = None,
        masks: KeepFiltersMasked | None = None,
    ):
        self.events, self.how = dict(events), how
        self.original = filter_widths(model)
        self.initial, self.generator, self.masks = initial, generator, masks
        self.log: list[tuple[int, list[int]]] = [(0, self.original)]
        """(steps done, widths from there on) of every event."""
        self._removed: dict[str, Tensor] = {}

    def stepped(self, trainer: Trainer) -> None:
        done = trainer.iteration + 1
        if done in self.events:
            self._prune(trainer, self.events[done], done)

    def _prune(self, trainer: Trainer, fraction: float, done: int) -> None:
        model = trainer.model
        keep = choose(
            model, fraction, self.original, self.how,
            initial=self.initial, generator=self.generator, removed=self._removed,
        )  # fmt: skip
        if self.masks is None:
            channels.remove(model, keep, trainer.optimizer)
            if self.initial is not None:
                channels.remove(self.initial, keep)
        else:
            self.masks.masks = channels.masks(model, keep)
            apply_masks(self.masks.masks, dict(model.named_parameters()), trainer.optimizer)
            self._removed = {
                name: _complement(index, len(weight_of(model, name))) for name, index in keep.items()
            }
        self.log.append((done, [len(index) for index in keep.values()]))

    def finish(self, model: nn.Module) -> None:
        """Remove what is masked."""
        if self._removed:
            channels.remove(model, {name: torch.nonzero(~gone)[:, 0] for name, gone in self._removed.items()})

    def state(self) -> dict[str, Any]:
        initial = self.initial.state_dict() if self.initial is not None else None
        generator = self.generator.get_state() if self.generator is not None else None
        return {"log": self.log, "removed": self._removed, "initial": initial, "generator": generator}

    def load_state(self, trainer: Trainer, state: dict[str, Any]) -> None:
        self.log, self._removed = (
            [(done, list(widths)) for done, widths in state["log"]],
            dict(state["removed"]),
        )
        if self.generator is not None:
            self.generator.set_state(state["generator"])
        for model in (trainer.model, self.initial) if self.masks is None else ():
            if model is not None:
                narrow(model, self.log[-1][1])
        if self.initial is not None:
            self.initial.load_state_dict(state["initial"])


def _complement(index: Tensor, count: int) -> Tensor:
    gone = torch.ones(count, dtype=torch.bool, device=index.device)
    gone[index] = False
    return gone


def narrow(model: nn.Module, widths: Sequence[int]) -> None:
    """Bring `model` to the shapes of filter `widths`; its values are then to be loaded."""
    channels.remove(
        model, {g.name: torch.arange(n) for g, n in zip(filter_groups(model), widths, strict=True)}
    )


def schedule_events(
    schedule: str, total: int, fraction: float, window: tuple[float, float], span: int
) -> dict[int, float]:
    """Filter fraction by step for pruning every `span` steps inside `window` (shares of `total` steps).

    The last event lies at the window's end and asks for exactly `fraction`.
    """
    begin, end = (round(share * total) for share in window)
    steps = method.event_steps(begin, end, span)
    return {
        s: method.windowed(schedule, s / total, begin / total, end / total) * fraction for s in steps[:-1]
    } | {steps[-1]: fraction}


class OneCycleMomentum(Hooks):
    """The momentum of one-cycle training over `total` iterations."""

    def __init__(self, total: int):
        self.total = total

    def gradients_ready(self, trainer: Trainer) -> None:
        momentum = method.one_cycle_policy(trainer.iteration / self.total, 1.0)[1]
        for group in trainer.optimizer.param_groups:
            group["betas"] = (momentum, group["betas"][1])
