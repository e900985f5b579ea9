"""The events of pruning inside a training run: the network becomes narrower while it trains.

The paper multiplies masks into the weights. Here the channels go for good, which makes training cheaper; the
masked execution remains as the reference. Both take the same decisions: scores are always those of the masked
network, which differ from those of a narrow one because filters of zeros hand relevance on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from common.core.identity import stream
from common.core.models import Network, weight_of
from common.core.pruning import channels
from common.core.trainer import BatchSource, Hooks, Trainer
from replications.feature_relevance import method
from replications.feature_relevance.method import ChannelAllocation, ChannelCriterion, CostTable

Enough = Callable[[int, Mapping[str, int]], bool]
"""Whether an event may stop, from the number of channels it has taken and those left in each layer."""


@dataclass(frozen=True)
class Scoring:
    """How channels are scored and compared. branch_share: score a block's last convolution by its branch alone."""

    criterion: ChannelCriterion = "relevance"
    allocation: ChannelAllocation = "global"
    alpha: float = 2.0
    class_scale: bool = True
    branch_share: bool = False
    minimum: int = 0
    seed: int = 0

    def scores(self, model: nn.Module, names: list[str], batches: BatchSource, event: int) -> method.Scored:
        """Scores of the layers `names` of a masked network at its event number `event`."""
        if self.criterion == "random":
            return method.random_scores(model, names, stream(self.seed, "random channels", event))
        if self.criterion == "l1":
            return method.l1_scores(model, names)
        if self.criterion == "taylor":
            return method.taylor_scores(model, names, batches)
        return method.relevance_scores(model, names, batches, self.alpha, self.class_scale, self.branch_share)


@dataclass(frozen=True)
class Event:
    """What one event decided.

    channels, units: (layer, channel) in order of removal, layers counted from the deepest.
    """

    scored: method.Scored
    channels: list[tuple[int, int]]
    units: list[tuple[int, int]]


@dataclass
class Pruner:
    """Decides what goes, and remembers what has gone.

    model: at its full width. batches: the images that are scored. protected: names of layers that lose
    nothing (default: those of the paper).
    """

    model: Network
    scoring: Scoring
    batches: BatchSource
    protected: Collection[str] | None = None
    removed: method.Removed = field(init=False)
    events: int = 0

    def __post_init__(self) -> None:
        layers = method.prunable_layers(self.model, self.protected)
        self.layers, self.units = ([group.name for group in groups] for groups in layers)
        self.widths = {name: len(weight_of(self.model, name)) for name in self.layers + self.units}
        self.removed = {name: [] for name in self.widths}

    @property
    def kept(self) -> dict[str, list[int]]:
        """Channels that stay, by layer."""
        return method.kept(self.widths, self.removed)

    @property
    def left(self) -> dict[str, int]:
        """Number of channels that stay, by layer."""
        return {name: len(channels) for name, channels in self.kept.items()}

    def event(self, masked: nn.Module, enough: Enough, units: int = 0) -> Event:
        """Score the masked network; remove channels until `enough`, and `units` of every hidden layer."""
        scored = self.scoring.scores(masked, self.layers + self.units, self.batches, self.events)
        chosen_units = []
        for number, name in enumerate(self.units):
            chosen = method.select(
                [scored.scores[name]], [self.removed[name]], lambda n, _: n >= units, minimum=1
            )
            chosen_units += [(number, unit) for _, unit in chosen]
        self._take(self.units, chosen_units)
        scores = [scored.scores[name] for name in self.layers]
        gone = [self.removed[name] for name in self.layers]
        if self.scoring.allocation == "per_layer":
            scores = method.in_layer_shares(scores, gone)
        other = {name: self.left[name] for name in self.units}
        chosen = method.select(
            scores,
            gone,
            lambda n, left: enough(n, other | dict(zip(self.layers, left))),
            self.scoring.minimum,
        )
        self._take(self.layers, chosen)
        self.events += 1
        return Event(scored, chosen, chosen_units)

    def _take(self, names: list[str], chosen: list[tuple[int, int]]) -> None:
        for layer, channel in chosen:
            self.removed[names[layer]] = sorted([*self.removed[names[layer]], channel])


