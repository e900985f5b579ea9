"""The one loop in which every network of the suite is trained.

A method takes part through `Hooks`. Learning rates are given as one number per iteration. The loop never waits for
the device inside an epoch; sums of loss and accuracy are read once at its end. On a GPU whole steps are captured.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.dropout import _DropoutNd

from common.core.compute import TURNS, Compute, out_of_memory, release_memory
from common.core.data import Batches
from common.core.failures import Diverged, OutOfMemory, Unreachable
from common.core.hooks import Hooks as Hooks
from common.core.identity import GLOBAL_GENERATOR, stream
from common.core.models.network import weights_in_place
from common.core.sgd import SGD
from common.core.steps import Steps

Decays = Callable[[str, nn.Parameter], bool]
"""Whether a parameter, given with its name, gets weight decay."""


class BatchSource(Protocol):
    """What the trainer needs to know of its data."""

    def __len__(self) -> int: ...

    def epoch(self, number: int) -> Iterable[tuple[Tensor, Tensor]]: ...


class Checkpoints(Protocol):
    """Where a fit keeps its state, so that an interrupted run need not begin again."""

    def load(self, fit: int) -> dict[str, Any] | None: ...

    def offer(self, fit: int, state: Callable[[], dict[str, Any]], finished: bool) -> None: ...


def gradients_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Their gradients. Raises ValueError where one has none."""
    found = []
    for tensor in tensors:
        if tensor.grad is None:
            raise ValueError(f"a tensor of {tuple(tensor.shape)} has no gradient")
        found.append(tensor.grad)
    return found


