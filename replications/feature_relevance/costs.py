"""What a network costs by the number of channels that each of its layers keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from common.core.models import Network, weight_of
from common.core.models.chain import ConvNet
from common.core.pruning import channels
from common.core.pruning.counting import layer_costs


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


def even_share(spent: Callable[[float], float], most: float) -> float:
    """The smallest share that every layer must lose so that no more than `most` is spent, by bisection.

    spent: what is spent by the share lost. 1 where even that is too little.
    """
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > most else (low, middle)
    return high


def official_zero_weights(model: Network, table: CostTable, removed: Mapping[str, Sequence[int]]) -> int:
    """Zeros that the authors' code counts: all but the filters of the first block's first convolution."""
    left = {name: table.widths[name] - len(gone) for name, gone in removed.items()}
    zeros = round(table.weights() - table.weights(left))
    if isinstance(model, ConvNet):
        return zeros
    first = channels.groups_of(model)[0].name
    return zeros - len(removed.get(first, ())) * weight_of(model, first)[0].numel()


def forward_macs(log: list[dict[str, Any]], table: CostTable, epochs: int) -> list[float]:
    """MACs of one forward pass in each epoch of a training with the events of `log`."""
    macs = []
    for epoch in range(epochs):
        past = [row for row in log if row["epoch"] <= epoch]
        macs.append(table.macs(past[-1]["left"]) if past else table.macs())
    return macs
