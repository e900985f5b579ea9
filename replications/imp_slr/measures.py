"""What is measured on a pruned network beside its accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
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


def saturation_epochs(epochs: Sequence[float], gains: Sequence[float], share: float = 0.9) -> float | None:
    """Epochs of retraining until `share` of the final gain, by the curve a * (1 - exp(-epochs / tau)).

    gains: accuracy above that before retraining. Fitted by least squares: for each tau the best a is known,
    and tau is looked for between a hundredth of the shortest and ten times the longest retraining. None
    without a gain.
    """
    if max(gains) <= 0:
        return None
    x, y = np.asarray(epochs, dtype=float), np.asarray(gains, dtype=float)
    taus = np.geomspace(x.min() / 100, x.max() * 10, 5000)
    curves = 1 - np.exp(-x / taus[:, None])
    heights = (curves @ y) / (curves**2).sum(1)
    misfits = ((y - heights[:, None] * curves) ** 2).sum(1)
    return float(-math.log(1 - share) * taus[misfits.argmin()])


def gain_shares(epochs: Sequence[int], gains: Sequence[float], dense_epochs: int) -> dict[str, float | None]:
    """How much of the gain of the longest retraining the shorter ones reach, and how long 90 % of it takes.

    epochs, gains: as of `saturation_epochs`, the longest last. The time is a share of the dense epochs. None where the
    longest gained nothing.
    """
    *shorter, longest = gains
    found = {
        f"gain_share_{percent(length, dense_epochs)}": gain / longest if longest > 0 else None
        for length, gain in zip(epochs, shorter)
    }
    needed = saturation_epochs(epochs, gains)
    return found | {"saturation_share": None if needed is None else needed / dense_epochs}
