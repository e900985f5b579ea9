"""Equal footing: one network, one data set and one budget of training epochs for every method.

A paper takes part by an entry in `CONTENDERS` of its `contender.py`: a name, a function and what is tried for it. The
function gets a `Contest`, trains for `arena.epochs` epochs in total (search and retraining included), leaves a network with
the share `keep` of the dense network's parameters, and returns `contest.outcome(trainer)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from common.core.data import Dataset
from common.core.failures import Unreachable
from common.core.models import Network
from common.core.pruning.counting import cost
from common.core.pruning.masks import prunable
from common.core.recipe import Recipe
from common.core.run import Cell, Context, Outcome
from common.core.trainer import Hooks, Trainer

TRIALS = 3
"""Settings that are tried for every contender, at each target."""
_BACKWARD_AND_FORWARD = 3  # training costs about three forward passes


@dataclass(frozen=True)
class Contest:
    """One run of a contender: its seed and target, and the means that all contenders share.

    arena: optimiser, epochs and learning rates of the dense network.
    """

    context: Context
    arena: Recipe

    @property
    def cell(self) -> Cell:
        """The network and its images."""
        return self.context.job.cell

    @property
    def target(self) -> float:
        """Share of the dense network's parameters that must go."""
        return self.context.job.target

    @property
    def keep(self) -> float:
        """Share of the dense network's parameters that may stay."""
        return 1 - self.target

    @property
    def seed(self) -> int:
        """Of the run; what a method draws comes from a stream of it."""
        return self.context.job.seed

    @property
    def data(self) -> Dataset:
        """The data set on the run's device."""
        return self.context.data

    def network(self, widths: Sequence[int] | None = None) -> Network:
        """The network of the arena, or one of other widths, freshly initialised from the run's seed, on its device."""
        return self.context.network(widths=widths)

    def shape_of(self, widths: Sequence[int] | None = None) -> Network:
        """As `network`, without memory or values, for counting."""
        return self.cell.build(self.data, widths=widths, device="meta")

    def size_of(self, widths: Sequence[int] | None = None) -> int:
        """Parameters of the network of these widths; of the dense one by default."""
        return sum(parameter.numel() for parameter in self.shape_of(widths).parameters())

    @cached_property
    def parameters(self) -> int:
        """Parameters of the dense network."""
        return self.size_of()

    def sparsity(self, model: nn.Module) -> float:
        """Share of the prunable weights that must be zero so that `keep` of all parameters are left.

        Raises Unreachable when the parameters that cannot be pruned are too many for that.
        """
        candidates = sum(weight.numel() for weight in prunable(model).values())
        share = self.target * self.parameters / candidates
        if share >= 1:
            most = candidates / self.parameters
            raise Unreachable(
                f"only a share of {most:.3f} of the parameters are prunable weights; {self.target} must go"
            )
        return share

    def trainer(self, model: nn.Module, hooks: Hooks | Sequence[Hooks] = ()) -> Trainer:
        """A Trainer with the optimiser of the arena."""
        return self.arena.trainer(self.context, model, hooks)

    def part(self, share: float) -> int:
        """A share of the arena's epochs in whole ones: at least one, and one less than all at most."""
        return min(max(1, round(share * self.arena.epochs)), self.arena.epochs - 1)

    def rates(self, epochs: int, learning_rate: float | None = None) -> list[float]:
        """The arena's course of the learning rate in a training of `epochs` epochs, one per iteration.

        learning_rate: the highest one; that of the arena by default.
        """
        changes = {"epochs": epochs, "learning_rate": learning_rate or self.arena.learning_rate}
        return self.arena.changed(**changes).rates(self.arena.per_epoch(self.data))

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
        return self.context.measured(trainer, costs=costs, details=details)


@dataclass(frozen=True)
class Contender:
    """A method, and the settings of which the one with the best validation accuracy is chosen at each target.

    contend: a function of a contest, and of a setting's values by name. settings: as many as everybody has. Raises
    ValueError for another number.
    """

    contend: Callable[..., Outcome]
    settings: Sequence[Mapping[str, Any]]

    def __post_init__(self) -> None:
        if len(self.settings) != TRIALS:
            raise ValueError(f"a contender has {TRIALS} settings that are tried, not {len(self.settings)}")
