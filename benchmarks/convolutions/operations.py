"""What launches the kernels that are measured: those of training, and those with batch norm's sums in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from benchmarks.convolutions import kernels
from common.core.models.fused import tiles as tiling
from common.core.models.fused.kernels import convolve, weight_gradient, weight_gradient_sum
from common.core.models.fused.tiles import DoesNotFit as DoesNotFit
from common.core.models.fused.tiles import Kind, Product, Shape, Tiles, ceil, power

Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]
"""Kernel, grid, arguments, constants."""

EPSILON = 1e-5
# Rows of the table of a batch norm [9, C], float32: forward scale, shift, mean, 1/deviation; then of the gradient
# dy = a*g + b*y + c: a (= scale), b, c; then dgamma, dbeta.
SCALE, SHIFT, MEAN, RSTD, GRAD_A, GRAD_B, GRAD_C, DGAMMA, DBETA = range(9)
TABLE_ROWS = 9


@dataclass(frozen=True)
class Fused:
    """What a kernel does beside its product.

    epilogue: "sums", forward: the batch norm after it gets its table; "behind norm", backward: the gradient passes the
    ReLU of relu(batch norm(z)), whose table gets the rows of the gradient.
    finish: who adds the programs' sums: the last program, from one row for each pixel of a group ("unfolded") or one
    for each program ("folded"), or a small launch of its own ("apart").
    """

    epilogue: Literal["", "sums", "behind norm"] = ""
    finish: Literal["unfolded", "folded", "apart"] = "apart"

    def __str__(self) -> str:
        return f"{self.epilogue}, {self.finish}" if self.epilogue else "plain"


PLAIN = Fused()


def launch(launches: Sequence[Launch]) -> None:
    """One after the other."""
    for kernel, grid, arguments, constants in launches:
        kernel[grid](*arguments, **constants)


def build(
    kind: Kind,
    shape: Shape,
    tiles: Tiles,
    fused: Fused,
    processors: int,
    device: str | torch.device = "cuda",
) -> Conv | WeightGradient:
    """The operation of this kind. processors: multiprocessors of the chip. Raises DoesNotFit."""
    if kind == "wgrad":
        return WeightGradient(shape, tiles, processors, device)
    return Conv(kind, shape, tiles, fused, processors, device)


class Conv:
    """`forward` or `dgrad` of one shape with given tiles; holds the partial sums of its own launches.

    processors: multiprocessors of the chip. Raises DoesNotFit.
    """

    def __init__(
        self,
        kind: Kind,
        shape: Shape,
        tiles: Tiles,
        fused: Fused,
        processors: int,
        device: str | torch.device = "cuda",
    ) -> None:
        plan = Product(kind, shape, tiles, processors)
        co, bn = plan.constants["CO"], plan.constants["BN"]
        self.grid, self.sizes = plan.grid, plan.sizes
        epilogue = ("", "sums", "behind norm").index(fused.epilogue)
        finish = ("unfolded", "folded", "apart").index(fused.finish)
        # a row of partial sums: one of each channel
        self.rows = self.grid[0] * self.grid[1] * bn // (co if finish == 0 else max(bn, co))
        self.part = torch.zeros(2 * self.rows * co if epilogue else 1, device=device)
        self.counter = torch.zeros(1, dtype=torch.int32, device=device)
        self.count = shape.n * (shape.size if kind == "dgrad" else shape.out) ** 2
        self.fused, self.apart = bool(epilogue), bool(epilogue) and finish == 2
        self.constants = dict(plan.constants)
        if self.fused:
            self.constants |= dict(EPILOGUE=epilogue, EPS=EPSILON, FINISH=finish)
        registers = 65_536 // (tiles.per_sm * tiles.warps * 32)
        if self.apart and tiles.resident and registers < 255:
            # sums take so many that fewer programs than planned would share a multiprocessor
            self.constants["maxnreg"] = registers
        channels = 8  # a program: 32 bytes of a row
        self.table_grid = (co // channels,)
        self.table_constants = dict(
            CO=co, BC=channels, BR=min(power(self.rows), 512), EPILOGUE=epilogue, EPS=EPSILON, num_warps=4
        )

    def launches(self, x, w, y, z=None, out_table=None, gamma=None, beta=None) -> list[Launch]:
        """x, y: input and output of this kernel; out_table: of the batch norm after it."""
        if not self.fused:
            return [(convolve, self.grid, (x, w, y, *self.sizes), self.constants)]
        # what is not there is not read either
        z, out_table, gamma, beta = (self.part if t is None else t for t in (z, out_table, gamma, beta))
        tensors = (x, w, y, z, out_table, gamma, beta, self.part, self.counter)
        launches: list[Launch] = [
            (kernels.conv, self.grid, (*tensors, *self.sizes, self.count), self.constants)
        ]
        if self.apart:
            arguments = (self.part, out_table, gamma, beta, self.rows, self.count)
            launches.append((kernels.norm_table, self.table_grid, arguments, self.table_constants))
        return launches

    def __call__(self, *tensors) -> None:
        """Write y, and in `out_table` what the epilogue gives; tensors as in `launches`."""
        launch(self.launches(*tensors))


class WeightGradient:
    """`wgrad` of one shape, float32; holds the partial products of its own launches. Raises DoesNotFit."""

    def __init__(
        self, shape: Shape, tiles: Tiles, processors: int, device: str | torch.device = "cuda"
    ) -> None:
        self.plan = tiling.WeightGradient(shape, tiles, processors)
        self.part = torch.empty(self.plan.parts, device=device)

    def launches(self, x, dy, dw) -> list[Launch]:
        """x: the convolution's input; dy: the gradient of its output."""
        plan = self.plan
        return [
            (weight_gradient, plan.grid, (x, dy, self.part, *plan.sizes), plan.constants),
            (weight_gradient_sum, plan.sum_grid, (self.part, dw, plan.splits), plan.sum_constants),
        ]

    def __call__(self, *tensors) -> None:
        """Write dw: [C_out, 3, 3, C_in] float32; tensors as in `launches`."""
        launch(self.launches(*tensors))


