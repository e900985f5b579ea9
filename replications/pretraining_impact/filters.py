"""The filters of a network, and what a network of so many filters comes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from common.core.models import ChannelGroup, Network, weight_of
from common.core.pruning import channels, counting


def filter_groups(model: nn.Module) -> list[ChannelGroup]:
    """The channels that convolutions produce; units of linear layers are never removed."""
    return [g for g in channels.groups_of(model) if isinstance(model.get_submodule(g.name), nn.Conv2d)]


def filter_widths(model: nn.Module) -> list[int]:
    """Filters of each group, front to back."""
    return [len(weight_of(model, group.name)) for group in filter_groups(model)]


def narrow(model: nn.Module, widths: Sequence[int]) -> None:
    """Bring `model` to the shapes of filter `widths`; its values are then to be loaded."""
    channels.remove(
        model, {g.name: torch.arange(n) for g, n in zip(filter_groups(model), widths, strict=True)}
    )


class Shape:
    """A network by the filters of its convolutions, without values; units of hidden linear layers stay.

    build: makes it, as `common.core.models.build` does. image_shape: (channels, height, width).
    """

    def __init__(self, build: Callable[..., Network], image_shape: tuple[int, int, int]):
        self.build, self.image_shape = build, image_shape
        self._costs: dict[tuple[int, ...], dict[str, Any]] = {}

    @cached_property
    def whole(self) -> Network:
        """The unpruned network; not to be changed."""
        return self.build(device="meta")

    @cached_property
    def filters(self) -> list[int]:
        """Those of the unpruned network."""
        return filter_widths(self.whole)

    def widths(self, filters: Sequence[int]) -> list[int]:
        """The option of `build`."""
        return [*filters, *self.whole.widths[len(filters) :]]

    def network(self, filters: Sequence[int]) -> Network:
        """The network of so many filters."""
        return self.build(widths=self.widths(filters), device="meta")

    def parameters(self, filters: Sequence[int]) -> int:
        """Trainable parameters."""
        return sum(p.numel() for p in self.network(filters).parameters())

    @cached_property
    def whole_cost(self) -> dict[str, Any]:
        """Of the unpruned network, as `cost`."""
        return counting.cost(self.whole, self.image_shape)

    def cost(self, filters: Sequence[int]) -> dict[str, Any]:
        """Cost without zeros, beside the unpruned network; see common.core.pruning.counting."""
        key = tuple(filters)
        if key not in self._costs:
            self._costs[key] = counting.cost(self.network(key), self.image_shape, self.whole_cost)
        return self._costs[key]
