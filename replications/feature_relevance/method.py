"""Gradual channel pruning while training (Aketi et al. 2020): scores, selection and the events of pruning.

A layer here is a `ChannelGroup`, known by the name of the convolution (or hidden linear layer) that makes its
channels. Lists of layers begin next to the classifier; inside a residual block the last convolution comes
first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from common.core.failures import Diverged
from common.core.models import ChannelGroup, Network, weight_of
from common.core.models.chain import ConvNet
from common.core.models.resnet import ResNet
from common.core.pruning import channels
from common.core.pruning.counting import layer_costs
from common.core.trainer import BatchSource
from replications.feature_relevance.relevance import EPS, relevances

ChannelCriterion = Literal["relevance", "random", "l1", "taylor"]
ChannelAllocation = Literal["global", "per_layer"]
BudgetUnit = Literal["channels", "macs"]
Removed = dict[str, list[int]]
"""Channels taken so far, ascending, by layer."""

KNOWN = (ConvNet, ResNet)
"""Networks that relevance is defined for."""
SCORING_PASSES = {"relevance": 5, "taylor": 3, "l1": 0, "random": 0}
"""Cost of scoring an image, in forward passes: for relevance one, and four convolutions for each in it."""


# ------------------------------------------------------------------------------------------ what is prunable


def protected_layers(model: Network) -> list[str]:
    """The layers that the paper never prunes: the first two convolutions of a plain network, by name."""
    if not isinstance(model, ConvNet):
        return []
    names = [group.name for group in channels.groups_of(model)]
    return [name for name in names if isinstance(model.get_submodule(name), nn.Conv2d)][:2]


def prunable_layers(
    model: Network, protected: Collection[str] | None = None
) -> tuple[list[ChannelGroup], list[ChannelGroup]]:
    """(layers whose channels compete with one another, layers of hidden units), each list the deepest first.

    Every convolution inside a block of a residual network, every convolution of a plain one, and hidden
    linear layers; all but those whose names are in `protected` (default: `protected_layers`). Raises
    ValueError for a network that describes no channels.
    """
    if protected is None:
        protected = protected_layers(model)
    position = {name: i for i, (name, _) in enumerate(model.named_modules())}
    groups = sorted(channels.groups_of(model), key=lambda group: -position[group.name])
    groups = [group for group in groups if group.name not in protected]
    units = [g for g in groups if isinstance(model.get_submodule(g.name), nn.Linear)]
    return [g for g in groups if g not in units], units


def kept(widths: Mapping[str, int], removed: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """The channels that stay, ascending, by layer. widths: of the layers before anything was removed."""
    return {name: sorted(set(range(widths[name])) - set(gone)) for name, gone in removed.items()}


def pruning_schedule(epochs: int, every: int, last: int) -> list[int]:
    """The epochs (counted from 1) that end with a pruning event: every, 2*every, ... up to `last`."""
    return list(range(every, min(last, epochs) + 1, every))


# ------------------------------------------------------------------------------------------ scores


def class_accuracy(confusion: Tensor) -> Tensor:
    """Accuracy of each class from counts [true class, predicted class]."""
    return confusion.diagonal() / confusion.sum(1)


def class_scale(accuracy: Tensor) -> Tensor:
    """Weight of each class: sigmoid(best accuracy / its accuracy), 1 for a class that is never right.

    Raises Diverged when no class is ever right.
    """
    if not accuracy.max() > 0:
        raise Diverged(
            "no class is ever predicted right, so the class scale is undefined: the network has not learnt"
        )
    return torch.sigmoid(accuracy.max() / accuracy)


def class_sums(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Sums over the images of each class [classes, channels] of values [N, channels].

    An image with a NaN is left out.
    """
    clean = torch.where(values.isnan().any(1, keepdim=True), 0, values)
    return one_hot(labels, classes).to(values.dtype).T @ clean


def channel_scores(sums: Tensor, counts: Tensor, scale: Tensor) -> Tensor:
    """Score of each channel of a layer from class sums [classes, channels].

    The mean of each class, weighted by its scale; averaged over classes; the absolute value of that, over the
    layer's L2 norm. Raises Diverged when a score is not a number.
    """
    return normalised((scale[:, None] * sums / counts[:, None]).mean(0).abs())


