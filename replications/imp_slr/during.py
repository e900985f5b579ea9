"""The methods that prune during training as `params.yaml` has them: hyper-parameters, and the hooks that they make."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Self

from pydantic import Field
from torch import nn

from common.core.pruning.masks import Allocation
from common.core.recipe import Momentum, NotNegative, Recipe
from common.settings import Count, Strict
from replications.imp_slr import baselines


class Baseline(Strict):
    """Hyper-parameters of one method."""

    def recipe(self, dense: Recipe) -> Recipe:
        """How it trains, where dense networks train by `dense`."""
        return dense

    def hook(
        self, model: nn.Module, sparsity: float, recipe: Recipe, per_epoch: int
    ) -> baselines.DuringTraining:
        """Its part in the training of `model` by `recipe`, with `per_epoch` iterations in an epoch."""
        raise NotImplementedError


class Preparing(Baseline):
    """A method that ends in an ordinary pruning and retraining."""


class Swept(Baseline):
    """A method that aims at no sparsity: it is run with several values, and IMP at the sparsity that each reaches."""

    swept: ClassVar[str]
    """The field that holds the values."""

    def points(self) -> Iterator[tuple[float, Self]]:
        """Each value, and the hyper-parameters with it alone."""
        for value in getattr(self, self.swept):
            yield value, self.model_copy(update={self.swept: (value,)})


class GMP(Baseline):
    interval: Count = 1
    """Epochs between prunings."""
    recovering: bool = False
    """Whether pruned weights may come back."""
    allocation: Allocation = "global"

    def hook(self, model: nn.Module, sparsity: float, recipe: Recipe, per_epoch: int) -> baselines.GMP:
        return baselines.GMP(model, sparsity, recipe.epochs, self.interval, self.recovering, self.allocation)


class DPF(Baseline):
    interval: Count = 1
    """Epochs between changes of the target."""

    def hook(self, model: nn.Module, sparsity: float, recipe: Recipe, per_epoch: int) -> baselines.DPF:
        return baselines.DPF(model, sparsity, recipe.epochs, self.interval)


class GSM(Preparing):
    momentum: Momentum = 0.99
    rank_over: baselines.RankOver = "all"

    def recipe(self, dense: Recipe) -> Recipe:
        return dense.changed(momentum=self.momentum)

    def hook(self, model: nn.Module, sparsity: float, recipe: Recipe, per_epoch: int) -> baselines.GSM:
        return baselines.GSM(model, sparsity, self.rank_over)


class LC(Preparing):
    weight_decay: NotNegative = 5e-3
    rank_over: baselines.RankOver = "all"
    growing: bool = False
    """Let the weight decay grow as in the 2022 code."""

    def recipe(self, dense: Recipe) -> Recipe:
        return dense.changed(weight_decay=self.weight_decay)

    def hook(self, model: nn.Module, sparsity: float, recipe: Recipe, per_epoch: int) -> baselines.LC:
        growth = baselines.lc_weight_decays(self.weight_decay, recipe.epochs) if self.growing else None
        return baselines.LC(model, sparsity, self.weight_decay, self.rank_over, growth)


class DNW(Baseline):
    def hook(self, model: nn.Module, sparsity: float, recipe: Recipe, per_epoch: int) -> baselines.DNW:
        return baselines.DNW(model, sparsity)


class STR(Swept):
    swept = "weight_decays"
    initial: float = -5.0
    """Every layer's threshold is sigmoid of a learnt number that starts here."""
    weight_decays: Annotated[tuple[NotNegative, ...], Field(min_length=1)] = (1e-2, 2e-2)
    """They drive the sparsity."""

    def recipe(self, dense: Recipe) -> Recipe:
        (weight_decay,) = self.weight_decays
        return dense.changed(weight_decay=weight_decay)

    def hook(self, model: nn.Module, sparsity: float, recipe: Recipe, per_epoch: int) -> baselines.STR:
        return baselines.STR(model, self.initial)


class CS(Swept):
    swept = "initials"
    initials: Annotated[tuple[float, ...], Field(min_length=1)] = (-0.1, 0.0)
    """First value of the mask parameters."""
    beta_final: Annotated[float, Field(ge=1)] = 200.0
    penalty: NotNegative = 1e-5
    double_decay: bool = False

    def hook(self, model: nn.Module, sparsity: float, recipe: Recipe, per_epoch: int) -> baselines.CS:
        (initial,) = self.initials
        numbers = initial, self.beta_final, self.penalty, recipe.epochs * per_epoch, recipe.weight_decay
        return baselines.CS(model, *numbers, self.double_decay)


class DST(Swept):
    swept = "penalties"
    penalties: Annotated[tuple[NotNegative, ...], Field(min_length=1)] = (3e-3, 1e-2)
    """They drive the sparsity."""
    double_decay: bool = False

    def hook(self, model: nn.Module, sparsity: float, recipe: Recipe, per_epoch: int) -> baselines.DST:
        (penalty,) = self.penalties
        return baselines.DST(model, penalty, recipe.weight_decay, self.double_decay)


Baselines = dict[str, Baseline]


class DuringSettings(Strict):
    """Which methods IMP is compared with, and their hyper-parameters; null leaves one out."""

    gmp: GMP | None = GMP()
    dpf: DPF | None = DPF()
    gsm: GSM | None = None
    lc: LC | None = None
    dnw: DNW | None = None
    str: STR | None = None
    cs: CS | None = None
    dst: DST | None = None

    @property
    def chosen(self) -> Baselines:
        """Those that are compared, by name."""
        return {name: baseline for name, baseline in self if baseline is not None}
