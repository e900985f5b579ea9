"""HALO on equal footing: the penalty throughout training, one mask at the end, no fine-tuning."""

from common.arena import Contest
from common.pruning.masks import Masks, prunable
from common.runs import Outcome
from replications.halo.method import HALO, LambdaTraining, cut, penalised

XI, PSI = 3e-4, 3e-3
"""Of the pilot on digits in the paper's README; there is no tuning on equal footing."""


def contend(contest: Contest) -> Outcome:
    """Train weights and lambdas together with the intended learning rates, then mask to the contest's share."""
    arena = contest.arena
    rates = contest.dense_rates(arena.epochs)
    model = contest.network()
    training = LambdaTraining(rates, momentum=arena.momentum, weight_decay=arena.weight_decay)
    trainer = contest.trainer(model, HALO(penalised(model, "conv+linear"), XI, PSI, training))
    trainer.fit(rates)
    share = contest.sparsity(model)
    Masks(cut(prunable(model), share).kept).apply(model)
    # the trainer's record ends here: the mask is not trained on
    return contest.outcome(trainer)


CONTENDERS = {"HALO": contend}