def decay_groups(model: nn.Module, decays: Decays | None) -> list[dict[str, Any]]:
    """The trainable parameters as groups for an optimiser: those that decay, then the others; none that is empty."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if decays is None or decays(n, p)]},
        {"params": [p for n, p in named if decays is not None and not decays(n, p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Trainer:
    """Trains one model on one source of batches.

    momentum, nesterov, weight_decay: of SGD (Sutskever form as in torch). decays(name, parameter) tells which
    parameters get weight decay (default: all). `optimizer` replaces the SGD altogether. `history` has one row per
    epoch over all fits; `epochs_done` counts them, and numbers the epochs of the batches. `rates` are the learning rates
    of the epoch, one an iteration.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: BatchSource,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decays: Decays | None = None,
        label_smoothing: float = 0.0,
        hooks: Hooks | Sequence[Hooks] = (),
        optimizer: torch.optim.Optimizer | None = None,
        validation: BatchSource | None = None,
        seed: int = 0,
        compute: Compute | None = None,
        checkpoints: Checkpoints | None = None,
    ):
        self.compute = compute or Compute(next(model.parameters()).device)
        self.model = self.compute.place(model)
        self.batches, self.validation = batches, validation
        self.hooks: tuple[Hooks, ...] = (hooks,) if isinstance(hooks, Hooks) else tuple(hooks)
        self.label_smoothing, self.seed = label_smoothing, seed
        self.optimizer = optimizer or self._sgd(momentum, nesterov, weight_decay, decays)
        self.history: list[dict[str, Any]] = []
        self.epochs_done = 0
        self.iteration = 0
        self._checkpoints = checkpoints
        self._compiled: tuple[nn.Module, Callable[[Tensor], Tensor]] | None = None
        self.rates: Sequence[float] = ()
        self._steps: Steps | None = None
        self._in_steps = False
        self._fits = 0
        self._draws = any(isinstance(module, _DropoutNd) and module.p for module in model.modules())

    def _sgd(self, momentum: float, nesterov: bool, weight_decay: float, decays: Decays | None) -> SGD:
        groups = decay_groups(self.model, decays)
        groups += [group for hook in self.hooks for group in hook.parameter_groups()]
        return SGD(
            groups, lr=0.0, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=True
        )

    @property
    def device(self) -> torch.device:
        """Where the network is trained."""
        return self.compute.device

    @property
    def planned(self) -> bool:
        """Whether steps are taken from tables on the device, as they are on a GPU where nothing speaks against it."""
        return self._planned() is not None

    def go_on_from(
        self,
        epochs: int,
        history: Iterable[Mapping[str, Any]] = (),
        *,
        model: Mapping[str, Any] | None = None,
        optimizer: dict[str, Any] | None = None,
    ) -> None:
        """Go on where another training stood after `epochs` epochs: data and curves continue as if it were this one.

        history: its rows so far. model, optimizer: its state dicts, where they are to be taken up.
        """
        if model is not None:
            self.model.load_state_dict(model)
        if optimizer is not None:
            self.optimizer.load_state_dict(optimizer)
        self.epochs_done, self.history = epochs, [dict(row) for row in history]

    def fresh_optimizer(self, **options: float) -> None:
        """Start the optimiser anew: it forgets all momentum, and gets `options` for all its parameters."""
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            group |= options

    def add_hook(self, hook: Hooks) -> None:
        """From the next fit on, `hook` takes part too, after those already there."""
        self.hooks += (hook,)
        for group in hook.parameter_groups():
            self.optimizer.add_param_group(group)

    def fit(self, learning_rates: Sequence[float], phase: str = "train") -> None:
        """Train for len(learning_rates) iterations, one learning rate each; `phase` labels the rows of the history.

        Raises Diverged at the end of an epoch whose loss is not finite, ValueError when the iterations are not whole
        epochs.
        """
        per_epoch = len(self.batches)
        epochs, rest = divmod(len(learning_rates), per_epoch)
        if rest:
            raise ValueError(
                f"{len(learning_rates)} learning rates are not whole epochs of {per_epoch} iterations"
            )
        fit, self._fits, first = self._fits, self._fits + 1, 0
        if self._checkpoints and (saved := self._checkpoints.load(fit)):
            first = self._restore(saved)
        for epoch in range(first, epochs):
            self.iteration = epoch * per_epoch
            for hook in self.hooks:
                hook.epoch_started(self, epoch)
            self.rates = learning_rates[self.iteration : self.iteration + per_epoch]
            row = self._epoch(self.rates)
            for hook in self.hooks:
                hook.epoch_ended(self, epoch)
            if self.validation is not None:
                scores = self.evaluate()
                row |= {"validation_accuracy": scores["accuracy"], "validation_loss": scores["loss"]}
            self.history.append({"phase": phase, "epoch": self.epochs_done, **row})
            self.epochs_done += 1
            if self._checkpoints:
                self._checkpoints.offer(fit, lambda: self._snapshot(epoch + 1), epoch + 1 == epochs)

    def _epoch(self, learning_rates: Sequence[float]) -> dict[str, float]:
        with GLOBAL_GENERATOR if self._draws else nullcontext():
            if self._draws:
                # dropout draws from the global generator: seeding it per epoch makes an epoch repeatable by itself, as long
                # as no other thread has its turn before the end
                torch.manual_seed(stream(self.seed, "dropout", self.epochs_done))
            self.model.train()
            steps = self._planned()
            count = self._planned_epoch(steps, learning_rates) if steps else self._eager(learning_rates)
        self.compute.wait()
        mean = self._loss.item() / count
        if not math.isfinite(mean):
            raise Diverged(f"the training loss is {mean} in epoch {self.epochs_done + 1}")
        return {
            "lr": learning_rates[-1],
            "train_loss": mean,
            "train_accuracy": self._correct.item() / count,
        }

    def _planned_epoch(self, steps: Steps, learning_rates: Sequence[float]) -> int:
        """Train by steps from tables; returns the number of images."""
        self._loss, self._correct, self._in_steps = steps.loss, steps.correct, True
        try:
            steps.run(self, learning_rates)
        except (RuntimeError, ValueError) as error:
            steps.no_memory()
            self._explain(error, lambda: steps.batch(steps.size))
            raise
        finally:
            self._in_steps = False
        return sum(steps.tables.size(step) for step in range(len(learning_rates)))

    def _planned(self) -> Steps | None:
        """The steps that are taken from tables on the device, where that is done and can be."""
        if not self.compute.planned or self._draws or not isinstance(self.batches, Batches):
            return None
        if self._steps is None or self._steps.tables.batches is not self.batches:
            tables = self.batches.tables()
            self._steps = Steps(tables, self.compute.device) if tables else None
        for group in self.optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True
        return self._steps

    def _eager(self, learning_rates: Sequence[float]) -> int:
        """Train step by step; returns the number of images."""
        device, count = self.compute.device, 0
        self._loss, self._correct = torch.zeros((), device=device), torch.zeros((), device=device)
        for rate, (images, labels) in zip(learning_rates, self.batches.epoch(self.epochs_done), strict=True):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            try:
                self.learn(images, labels)
            except (RuntimeError, ValueError) as error:
                self._explain(error, lambda: (images, labels))
                raise
            count += len(labels)
            self.iteration += 1
            if not self._draws:
                TURNS.pass_on()
        return count

    def learn(self, images: Tensor, labels: Tensor) -> None:
        """One step on a batch, with all that hooks do in it; its loss and correct answers join the sums of the epoch."""
        loss, logits = self._pass(images, labels, self.effective())
        for hook in self.hooks:
            hook.gradients_ready(self)
        self.optimizer.step()
        for hook in self.hooks:
            hook.stepped(self)
        self._loss += loss * len(labels)
        self._correct += (logits.argmax(1) == labels).sum()

    def at_iteration(self, values: Sequence[float]) -> float | Tensor:
        """The entry of `values`, which must not change, for this iteration of the fit.

        A scalar on the device where steps may be captured, in float32.
        """
        if self._steps and self._in_steps:
            return self._steps.number(values)
        return values[self.iteration]

    def _explain(self, error: RuntimeError | ValueError, batch: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Raise OutOfMemory or Unreachable if a step on a batch ended for want of memory, or since it is a single image."""
        if out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # they hold what the pass has computed
            raise OutOfMemory(self._what_fits(*batch())) from None
        if isinstance(error, ValueError) and len(batch()[1]) == 1:
            raise Unreachable(
                f"one of the {len(self.batches)} batches has a single image, on which this network cannot be trained "
                f"({error}): another batch_size leaves none"
            ) from None

    def _pass(self, images: Tensor, labels: Tensor, effective: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Forward and backward pass, which leaves the gradients in `.grad`; returns the loss and the logits."""
        self.optimizer.zero_grad(set_to_none=True)
        logits = self._forward(images, effective)
        loss = cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        total = loss
        for hook in self.hooks:
            if (term := hook.loss(self)) is not None:
                total = total + term
        total.backward()
        return loss.detach(), logits.detach()

    def _what_fits(self, images: Tensor, labels: Tensor) -> str:
        """Why a batch cannot be trained on, and the largest half, quarter, ... of it that can."""
        fitting = len(labels) // 2
        while fitting:
            release_memory(self.compute.device)
            try:
                self._pass(images[:fitting], labels[:fitting], self.effective())
                break
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            fitting //= 2
        fits = f"a batch of {fitting} fits" if fitting else "not even one image fits"
        return f"out of memory on {self.compute.device} with a batch of {len(labels)} images of {tuple(images.shape[1:])}; {fits}"

    def effective(self) -> dict[str, Tensor]:
        """The weights by parameter name that hooks put in place of the stored ones."""
        effective: dict[str, Tensor] = {}
        for hook in self.hooks:
            effective |= hook.weights(self) or {}
        return effective

    def _forward(self, images: Tensor, effective: dict[str, Tensor] | None = None) -> Tensor:
        with self.compute.precision():
            if effective:
                with weights_in_place(self.model, effective):
                    logits = self.model(images)
            else:
                logits = self._network()(images)
        return logits.float() if logits.dtype == torch.bfloat16 else logits

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, classes] in float32 of a batch [B, C, H, W], with the weights that hooks put in place.

        The network stays in training or evaluation mode, whichever it is in.
        """
        return self._forward(images, self.effective())

    @torch.no_grad()
    def look(self) -> None:
        """Pass over the training images of the next epoch in training mode, which renews running statistics; nothing is learned."""
        self.model.train()
        if steps := self._planned():
            steps.look(self)
            return
        for images, _ in self.batches.epoch(self.epochs_done):
            self.logits(images)
            TURNS.pass_on()

    def _network(self) -> Callable[[Tensor], Tensor]:
        """The model, compiled where that was chosen; a hook may have put another model in its place."""
        if not self.compute.compiled:
            return self.model
        if self._compiled is None or self._compiled[0] is not self.model:
            self._compiled = self.model, torch.compile(self.model)
        return self._compiled[1]

    @torch.no_grad()
    def evaluate(
        self, batches: BatchSource | None = None, classes: list[Tensor] | None = None
    ) -> dict[str, float]:
        """Accuracy in [0, 1] and mean cross-entropy, in evaluation mode (default: on the validation batches).

        classes: where given, the predicted class of each image is appended to it, batch by batch, [B].
        """
        source = self.validation if batches is None else batches
        if source is None:
            raise ValueError("this training has no validation batches: say on which to evaluate")
        self.model.eval()
        device = self.compute.device
        loss, correct, count = torch.zeros((), device=device), torch.zeros((), device=device), 0
        for images, labels in source.epoch(0):
            logits = self.logits(images)
            loss += cross_entropy(logits, labels, reduction="sum")
            predicted = logits.argmax(1)
            correct += (predicted == labels).sum()
            count += len(labels)
            if classes is not None:
                classes.append(predicted)
            TURNS.pass_on()
        self.compute.wait()
        return {"accuracy": correct.item() / count, "loss": loss.item() / count}

    def momentum_buffer(self, parameter: nn.Parameter) -> Tensor | None:
        """The momentum of a parameter, or None before its first step."""
        return (
            self.optimizer.state[parameter].get("momentum_buffer")
            if parameter in self.optimizer.state
            else None
        )

    def _snapshot(self, epochs_of_fit: int) -> dict[str, Any]:
        return {
            "epochs_of_fit": epochs_of_fit,
            "epochs_done": self.epochs_done,
            "history": self.history,
            "hooks": [hook.state() for hook in self.hooks],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def _restore(self, saved: dict[str, Any]) -> int:
        for hook, state in zip(self.hooks, saved["hooks"], strict=True):
            hook.load_state(self, state)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.epochs_done, self.history = saved["epochs_done"], list(saved["history"])
        return saved["epochs_of_fit"]
