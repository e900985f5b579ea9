"""Pre-training and pruning: levels of removing filters and training on, and removal while training."""

from __future__ import annotations

import copy
from unittest.mock import patch

import torch

from common.core import schedules
from common.core.trainer import Trainer
from lockstep import PER_EPOCH, StoredBatches, chain, ended, resnet
from replications.pretraining_impact import filters, gradual, method, training

EPOCHS = 3
OPTIONS = {"nesterov": True, "weight_decay": 5e-4, "decays": lambda name, parameter: parameter.ndim > 1}


def _fit(model, epochs: int, *hooks):
    trainer = Trainer(model, StoredBatches(), hooks=hooks, **OPTIONS)
    trainer.fit(schedules.cosine(0.1, epochs, PER_EPOCH, warmup_epochs=1))


def _levels(make, **how):
    """Trained, then narrowed and trained on twice, each level with a fresh optimiser."""
    model, selection = make(), method.FilterSelection(**how)
    initial = copy.deepcopy(model) if selection.criterion in method.NEEDS_INITIAL else None
    original, choose, found = filters.filter_widths(model), method.choose, {}
    _fit(model, EPOCHS)

    def noted(model, fraction, *rest, **more):
        keep = choose(model, fraction, *rest, **more)
        found.update({f"kept.{fraction}.{name}": index for name, index in keep.items()})
        return keep

    with patch.object(method, "choose", noted):
        method.prune_and_retrain(
            model, (0.3, 0.6), original, selection, lambda fraction: _fit(model, EPOCHS), initial=initial
        )
    return ended(model) | found


def _gradual(removal: str = "at_events", optimizer: str = "sgd", **how):
    """Filters leave at some steps of one training of 9 epochs."""
    model, total = chain(), 9 * PER_EPOCH
    masks = [gradual.KeepFiltersMasked("after_step")] if removal == "at_end" else []
    events = gradual.schedule_events("agp", total, 0.6, (0.2, 0.8), 6)
    hook = gradual.Gradual(model, events, method.FilterSelection(**how), masks=(masks or [None])[0])
    if optimizer == "sgd":
        _fit(model, 9, hook, *masks)
    else:
        adam = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.95, 0.99), eps=1e-5, weight_decay=1e-2)
        once = training.OneCycleMomentum(total)
        trainer = Trainer(model, StoredBatches(), hooks=[hook, *masks, once], optimizer=adam)
        trainer.fit([training.one_cycle_policy(t / total, 3e-3)[0] for t in range(total)])
    hook.finish(model)
    return ended(model) | {"widths": [[done, *widths] for done, widths in hook.log]}


CASES = {
    "levels-chain": lambda: _levels(chain),
    "levels-resnet-global": lambda: _levels(resnet, criterion="l1_mean", context="global"),
    "levels-group": lambda: _levels(chain, score="group", inputs="all"),
    "levels-movement": lambda: _levels(chain, criterion="movement_mean"),
    "gradual": _gradual,
    "gradual-masked": lambda: _gradual(removal="at_end"),
    "gradual-one-cycle-adam": lambda: _gradual(optimizer="adam"),
}
