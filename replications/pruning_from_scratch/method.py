"""Pruning from scratch (Wang et al., AAAI 2020): gates, learned on a network whose weights are never trained.

A gate multiplies the output of a batch norm, scale and shift both, before the activation. The gates of the
whole network are learned while everything else stays as it was initialised; the largest ones tell which
channels a small network gets (`structure.py`). That network is then built afresh and trained like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from common.core import schedules
from common.core.data import Dataset
from common.core.models import Network, module_of
from common.core.recipe import Batched, Recipe
from common.core.run import Context
from common.core.trainer import Hooks, Trainer
from common.settings import Count, Rate, Share, Strict

EXPANSION = 1.25
REFERENCE_BATCH = 256
"""The batch size for which the cosine recipe states its learning rate."""


class GateSettings(Batched):
    """How gates are learned; Adam, its learning rate constant."""

    epochs: Count = 20
    batch_size: Count = 32
    learning_rate: Rate = 0.01
    weight: Annotated[float, Field(ge=0)] = 0.5
    """Lambda, the weight of the penalty on the mean gate."""
    level: Literal["budget"] | Share = 0.5
    """s, the mean gate that the penalty aims at; `budget` is 1 - target, which needs gates for every target.
    """

    @property
    def aim(self) -> float:
        """The level as a number; that of a budget is one from the run on."""
        if isinstance(self.level, str):
            raise ValueError(f"gates of level {self.level!r} are learned for a target")
        return self.level


class Training(Recipe):
    """As the paper's release has it: the rate changes between epochs alone, milestones are rounded down to an epoch.

    For `cosine` the learning rate is stated for a batch of 256 and grows with the batch size.
    """

    schedule: Literal["multistep", "cosine"] = "multistep"

    def rates(self, per_epoch: int) -> list[float]:
        course = self.schedule, self.learning_rate, self.epochs, per_epoch
        return learning_rates(*course, drops=self.milestones, batch_size=self.batch_size)


class FineTuning(Strict):
    """What is other in the training that follows the removal of channels from a trained network."""

    learning_rate: Rate = 0.1
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5, 0.75)
    """Shares of its epochs at which the rate drops; none for a constant one."""


class Gates(Hooks):
    """One gate per channel of the named batch norms of `model`, at first 1; everything else is frozen.

    `weight` and `level` are lambda and s of the penalty (see `regulariser`). Only `values` [N] is for the
    optimiser (`optimizer`); the forward pass uses batch-norm scales and shifts multiplied by the gates, which
    is the same as multiplying the outputs. `epochs` holds a copy of the gates after each epoch.
    Source: learn_gates.py of the paper's release.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], weight: float, level: float):
        model.requires_grad_(False)
        self.weight, self.level = weight, level
        self._names = list(names)
        norms = [module_of(model, name, nn.BatchNorm2d) for name in names]
        self._affine = [(norm.weight, norm.bias) for norm in norms]
        self._sizes = [norm.num_features for norm in norms]
        self.values = nn.Parameter(norms[0].weight.new_ones(sum(self._sizes)))
        self.epochs: list[Tensor] = []

    def optimizer(self) -> torch.optim.Adam:
        """Adam over the gates alone (betas .9 and .999, eps 1e-8, no weight decay)."""
        return torch.optim.Adam([self.values])

    def layers(self, values: Tensor | None = None) -> list[Tensor]:
        """`values` [N] (default: the gates as they are now) cut into one vector for each gated layer."""
        return list((self.values.detach() if values is None else values).split(self._sizes))

    def weights(self, trainer: Trainer) -> dict[str, Tensor]:
        effective: dict[str, Tensor] = {}
        for name, (scale, shift), gate in zip(self._names, self._affine, self.values.split(self._sizes)):
            effective |= {f"{name}.weight": scale * gate, f"{name}.bias": shift * gate}
        return effective

    def loss(self, trainer: Trainer) -> Tensor:
        return regulariser(self.values, self.weight, self.level)

    @torch.no_grad()
    def stepped(self, trainer: Trainer) -> None:
        # a gate that reaches 0 stays there: neither the activation nor |g| has a gradient at 0
        self.values.clamp_(0, 1)

    def in_graph(self, trainer: Trainer) -> Sequence[Any]:
        return [self.values, *(tensor for pair in self._affine for tensor in pair), self.weight, self.level]

    def epoch_ended(self, trainer: Trainer, epoch: int) -> None:
        self.epochs.append(self.values.detach().clone())

    def state(self) -> dict[str, Any]:
        return {"values": self.values.detach().clone(), "epochs": list(self.epochs)}

    def load_state(self, trainer: Trainer, state: dict[str, Any]) -> None:
        self.values.data.copy_(state["values"])
        self.epochs = [values.to(self.values.device) for values in state["epochs"]]


