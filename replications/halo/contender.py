"""HALO on equal footing: the penalty throughout training, one mask at the end, no fine-tuning."""

from common.arena import Contender, Contest
from common.core import schedules
from common.core.pruning.masks import Masks, prunable
from common.core.run import Outcome
from replications.halo.method import HALO, LambdaTraining, cut, penalised

DROPS = (0.5, 0.75)
"""Shares of the epochs at which the rates drop to a tenth, as in the paper's scripts. While they are high, lambdas of unused
weights fall until the penalty overpowers the loss; the network takes shape after the drops."""


def contend(contest: Contest, pull: float, xi_to_psi: float) -> Outcome:
    """Train weights and lambdas together with the intended learning rates, then mask to the contest's share.

    pull: psi * B, with B the sum of the learning rates over (1 - momentum): by how much the lambda of an unused weight
    would fall from its initial 1, however long training is. xi_to_psi: xi / psi.
    """
    arena = contest.arena
    drops = [share * arena.epochs for share in DROPS]
    rates = schedules.multistep(arena.learning_rate, arena.epochs, arena.per_epoch(contest.data), drops)
    psi = pull * (1 - arena.momentum) / sum(rates)
    model = contest.network()
    training = LambdaTraining(rates, momentum=arena.momentum, weight_decay=arena.weight_decay)
    trainer = contest.trainer(model, HALO(penalised(model, "conv+linear"), xi_to_psi * psi, psi, training))
    trainer.fit(rates)
    share = contest.sparsity(model)
    Masks(cut(prunable(model), share).kept).apply(model)
    return contest.outcome(trainer)


CONTENDERS = {
    "HALO": Contender(
        contend,
        [
            {"pull": 1.5, "xi_to_psi": 0.02},
            {"pull": 2.0, "xi_to_psi": 0.05},
            {"pull": 2.5, "xi_to_psi": 0.07},
        ],
    )
}
