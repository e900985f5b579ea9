"""Equal footing: one network, one data set and one budget of training epochs for every method.

A paper takes part by an entry in `CONTENDERS` of its `contender.py`: a name, and a function that gets a `Contest`, trains for
`arena.epochs` epochs in total (search and retraining included), leaves a network with the share `keep` of the dense
network's parameters, and returns `contest.outcome(trainer)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from common.core import schedules
from common.core.data import Dataset
from common.core.failures import Unreachable
from common.core.identity import stream
from common.core.models import Network, build
from common.core.pruning.counting import cost
from common.core.pruning.masks import prunable
from common.core.run import Context, Outcome, Run
from common.core.trainer import Hooks, Trainer
from common.settings import Count, Rate, Share, Strict

_BACKWARD_AND_FORWARD = 3  # training costs about three forward passes


class Arena(Strict):
    """What all contenders share."""

    architecture: str = "vgg_t8"
    epochs: Count = 20
    batch_size: Count = 64
    learning_rate: Rate = 0.1
    milestones: tuple[Share, ...] = (0.5, 0.75)
    """When the dense learning rate drops to a tenth, as shares of the epochs."""
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4


@dataclass(frozen=True)
class Contest:
    """One run of a contender: its seed and target, and the means that all contenders share."""

    run: Run
    context: Context
    arena: Arena

    @property
    def keep(self) -> float:
        """Share of the dense network's parameters that may stay."""
        return 1 - self.run.target

    @cached_property
    def data(self) -> Dataset:
        """The data set on the run's device."""
        return self.context.dataset(self.run.settings["data"])

    @property
    def per_epoch(self) -> int:
        """Iterations in an epoch."""
        return math.ceil(len(self.data.labels["train"]) / self.arena.batch_size)

    def network(self, widths: Sequence[int] | None = None) -> Network:
        """The network of the arena, or one of other widths, freshly initialised from the run's seed, on its device."""
        return self.context.compute.place(self._build(widths, seed=stream(self.run.seed, "init")))

    def shape_of(self, widths: Sequence[int] | None = None) -> Network:
        """As `network`, without memory or values, for counting."""
        return self._build(widths, device="meta")

    def _build(self, widths: Sequence[int] | None, **options: Any) -> Network:
        shape = self.data.image_shape
        return build(
            self.arena.architecture, classes=self.data.classes, image_shape=shape, widths=widths, **options
        )

    @cached_property
    def parameters(self) -> int:
        """Parameters of the dense network."""
        return sum(parameter.numel() for parameter in self.shape_of().parameters())

    def sparsity(self, model: nn.Module) -> float:
        """Share of the prunable weights that must be zero so that `keep` of all parameters are left.

        Raises Unreachable when the parameters that cannot be pruned are too many for that.
        """
        candidates = sum(weight.numel() for weight in prunable(model).values())
        share = self.run.target * self.parameters / candidates
        if share >= 1:
            most = candidates / self.parameters
            raise Unreachable(
                f"only a share of {most:.3f} of the parameters are prunable weights; {self.run.target} must go"
            )
        return share

    def trainer(self, model: nn.Module, hooks: Hooks | Sequence[Hooks] = ()) -> Trainer:
        """A Trainer with the optimiser of the arena."""
        arena = self.arena
        return self.context.trainer(
            model,
            self.data,
            arena.batch_size,
            hooks,
            momentum=arena.momentum,
            nesterov=arena.nesterov,
            weight_decay=arena.weight_decay,
        )

    def dense_rates(self, epochs: int) -> list[float]:
        """The dense learning rates for a training of `epochs` epochs, one per iteration."""
        milestones = [share * epochs for share in self.arena.milestones]
        return schedules.multistep(self.arena.learning_rate, epochs, self.per_epoch, milestones)

    def outcome(self, trainer: Trainer, forward_macs: float | None = None, **details: Any) -> Outcome:
        """Scores, cost and curves of the trained network.

        forward_macs: MACs for one image summed over all epochs, where they changed on the way. Raises Unreachable when
        training did not take the epochs of the arena.
        """
        if trainer.epochs_done > self.arena.epochs:
            raise Unreachable(
                f"trained for {trainer.epochs_done} epochs; the arena allows {self.arena.epochs}"
            )
        shape = self.data.image_shape
        costs = cost(trainer.model, shape, dense=cost(self.shape_of(), shape))
        if forward_macs is None:
            forward_macs = costs["macs"] * trainer.epochs_done
        images = len(self.data.labels["train"])
        costs["training_macs"] = int(_BACKWARD_AND_FORWARD * forward_macs * images)
        return Outcome(self.context.scores(trainer, self.data), costs, trainer.history, details=details)


Contender = Callable[[Contest], Outcome]
