"""IMP with SLR on equal footing: a part of the epochs dense, one pruning, the rest retraining."""

from common.arena import Contender, Contest
from common.core.pruning.masks import KeepMasked, Masks
from common.core.run import Outcome
from replications.imp_slr.method import History, Retraining, prune_and_retrain


def contend(contest: Contest, retraining: float) -> Outcome:
    """Train, prune by global magnitude to the contest's share of parameters, retrain with SLR for a share of the epochs."""
    after = contest.part(retraining)
    before = contest.arena.epochs - after
    rates = contest.rates(before)
    model = contest.network()
    masks = Masks.dense(model)
    trainer = contest.trainer(model, KeepMasked(masks))
    trainer.fit(rates, "dense")
    # IMP begins with a new optimiser
    trainer.fresh_optimizer()
    prune_and_retrain(
        trainer, masks, contest.sparsity(model), [after], Retraining("SLR", History(rates), before)
    )
    return contest.outcome(trainer)


CONTENDERS = {
    "IMP + SLR": Contender(contend, [{"retraining": 0.25}, {"retraining": 0.5}, {"retraining": 0.75}])
}
