"""Kernels compiled ahead in processes of their own, so that a GPU does not wait: they fill Triton's cache."""

from __future__ import annotations

import os

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.convolutions.operations import Fused, build
from common.core.models.fused.tiles import Kind, Shape, Tiles


class Compiler:
    """Stands in for Triton's driver, so that compiling needs no GPU."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


def begin(capability: int) -> None:
    """In a process that only compiles. capability: 90 for an H100."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Compiler(capability))


def compile_one(processors: int, kind: Kind, shape: Shape, tiles: Tiles, fused: Fused) -> None:
    """Compile what this operation launches. Raises DoesNotFit."""
    half = torch.empty(1, dtype=torch.bfloat16, device="meta")
    full = torch.empty(1, device="meta")
    tensors: tuple[torch.Tensor | None, ...] = (half, half, half)
    if kind == "wgrad":
        tensors = (half, half, full)
    elif fused.epilogue == "sums":
        tensors += (None, full, full, full)
    elif fused.epilogue:
        tensors += (half, full)
    operation = build(kind, shape, tiles, fused, processors, "meta")
    for kernel, grid, arguments, constants in operation.launches(*tensors):
        types = [a.dtype if isinstance(a, torch.Tensor) else a for a in arguments]
        kernel.warmup(*types, grid=grid, **constants)
