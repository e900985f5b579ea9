"""What is measured on a trained or pruned network beside its accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.core.data import Batches, Dataset
from common.core.pruning.masks import Masks
from common.core.trainer import BatchSource, Hooks, Trainer
from replications.halo.method import HALO, Cut, fixed_threshold, stationary_lambda

Features = Literal["corner", "mean"]

NEAR_ZERO = (1e-5, 1e-4, 1e-3, 1e-2)
"""Thresholds of the near-zero counters."""
ENERGY = 0.9
"""The share of the energy that the counted directions hold."""


@torch.no_grad()
def near_zero(parameters: Sequence[Tensor], taus: Sequence[float] = NEAR_ZERO) -> list[int]:
    """How many scalars are at most tau in size, for each tau; the paper counts those of all parameters."""
    sizes = torch.cat([p.abs().flatten() for p in parameters])
    return [int((sizes <= tau).sum()) for tau in taus]


class NearZero(Hooks):
    """Counts the network's near-zero parameters after every epoch, one row of `rows` each."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def epoch_ended(self, trainer: Trainer, epoch: int) -> None:
        counts = near_zero(list(trainer.model.parameters()))
        self.rows.append({f"near_zero_{tau:g}": count for tau, count in zip(NEAR_ZERO, counts, strict=True)})

    def state(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state(self, trainer: Trainer, state: dict[str, Any]) -> None:
        self.rows = list(state["rows"])


@torch.no_grad()
def rank_correlation(weights: Sequence[Tensor], lambdas: Sequence[Tensor]) -> float | None:
    """Spearman's correlation of |w| with |lambda| over all given scalars; None where one is constant."""
    ranks = torch.stack([_ranks(torch.cat([t.abs().flatten() for t in part])) for part in (weights, lambdas)])
    found = torch.corrcoef(ranks)[0, 1].item() if ranks.shape[1] > 1 else math.nan
    return found if math.isfinite(found) else None


def _ranks(values: Tensor) -> Tensor:
    """Ranks of a flat tensor; equal values share the mean of theirs."""
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[which]


def lambdas(penalty: HALO, weight_decay: float) -> dict[str, float | None]:
    """How lambdas follow the weights, and how far they are from where they would settle; weight_decay: theirs."""
    metrics: dict[str, float | None] = {
        "lambda_correlation": rank_correlation(penalty.tensors, penalty.lambdas)
    }
    if penalty.psi > 0 or weight_decay > 0:
        sizes = torch.cat([weight.detach().abs().flatten() for weight in penalty.tensors])
        found = torch.cat([part.abs().flatten() for part in penalty.lambdas])
        settled, _ = stationary_lambda(sizes, penalty.xi, penalty.psi, weight_decay)
        metrics["lambda_excess"] = (found.double() / settled.clamp(min=1e-12)).log10().median().item()
    return metrics


# ------------------------------------------------------------------------------------------ masks


def densities(kept: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of kept weights per tensor."""
    return {name: mask.double().mean().item() for name, mask in kept.items()}


def of_mask(found: Cut, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics and details of a mask. weights: what has become of those that it was found for."""
    kept = torch.cat([weights[name].detach().abs()[mask] for name, mask in found.kept.items()])
    total = sum(weight.numel() for weight in weights.values())
    by_layer = densities(found.kept)
    first, *_, last = by_layer.values()
    density = kept.numel() / total
    metrics = {
        "prunable_sparsity": 1 - density,
        "kept_magnitude": kept.mean().item() if kept.numel() else None,
        "first_layer_density": first,
        "last_layer_density": last,
        "first_layer_ratio": first / density if density else None,
    }
    details = {
        "density": by_layer,
        "emptied": found.emptied,
        "threshold": found.threshold,
        "index": found.index,
        "float32_index": found.float32_index,
        "pruned": total - kept.numel(),
    }
    return metrics, details


def at_threshold(
    trainer: Trainer, data: Dataset, weights: Mapping[str, Tensor], tau: float
) -> dict[str, float]:
    """Sparsity and test accuracy when all weights below `tau` go, which they do here."""
    masks = Masks(fixed_threshold(weights, tau))
    masks.apply(trainer.model)
    scores = trainer.evaluate(Batches(data, "test"))
    return {"threshold_sparsity": masks.sparsity, "threshold_test_accuracy": scores["accuracy"]}


# ------------------------------------------------------------------------------------------ energy


def features(outputs: Tensor, kind: Features) -> Tensor:
    """One number per channel from convolution outputs [N, C, H, W] -> [N, C].

    `corner` is the top-left pixel, which the authors' script looks at; `mean` is the average over the map.
    """
    return outputs[:, :, 0, 0] if kind == "corner" else outputs.mean((2, 3))


def energy(values: Tensor) -> Tensor:
    """Shares of the eigenvalues of the covariance of `values` [N, C], largest first; 0 if nothing varies."""
    covariance = values.double().T.cov(correction=1).reshape(values.shape[1], -1)
    sizes = torch.linalg.eigvalsh(covariance).abs().sort(descending=True).values
    total = sizes.sum()
    return sizes / total if total > 0 else sizes


def directions(shares: Tensor, wanted: float) -> int:
    """Smallest number of leading directions that hold at least the wanted share; 0 where nothing varies."""
    reached = shares.cumsum(0) >= wanted
    return int(reached.int().argmax()) + 1 if reached.any() else 0


@torch.no_grad()
def convolution_features(
    model: nn.Module, batches: BatchSource, kinds: Sequence[Features]
) -> dict[Features, dict[str, Tensor]]:
    """Features of every convolution over one pass in evaluation mode: kind -> layer -> [N, C]."""
    found: dict[Features, dict[str, list[Tensor]]] = {kind: {} for kind in kinds}

    def keep(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            for kind in kinds:
                found[kind].setdefault(name, []).append(features(output, kind))

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    model.eval()
    try:
        for images, _ in batches.epoch(0):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return {
        kind: {name: torch.cat(parts) for name, parts in layers.items()} for kind, layers in found.items()
    }


def output_directions(model: nn.Module, data: Dataset) -> tuple[dict[str, float], dict[str, dict[str, int]]]:
    """Directions that hold most of the energy of each convolution's output over the training images: totals, by layer."""
    batches = Batches(data, "train", shuffle=True, augment=True)
    found = convolution_features(model, batches, ("corner", "mean"))
    by_layer: dict[str, dict[str, int]] = {
        kind: {name: directions(energy(values), ENERGY) for name, values in layers.items()}
        for kind, layers in found.items()
    }
    totals = {
        f"directions_{kind}": float(sum(layers.values())) for kind, layers in by_layer.items() if layers
    }
    return totals, by_layer
