"""Where and in which number format steps run, whose turn it is on a GPU, and the capture of work in a CUDA graph."""

from __future__ import annotations

import gc
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from common.core.models import fused
from common.core.models.network import BatchNorm2d, Conv2d
from common.settings import ExecutionSettings, SettingsError

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Compute:
    """Where and in which number format training runs.

    autocast: lower precision of convolutions and matrix products; batch norm and the loss stay in float32.
    captured: whole steps are replayed from CUDA graphs, captured anew when a network shrinks.
    compiled: they go through torch.compile, anew whenever a network changes its shape.
    fused: layers that fit go through the kernels of `common.core.models.fused`.
    """

    device: torch.device
    autocast: torch.dtype | None = None
    channels_last: bool = False
    captured: bool = False
    compiled: bool = False
    fused: bool = False

    @classmethod
    def choose(cls, device: str = "auto", precision: str = "auto", compilation: str = "auto") -> Compute:
        """What `auto` stands for on this machine, and the rest as it is asked for.

        `auto` precision is bfloat16 on a GPU that has it and on a CPU with matrix units for it (AMX), else float32.
        `auto` compilation is captured graphs on a GPU, `fused` ones where these were measured to be faster, and nothing on a
        CPU, where torch.compile pays for long runs of some architectures only; `compile` on a GPU is both, and `fused` is
        captured graphs with kernels of the suite's own, in bfloat16. Raises SettingsError when the device, the number format or
        what compiles these kernels is not there.
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
        if compilation in ("capture", "fused") and not on_gpu:
            raise SettingsError(
                f"execution.compilation = {compilation!r}: a CPU has no graphs to capture; use 'auto', 'compile' or 'off'"
            )
        fast = torch.cuda.is_bf16_supported() if on_gpu else _has_amx()
        half = precision == "bfloat16" or (precision == "auto" and fast)
        if compilation == "fused":
            _check_fused(chosen, half)
        faster = compilation == "auto" and on_gpu and half and _measured(chosen) and not fused.problem(chosen)
        return cls(
            chosen,
            torch.bfloat16 if half else None,
            channels_last=True,
            captured=on_gpu and compilation != "off",
            compiled=compilation == "compile",
            fused=compilation == "fused" or faster,
        )

    def place(self, model: M) -> M:
        """`model` on the device, in the memory format of this choice, with layers that go the way it says."""
        placed = model.to(self.device)
        for layer in placed.modules():
            if isinstance(layer, (Conv2d, BatchNorm2d)):
                layer.fused = self.fused
        return placed.to(memory_format=torch.channels_last) if self.channels_last else placed

    @property
    def planned(self) -> bool:
        """Whether steps read what differs between them from tables on the device, so that they can be captured."""
        return self.captured or self.device.type == "cuda"

    def wait(self) -> None:
        """Let other threads have their turn until the device has done what this one has launched."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(blocking=True)
            event.record()
            TURNS.wait(event.synchronize)

    def precision(self) -> AbstractContextManager[object]:
        """The context in which forward passes run."""
        if (
            self.autocast is None
        ):  # to enter one that does nothing takes as long as a layer of a small network
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)


def _check_fused(device: torch.device, half: bool) -> None:
    """Raise SettingsError where kernels of the suite's own are not for the number format, or cannot be compiled."""
    if not half:
        raise SettingsError(
            "execution.compilation = 'fused': its kernels are for bfloat16; use 'auto', or precision 'bfloat16'"
        )
    if reason := fused.problem(device):
        raise SettingsError(
            f"execution.compilation = 'fused': Triton compiles no kernels here ({reason}); use 'auto' or 'capture'"
        )


def _measured(device: torch.device) -> bool:
    """Whether kernels of the suite's own were measured on such a GPU: a Hopper."""
    return torch.cuda.get_device_capability(device)[0] == 9


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
    if execution.compilation == "compile":
        torch.use_deterministic_algorithms(execution.deterministic, warn_only=True)
    else:  # the same without loading torch's compiler, which takes a second and more
        torch.set_deterministic_debug_mode("warn" if execution.deterministic else "default")
    # its search tries kernels with gigabytes of work space, which runs that share a GPU do not have
    torch.backends.cudnn.benchmark = False
    # nothing here reads memory before writing it, and filling it costs up to a tenth of a small network's step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set on the module by torch


class Turns:
    """Threads that train on one GPU take turns: one at a time executes Python, and gives up its turn when it has launched work.

    What it launched goes on beside that of others, on its stream. So nobody waits for Python's lock, and while a thread
    captures a graph no other one replays a graph, draws numbers or lets a library try out kernels.
    """

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._busy = False
        self._own = threading.local()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Work in turns with others; within it, this thread has the turn except while it passes it on or waits."""
        self._take()
        self._own.inside = True
        try:
            yield
        finally:
            self._own.inside = False
            self._give()

    def pass_on(self) -> None:
        """Let all that wait for their turn have one first."""
        if getattr(self._own, "inside", False) and self._waiting:
            self.wait(lambda: None)

    def wait(self, until: Callable[[], object]) -> None:
        """Call what waits for something other than a turn, while others have theirs."""
        if not getattr(self._own, "inside", False):
            until()
            return
        self._give()
        try:
            until()
        finally:
            self._take()

    def _take(self) -> None:
        with self._changing:
            if not self._busy:
                self._busy = True
                return
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append(gate)
        gate.acquire()

    def _give(self) -> None:
        with self._changing:
            if self._waiting:
                self._waiting.popleft().release()  # its turn begins, so nobody comes between
            else:
                self._busy = False


TURNS = Turns()
"""Whose turn it is in this process."""


class CaptureFailed(Exception):
    """Steps that CUDA cannot capture."""


_REFUSED = list[str]()
"""Why a capture has failed in this process: torch's allocator still takes it for under way then, so none comes after it."""


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's collector, which may drop a graph: to destroy one ends a capture that is under way."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def capture_graph(run: Callable[[], None], pool: Any) -> Callable[[], None]:
    """Capture `run` as a CUDA graph, which computes nothing; returns its replay, which does not hold `run`.

    pool: the memory (`torch.cuda.graph_pool_handle`) that it shares with graphs that are replayed before or after it and
    never at once. Raises CaptureFailed.
    """
    if _REFUSED:
        raise CaptureFailed(_REFUSED[0])
    graph = torch.cuda.CUDAGraph()
    # the stream of this thread: torch has 32, which it hands out in turn, so that a further one may be another thread's
    own = torch.cuda.current_stream()
    if own == torch.cuda.default_stream():
        own = torch.cuda.Stream()
    try:
        # torch.cuda.graph would first wait for all that the device has to do, for other threads, too
        with torch.cuda.stream(own), _no_collection():
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        # the first error says which operation it was, the one of the capture's end only that there was one
        reason = str(error.__context__ or error).partition("\n")[0]
        _REFUSED.append(f"steps cannot be captured ({reason})")
        raise CaptureFailed(_REFUSED[0]) from None
    return graph.replay


def usable(device: torch.device) -> bool:
    """Whether a device still does what this process asks of it; after a fault of CUDA it does not."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def release_memory(device: torch.device) -> None:
    """Give memory that is kept for later back to a GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the machine had no memory left for a tensor; also where that ended a capture, which then says so."""
    here = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    return here or (error.__context__ is not None and out_of_memory(error.__context__))
