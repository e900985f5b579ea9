"""Gradual channel pruning while training (Aketi et al. 2020), as the authors' code has it.

    for t = 1, ..., E:
        train one epoch
        if t is one of n, 2n, ..., N1, an event:                                                       (1)
            R[m] = one-hot of the true label of image m, carried back to the output of each layer
            r[m, k] = mean over positions of R[m] of channel k                                         (2)
            s[c] = sigmoid(max_j a[j] / a[c]), a[c] the training accuracy of class c                   (3)
            M[c, k] = mean of r[m, k] over the images m of class c                                     (4)
            g[k] = |mean over c of s[c] M[c, k]|,  F[k] = g[k] / (L2 norm of g in its layer + eps)     (5)
            the x channels with the smallest F of all layers together leave the network                (6)

Nothing is rewound: weights, momentum and learning rate go on as they are, and what has left stays away. (2) is
in `relevance.py`; how a channel leaves a network that goes on training is in `removal.py`.

A layer here is a `ChannelGroup`, known by the name of the convolution (or hidden linear layer) that makes its
channels. Lists of layers begin next to the classifier; inside a residual block the last convolution comes
first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from common.core.data import Batches, Dataset
from common.core.failures import Diverged, Unreachable
from common.core.identity import stream
from common.core.models import ChannelGroup, Network, weight_of
from common.core.models.chain import ConvNet
from common.core.models.resnet import ResNet
from common.core.pruning import channels
from common.core.trainer import BatchSource, Hooks, Trainer
from replications.feature_relevance.relevance import EPS, relevances
from replications.feature_relevance.removal import ForwardMasks, MaskedTwin, Removal

Removed = dict[str, list[int]]
"""Channels taken so far, ascending, by layer."""

KNOWN = (ConvNet, ResNet)
"""Networks that relevance is defined for."""
# relevance keeps what every layer put out: large images come in smaller batches
SCORING_BATCH, SCORING_PIXELS = 500, 500 * 32 * 32


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


# ------------------------------------------------------------------------------------------ scores


def class_accuracy(confusion: Tensor) -> Tensor:
    """Accuracy of each class from counts [true class, predicted class]."""
    return confusion.diagonal() / confusion.sum(1)


def class_scale(accuracy: Tensor) -> Tensor:
    """Equation (3): the weight of each class, 1 for one that is never right.

    Raises Diverged when no class is ever right.
    """
    if not accuracy.max() > 0:
        raise Diverged(
            "no class is ever predicted right, so the class scale is undefined: the network has not learnt"
        )
    return torch.sigmoid(accuracy.max() / accuracy)


def class_sums(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The sums of (4) over the images of each class [classes, channels], of values [N, channels].

    An image with a NaN is left out.
    """
    clean = torch.where(values.isnan().any(1, keepdim=True), 0, values)
    return one_hot(labels, classes).to(values.dtype).T @ clean


