"""Unstructured pruning: which weights may be pruned, which are chosen, and masks that hold them at zero.

A selection names tensors by their parameter names and keeps the order of the modules. Counts are exact: the
number of weights to prune is rounded half to even, and among equal scores the one that comes first is pruned
first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from common.core.failures import Unreachable
from common.core.pruning.layers import CONVOLUTIONS, TRANSPOSED, weight_parameter
from common.core.trainer import Hooks, Trainer

Layers = Literal["conv+linear", "conv"]
Allocation = Literal["global", "uniform", "uniform_plus", "ERK", "LAMP", "random"]
ALLOCATIONS: tuple[str, ...] = get_args(Allocation)

_MODULES = {
    "conv+linear": (*CONVOLUTIONS, *TRANSPOSED, nn.Linear),
    "conv": (*CONVOLUTIONS, *TRANSPOSED),
}
# largest share of the last linear layer that Uniform+ removes
_UNIFORM_PLUS_LAST = 0.8


class Infeasible(Unreachable):
    """A sparsity that the allocation rule cannot meet in this network."""


def prunable(model: nn.Module, layers: Layers = "conv+linear") -> dict[str, nn.Parameter]:
    """The weight tensors that may be pruned, by parameter name, in module order.

    An allow-list: convolutions, transposed ones too, and, unless layers="conv", linear layers. Biases and
    normalisation never belong to it. A weight that several layers share is there once, by its first name. Raises
    ValueError naming a layer whose weight is no plain parameter.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [
        weight_parameter(module, name)
        for name, module in model.named_modules()
        if isinstance(module, _MODULES[layers])
    ]
    return {names[weight]: weight for weight in found}


# ------------------------------------------------------------------------------------------ how many per
# layer


def erk_counts(shapes: Sequence[Sequence[int]], sparsity: float) -> list[int]:
    """Weights to prune per layer under Erdős-Rényi-Kernel densities (Evci et al. 2020).

    A layer's density is in proportion to (sum of its weight's dimensions) / (their product). A layer that
    would need more weights than it has stays dense, and the others share what is left.
    """
    sizes = [math.prod(shape) for shape in shapes]
    scores = [sum(shape) for shape in shapes]
    dense: set[int] = set()
    while True:
        sparse = [i for i in range(len(sizes)) if i not in dense]
        if not sparse:
            return [0] * len(sizes)
        budget = (1 - sparsity) * sum(sizes) - sum(sizes[i] for i in dense)
        total = sum(scores[i] for i in sparse)
        kept = {i: round(budget * scores[i] / total) for i in sparse}
        fullest = max(sparse, key=lambda i: kept[i] / sizes[i])
        if kept[fullest] <= sizes[fullest]:
            return [round((1 - kept[i] / n) * n) if i in kept else 0 for i, n in enumerate(sizes)]
        dense.add(fullest)


def uniform_plus_counts(shapes: Sequence[Sequence[int]], sparsity: float) -> list[int]:
    """Weights to prune per layer under Uniform+ (Gale et al. 2019).

    The first convolution stays dense and the last linear layer keeps at least a fifth; all others share one
    sparsity.
    Raises Infeasible when they would have to lose more than they have.
    """
    sizes = [math.prod(shape) for shape in shapes]
    first = next((i for i, shape in enumerate(shapes) if len(shape) > 2), None)
    last = next((i for i in reversed(range(len(shapes))) if len(shapes[i]) == 2), None)
    wanted = round(sparsity * sum(sizes))
    fractions = {i: 0.0 for i in (first,) if i is not None}
    share = _shared_fraction(sizes, fractions, wanted)
    if share > _UNIFORM_PLUS_LAST and last is not None:
        fractions[last] = _UNIFORM_PLUS_LAST
        share = _shared_fraction(sizes, fractions, wanted)
    return [round(fractions.get(i, share) * n) for i, n in enumerate(sizes)]


def _shared_fraction(sizes: Sequence[int], fixed: Mapping[int, float], wanted: int) -> float:
    """The fraction that all layers without a fixed one lose, so that `wanted` weights go in total."""
    free = sum(n for i, n in enumerate(sizes) if i not in fixed)
    missing = wanted - sum(fraction * sizes[i] for i, fraction in fixed.items())
    if missing > free:
        raise Infeasible(
            f"Uniform+ cannot prune {wanted} of {sum(sizes)} weights: "
            f"the layers it may thin out hold only {free}"
        )
    return missing / free if free else 0.0


