"""IMP+SLR: 6 dense epochs, then pruning and retraining; pruning during training takes as long in all."""

from __future__ import annotations

import functools

import torch

from common.core import schedules
from common.core.pruning.masks import KeepMasked, Masks
from common.core.trainer import Trainer
from lockstep import PER_EPOCH, StoredBatches, ended, resnet
from replications.imp_slr import baselines, method

SPARSITY, DENSE, RETRAINED = 0.9, 6, 3
TOTAL = DENSE + RETRAINED
OPTIONS = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


def _rates(epochs: int) -> list[float]:
    return schedules.multistep(0.1, epochs, PER_EPOCH, [0.5 * epochs, 0.75 * epochs])


def _trainer(model, *hooks, **changed) -> Trainer:
    return Trainer(model, StoredBatches(), hooks=hooks, **(OPTIONS | changed))


@functools.cache
def _dense_state():
    trainer = _trainer(resnet("A"))
    trainer.fit(_rates(DENSE))
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def _dense():
    return {name: value for name, value in _dense_state().items() if value.is_floating_point()}


def _kept(masks: Masks):
    return {"kept": torch.cat([mask.flatten() for mask in masks.kept.values()])}


def _retrained(trainer: Trainer, masks: Masks, schedule: method.Schedule, cycles: int = 1):
    """Prune and retrain from where the trainer is."""
    history = method.History(_rates(DENSE))
    retraining = method.Retraining(schedule, history, DENSE, recalibrate=True)
    epochs = method.cycle_epochs(cycles, each=RETRAINED)
    done = method.prune_and_retrain(trainer, masks, SPARSITY, epochs, retraining)
    rates = [rate for cycle in done for rate in cycle.rates]
    drops = [(cycle.norm_drop, cycle.prunable_norm_drop) for cycle in done]
    return ended(trainer.model) | _kept(masks) | {"rates": rates, "drops": drops}


def _imp(schedule: method.Schedule, cycles: int):
    model = resnet("A")
    model.load_state_dict(_dense_state())
    masks = Masks.dense(model)
    trainer = _trainer(model, KeepMasked(masks))
    trainer.go_on_from(DENSE)
    return _retrained(trainer, masks, schedule, cycles)


def _during(make, **changed):
    model = resnet("A")
    hook = make(model)
    trainer = _trainer(model, hook, decays=hook.decays, **changed)
    trainer.fit(_rates(TOTAL))
    raw = {f"raw.{number}": tensor.clone() for number, tensor in enumerate(hook._tensors())}
    hook.finish(trainer)
    return ended(model) | _kept(hook.masks) | raw


def _prepared(make, **changed):
    """Trained dense, pruned and retrained, as GSM and LC are."""
    model = resnet("A")
    hook = make(model)
    trainer = _trainer(model, hook, KeepMasked(hook.masks), decays=hook.decays, **changed)
    trainer.fit(_rates(DENSE))
    hook.finish(trainer)
    trainer.fresh_optimizer(momentum=OPTIONS["momentum"], weight_decay=OPTIONS["weight_decay"])
    return _retrained(trainer, hook.masks, "SLR")


def _bimp():
    shape = (TOTAL, 3, 2)
    model = resnet("A")
    hook = method.PruneAt(Masks.dense(model), method.bimp_events(SPARSITY, *shape))
    _trainer(model, hook).fit(method.bimp_rates(0.1, *shape, PER_EPOCH))
    return ended(model) | _kept(hook.masks)


def _reparameterised(method_class, *numbers, double_decay: bool):
    return lambda: _during(lambda m: method_class(m, *numbers, OPTIONS["weight_decay"], double_decay))


CASES = {
    "dense": _dense,
    **{
        f"{schedule}-{cycles}": functools.partial(_imp, schedule, cycles)
        for schedule in ("FT", "LRW", "SLR", "CLR", "LLR", "ALLR")
        for cycles in (1, 3)
    },
    "bimp-2022": _bimp,
    "GMP": lambda: _during(lambda m: baselines.GMP(m, SPARSITY, TOTAL, 1)),
    "GMP-recovering": lambda: _during(lambda m: baselines.GMP(m, SPARSITY, TOTAL, 1, recovering=True)),
    "DPF": lambda: _during(lambda m: baselines.DPF(m, SPARSITY, TOTAL, 1)),
    "DNW": lambda: _during(lambda m: baselines.DNW(m, SPARSITY)),
    "STR": lambda: _during(lambda m: baselines.STR(m, -5.0), weight_decay=2e-2),
    "CS": _reparameterised(baselines.CS, 0.0, 200.0, 1e-3, TOTAL * PER_EPOCH, double_decay=False),
    "CS-double": _reparameterised(baselines.CS, 0.0, 200.0, 1e-3, TOTAL * PER_EPOCH, double_decay=True),
    "DST": _reparameterised(baselines.DST, 3e-3, double_decay=False),
    "DST-double": _reparameterised(baselines.DST, 3e-3, double_decay=True),
    "GSM": lambda: _prepared(lambda m: baselines.GSM(m, SPARSITY), momentum=0.99),
    "LC": lambda: _prepared(lambda m: baselines.LC(m, SPARSITY, 5e-3), weight_decay=5e-3),
}
