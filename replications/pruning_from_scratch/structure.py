"""From gates to the widths of a network that meets a budget, and the structures that serve as controls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.core import models
from common.core.models.chain import ConvNet
from common.core.models.mobilenet import MobileNetV2
from common.core.models.resnet import BasicBlock
from common.core.pruning import counting
from common.settings import Count, SettingsError, Share, Sparsity, Strict

Status = Literal["converged", "nearest", "unreachable"]
Unit = Literal["macs", "parameters"]
Least = int | Sequence[int]
"""Channels that stay in a layer at least: of every one, or of each."""
WidthsCost = Callable[[Sequence[int]], int]
"""Cost of a network from the widths of its gated layers."""

CONVENTION: counting.Convention = "pool_inputs"
UNIFORM_STEPS = 40

# where the paper's networks differ from the suite's: scale of the batch norms, pooling, activations
_OPTIONS: dict[type, dict[str, Any]] = {
    ConvNet: {"norm_scale": 0.5, "final_pool": "average"},
    MobileNetV2: {"outer_relu6": False},
}


class SearchSettings(Strict):
    """How gates become widths."""

    budget: Literal["macs", "parameters"] = "macs"
    """What a target is a reduction of."""
    iterations: Count = 10
    tolerance: Share = 0.001
    """Relative to the target."""
    min_channels: Count = 1
    """How many channels a layer keeps at least."""
    min_share: Sparsity = 0.0
    """Which share of its channels a gated layer keeps at least, rounded up."""
    returned: Literal["best", "last"] = "best"
    """Which of the tried structures: the nearest to the budget, or the last as in the paper's release."""
    ties: Literal["first", "random"] = "first"
    """Which of equal gates is kept first: the earlier one, or one drawn for each seed."""

    def least(self, sizes: Sequence[int]) -> list[int]:
        """The channels that gated layers of these sizes keep at least."""
        return [max(self.min_channels, math.ceil(self.min_share * size)) for size in sizes]


