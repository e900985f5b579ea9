"""The controls: what a method has to beat. They are tuned like every contender."""

from bisect import bisect_right

import numpy as np

from common.arena import Contender, Contest
from common.core.failures import Unreachable
from common.core.pruning.masks import KeepMasked, Masks, prunable, select
from common.core.run import Outcome


def global_magnitude(contest: Contest, retraining: float) -> Outcome:
    """Train, prune the smallest weights of the whole network once, train the rest for the share `retraining`."""
    after = contest.part(retraining)
    model = contest.network()
    trainer = contest.trainer(model)
    trainer.fit(contest.rates(contest.arena.epochs - after), "dense")
    masks = Masks(select(prunable(model), contest.sparsity(model)))
    masks.apply(model)
    trainer.add_hook(KeepMasked(masks))
    trainer.fit(contest.rates(after), "retraining")
    return contest.outcome(trainer)


def small_dense(contest: Contest, learning_rate: float) -> Outcome:
    """The same network with all widths scaled alike to the budget, trained from scratch for all epochs."""
    full = contest.shape_of().widths
    budget = contest.keep * contest.parameters

    def widths(scale: float) -> list[int]:
        return [max(1, round(scale * width)) for width in full]

    scales = np.linspace(0, 1, 513)[1:]
    # wider networks have more parameters, so those that fit come first
    fitting = bisect_right(scales, budget, key=lambda scale: contest.size_of(widths(scale)))
    if not fitting:
        least = contest.size_of(widths(0))
        raise Unreachable(
            f"no network of the architecture has {budget:.0f} parameters or fewer; the least is {least}"
        )
    chosen = widths(scales[fitting - 1])
    trainer = contest.trainer(contest.network(chosen))
    trainer.fit(contest.rates(contest.arena.epochs, learning_rate), "dense")
    return contest.outcome(trainer, widths=chosen)


CONTENDERS = {
    "global magnitude": Contender(
        global_magnitude, [{"retraining": 0.25}, {"retraining": 0.5}, {"retraining": 0.75}]
    ),
    "small dense": Contender(
        small_dense, [{"learning_rate": 0.05}, {"learning_rate": 0.1}, {"learning_rate": 0.2}]
    ),
}