def channel_scores(sums: Tensor, counts: Tensor, scale: Tensor) -> Tensor:
    """Equations (4) and (5): the score of each channel of a layer from class sums [classes, channels].

    Raises Diverged when a score is not a number.
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


class Criterion(Protocol):
    """How channels are scored. passes: what an image costs to score, in forward passes."""

    passes: ClassVar[int]

    def scores(self, model: nn.Module, names: Sequence[str], batches: BatchSource, event: int = 0) -> Scored:
        """Scores of the layers `names` of a masked network at its event number `event`.

        Leaves parameters, statistics and random generators alone.
        """


@dataclass(frozen=True)
class Relevance:
    """The paper's criterion. branch_share: a block's last convolution is scored by its branch alone.

    An image costs one forward pass, and four convolutions for each in it.
    """

    passes: ClassVar[int] = 5
    alpha: float = 2.0
    class_scale: bool = True
    branch_share: bool = False

    @torch.no_grad()
    def scores(self, model: nn.Module, names: Sequence[str], batches: BatchSource, event: int = 0) -> Scored:
        """One pass over `batches` in evaluation mode; class accuracies come from the same images.

        An event is an epoch of the batches, for those that differ from epoch to epoch.
        """
        model.eval()
        sums: dict[str, Tensor] = {}
        confusion: Tensor | None = None
        largest, missing = [], []
        for images, labels in batches.epoch(event):
            logits, found = relevances(model, images, labels, self.alpha, self.branch_share)
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
        scale = class_scale(accuracy) if self.class_scale else torch.ones_like(accuracy)
        scores = {name: channel_scores(sums[name], counts, scale) for name in names}
        notes = {"class_accuracy": accuracy.tolist(), "largest_relevance": torch.stack(largest).max().item()}
        return Scored(scores, notes | {"images_with_nan": int(torch.stack(missing).sum())})


def scoring_batches(data: Dataset, share: float) -> Batches:
    """The training images that are scored: about `share` of them, as many of each class, always the same.

    Raises Unreachable when that is less than one image of each class.
    """
    labels = data.labels["train"].cpu()
    sizes = torch.bincount(labels, minlength=data.classes)
    each = min(int(share * len(labels) / data.classes), int(sizes.min()))
    if not each:
        raise Unreachable(f"scoring_share = {share:g} of {len(labels)} images is less than one of each class")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(stream(0, "scoring images")))
    index = torch.cat([order[labels[order] == label][:each] for label in range(data.classes)]).sort().values
    index = index.to(data.labels["train"].device)
    images, kept = data.images["train"][index], data.labels["train"][index]
    chosen = dataclasses.replace(data, images={"train": images}, labels={"train": kept})
    return Batches(chosen, "train", _scoring_batch(data))


def augmented_batches(data: Dataset, seed: int) -> Batches:
    """All training images, augmented anew in each epoch of the batches, as the authors' code scores them."""
    return Batches(data, "train", _scoring_batch(data), seed=stream(seed, "scored images"), augment=True)


