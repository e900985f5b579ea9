"""HALO on equal footing: the penalty throughout training, one mask at the end, no fine-tuning."""

from common.arena import Contest
from common.core.pruning.masks import Masks, prunable
from common.core.run import Outcome
from replications.halo.method import HALO, LambdaTraining, cut, penalised

PULL, XI_TO_PSI = 2.0, 0.05
"""psi * B, with B the sum of the learning rates over (1 - momentum): by how much the lambda of an unused weight falls
from its initial 1. There is no tuning on equal footing."""


def contend(contest: Contest) -> Outcome:
    """Train weights and lambdas together with the intended learning rates, then mask to the contest's share."""
    arena = contest.arena
    rates = contest.rates(arena.epochs)
    psi = PULL * (1 - arena.momentum) / sum(rates)
    model = contest.network()
    training = LambdaTraining(rates, momentum=arena.momentum, weight_decay=arena.weight_decay)
    trainer = contest.trainer(model, HALO(penalised(model, "conv+linear"), XI_TO_PSI * psi, psi, training))
    trainer.fit(rates)
    share = contest.sparsity(model)
    Masks(cut(prunable(model), share).kept).apply(model)
    return contest.outcome(trainer)


CONTENDERS = {"HALO": contend}
