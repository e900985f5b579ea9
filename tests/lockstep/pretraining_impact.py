"""Pre-training and pruning: levels of removing filters and training on, and removal while training."""

from __future__ import annotations

import copy

import torch

from common.core import schedules
from common.core.pruning import channels
from common.core.trainer import Trainer
from lockstep import PER_EPOCH, StoredBatches, chain, ended, resnet
from replications.pretraining_impact import filters, method

EPOCHS = 3
OPTIONS = {"nesterov": True, "weight_decay": 5e-4, "decays": lambda name, parameter: parameter.ndim > 1}


def _fit(model, epochs: int, *hooks):
    trainer = Trainer(model, StoredBatches(), hooks=hooks, **OPTIONS)
    trainer.fit(schedules.cosine(0.1, epochs, PER_EPOCH, warmup_epochs=1))


def _levels(make, **how):
    """Trained, then narrowed and trained on twice, each level with a fresh optimiser."""
    model, selection = make(), filters.FilterSelection(**how)
    initial = copy.deepcopy(model) if selection.criterion in method.NEEDS_INITIAL else None
    original = filters.filter_widths(model)
    _fit(model, EPOCHS)
    found = {}
    for fraction in (0.3, 0.6):
        keep = filters.choose(model, fraction, original, selection, initial=initial)
        for network in (model, initial):
            if network is not None:
                channels.remove(network, keep)
        found |= {f"kept.{fraction}.{name}": index for name, index in keep.items()}
        _fit(model, EPOCHS)
    return ended(model) | found


def _gradual(removal: str = "at_events", optimizer: str = "sgd", **how):
    """Filters leave at some steps of one training of 9 epochs."""
    model, total = chain(), 9 * PER_EPOCH
    masks = [filters.KeepFiltersMasked("after_step")] if removal == "at_end" else []
    events = filters.schedule_events("agp", total, 0.6, (0.2, 0.8), 6)
    hook = filters.Gradual(model, events, filters.FilterSelection(**how), masks=(masks or [None])[0])
    if optimizer == "sgd":
        _fit(model, 9, hook, *masks)
    else:
        adam = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.95, 0.99), eps=1e-5, weight_decay=1e-2)
        once = filters.OneCycleMomentum(total)
        trainer = Trainer(model, StoredBatches(), hooks=[hook, *masks, once], optimizer=adam)
        trainer.fit([method.one_cycle_policy(t / total, 3e-3)[0] for t in range(total)])
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