def regulariser(values: Tensor, weight: float, level: float) -> Tensor:
    """weight * (mean |g| - level)^2 over all gates of a network, a scalar.

    It draws the mean gate to `level` from both sides; its gradient at a gate of exactly 0 is 0.
    """
    return weight * (values.abs().mean() - level) ** 2


def density(values: Tensor) -> float:
    """The share of gates that are not exactly 0."""
    return (values != 0).double().mean().item()


def kept_epoch(accuracies: Sequence[float], densities: Sequence[float], level: float) -> tuple[int, bool]:
    """Which epoch's gates are kept, and whether an eligible one was found.

    Eligible are epochs whose density is at most `level`; the first of the best validation accuracy wins.
    Without any (or with accuracies of 0 only) it is the last epoch.
    """
    eligible = [i for i, value in enumerate(densities) if value <= level and accuracies[i] > 0]
    if not eligible:
        return len(accuracies) - 1, False
    return max(eligible, key=lambda i: (accuracies[i], -i)), True


def learned(
    context: Context, data: Dataset, gated: Sequence[str], model: Network, options: GateSettings
) -> tuple[Trainer, Gates, dict[str, Any]]:
    """Gates of `model` at the norms `gated`, all its weights frozen, as they were after the kept epoch.

    Returns the trainer with them in place, the gates, and as `epoch` and `eligible` what `kept_epoch` says.
    """
    gates = Gates(context.compute.place(model), gated, options.weight, options.aim)
    trainer = context.trainer(model, data, options.batch_size, hooks=gates, optimizer=gates.optimizer())
    trainer.fit([options.learning_rate] * (options.epochs * len(trainer.batches)), phase="gates")
    densities = [density(values) for values in gates.epochs]
    for row, values, share in zip(trainer.history, gates.epochs, densities, strict=True):
        row |= {"mean_gate": values.mean().item(), "density": share}
    accuracies = [row["validation_accuracy"] for row in trainer.history]
    epoch, eligible = kept_epoch(accuracies, densities, options.aim)
    gates.values.data.copy_(gates.epochs[epoch])
    return trainer, gates, {"epoch": epoch, "eligible": eligible}


def budget_epochs(base: float, target: float) -> int:
    """Epochs in which a network that is `target` cheaper costs what `base` of the base network do; rounded down."""
    return int((1 / (1 - target)) * base)


def milestones(epochs: int, shares: Sequence[float] = (0.5, 0.75)) -> list[int]:
    """Epochs (from 0) at which the learning rate drops, rounded down."""
    return [int(share * epochs) for share in shares]


def learning_rates(
    schedule: Literal["multistep", "cosine"],
    rate: float,
    epochs: int,
    per_epoch: int,
    *,
    drops: Sequence[float] = (0.5, 0.75),
    batch_size: int = REFERENCE_BATCH,
) -> list[float]:
    """One rate per iteration, the same throughout an epoch.

    multistep: a tenth at each of the shares `drops` of training, rounded down to an epoch. cosine: towards 0,
    from a `rate` that grows with the batch size (as given for 256 images). Source: scripts of the paper's
    release.
    """
    if schedule == "multistep":
        return schedules.multistep(rate, epochs, per_epoch, milestones(epochs, drops))
    by_epoch = schedules.cosine(rate * batch_size / REFERENCE_BATCH, epochs, per_epoch=1)
    return [value for value in by_epoch for _ in range(per_epoch)]