def layer_counts(
    shapes: Sequence[Sequence[int]], remaining: Sequence[int], fraction: float, allocation: Allocation
) -> list[int]:
    """Weights to prune now in each layer, for the allocations that do not look at the weights' values.

    remaining: weights that are left in each layer; `fraction` of their sum is to go. `uniform_plus` and `ERK`
    give each layer the count that it should have lost in total at the sparsity then reached.
    Raises ValueError for any other allocation, Infeasible.
    """
    if allocation == "uniform":
        return [round(fraction * left) for left in remaining]
    if allocation not in ("uniform_plus", "ERK"):
        raise ValueError(f"unknown allocation {allocation!r}; allowed: {', '.join(ALLOCATIONS)}")
    sizes = [math.prod(shape) for shape in shapes]
    sparsity = 1 - (1 - fraction) * (sum(remaining) / sum(sizes))
    totals = erk_counts(shapes, sparsity) if allocation == "ERK" else uniform_plus_counts(shapes, sparsity)
    return [min(max(total - (size - left), 0), left) for total, size, left in zip(totals, sizes, remaining)]


# ------------------------------------------------------------------------------------------ which ones


def smallest(scores: Tensor, count: int) -> Tensor:
    """Boolean mask of the `count` smallest entries of a flat tensor; of equal ones those that come first."""
    if not 0 <= count <= scores.numel():
        raise ValueError(f"{count} of {scores.numel()} entries cannot be chosen")
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.sort().values[count - 1]
    chosen = scores < threshold
    ties = (scores == threshold).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen


def lamp_scores(weight: Tensor, kept: Tensor) -> Tensor:
    """Layer-adaptive magnitude scores (Lee et al. 2021), flat.

    The square of a kept weight over the sum of squares of all kept weights of the layer that are no smaller.
    Entries that are not kept get 0.
    """
    index = kept.flatten().nonzero().flatten()
    squares = weight.detach().flatten()[index].square()
    ascending, order = squares.sort(stable=True)
    no_smaller = ascending.flip(0).cumsum(0).flip(0)
    scores = torch.zeros(kept.numel(), dtype=weight.dtype, device=weight.device)
    scores[index[order]] = torch.where(no_smaller > 0, ascending / no_smaller, 0.0)
    return scores


def select(
    weights: Mapping[str, Tensor],
    fraction: float,
    kept: Mapping[str, Tensor] | None = None,
    allocation: Allocation = "global",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Boolean masks, True = kept, after pruning `fraction` of the remaining weights.

    weights: tensors by name. kept: current masks (default: nothing is pruned yet); what is pruned stays
    pruned. allocation: `global` ranks all magnitudes together; `uniform` prunes the same fraction of each
    layer; `uniform_plus` and `ERK` set each layer's count from its shape and the cumulative sparsity; `LAMP`
    ranks layer-adaptive scores together; `random` draws from `generator` (a CPU generator), blind to the
    weights.
    Raises ValueError for an unknown allocation or a fraction outside [0, 1], Infeasible.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"a fraction of {fraction} of the weights cannot be pruned")
    if kept is None:
        kept = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    names = list(weights)
    if allocation in ("global", "LAMP", "random"):
        if allocation == "global":
            scores = [weights[name].detach().abs().flatten() for name in names]
        elif allocation == "LAMP":
            scores = [lamp_scores(weights[name], kept[name]) for name in names]
        else:
            drawn = (torch.rand(weights[name].numel(), generator=generator) for name in names)
            scores = [d.to(weights[name].device) for d, name in zip(drawn, names)]
        return _together(names, scores, kept, fraction)
    counts = layer_counts(
        [weights[name].shape for name in names],
        [int(kept[name].sum()) for name in names],
        fraction,
        allocation,
    )
    return {
        name: _pruned(weights[name].detach().abs().flatten(), kept[name], count)
        for name, count in zip(names, counts)
    }


def _together(
    names: Sequence[str], scores: Sequence[Tensor], kept: Mapping[str, Tensor], fraction: float
) -> dict[str, Tensor]:
    """One ranking over all layers."""
    flat = torch.cat([kept[name].flatten() for name in names])
    after = _pruned(torch.cat(list(scores)), flat, round(fraction * int(flat.sum())))
    parts = after.split([kept[name].numel() for name in names])
    return {name: part.view_as(kept[name]).clone() for name, part in zip(names, parts)}


def _pruned(scores: Tensor, kept: Tensor, count: int) -> Tensor:
    """`kept` without its `count` entries of smallest score."""
    after = kept.flatten().clone()
    index = after.nonzero().flatten()
    after[index[smallest(scores[index], count)]] = False
    return after.view_as(kept)


# ------------------------------------------------------------------------------------------ masks


