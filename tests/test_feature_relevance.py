"""Behaviour of the feature-relevance replication beyond the golden vectors."""

import copy

import pytest
import torch

from common.datasets import FixedBatches
from common.models import build
from common.training import RunFailed, Trainer
from replications.feature_relevance import method
from replications.feature_relevance.gradual import GradualPruning, MaskedTwin, Pruner, Ranking, until_channels

CLASSES, SHAPE = 3, (1, 8, 8)
NETWORKS = {
    "resnet14": {"stem": 4},
    "resnet11": None,
    "vgg_mini": {"dropout": 0.0},
}


def _batches(count=3, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, size, *SHAPE, generator=generator, dtype=torch.float64)
    labels = torch.arange(size).remainder(CLASSES).expand(count, size)
    # a mean that tells the classes apart, so that the network learns something
    return FixedBatches([(x + y.view(-1, 1, 1, 1), y) for x, y in zip(images, labels)])


def _network(name, **options):
    return build(name, classes=CLASSES, image_shape=SHAPE, seed=1, **options).double()


def _trained(model, physical, events=(1, 2, 3), epochs=5, taken=6, units=0, momentum=0.9, **ranking):
    pruner = Pruner(copy.deepcopy(model), Ranking(minimum=1, **ranking), _batches(seed=9))
    hook = GradualPruning(pruner, dict.fromkeys(events, until_channels(taken)), dict.fromkeys(events, units), physical)
    trainer = Trainer(copy.deepcopy(model), _batches(), hooks=hook, weight_decay=0.01, momentum=momentum)
    trainer.fit([0.05] * (epochs * len(trainer.batches)))
    return trainer, hook


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet14", {"stem": 4}), ("resnet56", {"stem": 2}), ("vgg_mini", {"dropout": 0.0})],
)
def test_narrowed_training_equals_masked_training(name, options):
    model = _network(name, **options)
    narrow, physical = _trained(model, True, units=2)
    wide, masked = _trained(model, False, units=2)
    assert physical.pruner.removed == masked.pruner.removed
    assert sum(p.numel() for p in narrow.model.parameters()) < sum(p.numel() for p in wide.model.parameters())
    images, _ = next(iter(_batches(seed=5).epoch(0)))
    for mode in (True, False):
        found = []
        for trainer in (narrow, wide):
            trainer.model.train(mode)
            found.append(trainer._forward(images))
        assert torch.allclose(*found, atol=1e-9, rtol=0)
