"""Whole training steps from tables on the device, which a GPU repeats from CUDA graphs without the host.

A step takes its batch, its learning rate and other numbers of its iteration from tables, at a place that a counter on the
device names. So every step is the same work: data, forward and backward pass, hooks, optimiser and sums are captured once,
several steps in a graph, and replayed. Eager steps from the same tables come first, stand in where a hook needs the host,
and are all there is where a hook cannot be captured or nothing is to be.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.core import compute
from common.core.compute import TURNS, CaptureFailed
from common.core.data import Tables
from common.core.hooks import NotCapturable, held

if TYPE_CHECKING:
    from common.core.trainer import Trainer

WARM_UP = 3
"""Eager steps before any is captured, in which libraries choose kernels and set up their work space."""
Step = Callable[["Trainer", int], None]
"""What is done with the next batch, which has so many images."""
MOST = 4
"""Steps of one graph, at most: more gain nothing on a GPU, and take longer to capture."""


class Steps:
    """The steps of one trainer on the tables of its batches."""

    def __init__(self, tables: Tables, device: torch.device):
        self.tables, per_epoch = tables, len(tables.batches)
        self.loss, self.correct = (torch.zeros((), device=device) for _ in range(2))
        """Sums over an epoch."""
        self.size = 0
        """Images of the batch that is trained on."""
        # iteration of the fit, and step of the epoch
        self._now = torch.zeros(2, dtype=torch.int64, device=device)
        self._rates = torch.zeros(per_epoch, device=device)
        self._rate = torch.zeros(1, device=device)
        self._scalar_rate = self._rate[0]
        full = sum(tables.size(step) == tables.size(0) for step in range(per_epoch))
        self._together = max(count for count in range(1, MOST + 1) if full % count == 0)
        self._numbers: dict[int, tuple[Sequence[float], Tensor]] = {}
        self._captures = True
        self._forget()

    def _forget(self) -> None:
        self._graphs: dict[tuple[int, int], Callable[[], None]] = {}
        self._held: list[Any] = []
        self._eager = Counter[int]()
        self._pool: Any = None

    def number(self, values: Sequence[float]) -> Tensor:
        """The entry of `values` for the iteration of the fit, a scalar; the sequence must not change."""
        if id(values) not in self._numbers:
            table = torch.tensor(values, dtype=torch.float32, device=self._now.device)
            self._numbers[id(values)] = values, table
        return self._numbers[id(values)][1].index_select(0, self._now[:1])[0]

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Images and labels of the step that comes next."""
        return self.tables.batch(self._now[1:], size)

    def run(self, trainer: Trainer, rates: Sequence[float]) -> None:
        """Train for one epoch, or its first len(rates) steps, at these learning rates. The sums begin at zero."""
        self.tables.fill(trainer.epochs_done)
        self._now.copy_(torch.tensor([trainer.iteration, 0]))
        self._rates[: len(rates)].copy_(torch.tensor(rates))
        self.loss.zero_()
        self.correct.zero_()
        self._take(trainer, len(rates), learns=True)
        for group in trainer.optimizer.param_groups:
            group["lr"] = rates[-1]
        if self._graphs:
            # they are in memory that graphs share, in which only a graph's own steps find them
            trainer.optimizer.zero_grad(set_to_none=True)

    def look(self, trainer: Trainer) -> None:
        """Pass forward over the batches of an epoch, in the mode that the network is in; nothing is learned."""
        self.tables.fill(trainer.epochs_done)
        self._now.zero_()
        learning = self._graphs, self._held, self._eager, self._pool
        self._forget()
        self._take(trainer, len(self.tables.batches), learns=False)
        trainer.compute.wait()  # until nothing needs the memory of its graphs
        self._graphs, self._held, self._eager, self._pool = learning

    def _take(self, trainer: Trainer, steps: int, learns: bool) -> None:
        step = self._step if learns else self._forward
        captures = self._captures and trainer.compute.captured and self._check(trainer)
        done = 0
        while done < steps:
            self.size = size = self.tables.size(done)
            apart = learns and _needs_host(trainer, trainer.iteration)
            if apart or not captures or not self._warm(size):
                count = 1
                if apart:
                    trainer.compute.wait()
                step(trainer, size)
                self._eager[size] += 1
                captures = captures and (not apart or self._check(trainer))
            else:
                count = self._in_a_row(trainer, done, steps, learns)
                captures = self._replay(trainer, count, size, step)
                count *= captures
            trainer.iteration += count * learns
            done += count
            TURNS.pass_on()

    def _warm(self, size: int) -> bool:
        return self._eager[size] > 0 and self._eager.total() >= WARM_UP

    def _in_a_row(self, trainer: Trainer, done: int, steps: int, learns: bool) -> int:
        """How many steps come next of which none needs the host, and as many as a graph has: all of one, or one."""
        whole = done + self._together <= steps and all(
            self.tables.size(done + i) == self.tables.size(0)
            and not (learns and _needs_host(trainer, trainer.iteration + i))
            for i in range(self._together)
        )
        return self._together if whole else 1

    def _step(self, trainer: Trainer, size: int) -> None:
        torch.index_select(self._rates, 0, self._now[1:], out=self._rate)
        for group in trainer.optimizer.param_groups:
            group["lr"] = self._scalar_rate
        trainer.learn(*self.batch(size))
        self._now += 1

    def _forward(self, trainer: Trainer, size: int) -> None:
        trainer.logits(self.batch(size)[0])
        self._now += 1

    def _replay(self, trainer: Trainer, count: int, size: int, step: Step) -> bool:
        """Replay so many steps; False, and nothing is done, if they cannot be captured."""
        if (count, size) not in self._graphs:

            def steps() -> None:
                for _ in range(count):
                    step(trainer, size)

            try:
                self._graphs[count, size] = self._captured(steps)
            except CaptureFailed as failure:
                self._forget()
                self._captures = False
                _tell(str(failure))
                return False
            self._held = _held(trainer)
        self._graphs[count, size]()
        return True

    def _captured(self, steps: Callable[[], None]) -> Callable[[], None]:
        try:
            return self._capture(steps)
        except RuntimeError as error:
            if not compute.out_of_memory(error):
                raise
        # what is kept for later cannot be had while a graph is captured
        compute.release_memory(self._now.device)
        return self._capture(steps)

    def _capture(self, steps: Callable[[], None]) -> Callable[[], None]:
        if not self._graphs and self._now.is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        return compute.capture_graph(steps, self._pool)

    def _check(self, trainer: Trainer) -> bool:
        """Whether steps can be captured; those that were and are no longer right are forgotten."""
        try:
            now = _held(trainer)
        except NotCapturable as reason:
            self._forget()
            _tell(str(reason))
            return False
        if now != self._held:
            if self._graphs:
                trainer.compute.wait()
            self._forget()  # and what the eager steps have set up: a new optimiser has no momentum to capture yet
            self._held = now
        return True

    def no_memory(self) -> None:
        """Give up the memory of all graphs."""
        self._forget()