def normalised(values: Tensor) -> Tensor:
    """Values of one layer over their L2 norm. Raises Diverged when one is not finite."""
    scores = values / (values.norm() + EPS)
    if not scores.isfinite().all():
        raise Diverged("the scores of a layer are not finite numbers, so its channels cannot be ranked")
    return scores


@dataclass
class Scored:
    """Scores by layer name, and notes on them: class accuracies, largest relevance, images with a NaN."""

    scores: dict[str, Tensor]
    notes: dict[str, float | list[float]] = field(default_factory=dict)


@torch.no_grad()
def relevance_scores(
    model: nn.Module,
    names: Sequence[str],
    batches: BatchSource,
    alpha: float = 2.0,
    use_class_scale: bool = True,
    branch_share: bool = False,
) -> Scored:
    """Scores of the layers `names` by relevance for the true class.

    One pass over `batches` in evaluation mode. Class accuracies come from the same images. Leaves parameters,
    statistics and random generators alone.
    """
    model.eval()
    sums: dict[str, Tensor] = {}
    confusion: Tensor | None = None
    largest, missing = [], []
    for images, labels in batches.epoch(0):
        logits, found = relevances(model, images, labels, alpha, branch_share)
        classes = logits.shape[1]
        for name in names:
            of_batch = class_sums(found[name], labels, classes)
            sums[name] = sums[name] + of_batch if name in sums else of_batch
        largest.append(torch.stack([found[name].abs().amax() for name in names]).amax())
        missing.append(torch.stack([found[name].isnan().any(1) for name in names]).any(0).sum())
        truth, predicted = (one_hot(c, classes).to(logits.dtype) for c in (labels, logits.argmax(1)))
        counted = truth.T @ predicted
        confusion = counted if confusion is None else confusion + counted
    assert confusion is not None, "there is nothing to score on"
    accuracy, counts = class_accuracy(confusion), confusion.sum(1)
    scale = class_scale(accuracy) if use_class_scale else torch.ones_like(accuracy)
    scores = {name: channel_scores(sums[name], counts, scale) for name in names}
    notes = {"class_accuracy": accuracy.tolist(), "largest_relevance": torch.stack(largest).max().item()}
    return Scored(scores, notes | {"images_with_nan": int(torch.stack(missing).sum())})


def l1_scores(model: nn.Module, names: Sequence[str]) -> Scored:
    """Sum of absolute weights of each filter, over the layer's L2 norm."""
    weights = {name: weight_of(model, name).detach() for name in names}
    return Scored({name: normalised(weight.abs().flatten(1).sum(1)) for name, weight in weights.items()})


def random_scores(model: nn.Module, names: Sequence[str], seed: int) -> Scored:
    """Independent uniform numbers."""
    generator = torch.Generator().manual_seed(seed)
    widths = {name: len(weight_of(model, name)) for name in names}
    return Scored({name: torch.rand(width, generator=generator) for name, width in widths.items()})


def taylor_scores(model: nn.Module, names: Sequence[str], batches: BatchSource) -> Scored:
    """First-order change of the loss when a filter goes, over the layer's L2 norm (Molchanov et al. 2017).

    |sum of weight * gradient| over a filter equals |sum of activation * gradient| over its output. Evaluation
    mode; gradients of the model are left alone.
    """
    model.eval()
    weights = [weight_of(model, name) for name in names]
    totals = [torch.zeros(len(weight), dtype=weight.dtype, device=weight.device) for weight in weights]
    for images, labels in batches.epoch(0):
        loss = cross_entropy(model(images), labels, reduction="sum")
        for total, weight, gradient in zip(totals, weights, torch.autograd.grad(loss, weights)):
            total += (weight.detach() * gradient).flatten(1).sum(1)
    return Scored({name: normalised(total.abs()) for name, total in zip(names, totals)})


# ------------------------------------------------------------------------------------------ selection


def removal_order(scores: Sequence[Tensor], removed: Sequence[Iterable[int]]) -> list[tuple[int, int]]:
    """All channels that are left, as (layer, channel), the smallest score first.

    Of equal scores the lower channel comes first, then the layer nearer the classifier.
    """
    gone = [set(channels) for channels in removed]
    left = [
        (score, channel, layer)
        for layer, values in enumerate(scores)
        for channel, score in enumerate(values.tolist())
        if channel not in gone[layer]
    ]
    return [(layer, channel) for _, channel, layer in sorted(left)]


