"""Pruning while training, in place of the paper's loop: when how much goes, at once or behind masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from common.core.models import weight_of
from common.core.pruning import channels
from common.core.trainer import Hooks, Trainer
from common.settings import Count, Share, Strict
from replications.pretraining_impact.filters import filter_widths, narrow
from replications.pretraining_impact.method import FilterSelection, choose

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


def schedule_events(
    schedule: str, total: int, fraction: float, window: tuple[float, float], span: int
) -> dict[int, float]:
    """Filter fraction by step for pruning every `span` steps inside `window` (shares of `total` steps).

    The last event lies at the window's end and asks for exactly `fraction`.
    """
    begin, end = (round(share * total) for share in window)
    steps = event_steps(begin, end, span)
    return {s: windowed(schedule, s / total, begin / total, end / total) * fraction for s in steps[:-1]} | {
        steps[-1]: fraction
    }


class GradualSettings(Strict):
    """Pruning while training."""

    schedule: Literal["agp", "cos", "lin", "one_cycle"] = "agp"
    """Of the `-gradual` variants; the `-one-cycle` ones follow the one-cycle curve over all of training."""
    begin: Annotated[float, Field(ge=0, lt=1)] = 0.2
    finish: Share = 0.8
    """First and last moment of pruning as shares of training."""
    span: Count = 20
    """Steps between events."""
    removal: Literal["at_events", "at_end"] = "at_events"
    """Remove filters for good at each event, or mask them until the end of training."""
    masks: Literal["after_step", "before_forward"] = "after_step"
    """When masked weights are set to zero again (`at_end` only)."""

    @model_validator(mode="after")
    def _window(self) -> GradualSettings:
        if self.begin >= self.finish:
            raise ValueError(f"begin {self.begin:g} must lie before finish {self.finish:g}")
        return self

    def events(self, total: int, fraction: float) -> dict[int, float]:
        """As of `schedule_events`."""
        return schedule_events(self.schedule, total, fraction, (self.begin, self.finish), self.span)


# ---------------------------------------------------------------------------------------- hooks


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

    def in_graph(self, trainer: Trainer) -> Sequence[Any]:
        return list(self.masks.values())

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

    def needs_host(self, iteration: int) -> bool:
        return iteration + 1 in self.events

    def in_graph(self, trainer: Trainer) -> Sequence[Any]:
        return ()

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

    def mean(self, total: int, cost: Callable[[list[int]], float]) -> float:
        """Mean of a cost by widths over the `total` steps in which the network becomes narrower."""
        ends = [done for done, _ in self.log[1:]] + [total]
        return sum((end - begin) * cost(widths) for (begin, widths), end in zip(self.log, ends)) / total

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
