"""Microseconds of cuDNN's convolutions and of those in Triton, in a given time.

Every case stands alone: one that fails loses itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.convolutions.clock import Call, Clock
from benchmarks.convolutions.estimate import estimates
from benchmarks.convolutions.operations import (
    EPSILON,
    MEAN,
    PLAIN,
    RSTD,
    SCALE,
    SHIFT,
    TABLE_ROWS,
    Conv,
    Fused,
    WeightGradient,
    build,
    candidates,
    launch,
    normalise,
    through_norm,
)
from common.core.models.fused.norms import Norm
from common.core.models.fused.tiles import DoesNotFit, Kind, Shape, Tiles

COPIES = 8
# ResNet's at batch 128; the first layer's 3 channels are padded to 4 for Triton
SHAPES = [
    Shape(128, 32, 16, 16),
    Shape(128, 16, 32, 32),
    Shape(128, 8, 64, 64),
    Shape(128, 32, 16, 32, 2),
    Shape(128, 16, 32, 64, 2),
    Shape(128, 32, 4, 16),
]
KINDS: tuple[Kind, ...] = ("forward", "dgrad", "wgrad")
LIMITS = {
    "forward": 1e-2,
    "dgrad": 1e-2,
    "wgrad": 2e-3,
}  # of the largest error, relative to the largest value


def cases(shapes: Sequence[Shape]) -> list[tuple[Kind, Shape]]:
    """What a network needs: the first layer has no gradient to pass on."""
    return [(kind, shape) for shape in shapes for kind in KINDS if not (kind == "dgrad" and shape.ci == 4)]


def variants(kind: Kind) -> list[Fused]:
    """Batch norm's work to measure in one kernel with the convolution."""
    if kind == "wgrad":
        return []
    epilogue = "behind norm" if kind == "dgrad" else "sums"
    return [Fused(epilogue, finish) for finish in ("apart", "folded", "unfolded")]


def images(t: torch.Tensor) -> torch.Tensor:
    """torch's [N, C, H, W] view of an NHWC tensor."""
    return t.permute(0, 3, 1, 2)


def torch_call(kind: Kind, shape: Shape, x, gy, w) -> Call:
    """torch's own convolution of views as `images` gives them."""
    geometry = [shape.stride] * 2, [1, 1], [1, 1], False, [0, 0], 1
    if kind == "forward":
        return lambda: torch.ops.aten.convolution(x, w, None, *geometry)
    mask = [kind == "dgrad", kind == "wgrad", False]
    return lambda: torch.ops.aten.convolution_backward(gy, x, w, None, *geometry, mask)[kind == "wgrad"]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return round(((got.float() - want).abs().max() / want.abs().max()).item(), 6)


