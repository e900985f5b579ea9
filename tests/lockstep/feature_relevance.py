"""Feature relevance: channels leave after the epochs 3 and 6 of 9, narrowed or behind masks."""

from __future__ import annotations

import copy

import torch

from common.core import schedules
from common.core.trainer import Trainer
from lockstep import PER_EPOCH, StoredBatches, chain, ended, resnet
from replications.feature_relevance.gradual import GradualPruning, Pruner, Scoring, until_channels

EPOCHS, EVENTS, TAKEN = 9, (3, 6), 5


class _Noted(Pruner):
    """Keeps the scores of each event."""

    def event(self, *arguments, **options):
        event, number = super().event(*arguments, **options), self.events
        scores = event.scored.scores.items()
        self.noted = getattr(self, "noted", {}) | {f"scores.{number}.{n}": v.double() for n, v in scores}
        return event


def _pruned(make, *, physical: bool = True, minimum: int = 1, units: int = 0, **scoring):
    model = make()
    pruner = _Noted(copy.deepcopy(model), Scoring(minimum=minimum, **scoring), StoredBatches())
    enough = dict.fromkeys(EVENTS, until_channels(TAKEN))
    hook = GradualPruning(pruner, enough, dict.fromkeys(EVENTS, units), physical)
    trainer = Trainer(model, StoredBatches(), hooks=hook, weight_decay=5e-4)
    trainer.fit(schedules.multistep(0.1, EPOCHS, PER_EPOCH, [0.5 * EPOCHS, 0.75 * EPOCHS]))
    removed = {f"removed.{name}": index for name, index in pruner.removed.items()}
    return ended(trainer.model) | removed | pruner.noted


def _scores(make, **scoring):
    """Scores of a network that is not trained, and what an event takes from it."""
    model = make()
    pruner = Pruner(model, Scoring(minimum=1, **scoring), StoredBatches())
    event = pruner.event(model, until_channels(3 * TAKEN))
    order = {"order": torch.tensor(event.channels)}
    return {name: values.double() for name, values in event.scored.scores.items()} | order


CASES = {
    "scores-resnet": lambda: _scores(resnet),
    "scores-resnet-branch-share": lambda: _scores(resnet, branch_share=True, alpha=1.0),
    "scores-chain": lambda: _scores(chain),
    "scores-taylor": lambda: _scores(resnet, criterion="taylor"),
    "scores-l1": lambda: _scores(resnet, criterion="l1"),
    "relevance-resnet": lambda: _pruned(resnet),
    "relevance-resnet-masked": lambda: _pruned(resnet, physical=False),
    "relevance-resnet-per-layer": lambda: _pruned(resnet, allocation="per_layer"),
    "relevance-chain": lambda: _pruned(chain, units=2),
    "taylor-resnet": lambda: _pruned(resnet, criterion="taylor"),
}
