"""Batch norm, the addition of a shortcut and ReLU behind autograd: two launches forward and two backward.

Kept for the backward pass are the input, mean and deviation of each channel, and, behind a shortcut, the output, which
the next layer keeps anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.core.models.fused.tiles import FUSION, ceil, power

_TILE, _MOST_PARTS, _PROGRAMS = 4096, 4096, 256
"""Numbers of a tile; partial results that a program adds up, of each kind; programs of a launch, about."""


class Norm(torch.autograd.Function):
    """norm(x), relu(norm(x)) or relu(norm(x) + shortcut), with the batch's statistics if `training`, else the running ones.

    x, shortcut: [B, C, H, W], channels last; weight, bias, running_mean, running_var: [C] in float32. In training the running
    ones are brought up to date in place; only then there is a backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shortcut: Tensor | None,
        running: tuple[Tensor, Tensor],
        momentum: float,
        eps: float,
        relu: bool,
        training: bool,
    ) -> Tensor:
        from common.core.models.fused import norm_kernels as kernels

        ctx.mode = mode = 0 if not relu else 1 if shortcut is None else 2
        grid, sizes, tile = _launch(x)
        part = _partial(x, grid)
        saved = x.new_empty((2, x.shape[1]), dtype=torch.float32)
        out = torch.empty_like(x, memory_format=torch.channels_last)
        if training:
            kernels.statistics[grid](x, part, *sizes, **tile)
        added = x if shortcut is None else shortcut  # what is not there is not read either
        kernels.normalise[grid](
            x, added, out, part, saved, weight, bias, *running, *sizes, grid[0], momentum, eps,
            MODE=mode, TRAINING=training, BR=power(grid[0]), **tile,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, saved, out if mode == 2 else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from common.core.models.fused import norm_kernels as kernels

        x, weight, bias, saved, out = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        grid, sizes, tile = _launch(x)
        part = _partial(x, grid)
        of_x = torch.empty_like(x, memory_format=torch.channels_last)
        of_weight, of_bias = torch.empty_like(weight), torch.empty_like(bias)
        of_shortcut = None if out is None else torch.empty_like(of_x)
        behind, others = (x, x) if out is None else (out, of_shortcut)
        kernels.gradient_sums[grid](
            gradient, x, behind, others, part, saved, weight, bias, *sizes, MODE=ctx.mode, **tile
        )
        if of_shortcut is not None:
            gradient = of_shortcut
        kernels.gradient[grid](
            gradient, x, of_x, part, saved, weight, bias, of_weight, of_bias, *sizes, grid[0],
            MODE=ctx.mode, BR=power(grid[0]), **tile,
        )  # fmt: skip
        return of_x, of_weight, of_bias, of_shortcut, None, None, None, None, None


def _launch(x: Tensor) -> tuple[tuple[int, int], tuple[int, int, int], dict[str, Any]]:
    """Grid; rows, channels and rows of a program; tile. They follow from the shape, so sums have one order everywhere."""
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    wide = min(32, power(channels))
    tall = _TILE // wide
    columns = ceil(channels, wide)
    tiles = ceil(rows, tall)
    per = ceil(tiles, max(1, min(_MOST_PARTS // wide, _PROGRAMS // columns)))
    tile = {"BM": tall, "BC": wide, "num_warps": 8, **FUSION}
    return (ceil(tiles, per), columns), (rows, channels, per * tall), tile


def _partial(x: Tensor, grid: tuple[int, int]) -> Tensor:
    return x.new_empty((2, grid[0], x.shape[1]), dtype=torch.float32)