@dataclass(frozen=True, eq=False)
class Layout:
    """An architecture as this paper builds it, whose gated widths are free; all around them is fixed.

    widths: the full ones. fixed: options of the network's class. Networks and counting follow the paper's
    release: scale of the batch norms, activations, and MACs of average pools.
    """

    architecture: str
    classes: int
    image_shape: tuple[int, ...]
    widths: tuple[int, ...]
    fixed: Mapping[str, Any]
    _counted: dict[tuple[int, ...], dict[str, Any]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        architecture: str,
        classes: int,
        image_shape: Sequence[int],
        options: Mapping[str, Any] | None = None,
    ) -> Layout:
        """The layout of an architecture before expansion.

        Raises SettingsError for an unknown architecture, one that cannot be built for such images, and one
        with layers that no batch norm follows, which cannot be gated.
        """
        fixed = {**_OPTIONS.get(models.architecture(architecture).network, {}), **(options or {})}
        shape = tuple(image_shape)
        if taken := sorted({"classes", "image_shape", "widths", "seed", "device"} & fixed.keys()):
            raise SettingsError(f"architecture {architecture!r}: {taken[0]!r} is not an option")
        try:
            model = models.build(architecture, classes=classes, image_shape=shape, device="meta", **fixed)
        except (ValueError, TypeError) as error:
            raise SettingsError(f"architecture {architecture!r} for images of {shape}: {error}") from None
        bare = [
            group.name for group in model.channel_groups() if group.norm is None and group.scatter is None
        ]
        if bare:
            raise SettingsError(
                f"architecture {architecture!r}: {bare[0]} has no batch norm, so it cannot be gated"
            )
        return cls(architecture, classes, shape, tuple(model.widths), fixed)

    def expanded(self, factor: float) -> Layout:
        """The widened layout: every width in the ratio of the first, which becomes int(factor * first).

        Networks of basic blocks widen their stem and residual stream too; all others only what is gated.
        """
        first = self.widths[0]
        wide = [width * int(factor * first) // first for width in self.widths]
        fixed = dict(self.fixed)
        if models.architecture(self.architecture).options.get("block") is BasicBlock:
            fixed["stem"] = wide[0]
        return Layout(self.architecture, self.classes, self.image_shape, tuple(wide), fixed)

    def build(
        self, widths: Sequence[int] | None = None, *, seed: int = 0, device: str = "cpu"
    ) -> models.Network:
        """A freshly initialised network with these gated widths (default: the full ones)."""
        return models.build(
            self.architecture,
            classes=self.classes,
            image_shape=self.image_shape,
            widths=list(self.widths if widths is None else widths),
            seed=seed,
            device=device,
            **self.fixed,
        )

    @cached_property
    def gated(self) -> list[str]:
        """Names of the batch norms behind the gated layers, in forward order."""
        return [group.norm for group in self.build(device="meta").channel_groups() if group.norm]

    def cost(self, widths: Sequence[int] | None = None) -> dict[str, Any]:
        """`common.core.pruning.counting.cost` of a network with these gated widths (default: the full ones)."""
        key = tuple(self.widths if widths is None else widths)
        if key not in self._counted:
            model = self.build(key, device="meta")
            self._counted[key] = counting.cost(model, self.image_shape, convention=CONVENTION)
        return self._counted[key]

    def cost_of(self, model: nn.Module) -> dict[str, Any]:
        """The cost of a network that was made from this layout's, beside the full one."""
        return counting.cost(model, self.image_shape, self.cost(), CONVENTION)

    def spends(self, unit: Unit) -> WidthsCost:
        """The cost in one unit as a function of the gated widths."""
        return lambda widths: self.cost(widths)[unit]


@dataclass(frozen=True)
class Ranking:
    """All gates of a network in the order in which they are kept.

    rank: place of each gate in the global order, largest gate first, [N]. place: its place within its own
    layer, [N].
    """

    values: Tensor
    sizes: tuple[int, ...]
    rank: Tensor
    place: Tensor

    @classmethod
    def of(cls, gates: list[Tensor], ties: Literal["first", "random"] = "first", seed: int = 0) -> Ranking:
        """Rank gates; of equal ones the first leads (by layer, then channel), or a drawn one (`random`)."""
        values = torch.cat([gate.detach().reshape(-1).cpu() for gate in gates])
        before = torch.arange(len(values))
        if ties == "random":
            before = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
        order = before[values[before].argsort(descending=True, stable=True)]
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        sizes = tuple(len(gate) for gate in gates)
        place = torch.cat([part.argsort().argsort() for part in rank.split(sizes)])
        return cls(values, sizes, rank, place)

    def masks(self, keep: int, min_channels: Least = 1) -> list[Tensor]:
        """Boolean masks: the `keep` first gates and the `min_channels` first of each layer, or all it has."""
        least = torch.tensor(_each(min_channels, self.sizes)).repeat_interleave(torch.tensor(self.sizes))
        return list(((self.rank < keep) | (self.place < least)).split(self.sizes))

    def tied_share(self, keep: int) -> float:
        """The share of the `keep` kept gates that equal a dropped one: what the tie rule alone has chosen."""
        kept, dropped = self.values[self.rank < keep], self.values[self.rank >= keep]
        if not len(kept) or not len(dropped):
            return 0.0
        return (kept == dropped.max()).double().mean().item()


@dataclass(frozen=True)
class Candidate:
    """A structure that the search tried.

    dropped: share of all gates to drop. keep: number of gates kept before empty layers are refilled. widths:
    channels of each gated layer. cost: in the budget's unit. reduction: 1 - cost / cost of the reference
    network.
    """

    dropped: float
    keep: int
    widths: tuple[int, ...]
    cost: int
    reduction: float


@dataclass(frozen=True)
class Structure:
    """What a search found.

    tried: all candidates in order; chosen: the index of the one returned. floor: the largest reduction that
    the least widths allow. status: `converged` (within the tolerance), `nearest` (out of iterations) or
    `unreachable` (the target is beyond the floor). tied_share: see Ranking.tied_share.
    """

    tried: tuple[Candidate, ...]
    chosen: int
    masks: list[Tensor]
    floor: float
    status: Status
    tied_share: float

    @property
    def candidate(self) -> Candidate:
        """The candidate that is returned."""
        return self.tried[self.chosen]


def keep_count(gates: int, dropped: float) -> int:
    """How many of `gates` remain when the share `dropped` goes, rounded half to even."""
    return round(gates * (1 - dropped))


def search(
    ranking: Ranking,
    cost: WidthsCost,
    reference: int,
    target: float,
    *,
    iterations: int = 10,
    tolerance: float = 0.001,
    min_channels: Least = 1,
    returned: Literal["last", "best"] = "best",
) -> Structure:
    """Bisect the share of dropped gates until the cost is `target` below `reference`, the base network's.

    Ends when |reduction - target| / target <= tolerance. Returns the candidate tried last, or the nearest one
    (the first of equals). A target that no structure meets is a status of the result, not an error. Raises
    ValueError for a target outside (0, 1).
    """
    if not 0 < target < 1:
        raise ValueError(f"target = {target}: the reduction must be between 0 and 1")
    low, high = 0.0, 1.0
    tried: list[Candidate] = []
    for _ in range(iterations):
        dropped = (low + high) / 2
        keep = keep_count(len(ranking.values), dropped)
        widths = tuple(int(mask.sum()) for mask in ranking.masks(keep, min_channels))
        spent = cost(widths)
        tried.append(Candidate(dropped, keep, widths, spent, 1 - spent / reference))
        if _near(tried[-1], target, tolerance):
            break
        low, high = (low, dropped) if tried[-1].reduction > target else (dropped, high)
    chosen = len(tried) - 1
    if returned == "best":
        chosen = min(range(len(tried)), key=lambda i: abs(tried[i].reduction - target))
    floor = largest_reduction(ranking.sizes, cost, reference, min_channels)
    status: Status = "converged" if _near(tried[-1], target, tolerance) else "nearest"
    if beyond(target, floor, tolerance):
        status = "unreachable"
    keep = tried[chosen].keep
    return Structure(
        tuple(tried), chosen, ranking.masks(keep, min_channels), floor, status, ranking.tied_share(keep)
    )


def largest_reduction(sizes: Sequence[int], cost: WidthsCost, reference: int, min_channels: Least) -> float:
    """The reduction of the smallest structure: `min_channels` of each layer, or all it has."""
    least = [min(pair) for pair in zip(_each(min_channels, sizes), sizes, strict=True)]
    return 1 - cost(least) / reference


def _each(least: Least, sizes: Sequence[int]) -> list[int]:
    return [least] * len(sizes) if isinstance(least, int) else list(least)


def beyond(target: float, floor: float, tolerance: float) -> bool:
    """Whether even the largest possible reduction `floor` is not within the tolerance of `target`."""
    return (target - floor) / target > tolerance


def _near(candidate: Candidate, target: float, tolerance: float) -> bool:
    return abs(candidate.reduction - target) / target <= tolerance


@dataclass(frozen=True)
class UniformWidths:
    """The control of equal relative widths: see `uniform_widths`. reachable: whether it meets the budget."""

    widths: tuple[int, ...]
    cost: int
    reachable: bool


def uniform_widths(widths: Sequence[int], cost: WidthsCost, target: float) -> UniformWidths:
    """The largest common share of `widths` (before expansion) whose cost is at most 1 - target of theirs.

    A width is max(1, share * width rounded half up).
    """
    budget = (1 - target) * cost(widths)

    def scaled(share: float) -> tuple[int, ...]:
        return tuple(max(1, math.floor(share * width + 0.5)) for width in widths)

    low, high = 0.0, 1.0
    for _ in range(UNIFORM_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(scaled(middle)) <= budget else (low, middle)
    found = scaled(low)
    return UniformWidths(found, cost(found), cost(found) <= budget)


def noise_gates(sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Gates drawn uniformly from [0, 1): the random structure."""
    drawn = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return list(drawn.split(list(sizes)))


def similarity(structures: Sequence[Sequence[float]]) -> Tensor:
    """Pearson correlation of structures (one row of widths or kept fractions each), a matrix [rows, rows]."""
    return torch.corrcoef(torch.tensor(structures, dtype=torch.float64))