class Masks:
    """Boolean masks of a network's weights, by parameter name; True = kept.

    kept: tensors of the shapes of the parameters that they mask. The masks belong to one network at a time,
    whose parameters are changed in place and not replaced.
    """

    def __init__(self, kept: Mapping[str, Tensor]):
        self.kept = dict(kept)
        self._factors: dict[str, Tensor] = {}
        self._changed = False
        self._model: nn.Module | None = None
        self._weights: dict[str, nn.Parameter] = {}

    @classmethod
    def dense(cls, model: nn.Module, layers: Layers = "conv+linear") -> Masks:
        """Masks over all prunable weights that prune nothing. Raises ValueError where there are none, and as `prunable`."""
        weights = prunable(model, layers)
        if not weights:
            raise ValueError(
                f"{type(model).__name__} has none of the layers whose weights can be pruned ({layers})"
            )
        return cls({name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()})

    def update(self, kept: Mapping[str, Tensor]) -> None:
        """Replace the masks."""
        self.kept = dict(kept)
        self._changed = True
        self._model = None

    def prune(
        self,
        model: nn.Module,
        fraction: float,
        allocation: Allocation = "global",
        generator: torch.Generator | None = None,
    ) -> None:
        """Prune `fraction` of the remaining weights, see `select`; the model itself is not touched."""
        self.update(select(self.weights(model), fraction, self.kept, allocation, generator))

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that are masked, by name."""
        if model is not self._model:
            # looked up once: going through all modules in every step costs more than masking a small network
            parameters = dict(model.named_parameters())
            self._model, self._weights = model, {name: parameters[name] for name in self.kept}
        return self._weights

    def factors(self, model: nn.Module) -> dict[str, Tensor]:
        """The masks as tensors of 0 and 1 in the number format and on the device of the model's weights.

        Other masks of the same weights are written into the same tensors, so that captured steps see them.
        """
        weights = self.weights(model)
        like = next(iter(self._factors.values()), None)
        first = next(iter(weights.values()))
        if self._changed or like is None or (like.dtype, like.device) != (first.dtype, first.device):
            # kept from call to call: a product with booleans is slow
            if not _alike(self._factors, weights):
                self._factors = {n: torch.empty_like(w) for n, w in weights.items()}
            for name, factor in self._factors.items():
                factor.copy_(self.kept[name])
            self._changed = False
        return self._factors

    def effective(self, model: nn.Module) -> dict[str, Tensor]:
        """Weights times masks, differentiable: what a forward pass behind the masks uses."""
        weights, factors = self.weights(model), self.factors(model)
        return dict(zip(weights, torch._foreach_mul(list(weights.values()), list(factors.values()))))

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set the pruned weights to zero."""
        self._multiply(model, list(self.weights(model).values()))

    @torch.no_grad()
    def apply_to_gradients(self, model: nn.Module) -> None:
        """Set the gradients of the pruned weights to zero."""
        self._multiply(model, [weight.grad for weight in self.weights(model).values()])

    @torch.no_grad()
    def apply_to_momentum(self, trainer: Trainer) -> None:
        """Set the momentum of the pruned weights to zero."""
        self._multiply(
            trainer.model, [trainer.momentum_buffer(w) for w in self.weights(trainer.model).values()]
        )

    @property
    def counts(self) -> dict[str, int]:
        """Kept weights per tensor."""
        return {name: int(mask.sum()) for name, mask in self.kept.items()}

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights that are pruned."""
        return 1 - sum(self.counts.values()) / sum(mask.numel() for mask in self.kept.values())

    def _multiply(self, model: nn.Module, tensors: Sequence[Tensor | None]) -> None:
        """Multiply in place; None (no gradient or momentum yet) is passed over."""
        pairs = [(t, factor) for t, factor in zip(tensors, self.factors(model).values()) if t is not None]
        if pairs:
            torch._foreach_mul_(*map(list, zip(*pairs)))


def _alike(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether they have the same names, shapes, layouts, number formats and devices."""
    kinds = [[(n, t.shape, t.stride(), t.dtype, t.device) for n, t in of.items()] for of in (tensors, others)]
    return kinds[0] == kinds[1]


class KeepMasked(Hooks):
    """Holds pruned weights at zero: masks the weights again after each step of the optimiser.

    Weight decay and left-over momentum would move them otherwise. The momentum itself is left alone.
    """

    def __init__(self, masks: Masks):
        self.masks = masks

    def stepped(self, trainer: Trainer) -> None:
        self.masks.apply(trainer.model)

    def in_graph(self, trainer: Trainer) -> Sequence[Any]:
        return list(self.masks.factors(trainer.model).values())

    def state(self) -> dict[str, Any]:
        return {"kept": self.masks.kept}

    def load_state(self, trainer: Trainer, state: dict[str, Any]) -> None:
        self.masks.update({n: mask.to(trainer.device) for n, mask in state["kept"].items()})


# ------------------------------------------------------------------------------------------ norms


def squared_norm(tensors: Iterable[Tensor]) -> float:
    """Sum of the squares of all entries, in double precision."""
    return sum(float(tensor.detach().double().square().sum()) for tensor in tensors)


def norm_drop(before: float, after: float) -> float:
    """sqrt(|before - after|) / sqrt(before) of squared norms: the relative size of what pruning removed."""
    return math.sqrt(abs(before - after) / before) if before else 0.0
