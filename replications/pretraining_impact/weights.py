"""Single weights as the unit of pruning, behind masks, in the loop of method.py.

The abstract speaks of irrelevant weights; the authors' later code masks the smallest magnitudes. A masked network keeps
its shape, so a reduction counts the parameters that are not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from torch import nn

from common.core.pruning.masks import Allocation, Layers, Masks
from common.settings import SettingsError, Strict

Retrained = TypeVar("Retrained")
ALLOCATIONS: dict[str, Allocation] = {"local": "uniform", "global": "global"}


class WeightSelection(Strict):
    """How the weights to prune are chosen: the smallest magnitudes."""

    context: Literal["local", "global"] = "local"
    """Rank inside each layer, as filters are, or over all layers at once."""
    layers: Layers = "conv+linear"
    """Whose weights are pruned. Biases and batch norms stay."""


def sparsities_for_reductions(parameters: int, prunable: int, targets: Sequence[float]) -> list[float]:
    """For each target the share of the `prunable` weights that is pruned when that share of all `parameters` is.

    Raises SettingsError naming a target for which the prunable weights are too few, and the share that they are.
    """
    for target in targets:
        if target * parameters >= prunable:
            raise SettingsError(
                f"target {target:g}: only {prunable / parameters:.4f} of the parameters are weights that may be pruned"
            )
    return [target * parameters / prunable for target in targets]


def prune_and_retrain(
    model: nn.Module,
    masks: Masks,
    sparsities: Sequence[float],
    how: WeightSelection,
    retrain: Callable[[float], Retrained],
) -> list[Retrained]:
    """The loop for a network that is trained: what `retrain`, given the sparsity, returns of each level.

    masks: of the levels before; brought to each level. sparsities: shares of the masked weights, ascending.
    """
    found = []
    for sparsity in sparsities:
        fraction = 1 - (1 - sparsity) / (1 - masks.sparsity)
        masks.prune(model, max(fraction, 0.0), ALLOCATIONS[how.context])
        masks.apply(model)
        found.append(retrain(sparsity))
    return found