def _scoring_batch(data: Dataset) -> int:
    _, height, width = data.image_shape
    return min(SCORING_BATCH, max(1, SCORING_PIXELS // (height * width)))


# ------------------------------------------------------------------------------------------ selection


Enough = Callable[[int, Mapping[str, int]], bool]
"""Whether an event may stop, from the number of channels it has taken and those left in each layer."""
Allocation = Callable[[list[Tensor], list[list[int]]], list[Tensor]]
"""What channels of different layers are compared by, from scores and removed channels of each layer."""


def until_channels(count: int) -> Enough:
    """Stop after `count` channels."""
    return lambda taken, left: taken >= count


def until_at_most(spent: Callable[[Mapping[str, int]], float], most: float) -> Enough:
    """Stop when what the channels left cost, by `spent`, is no more than `most`."""
    return lambda taken, left: spent(left) <= most


def until_all(bounds: Sequence[Enough]) -> Enough:
    """Stop when all of them would."""
    return lambda taken, left: all(enough(taken, left) for enough in bounds)


def all_together(scores: list[Tensor], removed: list[list[int]]) -> list[Tensor]:
    """The paper's: scores as they are."""
    return scores


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
    """Equation (6): channels to remove, as (layer, channel) in order of removal.

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


# ------------------------------------------------------------------------------------------ an event


@dataclass(frozen=True)
class Goal:
    """What an event must reach: channels go until `enough`, and `units` of every hidden layer."""

    enough: Enough
    units: int = 0


@dataclass(frozen=True)
class Event:
    """What one event decided.

    channels, units: (layer, channel) in order of removal, layers counted from the deepest.
    """

    scored: Scored
    channels: list[tuple[int, int]]
    units: list[tuple[int, int]]


@dataclass
class Pruner:
    """Decides what goes, and remembers what has gone.

    model: at its full width. batches: the images that are scored. minimum: channels that every layer keeps.
    protected: names of layers that lose nothing (default: those of the paper).
    """

    model: Network
    batches: BatchSource
    criterion: Criterion = Relevance()
    allocation: Allocation = all_together
    minimum: int = 0
    protected: Collection[str] | None = None
    removed: Removed = field(init=False)
    events: int = 0

    def __post_init__(self) -> None:
        layers = prunable_layers(self.model, self.protected)
        self.layers, self.units = ([group.name for group in groups] for groups in layers)
        self.widths = {name: len(weight_of(self.model, name)) for name in self.layers + self.units}
        self.removed = {name: [] for name in self.widths}

    @property
    def kept(self) -> dict[str, list[int]]:
        """Channels that stay, by layer."""
        return kept(self.widths, self.removed)

    @property
    def left(self) -> dict[str, int]:
        """Number of channels that stay, by layer."""
        return {name: len(channels) for name, channels in self.kept.items()}

    def event(self, masked: nn.Module, goal: Goal) -> Event:
        """Score the masked network by (2) to (5), and remove by (6): units inside their layer, then channels."""
        scored = self.criterion.scores(masked, self.layers + self.units, self.batches, self.events)
        units = []
        for number, name in enumerate(self.units):
            scores, gone = [scored.scores[name]], [self.removed[name]]
            chosen = select(scores, gone, lambda taken, _: taken >= goal.units, minimum=1)
            units += [(number, unit) for _, unit in chosen]
        self._take(self.units, units)
        gone = [self.removed[name] for name in self.layers]
        scores = self.allocation([scored.scores[name] for name in self.layers], gone)
        left = {name: self.left[name] for name in self.units}
        chosen = select(
            scores,
            gone,
            lambda taken, of_layers: goal.enough(taken, left | dict(zip(self.layers, of_layers))),
            self.minimum,
        )
        self._take(self.layers, chosen)
        self.events += 1
        return Event(scored, chosen, units)

    def _take(self, names: list[str], chosen: list[tuple[int, int]]) -> None:
        for layer, channel in chosen:
            self.removed[names[layer]] = sorted([*self.removed[names[layer]], channel])


# ------------------------------------------------------------------------------------------ while training


def pruning_schedule(epochs: int, every: int, last: int) -> list[int]:
    """The epochs (counted from 1) that end with a pruning event: every, 2*every, ... up to `last`."""
    return list(range(every, min(last, epochs) + 1, every))


class GradualPruning(Hooks):
    """The events of a training.

    events: what each must reach, by the epoch (from 1) at whose end it is. physical: whether channels are removed
    or only masked. `log` gets one row for each event.
    """

    def __init__(self, pruner: Pruner, events: Mapping[int, Goal], physical: bool = True):
        self.pruner, self.events = pruner, events
        self.log: list[dict[str, Any]] = []
        self.removal: Removal = MaskedTwin(pruner.model) if physical else ForwardMasks()

    def epoch_ended(self, trainer: Trainer, epoch: int) -> None:
        """Prune if an event is due."""
        self.removal.trained(trainer)
        if (number := trainer.epochs_done + 1) in self.events:
            self.prune(trainer, number)

    def prune(self, trainer: Trainer, epoch: int) -> None:
        """The event of epoch `epoch`."""
        before = self.pruner.kept
        event = self.pruner.event(self.removal.masked(trainer, before), self.events[epoch])
        self.removal.remove(trainer, before, self.pruner.kept)
        self.log.append(
            {"epoch": epoch, "taken": len(event.channels), "left": self.pruner.left, **event.scored.notes}
        )

    def weights(self, trainer: Trainer) -> dict[str, Tensor]:
        """Where channels are masked, the masked weights."""
        return self.removal.weights(trainer.model)

    def in_graph(self, trainer: Trainer) -> Sequence[Any]:
        return self.removal.tensors()

    def state(self) -> dict[str, Any]:
        own = {"removed": self.pruner.removed, "events": self.pruner.events, "log": self.log}
        return own | {"removal": self.removal.state()}

    def load_state(self, trainer: Trainer, state: dict[str, Any]) -> None:
        whole = self.pruner.kept
        self.pruner.removed, self.pruner.events, self.log = state["removed"], state["events"], state["log"]
        self.removal.load_state(state["removal"])
        self.removal.remove(trainer, whole, self.pruner.kept)
