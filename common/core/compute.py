"""Where and in which number format a step runs, and the capture of its pass in a CUDA graph.

On a GPU the forward and backward pass is captured once and replayed, since narrow networks wait for launches otherwise.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from common.settings import ExecutionSettings, SettingsError

M = TypeVar("M", bound=nn.Module)

_WARM_UP = 3
"""Passes before one is captured, in which libraries choose kernels and set up their work space."""


@dataclass(frozen=True)
class Compute:
    """Where and in which number format training runs.

    autocast: lower precision of convolutions and matrix products; batch norm and the loss stay in float32.
    captured: forward and backward passes are replayed from a CUDA graph, captured anew when a network shrinks.
    compiled: they go through torch.compile, anew whenever a network changes its shape.
    """

    device: torch.device
    autocast: torch.dtype | None = None
    channels_last: bool = False
    captured: bool = False
    compiled: bool = False

    @classmethod
    def choose(cls, device: str = "auto", precision: str = "auto", compilation: str = "auto") -> Compute:
        """What `auto` stands for on this machine, and the rest as it is asked for.

        `auto` precision is bfloat16 on a GPU that has it and on a CPU with matrix units for it (AMX), else float32.
        `auto` compilation is a captured graph on a GPU and nothing on a CPU, where torch.compile pays for long runs of
        some architectures only. Raises SettingsError when the device or the number format is not there.
        """
        cuda = torch.cuda.is_available()
        if device.startswith("cuda") and not cuda:
            raise SettingsError(
                f"execution.device = {device!r}: no CUDA device is available; use 'cpu' or 'auto'"
            )
        chosen = torch.device(("cuda" if cuda else "cpu") if device == "auto" else device)
        on_gpu = chosen.type == "cuda"
        if on_gpu and (chosen.index or 0) >= torch.cuda.device_count():
            known = ", ".join(f"'cuda:{i}'" for i in range(torch.cuda.device_count()))
            raise SettingsError(f"execution.device = {device!r}: no such device; there is {known}")
        if precision == "bfloat16" and on_gpu and not torch.cuda.is_bf16_supported():
            raise SettingsError(
                "execution.precision = 'bfloat16': this GPU or driver has none; use 'float32'"
            )
        if compilation == "capture" and not on_gpu:
            raise SettingsError(
                "execution.compilation = 'capture': a CPU has no graphs to capture; use 'auto', 'compile' or 'off'"
            )
        fast = torch.cuda.is_bf16_supported() if on_gpu else _has_amx()
        half = precision == "bfloat16" or (precision == "auto" and fast)
        return cls(
            chosen,
            torch.bfloat16 if half else None,
            channels_last=True,
            captured=compilation == "capture" or (compilation == "auto" and on_gpu),
            compiled=compilation == "compile",
        )

    def place(self, model: M) -> M:
        """`model` on the device, in the memory format of this choice."""
        placed = model.to(self.device)
        return placed.to(memory_format=torch.channels_last) if self.channels_last else placed

    def turn(self) -> AbstractContextManager[None]:
        """The context in which passes run: on a GPU, while no other thread captures a graph."""
        return TURNS.share() if self.device.type == "cuda" else nullcontext()

    def precision(self) -> torch.autocast:
        """The context in which forward passes run."""
        return torch.autocast(
            self.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None
        )


def _has_amx() -> bool:
    """Whether the processor multiplies matrices in bfloat16; False where torch is too old to tell."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities.get("amx_bf16", False)


def make_repeatable(execution: ExecutionSettings) -> None:
    """Have this process give the same numbers again, on as many threads as the settings say."""
    torch.set_num_threads(execution.threads)
    # weights that a penalty drives to zero pass through denormal numbers, which are slow
    torch.set_flush_denormal(True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not repeatable
    torch.use_deterministic_algorithms(execution.deterministic, warn_only=True)
    # its search tries kernels with gigabytes of work space, which runs that share a GPU do not have
    torch.backends.cudnn.benchmark = False
    # nothing here reads memory before writing it, and filling it costs up to a tenth of a small network's step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set on the module by torch


class Turns:
    """Threads that train on a GPU do so side by side; one that captures a graph waits for the others and is then alone.

    While a graph is captured the GPU's random generator is in a state in which no other thread can replay a graph or draw
    numbers, and what waits for the whole device, as libraries do that try out kernels, ends the capture.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = 0
        self._busy = False
        self._own = threading.local()

    @contextmanager
    def share(self) -> Iterator[None]:
        """Work beside other threads; also within `share` or `alone` of the same thread."""
        if getattr(self._own, "inside", False):
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)
            self._sharing += 1
        self._own.inside = True
        try:
            yield
        finally:
            self._own.inside = False
            with self._changed:
                self._sharing -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Work while no other thread does. Raises RuntimeError within `share`, where it would wait for itself."""
        if getattr(self._own, "inside", False):
            raise RuntimeError("a thread that shares a GPU cannot wait until nobody does")
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)
            self._busy = True
            self._changed.wait_for(lambda: not self._sharing)
        self._own.inside = True
        try:
            yield
        finally:
            self._own.inside = False
            with self._changed:
                self._busy = False
                self._changed.notify_all()


TURNS = Turns()
"""Whose turn it is on the GPUs of this process."""


class CaptureFailed(Exception):
    """A pass that CUDA cannot capture."""


def _capture_graph(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Capture `run` as a CUDA graph; returns its replay, and what `run` returned: tensors that a replay fills."""
    graph = torch.cuda.CUDAGraph()
    # the stream of this thread: torch has 32, which it hands out in turn, so that a further one may be another thread's
    own = torch.cuda.current_stream()
    if own == torch.cuda.default_stream():
        own = torch.cuda.Stream()
    with TURNS.alone(), torch.cuda.graph(graph, stream=own, capture_error_mode="thread_local"):
        outcome = run()

    def replay() -> None:
        with TURNS.share():
            graph.replay()

    return replay, outcome


def release_memory(device: torch.device) -> None:
    """Give memory that is kept for later back to a GPU; it must not happen while another thread captures."""
    if device.type == "cuda":
        with TURNS.alone():
            torch.cuda.empty_cache()


class Capture:
    """The forward and backward pass of one network, captured once and replayed for every batch of the same shape.

    What surrounds a pass (hooks, optimiser, sums) is not captured, so methods need not know of it. places: addresses of
    the parameters; a network whose parameters lie elsewhere needs another capture.
    """

    def __init__(self, model: nn.Module, places: list[int]):
        self.model, self.places = model, places
        self._passes = 0
        self._replay: Callable[[], None] | None = None

    def __call__(
        self, run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss and logits of a batch; they are overwritten by the next one.

        run: the pass, which leaves gradients in `.grad` and returns loss and logits. It is not kept: a trainer that held
        itself through it would keep its memory on the GPU after its end. Raises CaptureFailed.
        """
        if self._replay is None and self._passes >= _WARM_UP:
            self._start(run, images, labels)
        if self._replay is None or images.shape != self._images.shape:
            self._passes += 1
            return run(images, labels)
        self._images.copy_(images)
        self._labels.copy_(labels)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient  # another pass in between may have put its own there
        self._replay()
        return self._outcome

    def _start(
        self, run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], images: Tensor, labels: Tensor
    ) -> None:
        self._images, self._labels = images.clone(), labels.clone()
        try:
            self._replay, self._outcome = _capture_graph(lambda: run(self._images, self._labels))
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise CaptureFailed(f"the pass cannot be captured ({str(error).splitlines()[0]})") from None
        self._gradients = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU or the machine had no memory left for a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
