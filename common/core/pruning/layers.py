"""The kinds of layers that pruning and counting know."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CHANNEL_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
"""Norms that treat each channel by itself."""
NORMS = (*CHANNEL_NORMS, nn.GroupNorm)


def weight_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The weight of the layer of that name. Raises ValueError where it is not a parameter that has its shape."""
    weight = module._parameters.get("weight")
    if weight is None or is_lazy(weight):
        raise ValueError(
            f"{name or 'the network'}: the weight of this {type(module).__name__} is no plain parameter (computed from others, "
            "behind torch.nn.utils.prune, or without a shape yet): make it one first"
        )
    return weight
