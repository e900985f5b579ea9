"""How a network is trained: one optimiser, so many epochs, one course of the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from common.core import schedules
from common.core.data import Dataset
from common.core.run import Context
from common.core.trainer import Decays, Hooks, Trainer, decay_groups
from common.settings import Count, Rate, SettingsError, Share, Sparsity, Strict

NotNegative = Annotated[float, Field(ge=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
_WHOLE = 0.01
"""What an iteration may be off by, as a share such as 1/3 is written with some digits only."""


class Batched(Strict):
    """Base of what trains in batches."""

    batch_size: Count


class Recipe(Batched):
    """A training from its first to its last iteration; `changed` makes another one of it."""

    epochs: Count
    learning_rate: Rate
    """The highest one."""
    schedule: Literal["multistep", "constant", "linear", "cosine", "exponential"] = "multistep"
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5, 0.75)
    """Of `multistep`: shares of the epochs at which the rate drops. Each must fall on a whole iteration."""
    gamma: Share = 0.1
    """Factor of a drop; of `exponential`, per iteration."""
    end: NotNegative = 0.0
    """Last rate of `linear` and `cosine`."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs at the start in which the rate rises from 0."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """`adam` is AdamW."""
    momentum: Momentum = 0.9
    """Of `sgd`."""
    nesterov: bool = False
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """Of `adam`; so is epsilon."""
    epsilon: Rate = 1e-8
    weight_decay: NotNegative = 0.0
    decay: Literal["all", "weights", "not_depthwise"] = "all"
    """Which parameters decay: `weights` spares biases and batch norms, `not_depthwise` depthwise convolutions as well."""
    label_smoothing: Sparsity = 0.0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if any(one >= other for one, other in pairwise(self.milestones)):
            raise ValueError("milestones must rise")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be fewer than the {self.epochs} epochs")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self

    def changed(self, **changes: Any) -> Self:
        """The same with other values of some fields."""
        return type(self).model_validate(self.model_dump() | changes)

    def per_epoch(self, data: Dataset) -> int:
        """Iterations in an epoch on the training images of `data`."""
        return -(-len(data.labels["train"]) // self.batch_size)

    def drops(self, per_epoch: int) -> list[int]:
        """The iterations (from 0) before which `multistep` drops, with `per_epoch` iterations in an epoch.

        Raises SettingsError that names the milestone which falls on no whole one.
        """
        total, found = self.epochs * per_epoch, []
        for number, share in enumerate(self.milestones):
            found.append(round(share * total))
            if abs(share * total - found[-1]) > _WHOLE:
                raise SettingsError(
                    f"milestones[{number}] = {share:g}: must fall on a whole iteration, not on {share * total:.2f} of "
                    f"{total} ({self.epochs} epochs of {per_epoch})"
                )
        return found

    def rates(self, per_epoch: int) -> list[float]:
        """The learning rates, one per iteration. Raises SettingsError as `drops` does."""
        course = self.learning_rate, self.epochs, per_epoch
        if self.schedule == "multistep":
            milestones = [drop / per_epoch for drop in self.drops(per_epoch)]
            return schedules.multistep(*course, milestones, self.gamma, self.warmup_epochs)
        if self.schedule == "constant":
            return schedules.constant(*course, self.warmup_epochs)
        if self.schedule == "exponential":
            return schedules.exponential(*course, self.gamma, self.warmup_epochs)
        shape = schedules.linear if self.schedule == "linear" else schedules.cosine
        return shape(*course, self.end, self.warmup_epochs)

    def trainer(
        self,
        context: Context,
        model: nn.Module,
        hooks: Hooks | Sequence[Hooks] = (),
        *,
        data: Dataset | None = None,
        decays: Decays | None = None,
        seed: int | None = None,
    ) -> Trainer:
        """A trainer of `model` with this optimiser, as of `Context.trainer`; `rates` are for its `fit`.

        data: in place of the cell's. decays: in place of `decay`. seed: of order and augmentation, in place of the run's.
        """
        decays = decays or self._decays(model)
        optimizer = None
        if self.optimizer == "adam":
            groups = decay_groups(context.compute.place(model), decays)
            optimizer = torch.optim.AdamW(
                groups, lr=0.0, betas=self.betas, eps=self.epsilon, weight_decay=self.weight_decay
            )
        return context.trainer(
            model,
            data or context.data,
            self.batch_size,
            hooks,
            seed,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            decays=decays,
            label_smoothing=self.label_smoothing,
            optimizer=optimizer,
        )

    def _decays(self, model: nn.Module) -> Decays | None:
        if self.decay == "all":
            return None
        spared = set()
        if self.decay == "not_depthwise":
            convolutions = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d))
            spared = {f"{name}.weight" for name, convolution in convolutions if convolution.groups > 1}
        return lambda name, parameter: parameter.ndim > 1 and name not in spared
