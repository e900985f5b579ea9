"""Pruning from scratch on equal footing: gates on random weights, then the structure that they lead to."""

import math

from common.arena import Contender, Contest
from common.core.failures import Unreachable
from common.core.identity import stream
from common.core.pruning import counting
from common.core.run import Outcome
from replications.pruning_from_scratch.method import EXPANSION, GateSettings, learned
from replications.pruning_from_scratch.structure import Layout, Ranking, search

LEAST_SHARE = 0.125
"""Of the channels of a gated layer: what it keeps in any case (`search.min_share` of the paper's stage), else some close."""


def contend(contest: Contest, search_share: float) -> Outcome:
    """Gates on random weights for a share of the epochs, then training of the structure they lead to."""
    arena, data, cell = contest.arena, contest.data, contest.cell
    epochs = contest.part(search_share)
    wide = Layout.of(cell.architecture, data.classes, data.image_shape, cell.options).expanded(EXPANSION)
    model = wide.build(seed=stream(contest.seed, "widened network"))
    options = GateSettings(epochs=epochs, level=contest.keep)
    _, gates, _ = learned(contest.context, data, wide.gated, model, options)

    least = [math.ceil(LEAST_SHARE * width) for width in wide.widths]
    ranking = Ranking.of(gates.layers())
    found = search(ranking, contest.size_of, contest.parameters, contest.target, min_channels=least)
    if found.status == "unreachable":
        raise Unreachable(
            f"{contest.target:g} of the parameters must go; at most {found.floor:.4f} can be removed"
        )
    trainer = contest.trainer(contest.network(found.candidate.widths))
    trainer.fit(contest.rates(arena.epochs - epochs))
    macs = counting.cost(trainer.model, data.image_shape)["macs"]
    spent = wide.cost()["macs"] * epochs + macs * trainer.epochs_done
    return contest.outcome(trainer, spent, widths=list(found.candidate.widths))


CONTENDERS = {
    "pruning from scratch": Contender(
        contend, [{"search_share": 0.1}, {"search_share": 0.25}, {"search_share": 0.5}]
    )
}
