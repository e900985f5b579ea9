"""HALO and the penalties it is compared with: 9 epochs of 4 iterations, drops before the epochs 3 and 6."""

from __future__ import annotations

import torch

from common.core.pruning.masks import KeepMasked, Masks, prunable
from common.core.trainer import Trainer
from lockstep import PER_EPOCH, StoredBatches, ended, resnet
from replications.halo import method

EPOCHS, MILESTONES, RATE, DECAY = 9, (3, 6), 0.1, 1e-4
SHARES = (0.5, 0.9, 0.95, 0.98)
XI, PSI = 3e-4, 6e-3


def _trained(make=None, coupling: method.Coupling = "official", init: float = 1.0, psi_every=None, psi=PSI):
    model = resnet()
    drops = method.milestone_drops(EPOCHS * PER_EPOCH, [epoch * PER_EPOCH for epoch in MILESTONES])
    rates, of_lambdas = method.learning_rates(drops, RATE, 0.1, True, coupling)
    by_epoch = method.psi_schedule(psi, 0.1, psi_every, EPOCHS)
    training = method.LambdaTraining(of_lambdas, 0.9, DECAY, init, by_epoch)
    penalty = make and make(method.penalised(model, "conv"), training)
    if not hasattr(penalty, "lambdas"):
        rates, _ = method.learning_rates(drops, RATE, 0.1, False)
    trainer = Trainer(model, StoredBatches(), weight_decay=DECAY, hooks=[penalty] if penalty else [])
    trainer.fit(rates)
    return trainer, penalty


def _arm(*arguments, **options):
    trainer, penalty = _trained(*arguments, **options)
    found = ended(trainer.model)
    for number, part in enumerate(getattr(penalty, "lambdas", [])):
        found[f"lambdas.{number}"] = part
    for share in SHARES:
        cut = method.cut(prunable(trainer.model, "conv"), share)
        found[f"kept.{share}"] = torch.cat([mask.flatten() for mask in cut.kept.values()])
        found[f"index.{share}"] = torch.tensor([cut.index, cut.float32_index, cut.pruned])
    return found


def _halo(target: float = 0.0, mode: method.TargetMode = "L1", psi: float = PSI, **options):
    return lambda: _arm(lambda w, t: method.HALO(w, XI, psi, t, target, mode), psi=psi, **options)


def _magnitude():
    """The network without a penalty, pruned in two rounds and trained on after each."""
    trainer, _ = _trained()
    for number, share in enumerate((0.9, 0.5)):
        masks = Masks(method.cut(prunable(trainer.model, "conv"), share).kept)
        masks.apply(trainer.model)
        tuned = Trainer(trainer.model, StoredBatches(), weight_decay=DECAY, hooks=KeepMasked(masks))
        tuned.fit([0.01] * (number + 1) * PER_EPOCH)
    return ended(trainer.model)


CASES = {
    "none": _arm,
    "l1": lambda: _arm(lambda w, t: method.L1(w, 5e-3)),
    "sws": lambda: _arm(lambda w, t: method.SWS(w, 1e-3, 1.0, t), psi=1.0),
    "mcp": lambda: _arm(lambda w, t: method.MCP(w, 1e-2, 30.0)),
    "halo": _halo(),
    "halo-intended": _halo(coupling="intended", init=0.7),
    "halo-target-L1": _halo(target=700.0),
    "halo-target-L2": _halo(target=700.0, mode="L2", psi=1e-5),
    "halo-reg-scheduler": _halo(psi_every=4, psi=6e-6),
    "magnitude-iterative": _magnitude,
}
