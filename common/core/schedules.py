"""Learning rates of a whole training run in closed form: one number per iteration.

Lists in place of scheduler objects, because chained schedulers depend on the version of the framework and
cannot be looked at beforehand. `common.core.trainer.Trainer.fit` takes such a list. All functions share

    rate: the highest learning rate (> 0)
    epochs, per_epoch: length of training, and iterations in an epoch
    warmup_epochs: whole epochs at the start that rise linearly from 0, reaching `rate` right after them

and raise ValueError when the warm-up is longer than training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def constant(rate: float, epochs: int, per_epoch: int, warmup_epochs: int = 0) -> list[float]:
    """The same rate throughout."""
    return _after_warmup(rate, epochs, per_epoch, warmup_epochs, lambda t, length: rate)


def multistep(
    rate: float,
    epochs: int,
    per_epoch: int,
    milestones: Sequence[float],
    gamma: float = 0.1,
    warmup_epochs: int = 0,
) -> list[float]:
    """`rate`, multiplied by `gamma` at each milestone.

    milestones: epochs counted from the start of training, warm-up included.
    """
    drops = [round(milestone * per_epoch) for milestone in milestones]
    return _through_warmup(
        epochs, per_epoch, warmup_epochs, lambda t: rate * gamma ** sum(t >= d for d in drops)
    )


def step(
    rate: float, epochs: int, per_epoch: int, step_epochs: int, gamma: float = 0.1, warmup_epochs: int = 0
) -> list[float]:
    """`rate`, multiplied by `gamma` every `step_epochs` epochs, counted from the start, warm-up included."""
    every = step_epochs * per_epoch
    return _through_warmup(epochs, per_epoch, warmup_epochs, lambda t: rate * gamma ** (t // every))


def exponential(
    rate: float, epochs: int, per_epoch: int, gamma: float, warmup_epochs: int = 0
) -> list[float]:
    """`rate`, multiplied by `gamma` in every iteration after the warm-up."""
    return _after_warmup(rate, epochs, per_epoch, warmup_epochs, lambda t, length: rate * gamma**t)


def linear(rate: float, epochs: int, per_epoch: int, end: float = 0.0, warmup_epochs: int = 0) -> list[float]:
    """From `rate` straight to `end`, which would be reached one iteration after the last."""
    return _after_warmup(
        rate, epochs, per_epoch, warmup_epochs, lambda t, length: rate + (end - rate) * t / length
    )


def cosine(rate: float, epochs: int, per_epoch: int, end: float = 0.0, warmup_epochs: int = 0) -> list[float]:
    """From `rate` to `end` along half a cosine; `end` would be reached one iteration after the last."""
    return _after_warmup(
        rate,
        epochs,
        per_epoch,
        warmup_epochs,
        lambda t, length: end + (rate - end) * (1 + math.cos(math.pi * t / length)) / 2,
    )


def _iterations(epochs: int, per_epoch: int, warmup_epochs: int) -> tuple[int, int]:
    if not 0 <= warmup_epochs <= epochs:
        raise ValueError(f"a warm-up of {warmup_epochs} epochs does not fit into {epochs} epochs of training")
    return epochs * per_epoch, warmup_epochs * per_epoch


def _after_warmup(
    rate: float, epochs: int, per_epoch: int, warmup_epochs: int, main: Callable[[int, int], float]
) -> list[float]:
    """main(t, length) with t counted from the end of the warm-up."""
    total, warmup = _iterations(epochs, per_epoch, warmup_epochs)
    return [rate * t / warmup for t in range(warmup)] + [
        main(t, total - warmup) for t in range(total - warmup)
    ]


def _through_warmup(
    epochs: int, per_epoch: int, warmup_epochs: int, main: Callable[[int], float]
) -> list[float]:
    """main(t) with t counted from the start, scaled down during the warm-up."""
    total, warmup = _iterations(epochs, per_epoch, warmup_epochs)
    return [main(t) * min(1.0, t / warmup if warmup else 1.0) for t in range(total)]