class Tensors:
    """8 sets of one convolution's tensors, NHWC."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype):
        s, self.shape = shape, shape

        def normal(*size: int) -> list[torch.Tensor]:
            return [torch.randn(size, device=device).to(dtype) for _ in range(COPIES)]

        def tables(channels: int) -> list[torch.Tensor]:
            return [torch.rand(TABLE_ROWS, channels, device=device) + 0.5 for _ in range(COPIES)]

        self.x, self.gy = normal(s.n, s.size, s.size, s.ci), normal(s.n, s.out, s.out, s.co)
        self.w = [t * (2 / (9 * s.ci)) ** 0.5 for t in normal(s.co, 3, 3, s.ci)]
        self.y, self.gx = [torch.empty_like(t) for t in self.gy], [torch.empty_like(t) for t in self.x]
        self.dw = [torch.empty(s.co, 3, 3, s.ci, device=device) for _ in range(COPIES)]
        self.gamma, self.beta = torch.ones(s.co, device=device), torch.zeros(s.co, device=device)
        self.before, self.after = tables(s.ci), tables(s.co)

    def calls(self, kind: Kind, operations: Sequence[Conv | WeightGradient], fused: Fused) -> list[Call]:
        """One launch for each set."""

        def arguments(i: int) -> tuple[Any, ...]:
            if kind == "wgrad":
                return (self.x[i], self.gy[i], self.dw[i])
            if kind == "dgrad":
                behind = (self.x[i], self.before[i]) if fused.epilogue else ()
                return (self.gy[i], self.w[i], self.gx[i], *behind)
            after = (None, self.after[i], self.gamma, self.beta) if fused.epilogue else ()
            return (self.x[i], self.w[i], self.y[i], *after)

        return [partial(operation, *arguments(i)) for i, operation in enumerate(operations)]

    def result(self, kind: Kind) -> torch.Tensor:
        """What the first call wrote."""
        return {"forward": self.y, "dgrad": self.gx, "wgrad": self.dw}[kind][0]

    def wanted(self, kind: Kind, fused: Fused) -> torch.Tensor:
        """What the first call must write, in float32 from the same numbers."""
        x, gy, w = (images(t[0]).float().contiguous() for t in (self.x, self.gy, self.w))
        result = torch_call(kind, self.shape, x, gy, w)()
        if fused.epilogue == "behind norm":
            scale, shift = (self.before[0][row][None, :, None, None] for row in (SCALE, SHIFT))
            normed = x * scale + shift
            result = torch.where(normed > 0, result, 0.0)
        return result.permute(0, 2, 3, 1)

    def bytes(self, kind: Kind, fused: Fused) -> int:
        """That must be moved: activations read and written once (weights are small)."""
        x, y = (t[0].numel() * t[0].element_size() for t in (self.x, self.y))
        return x + y + (x if fused.epilogue == "behind norm" else 0)


class Kit:
    """One measurement: what it finds is in `found` and, after every case, in the file.

    submit: starts to compile build's first four arguments elsewhere; None where nothing is to be compiled before.
    budget: seconds in all, from now.
    """

    def __init__(
        self,
        out: Path,
        budget: float,
        processors: int,
        clock: Clock,
        submit: Callable[..., Future] | None = None,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
    ):
        self.out, self.budget, self.processors, self.clock, self.submit = (
            out,
            budget,
            processors,
            clock,
            submit,
        )
        self.device, self.dtype = device, dtype
        self.begun = time.perf_counter()
        self.found: dict[str, Any] = {"cases": [], "tuning": [], "errors": []}
        self.compiling: dict[tuple, list[Future]] = {}
        self.bytes_a_microsecond = 1.0

    def left(self) -> float:
        """Seconds."""
        return self.budget - (time.perf_counter() - self.begun)

    def all(self, shapes: Sequence[Shape]) -> dict[str, Any]:
        """Everything, most important first; returns `found`."""
        wanted = cases(shapes)
        for kind, shape in wanted:
            self._compile(kind, shape, PLAIN, candidates(kind, shape))
        self._guarded("copies", self._copies)
        for kind, shape in wanted:
            self._guarded(f"cudnn {kind} {shape}", self._cudnn, kind, shape)
        for shape in shapes:
            if shape.ci == shape.co:
                self._guarded(f"passes {shape}", self._passes, shape)
        best = {case: self._guarded(f"{case[0]} {case[1]}", self._tune, *case) for case in wanted}
        for (kind, shape), tiles in best.items():
            for fused in variants(kind) if tiles else []:
                self._guarded(f"{kind} {shape} {fused}", self._variant, kind, shape, fused, tiles)
        self.found["estimates"] = estimates(self.found["cases"])
        self._write()
        return self.found

    def _write(self) -> None:
        rest = {name: value for name, value in self.found.items() if not isinstance(value, list)}
        rest["seconds"] = round(time.perf_counter() - self.begun, 1)
        lists = {name: value for name, value in self.found.items() if isinstance(value, list)}
        rows = [
            f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, value)) + "\n]"
            for name, value in lists.items()
        ]
        values = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in rest.items()]
        self.out.write_text("{\n" + ",\n".join(values + rows) + "\n}\n")

    def _guarded(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            if self.left() < 3:
                raise TimeoutError("no time left")
            return function(*arguments)
        except Exception as problem:  # one failure loses only itself
            self._failed(name, problem)
            return None
        finally:
            self._write()

    def _failed(self, name: str, problem: BaseException) -> None:
        self.found["errors"].append(f"{name}: {type(problem).__name__}: {str(problem)[:300]}")
        print("failed:", self.found["errors"][-1], flush=True)

    def _compile(self, kind: Kind, shape: Shape, fused: Fused, tiles: Sequence[Tiles]) -> None:
        if self.submit is None:
            return
        try:
            self.compiling[kind, shape, fused] = [self.submit(kind, shape, t, fused) for t in tiles]
        except BrokenExecutor as problem:  # the first launch compiles then
            self.submit = None
            self._failed("compiling ahead", problem)

    def _compiled(self, kind: Kind, shape: Shape, fused: Fused) -> None:
        """Wait; what could not be compiled elsewhere fails, or is compiled, at its first launch."""
        for future in self.compiling.pop((kind, shape, fused), []):
            future.exception(timeout=max(1.0, self.left()))

    def _calls(self, tensors: Tensors, kind: Kind, tiles: Tiles, fused: Fused) -> list[Call]:
        shape = tensors.shape
        operations = [build(kind, shape, tiles, fused, self.processors, self.device) for _ in range(COPIES)]
        return tensors.calls(kind, operations, fused)

    def _copies(self) -> None:
        def rate(megabytes: int) -> float:
            a = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=self.device)
            b = torch.empty_like(a)
            return 2 * a.numel() / self.clock.cycled([lambda: b.copy_(a)])

        self.bytes_a_microsecond = rate(1024 if self.device == "cuda" else 1)
        one = torch.zeros(1, device=self.device)
        self.found |= {
            "device": torch.cuda.get_device_name() if self.device == "cuda" else self.device,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cudnn": torch.backends.cudnn.version(),
            "copy_tb_s": round(self.bytes_a_microsecond / 1e6, 3),
            "copy_of_4_mb_tb_s": round(rate(4) / 1e6, 3),
            "empty_kernel_us": self.clock.cycled([one.zero_]),
        }

    def _row(
        self, by: str, kind: str, tensors: Tensors, moved: int, calls: Sequence[Call], **more: Any
    ) -> None:
        clock = self.clock
        times = {name: getattr(clock, name)(calls) for name in ("hot", "cycled", "together")}
        floor = round(moved / self.bytes_a_microsecond, 2)
        row = {"case": str(tensors.shape), "kind": kind, "by": by, "floor_us": floor, **times, **more}
        self.found["cases"].append(row)
        print(*(f"{name} {value}" for name, value in row.items()), sep="  ", flush=True)

    def _tensors(self, shape: Shape) -> Tensors:
        return Tensors(shape, self.device, self.dtype)

    def _cudnn(self, kind: Kind, shape: Shape) -> None:
        t = self._tensors(Shape(shape.n, shape.size, 3, shape.co) if shape.ci == 4 else shape)
        calls = [torch_call(kind, shape, *map(images, sets)) for sets in zip(t.x, t.gy, t.w)]
        wrong = error(calls[0]().permute(0, 2, 3, 1), t.wanted(kind, PLAIN))
        self._row("cudnn", kind, t, t.bytes(kind, PLAIN), calls, error=wrong)

    def _tune(self, kind: Kind, shape: Shape) -> list[Tiles]:
        """The plain kernel with each candidate; the three fastest are compiled with batch norm's work."""
        self._compiled(kind, shape, PLAIN)
        t, found = self._tensors(shape), []
        want = t.wanted(kind, PLAIN)
        for tiles in candidates(kind, shape):
            try:
                calls = self._calls(t, kind, tiles, PLAIN)
                calls[0]()
                wrong = error(t.result(kind), want)
                if not wrong < LIMITS[kind]:
                    raise ArithmeticError(f"relative error {wrong}")
                found.append((self.clock.cycled(calls, 5), wrong, tiles))
            except DoesNotFit:
                continue
            except Exception as problem:
                self._failed(f"{kind} {shape} {tiles}", problem)
        found.sort(key=lambda candidate: candidate[0])
        self.found["tuning"].append([kind, str(shape), [[us, _words(tiles)] for us, _, tiles in found]])
        best = [tiles for _, _, tiles in found[:3]]
        for fused in variants(kind):
            self._compile(kind, shape, fused, best)
        _, wrong, tiles = found[0]
        more: dict[str, Any] = {"fused": str(PLAIN), "error": wrong, "tiles": _words(tiles)}
        if kind == "wgrad":
            operations = [
                build(kind, shape, tiles, PLAIN, self.processors, self.device) for _ in range(COPIES)
            ]
            parts = [op.launches(*sets)[:1] for op, *sets in zip(operations, t.x, t.gy, t.dw)]
            more["without_sum"] = self.clock.cycled([partial(launch, part) for part in parts])
        self._row("triton", kind, t, t.bytes(kind, PLAIN), self._calls(t, kind, tiles, PLAIN), **more)
        return best

    def _variant(self, kind: Kind, shape: Shape, fused: Fused, best: Sequence[Tiles]) -> None:
        self._compiled(kind, shape, fused)
        t, found = self._tensors(shape), []
        want = t.wanted(kind, fused)
        for tiles in best:
            calls = self._calls(t, kind, tiles, fused)
            found.append((self.clock.cycled(calls, 5), tiles, calls))
        _, tiles, calls = min(found, key=lambda candidate: candidate[0])
        calls[0]()
        got = t.result(kind).float()
        # at a ReLU's edge one rounding flips a whole value: the root mean square says whether that is all
        more = {"error": error(got, want), "rms": round(((got - want).norm() / want.norm()).item(), 6)}
        if fused.epilogue == "sums":
            more["error_mean"] = error(t.after[0][MEAN], want.mean((0, 1, 2)))
            deviation = (want.var((0, 1, 2), correction=0) + EPSILON).sqrt()
            more["error_rstd"] = error(t.after[0][RSTD], 1 / deviation)
        self._row(
            "triton", kind, t, t.bytes(kind, fused), calls, fused=str(fused), **more, tiles=_words(tiles)
        )

    def _passes(self, shape: Shape) -> None:
        """Batch norm's own passes: torch's kernels, those of training, and those behind sums in a convolution's kernel."""
        t, one = self._tensors(shape), torch.ones(shape.co, device=self.device)
        zero = torch.zeros_like(one)
        running = torch.zeros_like(one), torch.ones_like(one)

        def forward(i: int) -> torch.Tensor:
            x = images(t.gy[i])
            return torch.relu(torch.ops.aten.native_batch_norm(x, one, one, *running, True, 0.1, EPSILON)[0])

        def backward(i: int) -> Any:
            y = images(t.y[i])
            g = torch.ops.aten.threshold_backward(images(t.gy[i]), y, 0)
            more = (zero, one, True, EPSILON, [True, True, True])
            return torch.ops.aten.native_batch_norm_backward(g, y, one, *running, *more)

        def ours(i: int, shortcut: torch.Tensor | None = None, back: bool = False) -> Any:
            x = images(t.gy[i]).detach().requires_grad_()
            y = Norm.apply(x, one, zero, shortcut, running, 0.1, EPSILON, True, True)
            return torch.autograd.grad(y, x, images(t.y[i])) if back else y

        passes: dict[tuple[str, str], tuple[int, Callable[[int], Any]]] = {
            ("torch", "batch norm, ReLU, forward"): (2, forward),
            ("torch", "batch norm, ReLU, backward"): (3, backward),
            ("training", "batch norm, ReLU, forward"): (2, ours),
            ("training", "batch norm, addition, ReLU, forward"): (3, lambda i: ours(i, images(t.x[i]))),
            ("training", "batch norm, ReLU, forward and backward"): (5, lambda i: ours(i, back=True)),
            ("triton", "through norm"): (3, lambda i: through_norm(t.gy[i], t.x[i], t.y[i], t.after[i])),
            ("triton", "normalise"): (2, lambda i: normalise(t.x[i], None, t.y[i], t.after[i])),
            ("triton", "normalise, add"): (3, lambda i: normalise(t.x[i], t.gy[i], t.y[i], t.after[i])),
        }
        for (by, name), (tensors, function) in passes.items():
            calls = [partial(function, i) for i in range(COPIES)]
            self._row(by, name, t, tensors * t.bytes("forward", PLAIN) // 2, calls)


def _words(tiles: Tiles) -> str:
    return (
        " ".join(f"{name}={value}" for name, value in asdict(tiles).items()).replace("(", "").replace(")", "")
    )
