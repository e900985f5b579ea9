"""What is measured on a pruned network beside its accuracy."""

from __future__ import annotations

import math

import torch
from torch import nn

from common.core.pruning.masks import prunable, squared_norm


def percent(part: float, whole: float) -> str:
    """How names of variants and metrics write a share."""
    return f"{round(100 * part / whole)}pct"


def nonzero_by_layer(model: nn.Module) -> dict[str, int]:
    """Weights left in each prunable layer."""
    return {name: int(weight.detach().count_nonzero()) for name, weight in prunable(model).items()}


def pruning_stability(dense_accuracy: float, pruned_accuracy: float) -> float:
    """1 - (relative loss of accuracy by pruning, before any retraining)."""
    return 1 - (dense_accuracy - pruned_accuracy) / dense_accuracy if dense_accuracy else float("nan")


def distance_to_pruned(model: nn.Module, sparsity: float) -> float:
    """Norm of what global pruning would remove if it kept int((1 - sparsity) * n) of the prunable weights."""
    magnitudes = torch.cat([w.detach().flatten() for w in prunable(model).values()]).abs().sort().values
    removed = len(magnitudes) - int((1 - sparsity) * len(magnitudes))
    return math.sqrt(squared_norm([magnitudes[:removed]]))


def relative_distance(model: nn.Module, sparsity: float) -> float:
    """The same as a share of the norm of the prunable weights."""
    return distance_to_pruned(model, sparsity) / math.sqrt(squared_norm(prunable(model).values()))


def accuracy_at_gain(pruned_accuracy: float, retrained_accuracy: float, share: float) -> float:
    """The accuracy at which retraining has reached a share of what it gained from right after the pruning on."""
    return pruned_accuracy + share * (retrained_accuracy - pruned_accuracy)
