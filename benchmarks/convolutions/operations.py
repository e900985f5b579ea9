"""What launches the kernels: shapes, tiles, the one product of all directions, batch norm's passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from benchmarks.convolutions import kernels

Kind = Literal["forward", "dgrad", "wgrad"]
"""A convolution's directions: forward, backward to the input, backward to the weights."""
Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]
"""Kernel, grid, arguments, constants."""

EPSILON = 1e-5
SHARED_MEMORY = 225 * 1024  # bytes of a multiprocessor (H100), less a little
# Rows of the table of a batch norm [9, C], float32: forward scale, shift, mean, 1/deviation; then of the gradient
# dy = a*g + b*y + c: a (= scale), b, c; then dgamma, dbeta.
SCALE, SHIFT, MEAN, RSTD, GRAD_A, GRAD_B, GRAD_C, DGAMMA, DBETA = range(9)
TABLE_ROWS = 9


@dataclass(frozen=True)
class Shape:
    """One convolution of a network: batch, input height = width, channels, stride."""

    n: int
    size: int
    ci: int
    co: int
    stride: int = 1

    @property
    def out(self) -> int:
        """Height = width of the output."""
        return self.size // self.stride

    def __str__(self) -> str:
        return f"{self.ci}->{self.co} s{self.stride} @{self.size}"


@dataclass(frozen=True)
class Tiles:
    """Tiles of one kernel: a group of pixels, rows (groups), columns (0: all), depth, and how it is run."""

    group: tuple[int, int]
    bm: int
    bn: int
    bk: int
    resident: bool = True
    per_sm: int = 2  # programs a multiprocessor
    warps: int = 4
    stages: int = 2


class DoesNotFit(ValueError):
    """These tiles cannot compute this shape, or do not fit the chip."""


@dataclass(frozen=True)
class Fused:
    """What a kernel does beside its product.

    prologue: the input is relu(x*scale + shift) by the table of the batch norm before it.
    epilogue: "sums", forward: the batch norm after it gets its table; "behind norm", backward: the gradient passes the
    ReLU of relu(batch norm(z)), whose table gets the rows of the gradient.
    finish: who adds the programs' sums: the last program, from one row for each pixel of a group ("unfolded") or one
    for each program ("folded"), or a small launch of its own ("apart").
    """

    prologue: bool = False
    epilogue: Literal["", "sums", "behind norm"] = ""
    finish: Literal["unfolded", "folded", "apart"] = "apart"

    def __str__(self) -> str:
        words = ["norm"] * self.prologue + [self.epilogue, self.finish] * bool(self.epilogue)
        return ", ".join(words) or "plain"


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
        return WeightGradient(shape, tiles, fused, processors, device)
    return Conv(kind, shape, tiles, fused, processors, device)


