"""What the paper's scores and its one ranking of all layers are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common.core.identity import stream
from common.core.models import weight_of
from common.core.trainer import BatchSource
from replications.feature_relevance.method import Scored, normalised


@dataclass(frozen=True)
class Random:
    """Independent uniform numbers, other ones at each event."""

    passes: ClassVar[int] = 0
    seed: int = 0

    def scores(self, model: nn.Module, names: Sequence[str], batches: BatchSource, event: int = 0) -> Scored:
        generator = torch.Generator().manual_seed(stream(self.seed, "random channels", event))
        widths = {name: len(weight_of(model, name)) for name in names}
        return Scored({name: torch.rand(width, generator=generator) for name, width in widths.items()})


class L1:
    """Sum of absolute weights of each filter, over the layer's L2 norm."""

    passes: ClassVar[int] = 0

    def scores(self, model: nn.Module, names: Sequence[str], batches: BatchSource, event: int = 0) -> Scored:
        weights = {name: weight_of(model, name).detach() for name in names}
        return Scored({name: normalised(weight.abs().flatten(1).sum(1)) for name, weight in weights.items()})


class Taylor:
    """First-order change of the loss when a filter goes, over the layer's L2 norm (Molchanov et al. 2017).

    |sum of weight * gradient| over a filter equals |sum of activation * gradient| over its output. Evaluation
    mode; gradients of the model are left alone.
    """

    passes: ClassVar[int] = 3

    def scores(self, model: nn.Module, names: Sequence[str], batches: BatchSource, event: int = 0) -> Scored:
        model.eval()
        weights = [weight_of(model, name) for name in names]
        totals = [torch.zeros(len(weight), dtype=weight.dtype, device=weight.device) for weight in weights]
        for images, labels in batches.epoch(0):
            loss = cross_entropy(model(images), labels, reduction="sum")
            for total, weight, gradient in zip(totals, weights, torch.autograd.grad(loss, weights)):
                total += (weight.detach() * gradient).flatten(1).sum(1)
        return Scored({name: normalised(total.abs()) for name, total in zip(names, totals)})


def same_share(scores: Sequence[Tensor], removed: Sequence[Sequence[int]]) -> list[Tensor]:
    """Scores that remove the same share of every layer, in the order of `scores` inside each of them.

    A channel's value is the share of its layer that is gone once it has been removed.
    """
    shares = []
    for values, gone in zip(scores, removed):
        values = values.clone()
        values[list(gone)] = -1
        shares.append((values.argsort(stable=True).argsort() + 1) / len(values))
    return shares
