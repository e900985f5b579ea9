"""Which tiles compute a convolution of few channels, and what is launched for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["forward", "dgrad", "wgrad"]
"""A convolution's directions: forward, backward to the input, backward to the weights."""

SHARED_MEMORY = 225 * 1024  # bytes of a multiprocessor (H100), less a little
FUSION = {"enable_fp_fusion": True}
"""Of all kernels: a product and a sum are rounded once, as they were measured; Triton's default will be another."""


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


_SIXTEEN = Tiles((2, 2), 128, 0, 64, True, 2, 8, 1)
_THIRTY_TWO = Tiles((1, 2), 64, 0, 128, True, 2, 4, 1)

# (inputs, outputs, stride): largest height = width, and tiles; images, padded to four channels, are handed no gradient
_MEASURED: dict[tuple[int, int, int], tuple[int, dict[Kind, Tiles]]] = {
    (4, 16, 1): (
        32,
        {
            "forward": Tiles((2, 2), 128, 0, 16, True, 2, 8, 1),
            "wgrad": Tiles((1, 2), 128, 0, 16, per_sm=3, stages=3),
        },
    ),
    (16, 16, 1): (
        32,
        {
            "forward": _SIXTEEN,
            "dgrad": _SIXTEEN,
            "wgrad": Tiles((1, 2), 64, 0, 64, per_sm=2, stages=4),
        },
    ),
    (16, 32, 2): (
        32,
        {
            "forward": Tiles((1, 1), 64, 0, 64, True, 4, 4, 1),
            "dgrad": Tiles((2, 2), 64, 64, 64, False, 8, 4, 2),
            "wgrad": Tiles((1, 1), 64, 0, 64, per_sm=1, stages=5),
        },
    ),
    (32, 32, 1): (
        16,
        {
            "forward": _THIRTY_TWO,
            "dgrad": _THIRTY_TWO,
            "wgrad": Tiles((1, 2), 64, 0, 128, per_sm=1, warps=8, stages=4),
        },
    ),
    (32, 64, 2): (
        16,
        {
            "forward": Tiles((1, 1), 64, 0, 32, False, 8, 4, 5),
            "dgrad": Tiles((2, 2), 64, 64, 128, False, 8, 4, 2),
            "wgrad": Tiles((1, 1), 64, 0, 64, per_sm=2, stages=4),
        },
    ),
    (64, 64, 1): (
        8,
        {
            "forward": Tiles((1, 1), 64, 0, 64, False, 8, 4, 4),
            "dgrad": Tiles((1, 1), 64, 0, 128, False, 8, 4, 3),
            "wgrad": Tiles((1, 1), 64, 0, 64, per_sm=2, stages=4),
        },
    ),
}


def measured(ci: int, co: int, stride: int, size: int, back: bool) -> bool:
    """Whether a convolution of these channels on a map of this height = width was measured, or on a larger one.

    back: also backward to the input.
    """
    limit, tiles = _MEASURED.get((ci, co, stride), (0, {}))
    return 0 < size <= limit and size % 4 == 0 and ("dgrad" in tiles or not back)


def fastest(kind: Kind, shape: Shape) -> Tiles:
    """The tiles that were fastest on an H100 at batch 128 (reports/benchmark-gpu/convolutions.json). Raises KeyError."""
    return _MEASURED[shape.ci, shape.co, shape.stride][1][kind]


def ceil(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power(a: int) -> int:
    """The least power of two that is not below a."""
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
            qw = power(qw)
        taps = dict(A0=2, A1=-1, A2=1) if kind == "dgrad" else dict(A0=0, A1=1, A2=-stride)
        found = dict(STEP_H=gh * stride, STEP_W=gw * stride, OFF=-1, **taps)
    if qw * ci % tiles.bk:
        raise DoesNotFit(f"steps of {tiles.bk} must divide a row of a patch")
    return dict(GH=gh, GW=gw, QH=qh, QW=qw, **found)


class Product:
    """How `forward` or `dgrad` of one shape is launched with given tiles.

    processors: multiprocessors of the chip. grid; sizes: the kernel's GROUPS and TILES; constants: the rest of what it
    takes behind the tensors. Raises DoesNotFit.
    """

    def __init__(self, kind: Kind, shape: Shape, tiles: Tiles, processors: int) -> None:
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
        self.sizes = (groups, blocks)
        w_ci, w_co = (9 * s.ci, 1) if back else (1, 9 * s.ci)
        self.constants: dict[str, Any] = dict(
            **g, HI=hi, WI=hi, CI=ci, CO=co, HG=ho // g["GH"], WG=ho // g["GW"], W_CI=w_ci, W_CO=w_co, W_TAP=s.ci,
            BM=tiles.bm, BN=bn, BK=tiles.bk, CHUNKS=chunks, RESIDENT=tiles.resident, STAGES=tiles.stages,
            num_warps=tiles.warps, num_stages=tiles.stages, **FUSION,
        )  # fmt: skip


class WeightGradient:
    """How `wgrad` of one shape is launched with given tiles: partial products over splits of the batch, then their sum.

    processors: multiprocessors of the chip. grid, sizes, constants: of the first kernel; parts: numbers that it leaves for
    the second one, in float32; sum_grid, splits, sum_constants: of the second. Raises DoesNotFit.
    """

    def __init__(self, shape: Shape, tiles: Tiles, processors: int) -> None:
        s, g = shape, _geometry("forward", shape.stride, shape.ci, tiles)
        nt, kt = g["GH"] * g["GW"] * s.co, g["QH"] * g["QW"] * s.ci
        bn = tiles.bn or nt
        if bn > nt or nt % bn or s.out % g["GH"] or s.out % g["GW"]:
            raise DoesNotFit(f"{tiles} for the weights' gradient of {shape}")
        groups = s.n * (s.out // g["GH"]) * (s.out // g["GW"])
        blocks, parts = ceil(groups, tiles.bm), (kt // tiles.bk, nt // bn)
        per = ceil(blocks, max(1, processors * tiles.per_sm // (parts[0] * parts[1])))
        self.splits = ceil(blocks, per)
        self.grid = (self.splits, *parts)
        self.parts = self.splits * kt * nt
        self.sizes = (groups, blocks, per)
        common = dict(CI=s.ci, CO=s.co, GH=g["GH"], GW=g["GW"], STRIDE=s.stride, QH=g["QH"], QW=g["QW"])
        self.constants: dict[str, Any] = dict(
            **common, HI=s.size, WI=s.size, HG=s.out // g["GH"], WG=s.out // g["GW"],
            BM=tiles.bm, BN=bn, BK=tiles.bk, STAGES=tiles.stages, num_warps=tiles.warps, num_stages=tiles.stages, **FUSION,
        )  # fmt: skip
        elements = 9 * s.ci * s.co
        block = 32 if elements < 20_000 else 128
        self.sum_grid = (ceil(elements, block),)
        self.sum_constants: dict[str, Any] = dict(
            **common, BS=64 if block == 32 else 32, BE=block, num_warps=4, **FUSION
        )
