"""Pruning from scratch: gates after 3 epochs of Adam, and the structures that are found from them."""

from __future__ import annotations

import functools

import torch

from common.core.trainer import Trainer
from lockstep import PER_EPOCH, SHAPE, StoredBatches, ended, started
from replications.pruning_from_scratch import method
from replications.pruning_from_scratch.structure import Layout, Ranking, search

EPOCHS, RATE = 3, 0.03
TARGETS = (0.3, 0.5, 0.7, 0.9)
LAYOUTS = {
    "gated-resnet": ("resnet8", {"stem": 4}),
    "gated-vgg": ("convnet", {"cfg": [4, 4, "M", 8, 8, "M", 12], "linear_init": "torch"}),
}


def layout(name: str) -> Layout:
    """A layout before expansion."""
    architecture, options = LAYOUTS[name]
    return Layout.of(architecture, SHAPE["classes"], SHAPE["image_shape"], options)


def _learned(name: str):
    base = layout(name)
    wide = base.expanded(1.25)
    model = started(name, wide.build())
    gates = method.Gates(model, wide.gated, weight=0.5, level=0.5)
    trainer = Trainer(model, StoredBatches(), hooks=gates, optimizer=gates.optimizer())
    trainer.fit([RATE] * EPOCHS * PER_EPOCH)
    found = {"gates": torch.stack(gates.epochs)}
    found |= {key: value for key, value in ended(model).items() if "running" in key}
    for unit in ("macs", "parameters"):
        for target in TARGETS:
            structure = search(
                Ranking.of(gates.layers()), wide.spends(unit), base.cost()[unit], target, min_channels=1
            )
            found[f"{unit}.{target}"] = torch.cat(structure.masks)
            found[f"{unit}.{target}.tried"] = [candidate.keep for candidate in structure.tried]
            found[f"{unit}.{target}.widths"] = [*structure.candidate.widths, structure.candidate.cost]
    return found


CASES = {name: functools.partial(_learned, name) for name in LAYOUTS}
