"""Pruning during training: the methods that IMP is compared with, as the authors' code has them.

Each is a `Hooks` for one `Trainer.fit`; `finish` then writes the sparse weights into the model. GMP, DPF,
GSM, LC and DNW aim at a sparsity; with STR, CS and DST it results from their hyper-parameters and is read off
afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from common.core.failures import Unreachable
from common.core.hooks import NotCapturable
from common.core.pruning.masks import Allocation, Masks, select, smallest
from common.core.trainer import Hooks, Trainer
from replications.imp_slr.method import relative_steps

RankOver = Literal["all", "prunable"]
# DPF looks at its mask again after this many iterations
DPF_ITERATIONS = 16
# DST resets the thresholds of a layer of which no more than this share survives
DST_COLLAPSE = 0.01
_LC_STEPS = 30


class DuringTraining(Hooks):
    """A method that prunes while it trains.

    model: the network to be trained, already on its device. masks: those of the last pruning, and after
    `finish` those of the final weights.
    """

    def __init__(self, model: nn.Module):
        self.masks = Masks.dense(model)
        self.finished = False

    def effective(self, trainer: Trainer) -> dict[str, Tensor]:
        """The weights that the forward pass uses, by name; none if it uses the stored ones."""
        return {}

    def weights(self, trainer: Trainer) -> dict[str, Tensor] | None:
        return None if self.finished else self.effective(trainer)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether the optimiser's weight decay acts on a parameter of the model."""
        return True

    @torch.no_grad()
    def finish(self, trainer: Trainer) -> Masks:
        """Write the final sparse weights into the model; returns their masks. Called once, after training."""
        final = self._final(trainer)
        stored = self.masks.weights(trainer.model)
        for name, weight in final.items():
            stored[name].copy_(weight)
        self.masks.update({name: weight != 0 for name, weight in final.items()})
        self.finished = True
        return self.masks

    def _final(self, trainer: Trainer) -> dict[str, Tensor]:
        return self.effective(trainer)

    def _tensors(self) -> Sequence[Tensor]:
        """The method's own trained tensors."""
        return []

    def in_graph(self, trainer: Trainer) -> Sequence[Any]:
        return [self.finished, *self._tensors()]

    def state(self) -> dict[str, Any]:
        return {"kept": self.masks.kept, "tensors": [tensor.detach() for tensor in self._tensors()]}

    @torch.no_grad()
    def load_state(self, trainer: Trainer, state: dict[str, Any]) -> None:
        self.masks.update({name: mask.to(trainer.device) for name, mask in state["kept"].items()})
        for own, saved in zip(self._tensors(), state["tensors"], strict=True):
            own.copy_(saved)


# ------------------------------------------------------------------------------------------ GMP and DPF


def gmp_events(sparsity: float, epochs: int, interval: int) -> list[tuple[int, float]]:
    """The cubic schedule: (epoch at whose end is pruned, sparsity afterwards), epochs from 1.

    Raises ValueError when training is shorter than two intervals.
    """
    count = epochs // interval - 1
    if count < 1:
        raise ValueError(f"{epochs} epochs hold no pruning event at an interval of {interval}")
    return [(interval * k, sparsity - sparsity * (1 - k / count) ** 3) for k in range(1, count + 1)]


