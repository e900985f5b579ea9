"""The least time that a card could need, for plans without one and for the share that is reached on one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.core.pruning.counting import LayerCost

# passes over a convolution's output in training, with batch norm, ReLU and addition in one kernel; bfloat16 has two bytes
FUSED_PASSES, BYTES = 14.5, 2
FORWARD = 1 / 3
"""The share of a training step that goes forward: two of its six FLOP for each MAC."""
REACHED = 0.3
"""The share of the floor that plans reckon with: of 0.24 to 0.34 that eight ResNet-20 reached together (reports/benchmark-gpu)."""


@dataclass(frozen=True)
class Peaks:
    """What a card does at best with torch's own kernels: FLOP/s in large bf16 matrix products, and B/s in a large copy,
    reading and writing."""

    flops: float
    bytes: float


CARDS = {"h200": Peaks(flops=780e12, bytes=4.3e12), "h100": Peaks(flops=780e12, bytes=2.4e12)}
"""As measured on one of each; the products of an H100 are taken for those of an H200, which has the same chip."""


def training_seconds(layers: Sequence[LayerCost], peaks: Peaks) -> float:
    """The least time in which a card could train a network of these layers on one image: the larger of arithmetic and
    memory traffic.

    Six FLOP for each MAC; every convolution's output is passed over `FUSED_PASSES` times.
    """
    outputs = sum(layer.shape[0] * layer.positions for layer in layers if layer.kind != "linear")
    arithmetic = 6 * sum(layer.macs for layer in layers) / peaks.flops
    return max(arithmetic, outputs * FUSED_PASSES * BYTES / peaks.bytes)
