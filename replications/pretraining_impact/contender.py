"""The paper's pruning loop on equal footing: filters of least L1 norm go in steps; trained from scratch."""

import torch

from common.arena import Contender, Contest
from common.core.pruning.counting import cost
from common.core.run import Outcome
from replications.pretraining_impact.filters import filter_widths
from replications.pretraining_impact.method import (
    FilterSelection,
    fractions_for_reductions,
    prune_and_retrain,
)

STEPS = 3


def contend(contest: Contest, retraining: float) -> Outcome:
    """Train; then, in up to STEPS equal parts of the share `retraining`: remove filters, train on."""
    model = contest.network()
    original = filter_widths(model)

    after = contest.part(retraining)
    dense, steps = contest.arena.epochs - after, min(STEPS, after)
    parts = iter(torch.arange(after).tensor_split(steps))
    reductions = [contest.target * (step + 1) / steps for step in range(steps)]
    fractions = fractions_for_reductions(contest.size_of, original, reductions)
    trainer = contest.trainer(model)
    trainer.fit(contest.rates(dense), "dense")
    shape = contest.data.image_shape

    def retrain(fraction: float) -> float:
        epochs = len(next(parts))
        # as in the paper's loop, the optimiser starts anew after each removal
        trainer.fresh_optimizer()
        trainer.fit(contest.rates(epochs), f"after removing {fraction:.2f}")
        return cost(model, shape)["macs"] * epochs

    spent = cost(model, shape)["macs"] * dense
    spent += sum(
        prune_and_retrain(model, fractions, original, FilterSelection(), retrain, optimizer=trainer.optimizer)
    )
    return contest.outcome(trainer, spent, widths=filter_widths(model))


CONTENDERS = {
    "L1 filters": Contender(contend, [{"retraining": 0.5}, {"retraining": 0.65}, {"retraining": 0.8}])
}
