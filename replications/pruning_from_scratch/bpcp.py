"""Block and channel pruning (BPCP; Huang & Wang, J. Intell. Fuzzy Syst. 39(5), 2020) of residual networks.

Unlike pruning from scratch it starts from a trained network and keeps the weights of what stays: gates learn
which blocks go, and the scales of batch norms tell which channels go.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from common.core.hooks import NotCapturable
from common.core.identity import stream
from common.core.models import ChannelGroup, module_of
from common.core.models.resnet import Block, PaddedShortcut, ResNet
from common.core.pruning.channels import Keep, remove
from common.core.recipe import NotNegative
from common.core.trainer import Hooks, Trainer
from common.settings import Count, Rate, Strict

NetworkCost = Callable[[nn.Module], int]


def applies(model: nn.Module) -> TypeGuard[ResNet]:
    """Whether blocks and streams of a network can be narrowed: residual, and no shortcut pads with zeros."""
    return isinstance(model, ResNet) and not any(
        isinstance(block.shortcut, PaddedShortcut) for _, block in model.blocks()
    )


# ---------------------------------------------------------------------------------------------- blocks


class BlockSettings(Strict):
    """The search for blocks that `bpcp-e` removes; weights are trained along with it as `training` says."""

    weight: NotNegative = 0.05
    """Gamma, the weight of the penalty on each open gate."""
    learning_rate: Rate = 0.1
    """Of the gates' probabilities; constant."""
    recovery_epochs: Count = 10
    """Of training between the removal of blocks and that of channels."""
    recovery_learning_rate: Rate = 0.001


class BlockGates(Hooks):
    """One gate per residual block of `model`, drawn as 1 with probability sigmoid(alpha), alpha at first 0.

    In training every iteration draws the gates anew, and they multiply the branches: scale and shift of each
    branch's last batch norm. Evaluation keeps the blocks that `kept` names. The trainer's SGD learns `alpha`
    [blocks] along with the weights, at the constant learning rate `rate` and without weight decay. `weight`:
    gamma of the penalty (see `penalty`).
    """

    def __init__(self, model: ResNet, weight: float, rate: float):
        self.weight, self.rate = weight, rate
        self._names = [f"{name}.bn{len(block.kernels)}" for name, block in model.blocks()]
        norms = [module_of(model, name, nn.BatchNorm2d) for name in self._names]
        self._affine = [(norm.weight, norm.bias) for norm in norms]
        self.alpha = nn.Parameter(norms[0].weight.new_zeros(len(norms)))

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.alpha], "weight_decay": 0.0}]

    def epoch_started(self, trainer: Trainer, epoch: int) -> None:
        # drawn on the CPU for a whole epoch: the same on every device, and again after an interruption
        generator = torch.Generator().manual_seed(stream(trainer.seed, "block gates", epoch))
        noise = torch.rand(len(trainer.batches), len(self.alpha), generator=generator)
        self._noise = noise.to(self.alpha.device)

    def weights(self, trainer: Trainer) -> dict[str, Tensor]:
        if trainer.model.training:
            gates = self._gates = sampled(self.alpha, self._noise[trainer.iteration % len(self._noise)])
        else:
            gates = kept(self.alpha).to(self.alpha.dtype)
        effective: dict[str, Tensor] = {}
        for name, (scale, shift), gate in zip(self._names, self._affine, gates, strict=True):
            effective |= {f"{name}.weight": scale * gate, f"{name}.bias": shift * gate}
        return effective

    def loss(self, trainer: Trainer) -> Tensor:
        return penalty(self._gates, self.weight)

    def gradients_ready(self, trainer: Trainer) -> None:
        trainer.optimizer.param_groups[-1]["lr"] = self.rate

    def in_graph(self, trainer: Trainer) -> Sequence[Any]:
        raise NotCapturable("block gates are drawn anew in every step")

    def state(self) -> dict[str, Any]:
        return {"alpha": self.alpha.detach().clone()}

    def load_state(self, trainer: Trainer, state: dict[str, Any]) -> None:
        self.alpha.data.copy_(state["alpha"])


def probability(alpha: Tensor) -> Tensor:
    """The probability with which each block is kept, sigmoid(alpha)."""
    return alpha.sigmoid()


def sampled(alpha: Tensor, noise: Tensor) -> Tensor:
    """Gates of 0 or 1 from uniform `noise` in [0, 1), 1 with the `probability` p.

    Their gradient passes straight through to p, so that of alpha is the gates' times p * (1 - p).
    """
    p = probability(alpha)
    return (noise < p).to(p.dtype) + (p - p.detach())


def kept(alpha: Tensor) -> Tensor:
    """Which blocks stay: those of probability 0.5 or more."""
    return probability(alpha.detach()) >= 0.5


def penalty(gates: Tensor, weight: float) -> Tensor:
    """weight * sum |gate|, a scalar; its gradient at a gate of 0 is 0."""
    return weight * gates.abs().sum()


