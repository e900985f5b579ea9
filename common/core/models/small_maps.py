"""Convolutions of small feature maps on a CPU, as matrix products.

Where weights outnumber activations, oneDNN's bfloat16 convolutions spend their time on laying out weights. For 512
channels of 2x2 pixels products of matrices are four times as fast, and fifteen times in the gradient of the weights.
All shapes and layouts are right; the memory format channels_last, whose runs of memory are rows of the matrices, is fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

Pair = tuple[int, int]

_MOST_PIXELS, _FEWEST_WEIGHTS = 16, 2**17


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether `convolve` is faster in bfloat16 than torch's own convolution."""
    small = x.shape[2] * x.shape[3] <= _MOST_PIXELS and x.numel() < weight.numel()
    return small and weight.numel() >= _FEWEST_WEIGHTS and weight.shape[2:].numel() > 1


def convolve(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """The convolution [B, O, H', W'] of x [B, I, H, W] with weight [O, I, h, w], ungrouped and undilated."""
    return _Convolution.apply(x, weight, stride, padding)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        patches, height, width = _patches(x, weight.shape[2:], stride, padding)
        return (patches @ _matrix(weight).t()).view(len(x), height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        rows = gradient.permute(0, 2, 3, 1).reshape(-1, len(weight))
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _folded(rows @ _matrix(weight), x, weight, gradient.shape[2:], ctx.stride, ctx.padding)
        if ctx.needs_input_grad[1]:
            patches, *_ = _patches(x, weight.shape[2:], ctx.stride, ctx.padding)
            outputs, inputs, *kernel = weight.shape
            of_weight = (rows.t() @ patches).view(outputs, *kernel, inputs).permute(0, 3, 1, 2)
        return of_x, of_weight, None, None


def _matrix(weight: Tensor) -> Tensor:
    """[O, h*w*I]"""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def _patches(x: Tensor, kernel: Sequence[int], stride: Pair, padding: Pair) -> tuple[Tensor, int, int]:
    """What each output position sees, [B*H'*W', h*w*I], and H' and W'."""
    (up, left), (down, right) = padding, stride
    padded = pad(x.permute(0, 2, 3, 1), (0, 0, left, left, up, up))
    windows = padded.unfold(1, kernel[0], down).unfold(2, kernel[1], right)  # [B, H', W', I, h, w]
    height, width = windows.shape[1:3]
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(len(x) * height * width, -1), height, width


def _folded(
    columns: Tensor, x: Tensor, weight: Tensor, size: Sequence[int], stride: Pair, padding: Pair
) -> Tensor:
    """The sum over all patches [B*H'*W', h*w*I] at each pixel of x, in float32 before it is rounded."""
    (height, width), kernel = size, weight.shape[2:]
    patches = columns.view(len(x), height, width, *kernel, x.shape[1])
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = columns.new_zeros((len(x), *x.shape[2:], x.shape[1]), dtype=wide)
    for i, j in product(*map(range, kernel)):
        top, vertical = _overlap(i, height, x.shape[2], stride[0], padding[0])
        left, horizontal = _overlap(j, width, x.shape[3], stride[1], padding[1])
        sums[:, top, left] += patches[:, vertical, horizontal, i, j]
    return sums.to(x.dtype).permute(0, 3, 1, 2)


def _overlap(tap: int, outputs: int, inputs: int, stride: int, padding: int) -> tuple[slice, slice]:
    """Pixels of the input that a place of the kernel meets, and the output positions where it does."""
    first = max(0, -((tap - padding) // stride))
    last = max(first, min(outputs, (inputs - 1 + padding - tap) // stride + 1))
    start = first * stride + tap - padding
    return slice(start, start + (last - first) * stride, stride), slice(first, last)