class GMP(DuringTraining):
    """Gradual magnitude pruning (Zhu & Gupta 2017), ranked globally by default.

    recovering: choose each mask anew from all raw values, which go on decaying behind the mask, so that a
    pruned weight may come back; else prune only among those that remain. The momentum is masked at each
    pruning.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        epochs: int,
        interval: int,
        recovering: bool = False,
        allocation: Allocation = "global",
    ):
        super().__init__(model)
        events = gmp_events(sparsity, epochs, interval)
        self._targets = dict(events)
        self._steps = {epoch: step for (epoch, _), step in zip(events, relative_steps(events))}
        self.recovering, self.allocation = recovering, allocation

    def effective(self, trainer: Trainer) -> dict[str, Tensor]:
        return self.masks.effective(trainer.model)

    def epoch_ended(self, trainer: Trainer, epoch: int) -> None:
        if epoch + 1 not in self._targets:
            return
        if self.recovering:
            raw = self.masks.weights(trainer.model)
            self.masks.update(select(raw, self._targets[epoch + 1], allocation=self.allocation))
        else:
            self.masks.prune(trainer.model, self._steps[epoch + 1], self.allocation)
        self.masks.apply_to_momentum(trainer)

    def in_graph(self, trainer: Trainer) -> Sequence[Any]:
        return [*super().in_graph(trainer), *self.masks.factors(trainer.model).values()]


class DPF(DuringTraining):
    """Dynamic pruning with feedback (Lin et al. 2020).

    The gradient at the masked weights is applied to the dense ones. The mask is the global magnitude mask of
    the dense weights, looked at again every 16 iterations; its target moves with the events of GMP.
    """

    def __init__(self, model: nn.Module, sparsity: float, epochs: int, interval: int):
        super().__init__(model)
        self._events = gmp_events(sparsity, epochs, interval)

    def effective(self, trainer: Trainer) -> dict[str, Tensor]:
        weights = self.masks.weights(trainer.model)
        return {
            name: _straight_through(weights[name], f) for name, f in self.masks.factors(trainer.model).items()
        }

    def stepped(self, trainer: Trainer) -> None:
        if self.needs_host(trainer.iteration):
            self._look_again(trainer, trainer.iteration // len(trainer.batches))

    def needs_host(self, iteration: int) -> bool:
        return (iteration + 1) % DPF_ITERATIONS == 0

    def in_graph(self, trainer: Trainer) -> Sequence[Any]:
        return [*super().in_graph(trainer), *self.masks.factors(trainer.model).values()]

    def epoch_ended(self, trainer: Trainer, epoch: int) -> None:
        if epoch + 1 in dict(self._events):
            self._look_again(trainer, epoch + 1)

    def _look_again(self, trainer: Trainer, epochs: int) -> None:
        target = max((sparsity for event, sparsity in self._events if event <= epochs), default=0.0)
        self.masks.update(select(self.masks.weights(trainer.model), target))


def _straight_through(weight: Tensor, factor: Tensor) -> Tensor:
    """weight * factor whose gradient reaches all of `weight` unmasked."""
    return weight + (weight * factor - weight).detach()


# ------------------------------------------------------------------------------------------ GSM and LC


class _Preparing(DuringTraining):
    """Trains dense in a way that makes weights dispensable; after `finish` they are pruned as by IMP.

    rank_over: whether biases and normalisation compete for the places. There are int((1 - sparsity) * n) of
    them, n the number of prunable weights.
    """

    def __init__(self, model: nn.Module, sparsity: float, rank_over: RankOver = "all"):
        super().__init__(model)
        self._parameters = list(
            model.parameters() if rank_over == "all" else self.masks.weights(model).values()
        )
        self.places = int((1 - sparsity) * sum(w.numel() for w in self.masks.kept.values()))

    def _largest(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """Masks of the entries that win a place."""
        flat = torch.cat([score.flatten() for score in scores])
        winners = ~smallest(flat, flat.numel() - min(self.places, flat.numel()))
        parts = winners.split([score.numel() for score in scores])
        return [part.view_as(score) for part, score in zip(parts, scores)]

    def gradients_ready(self, trainer: Trainer) -> None:
        if not self.finished:
            with torch.no_grad():
                pairs = [(p, p.grad) for p in self._parameters if p.grad is not None]
                self._change([p for p, _ in pairs], [gradient for _, gradient in pairs])

    def in_graph(self, trainer: Trainer) -> Sequence[Any]:
        if self.finished:
            return super().in_graph(trainer)
        raise NotCapturable(
            f"{type(self).__name__} ranks all entries in every step, and the host counts them"
        )

    def _change(self, parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
        """Edit the gradients of these parameters."""
        raise NotImplementedError

    def finish(self, trainer: Trainer) -> Masks:
        self.finished = True
        return self.masks


class GSM(_Preparing):
    """Global sparse momentum (Ding et al. 2019): few entries keep their gradient.

    Those of largest |weight * gradient|; all others shrink by weight decay alone.
    """

    def _change(self, parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
        scores = [(parameter * gradient).abs() for parameter, gradient in zip(parameters, gradients)]
        for gradient, kept in zip(gradients, self._largest(scores)):
            gradient.mul_(kept)


def lc_weight_decays(weight_decay: float, epochs: int) -> dict[int, float]:
    """Weight decay of LC in the 2022 code by number of finished epochs: 10 % more every epochs // 30 epochs.

    Below 30 epochs the steps fall together and the last one holds from the start, as they do there.
    """
    return {k * (epochs // _LC_STEPS): weight_decay * 1.1**k for k in range(_LC_STEPS)}


class LC(_Preparing):
    """Learning-compression (Carreira-Perpiñán & Idelbayev 2018): large weights do not decay.

    weight_decay: the optimiser's. growth: the `lc_weight_decays` of the 2022 code, by which it changes.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        weight_decay: float,
        rank_over: RankOver = "all",
        growth: dict[int, float] | None = None,
    ):
        super().__init__(model, sparsity, rank_over)
        self._growth = growth or {0: weight_decay}
        self.weight_decay = weight_decay

    def epoch_started(self, trainer: Trainer, epoch: int) -> None:
        if self.finished:
            return
        self.weight_decay = self._growth[max(e for e in self._growth if e <= epoch)]
        for group in trainer.optimizer.param_groups:
            group["weight_decay"] = self.weight_decay

    def _change(self, parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
        largest = self._largest([parameter.abs() for parameter in parameters])
        for parameter, gradient, spared in zip(parameters, gradients, largest):
            gradient.sub_(parameter * spared, alpha=self.weight_decay)


# ------------------------------------------------------------------------------------------ DNW, STR, CS, DST


class DNW(DuringTraining):
    """Discovering neural wirings (Wortsman et al. 2019): magnitude masks in every step.

    The gradient goes straight through to all weights. Keeps what is strictly larger than the
    int(sparsity * n)-th smallest magnitude of all layers. Raises Unreachable when that number is 0.
    """

    def __init__(self, model: nn.Module, sparsity: float):
        super().__init__(model)
        self._rank = int(sparsity * sum(mask.numel() for mask in self.masks.kept.values()))
        if self._rank < 1:
            raise Unreachable(f"DNW needs at least one weight to prune; sparsity {sparsity:g} gives none")

    def effective(self, trainer: Trainer) -> dict[str, Tensor]:
        weights = self.masks.weights(trainer.model)
        magnitudes = torch.cat([w.detach().abs().flatten() for w in weights.values()])
        threshold = magnitudes.sort().values[self._rank - 1]
        return {
            name: _straight_through(w, (w.detach().abs() > threshold).to(w.dtype))
            for name, w in weights.items()
        }


class STR(DuringTraining):
    """Soft threshold reparameterisation (Kusupati et al. 2020).

    Each layer has one learnt threshold sigmoid(s). Weight decay acts on s as well, and that is what drives
    the thresholds up.
    """

    def __init__(self, model: nn.Module, initial: float):
        super().__init__(model)
        like = next(iter(self.masks.weights(model).values()))
        self.thresholds = [nn.Parameter(like.new_tensor(initial)) for _ in self.masks.kept]

    def parameter_groups(self) -> list[dict]:
        return [{"params": self.thresholds}]

    def effective(self, trainer: Trainer) -> dict[str, Tensor]:
        weights = self.masks.weights(trainer.model)
        return {
            name: w.sign() * torch.relu(w.abs() - s.sigmoid())
            for (name, w), s in zip(weights.items(), self.thresholds)
        }

    def _tensors(self) -> Sequence[Tensor]:
        return self.thresholds


class _Reparameterised(DuringTraining):
    """A method whose loss holds the weight decay of the weights that it reparameterises.

    double_decay: let the optimiser decay those weights and the method's own tensors once more, as in the 2023
    code.
    """

    alone: ClassVar[str]
    """What each of its steps does that a captured one cannot."""

    def __init__(self, model: nn.Module, penalty: float, weight_decay: float, double_decay: bool):
        super().__init__(model)
        self.penalty, self.weight_decay, self.double_decay = penalty, weight_decay, double_decay

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return self.double_decay or name not in self.masks.kept

    def parameter_groups(self) -> list[dict]:
        return [{"params": self._tensors(), **({} if self.double_decay else {"weight_decay": 0.0})}]

    def loss(self, trainer: Trainer) -> Tensor:
        weights = self.masks.weights(trainer.model).values()
        decay = 0.5 * self.weight_decay * _total(w.square().sum() for w in weights)
        return self.penalty * self._penalised(trainer) + decay

    def in_graph(self, trainer: Trainer) -> Sequence[Any]:
        raise NotCapturable(f"{type(self).__name__} {self.alone}")

    def _penalised(self, trainer: Trainer) -> Tensor:
        raise NotImplementedError


class CS(_Reparameterised):
    """Continuous sparsification (Savarese et al. 2020): weights times sigmoid(beta * m).

    beta grows from 1 to `beta_final`. iterations: length of training. The final mask is m > 0; the scale
    1 / sigmoid(initial) stays in the weights.
    """

    alone = "has sharper masks in every step"

    def __init__(
        self,
        model: nn.Module,
        initial: float,
        beta_final: float,
        penalty: float,
        iterations: int,
        weight_decay: float,
        double_decay: bool = False,
    ):
        super().__init__(model, penalty, weight_decay, double_decay)
        self.mask_parameters = [
            nn.Parameter(torch.full_like(w, initial)) for w in self.masks.weights(model).values()
        ]
        self.scale = 1 + math.exp(-initial)
        self.beta_final, self.iterations = beta_final, iterations

    def beta(self, iteration: int) -> float:
        """Sharpness of the soft masks after a number of iterations, from 1 to `beta_final`."""
        return self.beta_final ** (iteration / self.iterations)

    def effective(self, trainer: Trainer) -> dict[str, Tensor]:
        beta, weights = self.beta(trainer.iteration), self.masks.weights(trainer.model)
        return {
            n: w * (torch.sigmoid(beta * m) * self.scale)
            for (n, w), m in zip(weights.items(), self.mask_parameters)
        }

    def _penalised(self, trainer: Trainer) -> Tensor:
        beta = self.beta(trainer.iteration)
        return _total(torch.sigmoid(beta * m).sum() for m in self.mask_parameters)

    def _final(self, trainer: Trainer) -> dict[str, Tensor]:
        weights = self.masks.weights(trainer.model)
        return {name: w * (m > 0) * self.scale for (name, w), m in zip(weights.items(), self.mask_parameters)}

    def _tensors(self) -> Sequence[Tensor]:
        return self.mask_parameters


class _Step(torch.autograd.Function):
    """1 where x > 0; the derivative is a long-tailed hat: 2 - 4|x| up to 0.4, then 0.4 up to 1, then 0."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        size = ctx.saved_tensors[0].abs()
        slope = torch.where(size <= 0.4, 2 - 4 * size, torch.where(size <= 1, 0.4, 0.0))
        return gradient * slope


class DST(_Reparameterised):
    """Dynamic sparse training (Liu et al. 2020): a learnt threshold for each output channel, 0 at first.

    When no more than 1 % of a layer survives, its thresholds go back to 0.
    """

    alone = "asks in every step whether a layer has collapsed"

    def __init__(self, model: nn.Module, penalty: float, weight_decay: float, double_decay: bool = False):
        super().__init__(model, penalty, weight_decay, double_decay)
        self.thresholds = [nn.Parameter(w.new_zeros(w.shape[0])) for w in self.masks.weights(model).values()]

    def effective(self, trainer: Trainer) -> dict[str, Tensor]:
        weights = self.masks.weights(trainer.model)
        return {name: w * self._mask(w, t) for (name, w), t in zip(weights.items(), self.thresholds)}

    def _mask(self, weight: Tensor, threshold: nn.Parameter) -> Tensor:
        shape = (-1, *[1] * (weight.dim() - 1))
        mask = _Step.apply(weight.abs() - threshold.view(shape))
        if mask.detach().mean() <= DST_COLLAPSE:
            with torch.no_grad():
                threshold.zero_()
            mask = _Step.apply(weight.abs() - threshold.view(shape))
        return mask

    def _penalised(self, trainer: Trainer) -> Tensor:
        return _total((-t).exp().sum() for t in self.thresholds)

    def _tensors(self) -> Sequence[Tensor]:
        return self.thresholds


def _total(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()