def drop_blocks(model: ResNet, alpha: Tensor, budget: float, cost: NetworkCost) -> list[str]:
    """Remove blocks in place and return their names.

    Blocks that are not `kept` go, the least probable first, until the next one would bring the cost below
    `budget`. Of a removed block the shortcut remains: the identity, or a strided convolution.
    """
    gates = zip(alpha.tolist(), kept(alpha).tolist(), model.blocks(), strict=True)
    closed = [(value, name) for value, stays, (name, _) in gates if not stays]
    removed = []
    for _, name in sorted(closed, key=lambda pair: pair[0]):
        trial = copy.deepcopy(model)
        _drop_block(trial, name)
        if cost(trial) < budget:
            break
        _drop_block(model, name)
        removed.append(name)
    return removed


def _drop_block(model: ResNet, name: str) -> None:
    block = module_of(model, name, Block)
    last = len(block.kernels)
    remove(model, {f"{name}.conv{i}": [] for i in range(1, last + 1)})
    # without it, what it makes of zeros would stay as a constant
    setattr(block, f"bn{last}", nn.Identity())


# ---------------------------------------------------------------------------------------------- channels


def channel_groups(model: ResNet) -> list[ChannelGroup]:
    """Channels that leave together: inner ones of the blocks that are left, and those of each stream.

    A stream begins at the stem or at a convolution in a shortcut; all layers that write to it are joined.
    """
    inner = [
        group
        for group in model.channel_groups()
        if group.norm and module_of(model, group.name, nn.Conv2d).out_channels
    ]
    streams: list[tuple[list[str], list[str]]] = [(["conv1", "bn1"], [])]
    for name, block in model.blocks():
        last = len(block.kernels)
        streams[-1][1].append(f"{name}.conv1")
        if not isinstance(block.shortcut, nn.Identity):
            streams[-1][1].append(f"{name}.shortcut.0")
            streams.append(([f"{name}.shortcut.0", f"{name}.shortcut.1"], []))
        if module_of(block, f"conv{last}", nn.Conv2d).out_channels:
            streams[-1][0].extend([f"{name}.conv{last}", f"{name}.bn{last}"])
    streams[-1][1].append("linear")
    joined = [
        ChannelGroup(writers[0], writers[1], followers=tuple(writers[2:]), consumers=tuple(readers))
        for writers, readers in streams
    ]
    return inner + joined


def importance(model: ResNet) -> dict[str, list[Tensor]]:
    """|scale| of the batch norm behind each layer, by group: one vector for each layer joined in it."""
    found = {}
    for group in channel_groups(model):
        modules = [model.get_submodule(name) for name in (group.norm, *group.followers) if name]
        norms = [module for module in modules if isinstance(module, nn.BatchNorm2d)]
        found[group.name] = [norm.weight.detach().abs() for norm in norms]
    return found


def removal_order(
    scores: Mapping[str, Sequence[Tensor]], count: int, least: int = 0
) -> list[tuple[str, int]]:
    """Which channels go, as (group, channel), the least important first.

    scores: see `importance`; a channel of a group has the largest score that one of the group's layers gives
    it. Ends when `count` channels are gone, those of every joined layer counted. `least` channels of each
    group stay. Of equal channels the first goes (by group, then channel).
    """
    whole = {name: torch.stack(list(layers)).amax(0).tolist() for name, layers in scores.items()}
    entries = [(score, name, channel) for name, row in whole.items() for channel, score in enumerate(row)]
    left = {name: len(row) for name, row in whole.items()}
    order: list[tuple[str, int]] = []
    gone = 0
    for _, name, channel in sorted(entries, key=lambda entry: entry[0]):
        if gone >= count:
            break
        if left[name] > least:
            left[name] -= 1
            gone += len(scores[name])
            order.append((name, channel))
    return order


def drop_channels(model: ResNet, budget: float, cost: NetworkCost, least: int) -> None:
    """Remove channels in `removal_order` until the cost is nearest to `budget`, in place.

    `least` channels of each group stay, also where the budget demands more.
    """
    scores = importance(model)
    total = sum(len(layers) * len(layers[0]) for layers in scores.values())

    def keep(count: int) -> Keep:
        gone = set(removal_order(scores, count, least))
        return {
            name: [channel for channel in range(len(layers[0])) if (name, channel) not in gone]
            for name, layers in scores.items()
        }

    def left(count: int) -> int:
        trial = copy.deepcopy(model)
        narrow(trial, keep(count))
        return cost(trial)

    within = bisect_left(range(total), True, key=lambda count: left(count) <= budget)
    nearest = min((within, max(within - 1, 0)), key=lambda count: abs(left(count) - budget))
    narrow(model, keep(nearest))


def narrow(model: ResNet, keep: Keep) -> None:
    """Remove in place, from the groups of `channel_groups`, every channel that `keep` leaves out."""
    remove(model, keep, groups=channel_groups(model), unfinished=True)
    width = model.conv1.out_channels
    for _, block in model.blocks():
        if not isinstance(block.shortcut, nn.Identity):
            width = module_of(block, "shortcut.0", nn.Conv2d).out_channels
        block.scatter.channels = width


def smallest(model: ResNet, least: int) -> ResNet:
    """`model` with `least` channels in every group, or all it has; changed in place."""
    narrow(model, {name: range(min(least, len(layers[0]))) for name, layers in importance(model).items()})
    return model
