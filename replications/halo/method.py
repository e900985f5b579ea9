"""HALO: one trainable shrinkage coefficient per weight, and the penalties that it is compared with.

Seto, Wells, Zhang 2021 (arXiv 2008.10183). All penalties are sums, not means, over the penalised scalars w_j,
added to the mean cross-entropy of a batch:

    HALO   xi * sum |w_j| / lambda_j^2 + psi * sum |lambda_j|       one trainable lambda_j for each w_j
    SWS    xi * sum |w_j| / lambda^2 + psi * lambda^2               one trainable lambda for the network
    L1     xi / lambda_init^2 * sum |w_j|
    MCP    sum of xi |w_j| - w_j^2 / (2 psi) up to the knot |w_j| = xi psi, and psi xi^2 / 2 beyond it

Gradients are in closed form with sign(0) = 0, and are added to those of the cross-entropy before the
optimiser's step. Lambdas take their own step of SGD at the same moment: both updates see the old
weights and the old lambdas.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.core.failures import Diverged
from common.core.pruning.masks import Layers, prunable
from common.core.trainer import Hooks, Trainer, gradients_of

Coupling = Literal["intended", "official"]
TargetMode = Literal["L1", "L2"]

# lambdas beyond this leave their weight practically without a penalty
LARGE_LAMBDA = 2.0
_ALL = slice(None)
_LARGE_TENSOR = 2**18
"""Entries of a tensor that takes its step alone on a CPU, so that what is computed from it is still in the caches."""


def penalised(model: nn.Module, layers: Layers) -> list[nn.Parameter]:
    """All parameters of the prunable layers in module order: each layer's weight, then its bias if any."""
    found = []
    for name, weight in prunable(model, layers).items():
        bias = getattr(model.get_submodule(name.rpartition(".")[0]), "bias", None)
        found += [weight] if bias is None else [weight, bias]
    return found


# ------------------------------------------------------------------------------------------ penalties


class Penalty(Hooks):
    """A penalty whose gradient joins that of the loss. `log` gets one row of statistics per epoch.

    tensors: the penalised weights (and biases). xi, psi: as in the formulas above.
    """

    def __init__(self, tensors: Iterable[Tensor], xi: float, psi: float):
        self.tensors = list(tensors)
        self.xi, self.psi = xi, psi
        self.log: list[dict[str, Any]] = []

    def value(self) -> Tensor:
        """The penalty at the current weights (scalar)."""
        raise NotImplementedError

    def weight_gradients(self) -> list[Tensor]:
        """Its derivative for each weight tensor."""
        raise NotImplementedError

    def statistics(self) -> dict[str, float]:
        """Numbers for the log. Raises Diverged when the penalty is not finite."""
        value = self.value().item()
        if not math.isfinite(value):
            raise Diverged(f"the {type(self).__name__} penalty is {value}: a lambda is zero or out of range")
        return {"penalty": value}

    @torch.no_grad()
    def gradients_ready(self, trainer: Trainer) -> None:
        torch._foreach_add_(gradients_of(self.tensors), self.weight_gradients())

    def in_graph(self, trainer: Trainer) -> Sequence[Any]:
        return [*self.tensors, self.xi, self.psi]

    @torch.no_grad()
    def epoch_ended(self, trainer: Trainer, epoch: int) -> None:
        self.log.append(self.statistics())

    def state(self) -> dict[str, Any]:
        return {"log": self.log}

    def load_state(self, trainer: Trainer, state: dict[str, Any]) -> None:
        self.log = list(state["log"])

    def _norm(self) -> Tensor:
        """Sum of all |w|."""
        return torch.stack(torch._foreach_norm(self.tensors, 1)).sum()


class L1(Penalty):
    """The lasso: HALO with all lambdas frozen at `lambda_init`.

    psi is in the logged value alone (psi * lambda_init a weight), as in the authors' code; it has no effect.
    """

    def __init__(self, tensors: Iterable[Tensor], xi: float, psi: float = 0.0, lambda_init: float = 1.0):
        super().__init__(tensors, xi, psi)
        self.lambda_init = lambda_init

    def value(self) -> Tensor:
        constant = self.psi * abs(self.lambda_init) * sum(w.numel() for w in self.tensors)
        return self.xi / self.lambda_init**2 * self._norm() + constant

    def weight_gradients(self) -> list[Tensor]:
        gradients = torch._foreach_sign(self.tensors)
        torch._foreach_mul_(gradients, self.xi / self.lambda_init**2)
        return list(gradients)