def ceil(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _power(a: int) -> int:
    return 1 << (a - 1).bit_length()


def _geometry(kind: Kind, stride: int, ci: int, tiles: Tiles) -> dict[str, int]:
    gh, gw = tiles.group
    if kind == "dgrad" and stride == 2:
        if tiles.group != (2, 2):
            raise DoesNotFit("backward to the input with stride 2 needs groups of 2 x 2")
        qh, qw = 2, 2
        found = dict(STEP_H=1, STEP_W=1, OFF=0, A0=1, A1=-2, A2=1)
    else:
        qh, qw = (gh - 1) * stride + 3, (gw - 1) * stride + 3
        if qw * ci % tiles.bk:
            qw = _power(qw)
        taps = dict(A0=2, A1=-1, A2=1) if kind == "dgrad" else dict(A0=0, A1=1, A2=-stride)
        found = dict(STEP_H=gh * stride, STEP_W=gw * stride, OFF=-1, **taps)
    if qw * ci % tiles.bk:
        raise DoesNotFit(f"steps of {tiles.bk} must divide a row of a patch")
    return dict(GH=gh, GW=gw, QH=qh, QW=qw, **found)


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
        s, back = shape, kind == "dgrad"
        ci, co, hi, ho = (s.co, s.ci, s.out, s.size) if back else (s.ci, s.co, s.size, s.out)
        g = _geometry(kind, s.stride, ci, tiles)
        nt, kt = g["GH"] * g["GW"] * co, g.pop("QH") * g["QW"] * ci
        bn = tiles.bn or nt
        chunks = kt // tiles.bk
        if bn > nt or nt % bn or ho % g["GH"] or ho % g["GW"] or (tiles.resident and chunks > 4):
            raise DoesNotFit(f"{tiles} for {kind} of {shape}")
        weights, patch = chunks * tiles.bk * bn * 2, tiles.bm * tiles.bk * 2
        stage = chunks * patch if tiles.resident else patch + tiles.bk * bn * 2
        if tiles.resident * weights + tiles.stages * stage > SHARED_MEMORY:
            raise DoesNotFit(f"the chip's shared memory does not hold {tiles}")
        groups = s.n * (ho // g["GH"]) * (ho // g["GW"])
        blocks = ceil(groups, tiles.bm)
        rounds = ceil(blocks * (nt // bn), processors * tiles.per_sm)
        self.grid = (ceil(blocks, rounds), nt // bn)
        epilogue = ("", "sums", "behind norm").index(fused.epilogue)
        finish = ("unfolded", "folded", "apart").index(fused.finish)
        # a row of partial sums: one of each channel
        rows = self.grid[0] * nt // (co if finish == 0 else max(bn, co))
        self.part = torch.zeros(2 * rows * co if epilogue else 1, device=device)
        self.counter = torch.zeros(1, dtype=torch.int32, device=device)
        self.sizes = (groups, blocks, s.n * ho * ho)
        w_ci, w_co = (9 * s.ci, 1) if back else (1, 9 * s.ci)
        self.constants = dict(
            **g, HI=hi, WI=hi, CI=ci, CO=co, HG=ho // g["GH"], WG=ho // g["GW"], W_CI=w_ci, W_CO=w_co, W_TAP=s.ci,
            PROLOGUE=fused.prologue, EPILOGUE=epilogue, EPS=EPSILON, FINISH=finish,
            BM=tiles.bm, BN=bn, BK=tiles.bk, CHUNKS=chunks, RESIDENT=tiles.resident, STAGES=tiles.stages,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        self.apart = bool(epilogue) and finish == 2
        registers = 65_536 // (tiles.per_sm * tiles.warps * 32)
        if self.apart and tiles.resident and registers < 255:
            # sums take so many that fewer programs than planned would share a multiprocessor
            self.constants["maxnreg"] = registers
        self.rows = rows
        channels = 8  # a program: 32 bytes of a row
        self.table_grid = (co // channels,)
        self.table_constants = dict(
            CO=co, BC=channels, BR=min(_power(rows), 512), EPILOGUE=epilogue, EPS=EPSILON, num_warps=4
        )

    def launches(self, x, w, y, in_table=None, z=None, out_table=None, gamma=None, beta=None) -> list[Launch]:
        """x, y: input and output of this kernel; tables: of the batch norms before it (prologue) and after it."""
        # what is not there is not read either
        in_table, z, out_table, gamma, beta = (
            self.part if t is None else t for t in (in_table, z, out_table, gamma, beta)
        )
        tensors = (x, w, y, in_table, z, out_table, gamma, beta, self.part, self.counter)
        launches: list[Launch] = [(kernels.conv, self.grid, (*tensors, *self.sizes), self.constants)]
        if self.apart:
            arguments = (self.part, out_table, gamma, beta, self.rows, self.sizes[-1])
            launches.append((kernels.norm_table, self.table_grid, arguments, self.table_constants))
        return launches

    def __call__(self, *tensors) -> None:
        """Write y, and in `out_table` what the epilogue gives; tensors as in `launches`."""
        launch(self.launches(*tensors))


class WeightGradient:
    """`wgrad` of one shape: partial products over splits of the batch, then their sum, float32. Raises DoesNotFit."""

    def __init__(
        self,
        shape: Shape,
        tiles: Tiles,
        fused: Fused,
        processors: int,
        device: str | torch.device = "cuda",
    ) -> None:
        s, g = shape, _geometry("forward", shape.stride, shape.ci, tiles)
        nt, kt = g["GH"] * g["GW"] * s.co, g["QH"] * g["QW"] * s.ci
        bn = tiles.bn or nt
        if bn > nt or nt % bn or s.out % g["GH"] or s.out % g["GW"]:
            raise DoesNotFit(f"{tiles} for the weights' gradient of {shape}")
        groups = s.n * (s.out // g["GH"]) * (s.out // g["GW"])
        blocks, parts = ceil(groups, tiles.bm), (kt // tiles.bk, nt // bn)
        per = ceil(blocks, max(1, processors * tiles.per_sm // (parts[0] * parts[1])))
        splits = ceil(blocks, per)
        self.grid = (splits, *parts)
        self.part = torch.empty(splits * kt * nt, device=device)
        self.sizes = (groups, blocks, per)
        common = dict(CI=s.ci, CO=s.co, GH=g["GH"], GW=g["GW"], STRIDE=s.stride, QH=g["QH"], QW=g["QW"])
        self.constants = dict(
            **common, HI=s.size, WI=s.size, HG=s.out // g["GH"], WG=s.out // g["GW"], PROLOGUE=fused.prologue,
            BM=tiles.bm, BN=bn, BK=tiles.bk, STAGES=tiles.stages, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        elements = 9 * s.ci * s.co
        block = 32 if elements < 20_000 else 128
        self.sum_grid = (ceil(elements, block),)
        self.sum_constants = dict(**common, BS=64 if block == 32 else 32, BE=block, num_warps=4)

    def launches(self, x, dy, dw, in_table=None) -> list[Launch]:
        """x: the convolution's input; dy: the gradient of its output; in_table: of the batch norm before (prologue)."""
        arguments = (x, dy, self.part, self.part if in_table is None else in_table, *self.sizes)
        return [
            (kernels.weight_gradient, self.grid, arguments, self.constants),
            (kernels.weight_gradient_sum, self.sum_grid, (self.part, dw, self.grid[0]), self.sum_constants),
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
