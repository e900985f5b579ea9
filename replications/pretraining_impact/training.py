"""How a phase is trained: the shared recipe, and the one-cycle policy of the author's later code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import model_validator
from torch import nn

from common.core.data import Dataset
from common.core.hooks import NotCapturable
from common.core.identity import stream
from common.core.recipe import NotNegative, Recipe
from common.core.run import Context
from common.core.trainer import Decays, Hooks, Trainer
from replications.pretraining_impact.gradual import level


class Training(Recipe):
    """A phase of training."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    nesterov: bool = True
    weight_decay: NotNegative = 5e-4
    decay: Literal["all", "weights", "not_depthwise"] = "weights"
    one_cycle: bool = False
    """With `adam`, the one-cycle policy in place of `schedule`: the first of `betas` moves with the rate."""

    @model_validator(mode="after")
    def _cycles_with_adam(self) -> Self:
        if self.one_cycle and self.optimizer != "adam":
            raise ValueError("one_cycle needs optimizer adam")
        return self

    def rates(self, per_epoch: int) -> list[float]:
        if not self.one_cycle:
            return super().rates(per_epoch)
        total = self.epochs * per_epoch
        return [one_cycle_policy(t / total, self.learning_rate)[0] for t in range(total)]

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
        trainer = super().trainer(context, model, hooks, data=data, decays=decays, seed=seed)
        if self.one_cycle:
            trainer.add_hook(OneCycleMomentum(self.epochs * len(trainer.batches)))
        return trainer

    def phase(
        self, context: Context, model: nn.Module, images: Dataset, name: str, hooks: Sequence[Hooks] = ()
    ) -> Trainer:
        """A trainer of one phase, with its own order of the images, in which runs of equal seed are paired."""
        seed = stream(context.run.seed, "order", name)
        trainer = self.trainer(context, model, hooks, data=images, seed=seed)
        # epochs have a few iterations only: measuring after each would be a quarter of the work
        trainer.validation = None
        return trainer

    def fitted(
        self, context: Context, model: nn.Module, images: Dataset, name: str, hooks: Sequence[Hooks] = ()
    ) -> Trainer:
        """The trainer of a phase, at its end."""
        trainer = self.phase(context, model, images, name, hooks)
        trainer.fit(self.rates(len(trainer.batches)), name)
        return trainer

    def macs(self, images: Dataset, per_image: float) -> int:
        """Forward MACs of the phase."""
        return round(self.epochs * len(images.labels["train"]) * per_image)


class OneCycleMomentum(Hooks):
    """The momentum of one-cycle training over `total` iterations."""

    def __init__(self, total: int):
        self.total = total

    def gradients_ready(self, trainer: Trainer) -> None:
        momentum = one_cycle_policy(trainer.iteration / self.total, 1.0)[1]
        for group in trainer.optimizer.param_groups:
            group["betas"] = (momentum, group["betas"][1])

    def in_graph(self, trainer: Trainer) -> Sequence[Any]:
        raise NotCapturable("the momentum of one-cycle training is another one in every step")


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