_TOLD = set[str]()


def _tell(reason: str) -> None:
    """Say why steps are not captured, once in a process."""
    if reason not in _TOLD:
        _TOLD.add(reason)
        print(f"{reason}; training goes on without captured steps", file=sys.stderr)


def _needs_host(trainer: Trainer, iteration: int) -> bool:
    return any(hook.needs_host(iteration) for hook in trainer.hooks)


def _held(trainer: Trainer) -> list[Any]:
    """All by which captured steps are known to be right still: where tensors lie, and the values that they were made with.

    Raises NotCapturable.
    """
    model, optimizer = trainer.model, trainer.optimizer
    if not all(group.get("fused") or "capturable" in group for group in optimizer.param_groups):
        raise NotCapturable(f"{type(optimizer).__name__} takes steps that are not captured")
    groups = [
        {k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups
    ]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [value for p in parameters for value in optimizer.state.get(p, {}).values()]
    tensors = [*parameters, *moments, *model.parameters(), *model.buffers()]
    of_hooks = [value for hook in trainer.hooks for value in held(hook, trainer)]
    return [model, trainer.hooks, trainer.label_smoothing, groups, *map(_mark, [*tensors, *of_hooks])]


def _mark(value: Any) -> Any:
    return (value.data_ptr(), value.shape, value.stride()) if isinstance(value, Tensor) else value
