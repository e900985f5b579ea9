"""Iterative magnitude pruning with restarted learning rates (Zimmer, Spiegel & Pokutta, arXiv 2111.00843).

Prune, retrain, repeat. The paper's subject is the learning rate of the retraining phases, so most of this
file is lists of learning rates, one number per iteration. Rules follow the authors' 2023 code where it and
the 2022 code differ; the 2022 readings are functions of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import nn

from common.core.failures import Unreachable
from common.core.pruning.masks import Allocation, KeepMasked, Masks, norm_drop, squared_norm
from common.core.schedules import linear
from common.core.trainer import Trainer

Schedule = Literal["FT", "LRW", "SLR", "SLR-Le-Hua", "CLR", "LLR", "ALLR", "LLR_min", "LC", "LCT", "LCN"]
Tunable = Literal["constant", "stepped", "cosine", "linear", "linear_min"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)
TUNABLES: tuple[str, ...] = get_args(Tunable)
ADAPTIVE = ("ALLR", "LC", "LCT", "LCN")
WARMUP_SHARE = 0.1
LCT_FLOOR = 0.01


# ------------------------------------------------------------------------------------------ learning rates


@dataclass(frozen=True)
class History:
    """The learning rates of dense training, one per iteration.

    warmup: number of iterations at the start that belong to a warm-up. highest: the rate that retraining
    restarts from (default: the largest of `rates`).
    """

    rates: Sequence[float]
    warmup: int = 0
    highest: float | None = None

    @classmethod
    def of_epochs(cls, rates: Sequence[float], per_epoch: int) -> History:
        """The history as the 2022 code keeps it: the initial rate, then the rate after the last step of each epoch.

        Its drops come an epoch early, and a linear or cosine schedule ends at 0.
        """
        return cls([rate for rate in rates[1:] for _ in range(per_epoch)], highest=max(rates))

    @property
    def eta_max(self) -> float:
        return max(self.rates) if self.highest is None else self.highest

    @property
    def eta_min(self) -> float:
        """Lowest rate, the warm-up not counted."""
        return min(self.rates[self.warmup :])

    def compressed(self, iteration: int, length: int) -> float:
        """The rate at an iteration if the history is squeezed into `length`; the highest one for a warm-up."""
        index = iteration * len(self.rates) // length
        return self.eta_max if index < self.warmup else self.rates[index]


def start_value(highest: float, drop: float, floor: float) -> float:
    """highest * max(drop, floor), at most `highest`: where the adaptive schedules start."""
    return highest * min(1.0, max(drop, floor))


def adaptive_start(
    highest: float, drop: float, fraction: float, retrain_epochs: float, dense_epochs: float
) -> float:
    """Start of ALLR: the norm drop, over the square root of the pruned fraction, decides how far to restart.

    Never below the share of the dense epochs that this cycle retrains. LCN passes all retraining epochs that
    are left as `retrain_epochs`.
    """
    return start_value(highest, drop / math.sqrt(fraction), retrain_epochs / dense_epochs)


def retraining_rates(
    kind: Schedule | Tunable,
    history: History,
    length: int,
    *,
    start: float | None = None,
    warmup_share: float = WARMUP_SHARE,
    per_epoch: int = 1,
) -> list[float]:
    """Learning rates of one retraining phase of `length` iterations.

    start: the rate right after the warm-up; required by the adaptive and the tunable kinds, unused by the
    others. warmup_share: share of the iterations that rise from 0 along a cosine; none for FT and LRW. per_epoch:
    iterations in an epoch, for SLR-Le-Hua, whose rate stands still in an epoch.
    Raises ValueError for an unknown kind, for a missing start, and Unreachable when LRW would rewind beyond the
    beginning of dense training.
    """
    if kind == "SLR-Le-Hua":
        by_epoch = slr_of_le_and_hua(history, length // per_epoch)
        return [rate for rate in by_epoch for _ in range(per_epoch)]
    if kind == "FT":
        return [history.eta_min] * length
    if kind == "LRW":
        if length > len(history.rates):
            raise Unreachable(
                f"LRW cannot rewind {length} iterations: dense training had {len(history.rates)}; "
                "retrain for less"
            )
        return list(history.rates[len(history.rates) - length :])
    if (kind in ADAPTIVE or kind in TUNABLES) and start is None:
        raise ValueError(f"{kind} needs a start value")
    top = history.eta_max if start is None else start
    main = _main_phase(kind, history, top)
    warmup = int(warmup_share * length)
    main_length = length - warmup
    rising = [top * (1 - math.cos(math.pi * t / warmup)) / 2 for t in range(warmup)]
    # the first rate after a warm-up is its end point, also where a compressed schedule would begin lower
    first = 1 if warmup and main_length else 0
    return rising + [top] * first + [main(j, main_length) for j in range(first, main_length)]


def slr_of_le_and_hua(history: History, epochs: int) -> list[float]:
    """SLR by its source (Le & Hua, ICLR 2021; lehduong/NPTM, weight-level/cifar_finetune.py): one rate an epoch.

    A cosine from the lowest dense rate up to the highest for int(.1 E) epochs, then a tenth at int(.45 E) and again at
    int(.675 E) epochs after the warm-up, whatever the milestones of dense training were.
    """
    low, top, warmup = history.eta_min, history.eta_max, int(WARMUP_SHARE * epochs)
    drops = int(0.45 * epochs), int(0.675 * epochs)
    rising = [low + (top - low) * (1 - math.cos(math.pi * e / warmup)) / 2 for e in range(warmup)]
    return rising + [top * 0.1 ** sum(e >= drop for drop in drops) for e in range(epochs - warmup)]


def _main_phase(kind: str, history: History, top: float) -> Callable[[int, int], float]:
    """The rate in iteration j of the m that follow the warm-up."""
    low = history.eta_min
    if kind in ("SLR", "stepped"):
        return lambda j, m: history.compressed(j, m) * (top / history.eta_max)
    if kind == "CLR":
        return lambda j, m: low + (top - low) * (1 + math.cos(math.pi * j / m)) / 2
    if kind == "cosine":
        return lambda j, m: top * (1 + math.cos(math.pi * j / m)) / 2
    if kind in ("LLR_min", "linear_min"):
        return lambda j, m: top + (low - top) * j / m
    if kind in ("LLR", "linear", *ADAPTIVE):
        return lambda j, m: top * (1 - j / m)
    if kind == "constant":
        return lambda j, m: top
    raise ValueError(f"unknown retraining schedule {kind!r}; allowed: {', '.join(SCHEDULES + TUNABLES)}")


# ------------------------------------------------------------------------------------------ cycles


def cycle_fraction(sparsity: float, cycles: int) -> float:
    """The fraction of the remaining weights that each of `cycles` prunings removes to end at `sparsity`."""
    return 1 - (1 - sparsity) ** (1 / cycles)


def cycles_needed(sparsity: float, fraction: float = 0.2) -> int:
    """Cycles to reach `sparsity` if each removes `fraction` of the remaining weights (Renda et al. 2020)."""
    # the margin keeps an exact number of cycles from being rounded up
    return max(1, math.ceil(math.log(1 - sparsity) / math.log(1 - fraction) - 1e-9))


def cumulative_sparsities(sparsity: float, cycles: int) -> list[float]:
    """Sparsity after each cycle."""
    fraction = cycle_fraction(sparsity, cycles)
    return [1 - (1 - fraction) ** k for k in range(1, cycles + 1)]


def surviving(count: int, sparsity: float, cycles: int) -> list[int]:
    """Weights left of `count` after each cycle; each pruning is rounded half to even."""
    fraction, left = cycle_fraction(sparsity, cycles), []
    for _ in range(cycles):
        count -= round(fraction * count)
        left.append(count)
    return left


def cycle_epochs(cycles: int, *, each: int | None = None, split: int | None = None) -> list[int]:
    """Retraining epochs of each cycle: `each`, or `split` shared out, the remainder to the last cycle.

    Raises ValueError unless exactly one of the two is given.
    """
    if each is not None and split is None:
        return [each] * cycles
    if split is not None and each is None:
        return [split // cycles] * (cycles - 1) + [split - (cycles - 1) * (split // cycles)]
    raise ValueError("give either the epochs of each cycle or the epochs to split, not both")


# ------------------------------------------------------------------------------------------ the algorithm


@dataclass(frozen=True)
class Cycle:
    """What one pruning did.

    norm_drop: relative drop of the norm of all weights and biases, normalisation included (ALLR's measure);
    prunable_norm_drop: the same over the prunable weights alone. rates: learning rates of the retraining
    after it.
    """

    fraction: float
    epochs: int
    norm_drop: float
    prunable_norm_drop: float
    start: float | None
    rates: list[float] = field(repr=False)


@dataclass(frozen=True)
class Retraining:
    """How pruned networks are retrained.

    schedule: kind of learning rates. history: of dense training, which took `dense_epochs`. initial and
    warmup_share: start value and share of warm-up of the tunable kinds. reset_momentum: forget the momentum
    at each pruning. recalibrate: after each pruning, pass once over the training images in training mode
    without gradients, which renews the statistics of batch normalisation. adaptive_from: the cycle, from 0,
    from which on ALLR's formula holds; cycles before it start at the highest rate (2022 code: all but the
    last).
    """

    schedule: Schedule | Tunable
    history: History
    dense_epochs: int
    initial: float | None = None
    warmup_share: float = WARMUP_SHARE
    reset_momentum: bool = False
    recalibrate: bool = False
    adaptive_from: int = 0


def prune_and_retrain(
    trainer: Trainer,
    masks: Masks,
    sparsity: float,
    epochs: Sequence[int],
    retraining: Retraining,
    allocation: Allocation = "global",
    generator: torch.Generator | None = None,
    pruned: Callable[[Trainer, Cycle], None] | None = None,
) -> list[Cycle]:
    """IMP: one cycle for each entry of `epochs`, which is how long it retrains; ends at `sparsity`.

    The trainer starts with a fresh optimiser and has `KeepMasked(masks)` among its hooks. pruned: called
    after each pruning, before its retraining. Raises RunFailed.
    """
    fraction = cycle_fraction(sparsity, len(epochs))
    by_accuracy = retraining.schedule in ("LC", "LCT")
    done = []
    for index, count in enumerate(epochs):
        accuracy = _train_accuracy(trainer) if by_accuracy else 0.0
        before = _norms(trainer.model, masks)
        masks.prune(trainer.model, fraction, allocation, generator)
        masks.apply(trainer.model)
        drop, prunable_drop = (norm_drop(*pair) for pair in zip(before, _norms(trainer.model, masks)))
        if retraining.recalibrate:
            recalibrate(trainer)
        if retraining.reset_momentum:
            trainer.fresh_optimizer()
        lost = (accuracy - _train_accuracy(trainer)) / accuracy if accuracy else 0.0
        start = _start(retraining, index, epochs, fraction, drop, lost)
        rates = retraining_rates(
            retraining.schedule,
            retraining.history,
            count * len(trainer.batches),
            start=start,
            warmup_share=retraining.warmup_share,
            per_epoch=len(trainer.batches),
        )
        cycle = Cycle(fraction, count, drop, prunable_drop, start, rates)
        if pruned is not None:
            pruned(trainer, cycle)
        trainer.fit(rates, phase=f"retrain {index + 1}")
        done.append(cycle)
    return done


def _start(
    retraining: Retraining, cycle: int, epochs: Sequence[int], fraction: float, drop: float, lost: float
) -> float | None:
    """The start value of a cycle's schedule, if it needs one. lost: relative loss of train accuracy."""
    highest, total, left = retraining.history.eta_max, retraining.dense_epochs, sum(epochs[cycle:])
    if retraining.schedule == "ALLR":
        if cycle < retraining.adaptive_from:
            return highest
        return adaptive_start(highest, drop, fraction, epochs[cycle], total)
    if retraining.schedule == "LCN":
        return adaptive_start(highest, drop, fraction, left, total)
    if retraining.schedule in ("LC", "LCT"):
        return start_value(highest, lost, left / total if retraining.schedule == "LC" else LCT_FLOOR)
    return retraining.initial