def until_channels(count: int) -> Enough:
    """Stop after `count` channels."""
    return lambda taken, left: taken >= count


def until_at_most(spent: Callable[[Mapping[str, int]], float], most: float) -> Enough:
    """Stop when what the channels left cost, by `spent`, is no more than `most`."""
    return lambda taken, left: spent(left) <= most


class ForwardMasks:
    """Masks that are multiplied into the weights of every forward pass; nothing is masked at first."""

    def __init__(self) -> None:
        self._masks: dict[str, Tensor] = {}

    def set(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Take these masks by parameter name, and set what they exclude to zero."""
        self._masks = {name: mask.to(model.get_parameter(name).dtype) for name, mask in masks.items()}
        self.zero(model)

    @torch.no_grad()
    def zero(self, model: nn.Module) -> None:
        """Set what is excluded to zero: momentum and weight decay may have moved the stored values."""
        for name, mask in self._masks.items():
            model.get_parameter(name).mul_(mask)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The masked weights by parameter name."""
        return {name: model.get_parameter(name) * mask for name, mask in self._masks.items()}


class MaskedTwin:
    """The full-width network with masks that a narrowed network stands for.

    Filters of removed channels are zero. Their batch norms still move in the masked network: scale and shift
    under weight decay and momentum without any gradient, running statistics towards those of zeros. All of
    them do so alike, so one 2x2 matrix keeps account of it: (value, momentum) -> (value, momentum).
    """

    def __init__(self, model: Network):
        self.model = copy.deepcopy(model)
        norms = [group.norm for group in channels.groups_of(model) if group.norm]
        self._momenta: dict[str, Tensor | None] = {
            f"{norm}.{entry}": None for norm in norms for entry in ("weight", "bias")
        }
        self._begin()

    def _begin(self) -> None:
        self._age, self._steps = [[1.0, 0.0], [0.0, 1.0]], 0

    def stepped(self, trainer: Trainer) -> None:
        """Take note of one step of the optimiser."""
        group = trainer.optimizer.param_groups[0]
        rate, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        values, momenta = self._age
        momenta = [decay * value + momentum * m for value, m in zip(values, momenta)]
        moves = momenta
        if group["nesterov"]:
            moves = [decay * value + momentum * m for value, m in zip(values, momenta)]
        self._age = [[value - rate * move for value, move in zip(values, moves)], momenta]
        self._steps += 1

    @torch.no_grad()
    def refresh(self, trainer: Trainer, kept: Mapping[str, list[int]]) -> Network:
        """Make the twin what it is now, given the channels that the trainer's network has; returns it."""
        trainer.compute.place(self.model)
        masks = channels.masks(self.model, kept)
        small = dict(trainer.model.named_parameters())
        for name, parameter in self.model.named_parameters():
            mask = masks.get(name)
            if mask is None:
                parameter.copy_(small[name])
            elif name in self._momenta:
                self._refresh_norm(trainer, name, parameter, small[name], mask)
            else:
                parameter.zero_()
                parameter[mask] = small[name].flatten()
        buffers = dict(trainer.model.named_buffers())
        for name, buffer in self.model.named_buffers():
            norm, _, entry = name.rpartition(".")
            mask = masks.get(f"{norm}.weight") if entry.startswith("running") else None
            if mask is None:
                buffer.copy_(buffers[name])
            else:
                buffer.mul_((1 - _momentum(self.model.get_submodule(norm))) ** self._steps)
                buffer[mask] = buffers[name]
        self._begin()
        return self.model

    def _refresh_norm(
        self, trainer: Trainer, name: str, parameter: Tensor, small: nn.Parameter, mask: Tensor
    ) -> None:
        (a, b), (c, d) = self._age
        old = self._momenta[name]
        old = torch.zeros_like(parameter) if old is None else old.to(parameter)
        momentum = c * parameter + d * old
        parameter.copy_(a * parameter + b * old)
        parameter[mask] = small
        current = trainer.momentum_buffer(small)
        momentum[mask] = torch.zeros_like(small) if current is None else current
        self._momenta[name] = momentum

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        own = {"momenta": self._momenta, "age": self._age, "steps": self._steps}
        return {"model": self.model.state_dict(), **own}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up a `state`."""
        self.model.load_state_dict(state["model"])
        self._momenta, self._age, self._steps = state["momenta"], state["age"], state["steps"]


def _momentum(norm: nn.Module) -> float:
    """The share by which a batch norm's running statistics move towards those of a batch."""
    assert isinstance(norm, nn.BatchNorm2d) and norm.momentum is not None
    return norm.momentum


class GradualPruning(Hooks):
    """Prunes at the end of given epochs.

    events: what each event must reach, by epoch (from 1). units: hidden units that go at each event, by
    epoch. physical: whether channels are removed or only masked. `log` gets one row for each event.
    """

    def __init__(
        self, pruner: Pruner, events: Mapping[int, Enough], units: Mapping[int, int], physical: bool = True
    ):
        self.pruner, self.events, self.units = pruner, events, units
        self.log: list[dict[str, Any]] = []
        self._twin = MaskedTwin(pruner.model) if physical else None
        self._masks = ForwardMasks()

    def weights(self, trainer: Trainer) -> dict[str, Tensor]:
        """In masked execution, the masked weights."""
        return self._masks.weights(trainer.model)

    def stepped(self, trainer: Trainer) -> None:
        """Let the batch norms of removed channels move on."""
        if self._twin:
            self._twin.stepped(trainer)

    def epoch_ended(self, trainer: Trainer, epoch: int) -> None:
        """Prune if an event is due."""
        if (number := trainer.epochs_done + 1) in self.events:
            self.prune(trainer, number)

    def prune(self, trainer: Trainer, epoch: int) -> None:
        """The event of epoch `epoch`."""
        before = self.pruner.kept
        masked = self._twin.refresh(trainer, before) if self._twin else trainer.model
        self._masks.zero(masked)
        event = self.pruner.event(masked, self.events[epoch], self.units.get(epoch, 0))
        self._apply(trainer, before)
        self.log.append(
            {"epoch": epoch, "taken": len(event.channels), "left": self.pruner.left, **event.scored.notes}
        )

    def _apply(self, trainer: Trainer, before: Mapping[str, list[int]]) -> None:
        """Take away what is no longer kept; `before` are the channels that the trainer's network has."""
        kept = self.pruner.kept
        if self._twin:
            keep = {name: [before[name].index(channel) for channel in index] for name, index in kept.items()}
            channels.remove(trainer.model, keep, trainer.optimizer)
        else:
            self._masks.set(trainer.model, channels.masks(trainer.model, kept, norms=False))

    def state(self) -> dict[str, Any]:
        own = {"removed": self.pruner.removed, "events": self.pruner.events, "log": self.log}
        return own | ({"twin": self._twin.state()} if self._twin else {})

    def load_state(self, trainer: Trainer, state: dict[str, Any]) -> None:
        whole = self.pruner.kept
        self.pruner.removed, self.pruner.events, self.log = state["removed"], state["events"], state["log"]
        if self._twin:
            self._twin.load_state(state["twin"])
        self._apply(trainer, whole)


def forward_macs(log: list[dict[str, Any]], table: CostTable, epochs: int) -> list[float]:
    """MACs of one forward pass in each epoch of a training with the events of `log`."""
    macs = []
    for epoch in range(epochs):
        past = [row for row in log if row["epoch"] <= epoch]
        macs.append(table.macs(past[-1]["left"]) if past else table.macs())
    return macs
