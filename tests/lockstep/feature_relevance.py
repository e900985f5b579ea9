"""Feature relevance: channels leave after the epochs 3 and 6 of 9, narrowed or behind masks."""

from __future__ import annotations

import copy

import torch

from common.core import schedules
from common.core.trainer import Trainer
from lockstep import PER_EPOCH, StoredBatches, chain, ended, resnet
from replications.feature_relevance import baselines
from replications.feature_relevance.method import Goal, GradualPruning, Pruner, Relevance, until_channels

EPOCHS, EVENTS, TAKEN = 9, (3, 6), 5


class _Noted(Pruner):
    """Keeps the scores of each event."""

    def event(self, *arguments, **options):
        event, number = super().event(*arguments, **options), self.events
        scores = event.scored.scores.items()
        self.noted = getattr(self, "noted", {}) | {f"scores.{number}.{n}": v.double() for n, v in scores}
        return event


def _pruned(make, *, physical: bool = True, units: int = 0, **options):
    model = make()
    pruner = _Noted(copy.deepcopy(model), StoredBatches(), minimum=1, **options)
    hook = GradualPruning(pruner, dict.fromkeys(EVENTS, Goal(until_channels(TAKEN), units)), physical)
    trainer = Trainer(model, StoredBatches(), hooks=hook, weight_decay=5e-4)
    trainer.fit(schedules.multistep(0.1, EPOCHS, PER_EPOCH, [0.5 * EPOCHS, 0.75 * EPOCHS]))
    removed = {f"removed.{name}": index for name, index in pruner.removed.items()}
    return ended(trainer.model) | removed | pruner.noted


def _scores(make, **options):
    """Scores of a network that is not trained, and what an event takes from it."""
    model = make()
    pruner = Pruner(model, StoredBatches(), minimum=1, **options)
    event = pruner.event(model, Goal(until_channels(3 * TAKEN)))
    order = {"order": torch.tensor(event.channels)}
    return {name: values.double() for name, values in event.scored.scores.items()} | order


CASES = {
    "scores-resnet": lambda: _scores(resnet),
    "scores-resnet-branch-share": lambda: _scores(resnet, criterion=Relevance(alpha=1.0, branch_share=True)),
    "scores-chain": lambda: _scores(chain),
    "scores-taylor": lambda: _scores(resnet, criterion=baselines.Taylor()),
    "scores-l1": lambda: _scores(resnet, criterion=baselines.L1()),
    "relevance-resnet": lambda: _pruned(resnet),
    "relevance-resnet-masked": lambda: _pruned(resnet, physical=False),
    "relevance-resnet-per-layer": lambda: _pruned(resnet, allocation=baselines.same_share),
    "relevance-chain": lambda: _pruned(chain, units=2),
    "taylor-resnet": lambda: _pruned(resnet, criterion=baselines.Taylor()),
}
