"""What a method may do inside the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from common.core.trainer import Trainer


class NotCapturable(Exception):
    """Why steps cannot be captured, in words that can be followed by what happens in place of it."""


class Hooks:
    """What a method may do inside the loop. Every method does nothing by default.

    On a GPU steps are captured and replayed as long as every hook lets them be, see `in_graph`.
    """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser beside the model's own."""
        return []

    def epoch_started(self, trainer: Trainer, epoch: int) -> None:
        """Before the first iteration of epoch `epoch` (from 0 in each fit)."""

    def weights(self, trainer: Trainer) -> dict[str, Tensor] | None:
        """Weights by parameter name to use in the forward pass in place of the stored ones; gradients flow through."""
        return None

    def loss(self, trainer: Trainer) -> Tensor | None:
        """A differentiable scalar that is added to the cross-entropy."""
        return None

    def gradients_ready(self, trainer: Trainer) -> None:
        """After backward and before the optimiser's step: `.grad` may be changed in place."""

    def stepped(self, trainer: Trainer) -> None:
        """After the optimiser's step."""

    def epoch_ended(self, trainer: Trainer, epoch: int) -> None:
        """After the last iteration of an epoch: prune, shrink, select."""

    def needs_host(self, iteration: int) -> bool:
        """Whether the step of an iteration (from 0 in each fit) prunes, looks at a value or is else unlike the others.

        It is not captured, and after it what captured steps hold may be another.
        """
        return False

    def in_graph(self, trainer: Trainer) -> Sequence[Any]:
        """What `weights`, `loss`, `gradients_ready` and `stepped` hold of this hook's in a captured step.

        Tensors, which are told by their places, and values that are compared: of another one steps are captured anew. A
        captured step calls no Python. So these methods do the same work in every step on tensors that they change in
        place, never look at a value of the device, and have the number of an iteration from `Trainer.at_iteration`.
        A class that changes one of the four says this anew. Raises NotCapturable with the reason.
        """
        return ()

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that a checkpoint in the middle of a fit must hold."""
        return {}

    def load_state(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Take up a `state`; called before the trainer loads its model and optimiser, so shapes may be restored here."""


_IN_STEPS = ("weights", "loss", "gradients_ready", "stepped")


def held(hook: Hooks, trainer: Trainer) -> Sequence[Any]:
    """As of `in_graph`. Raises NotCapturable also for a hook that acts in steps without saying what it holds."""
    kinds = type(hook).__mro__

    def origin(name: str) -> int:
        return next(number for number, kind in enumerate(kinds) if name in vars(kind))

    if any(origin(name) < origin("in_graph") for name in _IN_STEPS):
        raise NotCapturable(
            f"{kinds[0].__name__} acts in every step and does not say what a graph holds of it"
        )
    return hook.in_graph(trainer)