def _norms(model: nn.Module, masks: Masks) -> tuple[float, float]:
    """Squared norms of all weights and biases, and of the prunable weights."""
    return squared_norm(norm_parameters(model)), squared_norm(masks.weights(model).values())


def _train_accuracy(trainer: Trainer) -> float:
    return trainer.evaluate(trainer.batches)["accuracy"]


def recalibrate(trainer: Trainer) -> None:
    """Renew the running statistics of batch normalisation with a pass over the training images."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in trainer.model.modules()):
        trainer.look()


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All weights and biases, those of normalisation included: what ALLR's norm runs over."""
    return [p for name, p in model.named_parameters() if name.rpartition(".")[2] in ("weight", "bias")]


# ------------------------------------------------------------------------------------------ BIMP as one run


def bimp_events(sparsity: float, epochs: int, dense_epochs: int, interval: int) -> list[tuple[int, float]]:
    """Prunings of BIMP in the 2022 reading: (epoch at whose end, from 1; cumulative sparsity afterwards).

    Raises ValueError when the epochs after dense training are fewer than one interval.
    """
    cycles = (epochs - dense_epochs) // interval
    if cycles < 1:
        raise ValueError(
            f"{epochs} epochs leave no pruning interval of {interval} after {dense_epochs} dense ones"
        )
    return [(dense_epochs + k * interval, s) for k, s in enumerate(cumulative_sparsities(sparsity, cycles))]