def select(
    scores: Sequence[Tensor],
    removed: Sequence[Iterable[int]],
    enough: Callable[[int, list[int]], bool],
    minimum: int = 0,
) -> list[tuple[int, int]]:
    """Channels to remove, as (layer, channel) in order of removal.

    enough(taken, left): whether to stop, from the number taken and the channels left in each layer. minimum:
    channels that every layer keeps. When nothing more can go, what was found is the answer.
    """
    left = [len(values) - len(set(gone)) for values, gone in zip(scores, removed)]
    chosen: list[tuple[int, int]] = []
    for layer, channel in removal_order(scores, removed):
        if enough(len(chosen), left):
            break
        if left[layer] > minimum:
            left[layer] -= 1
            chosen.append((layer, channel))
    return chosen


def in_layer_shares(scores: Sequence[Tensor], removed: Sequence[Sequence[int]]) -> list[Tensor]:
    """Scores that remove the same share of every layer, in the order of `scores` inside each of them.

    A channel's value is the share of its layer that is gone once it has been removed.
    """
    shares = []
    for values, gone in zip(scores, removed):
        values = values.clone()
        values[list(gone)] = -1
        shares.append((values.argsort(stable=True).argsort() + 1) / len(values))
    return shares


# ------------------------------------------------------------------------------------------ cost


class CostTable:
    """What a network costs by the number of channels that each layer keeps; numbers may be fractions.

    Dead rows and columns do not count. Weights and MACs are those of convolutions and linear layers.
    """

    def __init__(self, model: Network, image_shape: Sequence[int]):
        groups = channels.groups_of(model)
        self.widths = {group.name: len(weight_of(model, group.name)) for group in groups}
        makes = {name: group.name for group in groups for name in (group.name, group.norm) if name}
        reads = {name: group.name for group in groups for name in group.consumers}
        positions = {layer.name: layer.positions for layer in layer_costs(model, image_shape)}
        # per parameter: entries, layers that rows and columns follow, uses of each entry (None: not a weight)
        self._entries: list[tuple[int, str | None, str | None, int | None]] = []
        for name, parameter in model.named_parameters():
            module, _, entry = name.rpartition(".")
            uses = positions.get(module) if entry == "weight" else None
            column = reads.get(module) if parameter.ndim > 1 else None
            self._entries.append((parameter.numel(), makes.get(module), column, uses))

    def _left(self, left: Mapping[str, float]) -> list[tuple[float, int | None]]:
        share: dict[str | None, float] = {
            name: left.get(name, width) / width for name, width in self.widths.items()
        }
        return [
            (n * share.get(row, 1) * share.get(column, 1), uses) for n, row, column, uses in self._entries
        ]

    def parameters(self, left: Mapping[str, float] = MappingProxyType({})) -> float:
        """Trainable parameters with `left` channels in the layers named."""
        return sum(count for count, _ in self._left(left))

    def weights(self, left: Mapping[str, float] = MappingProxyType({})) -> float:
        """Weights of convolutions and linear layers, likewise."""
        return sum(count for count, uses in self._left(left) if uses is not None)

    def macs(self, left: Mapping[str, float] = MappingProxyType({})) -> float:
        """MACs for one image, likewise."""
        return sum(count * uses for count, uses in self._left(left) if uses is not None)

    def even(self, names: Iterable[str], fraction: float) -> dict[str, float]:
        """Channels left when every layer of `names` loses the same fraction."""
        return {name: (1 - fraction) * self.widths[name] for name in names}


def official_zero_weights(model: Network, table: CostTable, removed: Mapping[str, Sequence[int]]) -> int:
    """Zeros that the authors' code counts: all but the filters of the first block's first convolution."""
    left = {name: table.widths[name] - len(gone) for name, gone in removed.items()}
    zeros = round(table.weights() - table.weights(left))
    if isinstance(model, ConvNet):
        return zeros
    first = channels.groups_of(model)[0].name
    return zeros - len(removed.get(first, ())) * weight_of(model, first)[0].numel()