def _combine(x, z, out, table, a: int, b: int, d: int, relu: bool) -> None:
    block = 4096
    constants = dict(C=table.shape[1], A=a, B=b, D=d, RELU=relu, BLOCK=block, num_warps=8)
    kernels.combine[(ceil(x.numel(), block),)](x, z, out, table, x.numel(), **constants)


def normalise(y, shortcut, out, table) -> None:
    """relu(batch norm(y) + shortcut), NHWC tensors of one shape; no shortcut: None."""
    b = -2 if shortcut is None else -1
    _combine(y, y if shortcut is None else shortcut, out, table, SCALE, b, SHIFT, True)


def through_norm(g, y, out, table) -> None:
    """The gradient of a batch norm's input y, from that of its output, g, and the gradient's rows of its table."""
    _combine(g, y, out, table, GRAD_A, GRAD_B, GRAD_C, False)


def candidates(kind: Kind, shape: Shape) -> list[Tiles]:
    """The short list to choose from; a caller skips those that do not fit (DoesNotFit)."""
    if kind == "wgrad":
        return _wgrad_candidates(shape)
    c = shape.co if kind == "dgrad" else shape.ci
    wide = 4 * c
    if kind == "dgrad" and shape.stride == 2:
        row = 2 * c
        return [
            *(Tiles((2, 2), 64, bn, row, True, per, 4, 1) for bn, per in ((0, 2), (0, 4), (64, 4), (32, 4))),
            Tiles((2, 2), 64, 0, row, True, 2, 4, 2),
            Tiles((2, 2), 128, 0, row, True, 2, 8, 1),
            Tiles((2, 2), 64, 64, row, False, 8, 4, 2),
        ]
    if c <= 16 and shape.stride == 2:
        return [
            Tiles((1, 1), 64, 0, wide, True, 4, 4, 1),
            Tiles((1, 1), 128, 0, wide, True, 2, 4, 2),
            Tiles((1, 1), 64, 0, wide, False, 8, 4, 3),
        ]
    if c <= 16:
        return [
            Tiles((2, 2), 128, 0, wide, True, 2, 8, 1),
            Tiles((2, 2), 64, 0, wide, True, 2, 4, 2),
            Tiles((2, 2), 64, 0, wide, True, 3, 4, 1),
            Tiles((1, 2), 64, 0, wide, True, 4, 4, 1),
            Tiles((1, 2), 64, 0, wide, True, 2, 4, 2),
            Tiles((1, 2), 128, 0, wide, True, 2, 4, 1),
        ]
    if c == 32:
        return [
            Tiles((1, 2), 64, 0, wide, True, 2, 4, 1),
            Tiles((1, 2), 64, 0, wide, True, 1, 4, 2),
            Tiles((1, 2), 64, 0, wide, False, 8, 4, 3),
            Tiles((1, 2), 64, 0, wide // 2, False, 8, 4, 4),
            Tiles((1, 1), 64, 0, wide, True, 3, 4, 1),
            Tiles((1, 1), 64, 0, wide, False, 8, 4, 3),
            Tiles((1, 1), 64, 0, c, False, 8, 4, 5),
        ]
    return [
        Tiles((1, 1), 64, 0, c, False, 8, 4, 4),
        Tiles((1, 1), 64, 0, 2 * c, False, 8, 4, 3),
        Tiles((1, 1), 64, 0, c, False, 8, 8, 5),
        Tiles((1, 1), 64, 32, c, False, 8, 4, 4),
        Tiles((1, 2), 64, 64, 2 * c, False, 8, 4, 3),
        Tiles((1, 2), 64, 64, c, False, 8, 4, 4),
    ]


def _wgrad_candidates(shape: Shape) -> list[Tiles]:
    c = shape.ci
    if shape.stride == 2 and c == 16:
        runs = ((64, 2, 4), (128, 2, 3), (64, 1, 5), (128, 3, 2))
        return [Tiles((1, 1), bm, 0, 64, per_sm=per, stages=stages) for bm, per, stages in runs]
    if c <= 16:
        return [
            Tiles((1, 2), 128, 0, 4 * c, per_sm=3, stages=3),
            Tiles((1, 2), 64, 0, 4 * c, per_sm=3, stages=4),
            Tiles((1, 2), 64, 0, 4 * c, per_sm=2, stages=4),
            Tiles((2, 2), 128, 0, 4 * c, per_sm=2, stages=3),
        ]
    return [
        Tiles((1, 1), 64, 0, 64, per_sm=2, stages=4),
        Tiles((1, 1), 128, 0, 64, per_sm=2, stages=3),
        Tiles((1, 1), 64, 0, 64, per_sm=4, stages=3),
        Tiles((1, 1), 128, 0, 128, per_sm=1, warps=8, stages=3),
        Tiles((1, 2), 64, 0, 128, per_sm=1, warps=8, stages=4),
    ]
