"""How channels leave a network that goes on training: masked as in the authors' code, or out of it for good.

The authors multiply masks into the weights; that is the reference. Here the channels go, which makes training
cheaper. Both take the same decisions: scores are always those of the masked network, which differ from those
of a narrow one because filters of zeros hand relevance on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.core.models import Network
from common.core.pruning import channels
from common.core.trainer import Trainer


class Removal:
    """How removed channels are gone. kept, before: the channels of each layer that stay, and that stayed so far."""

    def masked(self, trainer: Trainer, kept: Mapping[str, list[int]]) -> nn.Module:
        """The network of full width behind masks, as it is now."""
        raise NotImplementedError

    def remove(
        self, trainer: Trainer, before: Mapping[str, list[int]], kept: Mapping[str, list[int]]
    ) -> None:
        """Take from the trainer's network the channels that are no longer kept."""
        raise NotImplementedError

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that a forward pass sees in place of the stored ones, by parameter name."""
        return {}

    def trained(self, trainer: Trainer) -> None:
        """Take note of the steps of an epoch that has just ended."""

    def tensors(self) -> list[Tensor]:
        """What `weights` multiplies."""
        return []

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up a `state`."""


class ForwardMasks(Removal):
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

    def masked(self, trainer: Trainer, kept: Mapping[str, list[int]]) -> nn.Module:
        self.zero(trainer.model)
        return trainer.model

    def remove(
        self, trainer: Trainer, before: Mapping[str, list[int]], kept: Mapping[str, list[int]]
    ) -> None:
        self.set(trainer.model, channels.masks(trainer.model, kept, norms=False))

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: model.get_parameter(name) * mask for name, mask in self._masks.items()}

    def tensors(self) -> list[Tensor]:
        return list(self._masks.values())


class MaskedTwin(Removal):
    """Channels leave the trained network; the full-width one with masks that it stands for is put together anew.

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

    def trained(self, trainer: Trainer) -> None:
        group = trainer.optimizer.param_groups[0]
        for rate in trainer.rates:
            self._step(rate, group["momentum"], group["weight_decay"], group["nesterov"])

    def _step(self, rate: float, momentum: float, decay: float, nesterov: bool) -> None:
        values, momenta = self._age
        momenta = [decay * value + momentum * m for value, m in zip(values, momenta)]
        moves = momenta
        if nesterov:
            moves = [decay * value + momentum * m for value, m in zip(values, momenta)]
        self._age = [[value - rate * move for value, move in zip(values, moves)], momenta]
        self._steps += 1

    @torch.no_grad()
    def masked(self, trainer: Trainer, kept: Mapping[str, list[int]]) -> nn.Module:
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

    def remove(
        self, trainer: Trainer, before: Mapping[str, list[int]], kept: Mapping[str, list[int]]
    ) -> None:
        keep = {name: [before[name].index(channel) for channel in index] for name, index in kept.items()}
        channels.remove(trainer.model, keep, trainer.optimizer)

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
        own = {"momenta": self._momenta, "age": self._age, "steps": self._steps}
        return {"model": self.model.state_dict(), **own}

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self._momenta, self._age, self._steps = state["momenta"], state["age"], state["steps"]


def _momentum(norm: nn.Module) -> float:
    """The share by which a batch norm's running statistics move towards those of a batch."""
    assert isinstance(norm, nn.BatchNorm2d) and norm.momentum is not None
    return norm.momentum