class MCP(Penalty):
    """The minimax concave penalty; psi sets the knot xi * psi, beyond which a weight is not pulled at all."""

    def values(self) -> list[Tensor]:
        """The penalty of every single weight, in the shapes of the weights."""
        clipped = [w.abs().clamp(max=self.xi * self.psi) for w in self.tensors]
        return [self.xi * size - size.square() / (2 * self.psi) for size in clipped]

    def value(self) -> Tensor:
        return torch.stack([part.sum() for part in self.values()]).sum()

    def weight_gradients(self) -> list[Tensor]:
        gradients = torch._foreach_abs(self.tensors)
        torch._foreach_mul_(gradients, -1 / self.psi)
        torch._foreach_add_(gradients, self.xi)
        torch._foreach_clamp_min_(gradients, 0.0)
        torch._foreach_mul_(gradients, torch._foreach_sign(self.tensors))
        return list(gradients)


@dataclass(frozen=True)
class LambdaTraining:
    """How lambdas are trained: SGD with momentum and weight decay, no Nesterov.

    rates: one learning rate an iteration. psi_by_epoch: replaces the penalty's psi epoch by epoch, if given.
    """

    rates: Sequence[float]
    momentum: float = 0.9
    weight_decay: float = 0.0
    init: float = 1.0
    psi_by_epoch: Sequence[float] | None = None


class _Shrinkage(Penalty):
    """A penalty with trainable lambdas; `lambdas` are real numbers, never clamped, in float32 or wider."""

    def __init__(self, tensors: Iterable[Tensor], xi: float, psi: float, training: LambdaTraining):
        super().__init__(tensors, xi, psi)
        self.training = training
        self.lambdas = self._initial()
        self._momenta = [torch.zeros_like(part) for part in self.lambdas]

    def _initial(self) -> list[Tensor]:
        raise NotImplementedError

    def accumulate(self, part: slice, of_weights: list[Tensor], of_lambdas: list[Tensor]) -> None:
        """Add the derivatives for a part of the weights, and for its lambdas, at the current values."""
        raise NotImplementedError

    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Derivatives for the weights and for the lambdas, at the current values."""
        of_weights = [torch.zeros_like(tensor) for tensor in self.tensors]
        of_lambdas = [torch.zeros_like(tensor) for tensor in self.lambdas]
        self.accumulate(_ALL, of_weights, of_lambdas)
        return of_weights, of_lambdas

    def parts(self) -> list[slice]:
        """Which tensors take their step together; what comes first has no part in the derivatives of the others."""
        return [_ALL]

    def weight_gradients(self) -> list[Tensor]:
        return self.gradients()[0]

    def epoch_started(self, trainer: Trainer, epoch: int) -> None:
        # the trainer may have moved the network, or changed its memory format, since the lambdas were made
        self.lambdas, self._momenta = self._placed(self.lambdas), self._placed(self._momenta)
        if self.training.psi_by_epoch is not None:
            self.psi = self.training.psi_by_epoch[epoch]

    def _placed(self, own: list[Tensor]) -> list[Tensor]:
        """The same tensors, on the device of the weights and in their memory format."""
        return [
            old
            if (old.device, old.dtype, old.stride()) == (new.device, new.dtype, new.stride())
            else new.copy_(old)
            for new, old in zip(self._initial(), own, strict=True)
        ]

    @torch.no_grad()
    def gradients_ready(self, trainer: Trainer) -> None:
        for part in self.parts():
            lambdas, momenta = self.lambdas[part], self._momenta[part]
            torch._foreach_mul_(momenta, self.training.momentum)
            self.accumulate(part, gradients_of(self.tensors[part]), momenta)
            if self.training.weight_decay:
                torch._foreach_add_(momenta, lambdas, alpha=self.training.weight_decay)
            rate = trainer.at_iteration(self.training.rates)
            if isinstance(rate, Tensor):
                torch._foreach_sub_(lambdas, torch._foreach_mul(momenta, rate))
            else:
                torch._foreach_add_(lambdas, momenta, alpha=-rate)

    def in_graph(self, trainer: Trainer) -> Sequence[Any]:
        return [*super().in_graph(trainer), *self.lambdas, *self._momenta, self.training]

    def statistics(self) -> dict[str, float]:
        sizes = torch.cat([part.flatten() for part in self.lambdas]).abs()
        return super().statistics() | {
            "lambda_min": sizes.min().item(),
            "lambda_median": sizes.median().item(),
            "lambda_max": sizes.max().item(),
            "lambda_above_2": int((sizes > LARGE_LAMBDA).sum()),
        }

    def state(self) -> dict[str, Any]:
        return super().state() | {"lambdas": self.lambdas, "momenta": self._momenta}

    def load_state(self, trainer: Trainer, state: dict[str, Any]) -> None:
        super().load_state(trainer, state)
        for own, saved in ((self.lambdas, state["lambdas"]), (self._momenta, state["momenta"])):
            for tensor, value in zip(own, saved, strict=True):
                tensor.copy_(value)


class HALO(_Shrinkage):
    """The hierarchical adaptive lasso.

    target, mode: a target S above 0 changes the lambda term to psi * |sum |lambda| - S| (L1) or
    psi * (sum |lambda| - S)^2 (L2).
    """

    def __init__(
        self,
        tensors: Iterable[Tensor],
        xi: float,
        psi: float,
        training: LambdaTraining,
        target: float = 0.0,
        mode: TargetMode = "L1",
    ):
        super().__init__(tensors, xi, psi, training)
        self.target, self.mode = target, mode

    def _initial(self) -> list[Tensor]:
        return [
            torch.full_like(w, self.training.init, dtype=torch.promote_types(w.dtype, torch.float32))
            for w in self.tensors
        ]

    def lambdas_of(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The lambdas of some of the penalised tensors, under the names that `weights` gives them."""
        number = {id(tensor): i for i, tensor in enumerate(self.tensors)}
        return {name: self.lambdas[number[id(weight)]] for name, weight in weights.items()}

    def _excess(self) -> Tensor:
        return torch.stack(torch._foreach_norm(self.lambdas, 1)).sum() - self.target

    def terms(self) -> tuple[Tensor, Tensor]:
        """The term of the weights and the term of the lambdas (scalars)."""
        pulls = torch._foreach_abs(self.tensors)
        torch._foreach_div_(pulls, torch._foreach_mul(self.lambdas, self.lambdas))
        excess = self._excess()
        size = excess.square() if self.mode == "L2" and self.target else excess.abs()
        return self.xi * torch.stack([pull.sum() for pull in pulls]).sum(), self.psi * size

    def value(self) -> Tensor:
        of_weights, of_lambdas = self.terms()
        return of_weights + of_lambdas

    def parts(self) -> list[slice]:
        if self.target or self.tensors[0].device.type != "cpu":
            return [_ALL]
        cuts = [i for i, tensor in enumerate(self.tensors) if i and tensor.numel() >= _LARGE_TENSOR]
        return [slice(*ends) for ends in pairwise([0, *cuts, len(self.tensors)])]

    def accumulate(self, part: slice, of_weights: list[Tensor], of_lambdas: list[Tensor]) -> None:
        weights, lambdas = self.tensors[part], self.lambdas[part]
        pulls = torch._foreach_sign(weights)
        torch._foreach_div_(pulls, torch._foreach_mul(lambdas, lambdas))
        torch._foreach_add_(of_weights, pulls, alpha=self.xi)
        torch._foreach_mul_(pulls, weights)
        torch._foreach_addcdiv_(of_lambdas, pulls, lambdas, value=-2 * self.xi)
        signs = torch._foreach_sign(lambdas)
        if self.target:
            excess = self._excess()
            torch._foreach_mul_(signs, 2 * excess if self.mode == "L2" else excess.sign())
        torch._foreach_add_(of_lambdas, signs, alpha=self.psi)


