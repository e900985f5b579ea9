"""Layers of networks with few channels in fewer passes over a GPU's memory than torch's own take, in Triton.

3x3 convolutions of 16 to 64 channels, and batch norm with ReLU and the addition of a shortcut; 1x1 convolutions of a shortcut
are a product of matrices. The functions take tensors, not modules, so weights may be others than a layer's parameters; they
work under autocast alone, in its format, and can be captured. Whatever does not fit is computed by torch, layer by layer.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from common.core.models.fused import convolutions
from common.core.models.fused.norms import Norm


def convolution(layer: nn.Conv2d, x: Tensor) -> Tensor | None:
    """What the layer makes of x [B, I, H, W]; None where the kernels do not compute that, or were not measured to be faster."""
    stride = layer.stride[0]
    plain = layer.bias is None and layer.groups == 1 and layer.padding_mode == "zeros"
    if not (plain and layer.stride == (stride, stride) and (dtype := _autocast(x))):
        return None
    if (
        layer.kernel_size == (1, 1)
        and layer.padding == (0, 0)
        and convolutions.narrow(x, layer.weight, stride)
    ):
        return convolutions.multiply(x, layer.weight, stride)
    square = layer.kernel_size == (3, 3) and layer.padding == (1, 1) and layer.dilation == (1, 1)
    if not square or not convolutions.known(x, layer.weight, stride):
        return None
    return convolutions.convolve(x, layer.weight, stride, dtype)


def _autocast(x: Tensor) -> torch.dtype | None:
    """The format of autocast, where that is on; None also for tensors without values, which no kernel takes."""
    device = x.device.type
    return None if x.is_meta or not torch.is_autocast_enabled(device) else torch.get_autocast_dtype(device)


def norm(layer: nn.BatchNorm2d, x: Tensor, relu: bool, shortcut: Tensor | None = None) -> Tensor | None:
    """What the layer makes of x [B, C, H, W], plus `shortcut` of the same shape, through ReLU if `relu` says so.

    None where the kernels do not compute that: x is not in the format of autocast or not in channels_last, the layer lacks
    scales or running statistics or averages them otherwise, gradients are asked for in evaluation mode, or a single
    value of a channel is there.
    """
    tensors = [x] if shortcut is None else [x, shortcut]
    dtype = _autocast(x)
    if dtype is None or not all(t.dtype == dtype and t.shape == x.shape for t in tensors):
        return None
    mean, variance, momentum = layer.running_mean, layer.running_var, layer.momentum
    if not layer.affine or mean is None or variance is None or momentum is None:
        return None
    several = x.shape[1] < x.numel() < 2**30
    last = x.is_contiguous(memory_format=torch.channels_last)
    if not several or not last or (torch.is_grad_enabled() and not layer.training):
        return None
    if shortcut is not None:
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
    running = mean, variance
    return Norm.apply(
        x, layer.weight, layer.bias, shortcut, running, momentum, layer.eps, relu, layer.training
    )


@functools.cache
def problem(device: torch.device) -> str | None:
    """Why the kernels cannot be compiled for a device; None where they can."""
    try:
        x = torch.ones(2, 16, 4, 4, device=device, dtype=torch.bfloat16)
        layer = nn.BatchNorm2d(16).to(device)
        with torch.cuda.device_of(x), torch.autocast(device.type, torch.bfloat16):
            norm(layer, x.to(memory_format=torch.channels_last), relu=True)
    except Exception as error:  # of whatever Triton, its compilers or the driver raise
        return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
    return None
