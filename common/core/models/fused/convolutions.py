"""3x3 convolutions of few channels behind autograd: the gradient of the weights comes out in float32. And 1x1 ones."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.core.models.fused.tiles import Kind, Product, Shape, WeightGradient, fastest, measured


def known(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Whether `convolve` computes this, and was measured to be faster than torch's own convolution."""
    inputs, (height, width) = 4 if x.shape[1] == 3 else x.shape[1], x.shape[2:]
    if height != width or not 0 < x.numel() < 2**30:
        return False
    return measured(inputs, len(weight), stride, height, back=x.requires_grad)


def convolve(x: Tensor, weight: Tensor, stride: int, dtype: torch.dtype) -> Tensor:
    """The convolution [B, O, H', W'] of x [B, I, H, W] with weight [O, I, 3, 3], padding 1, in `dtype`, channels last.

    For what is `known` alone.
    """
    return _Convolution.apply(_even(x, dtype), weight, stride)


def narrow(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Whether a 1x1 convolution is one of few channels with stride 2, whose gradients take cuDNN ten times what they need."""
    fit = all(channels % 8 == 0 and channels <= 64 for channels in weight.shape[:2])
    return fit and stride == 2 and x.numel() > 0


def multiply(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The 1x1 convolution [B, O, H', W'] of x [B, I, H, W] with weight [O, I, 1, 1] as a product of matrices, under autocast."""
    pixels = x[:, :, ::stride, ::stride].permute(0, 2, 3, 1)
    return torch.nn.functional.linear(pixels, weight.flatten(1)).permute(0, 3, 1, 2)


def _even(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In that format, channels last; three channels get a fourth one of zeros, so that a pixel is a power of two."""
    if tensor.shape[1] != 3:
        return tensor.to(dtype, memory_format=torch.channels_last)
    shape = (len(tensor), 4, *tensor.shape[2:])
    wide = torch.empty(shape, dtype=dtype, device=tensor.device, memory_format=torch.channels_last).zero_()
    wide[:, :3] = tensor
    return wide


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        from common.core.models.fused import kernels

        rounded = _even(weight, x.dtype)
        ctx.save_for_backward(x, rounded)
        ctx.shape = shape = Shape(len(x), x.shape[2], x.shape[1], len(weight), stride)
        ctx.inputs, ctx.dtype = weight.shape[1], weight.dtype
        plan = _product("forward", shape, processors(x.device))
        y = _images(x, shape.co, shape.out)
        kernels.convolve[plan.grid](x, rounded, y, *plan.sizes, **plan.constants)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        from common.core.models.fused import kernels

        x, rounded = ctx.saved_tensors
        shape, of_x, of_weight = ctx.shape, None, None
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        if ctx.needs_input_grad[0]:
            plan = _product("dgrad", shape, processors(x.device))
            of_x = _images(x, shape.ci, shape.size)
            kernels.convolve[plan.grid](gradient, rounded, of_x, *plan.sizes, **plan.constants)
        if ctx.needs_input_grad[1]:
            sums = _weight_gradient(shape, processors(x.device))
            parts = torch.empty(sums.parts, dtype=torch.float32, device=x.device)
            found = torch.empty(shape.co, 3, 3, shape.ci, dtype=torch.float32, device=x.device)
            kernels.weight_gradient[sums.grid](x, gradient, parts, *sums.sizes, **sums.constants)
            kernels.weight_gradient_sum[sums.sum_grid](parts, found, sums.splits, **sums.sum_constants)
            of_weight = found.permute(0, 3, 1, 2)[:, : ctx.inputs].to(ctx.dtype)
        return of_x, of_weight, None


def _images(like: Tensor, channels: int, size: int) -> Tensor:
    """Without values, in the format of another: [B, channels, size, size]."""
    shape = (len(like), channels, size, size)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=1024)
def _product(kind: Kind, shape: Shape, count: int) -> Product:
    return Product(kind, shape, fastest(kind, shape), count)


@functools.lru_cache(maxsize=1024)
def _weight_gradient(shape: Shape, count: int) -> WeightGradient:
    return WeightGradient(shape, fastest("wgrad", shape), count)