class SWS(_Shrinkage):
    """One lambda for the whole network."""

    def _initial(self) -> list[Tensor]:
        first = self.tensors[0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        return [torch.full((), self.training.init, dtype=dtype, device=first.device)]

    def terms(self) -> tuple[Tensor, Tensor]:
        """The term of the weights and the term of the lambda (scalars)."""
        (shared,) = self.lambdas
        return self.xi * self._norm() / shared.square(), self.psi * shared.square()

    def value(self) -> Tensor:
        of_weights, of_lambdas = self.terms()
        return of_weights + of_lambdas

    def accumulate(self, part: slice, of_weights: list[Tensor], of_lambdas: list[Tensor]) -> None:
        (shared,) = self.lambdas
        signs = torch._foreach_sign(self.tensors)
        torch._foreach_mul_(signs, self.xi / shared.square())
        torch._foreach_add_(of_weights, signs)
        of_lambdas[0] += 2 * self.psi * shared - 2 * self.xi * self._norm() / shared**3


# ------------------------------------------------------------------------------------------ schedules


def milestone_drops(iterations: int, milestones: Sequence[int]) -> list[int]:
    """Number of milestones (iterations from 0, dropping before the iteration) that each iteration has behind it."""
    return [sum(iteration >= m for m in milestones) for iteration in range(iterations)]


def step_drops(iterations: int, size: int) -> list[int]:
    """The same for a drop every `size` iterations: update number `size` is the first lower one."""
    return [(i + 1) // size for i in range(iterations)]


def learning_rates(
    drops: Sequence[int],
    rate: float,
    gamma: float,
    trains_lambdas: bool,
    coupling: Coupling = "intended",
    by_step: bool = False,
) -> tuple[list[float], list[float] | None]:
    """Learning rates of the weights and of the lambdas (None where there are none), one each iteration.

    drops: from `milestone_drops`, or from `step_drops` with by_step=True. `intended` lowers both by gamma at
    each drop. `official` is what the released scripts do when lambdas are trained: at milestones one running
    rate is lowered twice, first for the weights and then for the lambdas; by steps the weights drop twice and
    the lambdas never.
    """
    if not trains_lambdas:
        return [rate * gamma**k for k in drops], None
    if coupling == "intended":
        of_weights, of_lambdas = drops, drops
    elif by_step:
        of_weights, of_lambdas = [2 * k for k in drops], [0] * len(drops)
    else:
        of_weights, of_lambdas = [max(2 * k - 1, 0) for k in drops], [2 * k for k in drops]
    return [rate * gamma**k for k in of_weights], [rate * gamma**k for k in of_lambdas]


def psi_schedule(psi: float, gamma: float, every: int | None, epochs: int) -> list[float]:
    """psi of each epoch: times 10 / gamma at epochs divisible by `every`, epoch 0 included (None: never)."""
    return [psi * (10 / gamma) ** (epoch // every + 1 if every else 0) for epoch in range(epochs)]


# ------------------------------------------------------------------------------------------ the final mask


@dataclass(frozen=True)
class Cut:
    """A global magnitude mask.

    kept: True = kept, by name. index: place of the threshold among all sorted |w|; float32_index: where the
    released code would have put it.
    """

    kept: dict[str, Tensor]
    threshold: float
    index: int
    float32_index: int

    @property
    def pruned(self) -> int:
        """Weights that are zero after the cut."""
        return sum(int((~mask).sum()) for mask in self.kept.values())

    @property
    def emptied(self) -> list[str]:
        """Tensors that keep no weight at all; the rule allows it."""
        return [name for name, mask in self.kept.items() if not mask.any()]


def cut_index(total: int, nonzero: int, share: float, single_precision: bool = False) -> int:
    """Position (from 0) of the threshold among all sorted |w|, to prune `share` of those that are not zero.

    single_precision: with the float32 arithmetic of the released code, off by one for large networks.
    Raises ValueError when share is not in [0, 1) or nothing is left to prune.
    """
    if not 0 <= share < 1:
        raise ValueError(
            f"a share of {share} of the weights cannot be pruned: at least 0 and below 1 is needed"
        )
    if nonzero == 0:
        raise ValueError("all weights are zero already: nothing is left to prune")
    if single_precision:
        count = torch.tensor(nonzero, dtype=torch.float32)
        return int(total - count + int(count * share))
    return total - nonzero + int(nonzero * share)


@torch.no_grad()
def cut(weights: Mapping[str, Tensor], share: float) -> Cut:
    """The paper's one-shot mask: keep |w| strictly above the threshold, all tensors ranked together.

    Without ties this removes int(share * non-zeros) + 1 weights; ties with the threshold all go. Raises
    ValueError as `cut_index` does.
    """
    sizes = torch.cat([w.abs().flatten() for w in weights.values()])
    total, nonzero = sizes.numel(), int((sizes > 0).sum())
    index = cut_index(total, nonzero, share)
    threshold = sizes.kthvalue(index + 1).values
    kept = {name: w.abs() > threshold for name, w in weights.items()}
    return Cut(kept, threshold.item(), index, cut_index(total, nonzero, share, single_precision=True))


def fixed_threshold(weights: Mapping[str, Tensor], tau: float) -> dict[str, Tensor]:
    """Masks, True = kept, that remove what is strictly smaller than `tau`."""
    return {name: w.detach().abs() >= tau for name, w in weights.items()}


# ------------------------------------------------------------------------------------- the stationary point


def stationary_lambda(sizes: Tensor, xi: float, psi: float, weight_decay: float) -> tuple[Tensor, Tensor]:
    """lambda* that minimises the penalty for fixed |w| = sizes, and the penalty there, weight decay included.

    lambda* solves psi + weight_decay * lambda = 2 xi |w| / lambda^3. With one of the two alone the penalty is
    a bridge penalty in |w|, of power 1/3 (psi) or 1/2 (weight decay). Raises ValueError when both are zero.
    """
    if psi <= 0 and weight_decay <= 0:
        raise ValueError("without psi and without weight decay no finite lambda is best")
    pull = 2 * xi * sizes.double()
    # each term alone gives an upper bound; from there Newton's method descends, as the function is convex
    bounds = [(pull / psi) ** (1 / 3)] if psi > 0 else []
    bounds += [(pull / weight_decay) ** (1 / 4)] if weight_decay > 0 else []
    root = torch.stack(bounds).amin(0)
    for _ in range(30):
        value = weight_decay * root**4 + psi * root**3 - pull
        slope = 4 * weight_decay * root**3 + 3 * psi * root**2
        root = root - torch.where(slope > 0, value / slope, 0.0)
    penalty = torch.where(root > 0, pull / 2 / root**2, 0.0) + psi * root + weight_decay / 2 * root**2
    return root, penalty