def bimp_rates(
    rate: float,
    epochs: int,
    dense_epochs: int,
    interval: int,
    per_epoch: int,
    warmup_share: float = WARMUP_SHARE,
) -> list[float]:
    """Learning rates of BIMP in the 2022 reading.

    Linear to 0 in dense training, and in each cycle linear up, then linear to 0. The warm-up is a share of an
    interval; the last cycle takes the epochs that are left over.
    """
    rates = linear(rate, dense_epochs, per_epoch)
    starts = [epoch for epoch, _ in bimp_events(0.5, epochs, dense_epochs, interval)]
    warmup = int(warmup_share * per_epoch * interval)
    for begin, end in zip(starts, [*starts[1:], epochs]):
        length = (end - begin) * per_epoch - warmup
        rates += [rate * t / warmup for t in range(warmup)]
        rates += [rate * (1 - j / length) for j in range(length)]
    return rates


def relative_steps(events: Sequence[tuple[int, float]]) -> list[float]:
    """For each event of cumulative sparsities, the fraction of the then remaining weights that it prunes."""
    before = [0.0, *(sparsity for _, sparsity in events)]
    return [1 - (1 - target) / (1 - reached) for reached, (_, target) in zip(before, events)]


class PruneAt(KeepMasked):
    """Prunes at the end of given epochs to given cumulative sparsities, and holds the pruned weights at zero.

    events: pairs (epoch from 1, sparsity), ascending.
    """

    def __init__(self, masks: Masks, events: Sequence[tuple[int, float]], allocation: Allocation = "global"):
        super().__init__(masks)
        self.allocation = allocation
        self._fractions = {epoch: step for (epoch, _), step in zip(events, relative_steps(events))}

    def epoch_ended(self, trainer: Trainer, epoch: int) -> None:
        if epoch + 1 in self._fractions:
            self.masks.prune(trainer.model, self._fractions[epoch + 1], self.allocation)
            self.masks.apply(trainer.model)
