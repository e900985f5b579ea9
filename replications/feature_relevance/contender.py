"""Gradual pruning by feature relevance on equal footing: channels go at seven events of one training."""

from common.arena import Contender, Contest
from common.core.failures import Unreachable
from common.core.models.resnet import ResNet
from common.core.run import Outcome
from replications.feature_relevance import method
from replications.feature_relevance.costs import CostTable, even_share, forward_macs
from replications.feature_relevance.method import Goal, GradualPruning, Pruner, until_at_most

EVENTS = 7
SCORING_SHARE = 0.25


def contend(contest: Contest, last: float) -> Outcome:
    """Channels go at up to EVENTS events, spread evenly, until the parameters are few enough.

    last: N1 / E, the share of the epochs after which no channel goes; in the paper 0.75.
    """
    arena, model = contest.arena, contest.network()
    table = CostTable(model, contest.data.image_shape)
    least = 0 if isinstance(model, ResNet) else 1
    pruner = Pruner(model, method.scoring_batches(contest.data, SCORING_SHARE), minimum=least)
    budget = contest.keep * contest.parameters
    narrowest = table.parameters(dict.fromkeys(pruner.layers, least))
    if narrowest > budget:
        raise Unreachable(f"{budget:.0f} parameters cannot be met: the narrowest network has {narrowest:.0f}")
    fraction = even_share(lambda part: table.parameters(table.even(pruner.layers, part)), budget)
    end = contest.part(last)
    epochs = method.pruning_schedule(arena.epochs, max(1, round(end / EVENTS)), end)
    goals = {
        epoch: table.parameters(table.even(pruner.layers, fraction * (i + 1) / len(epochs)))
        for i, epoch in enumerate(epochs)
    } | {epochs[-1]: budget}
    events = {epoch: Goal(until_at_most(table.parameters, most)) for epoch, most in goals.items()}
    hook = GradualPruning(pruner, events)
    trainer = contest.trainer(model, hook)
    trainer.fit(contest.rates(arena.epochs))
    return contest.outcome(trainer, sum(forward_macs(hook.log, table, arena.epochs)), events=hook.log)


CONTENDERS = {"feature relevance": Contender(contend, [{"last": 0.25}, {"last": 0.5}, {"last": 0.75}])}
