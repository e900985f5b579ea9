"""The fine-tuned modality: a network that starts with the trunk of a pre-trained one and a fresh head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from common.core.models.checkpoints import matched, read_checkpoint
from common.settings import Count, SettingsError, Strict


def head_prefix(model: nn.Module) -> str:
    """What the names of the head's tensors begin with; the head is the last linear layer."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1] + "."


def trunk_keys(keys: Sequence[str], head: str) -> tuple[list[str], list[str]]:
    """The keys of a state that a fine-tuned network copies, and those of its head, which start afresh.

    Everything else is trunk, batch-norm running statistics included.
    """
    copied = [key for key in keys if not key.startswith(head)]
    return copied, [key for key in keys if key.startswith(head)]


def trunk(model: nn.Module) -> dict[str, Tensor]:
    """The trunk's tensors by name, in module order."""
    state = model.state_dict()
    return {key: state[key] for key in trunk_keys(list(state), head_prefix(model))[0]}


def trunk_size(model: nn.Module) -> int:
    """Parameters of the trunk that are not zero; all of them where there are no values."""
    head = head_prefix(model)
    found = (p for name, p in model.named_parameters() if not name.startswith(head))
    return sum(p.numel() if p.is_meta else int(p.count_nonzero()) for p in found)


def shuffled(tensors: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Each tensor with its entries permuted: the same distribution of values, none of the features."""

    def permuted(tensor: Tensor) -> Tensor:
        order = torch.randperm(tensor.numel(), generator=generator)
        return tensor.flatten()[order.to(tensor.device)].view_as(tensor)

    return {key: permuted(tensor) for key, tensor in tensors.items()}


class Checkpoint(Strict):
    """A trained network that takes the place of the pre-training."""

    source: Annotated[str, Field(min_length=1)]
    """A file of torch.save or safetensors, or `torchvision:<weights>`."""
    classes: Count = 1000
    """Classes of its head."""

    def trunk_for(self, model: nn.Module) -> tuple[dict[str, Tensor], str]:
        """Its trunk under the names of `model`, and a digest of what was read. Raises SettingsError."""
        state, digest = read_checkpoint(self.source)
        return trunk_from_checkpoint(model, state, self.classes, self.source), digest


def trunk_from_checkpoint(
    model: nn.Module, state: Mapping[str, Tensor], classes: int, source: str
) -> dict[str, Tensor]:
    """The checkpoint's trunk under the names of `model`, matched as of `common.core.models.checkpoints.matched`.

    classes: of the checkpoint's head, its last matrix. Raises SettingsError naming the first tensor that does
    not fit or cannot be, or the number of classes.
    """
    found, rest = matched(trunk(model), state, source)
    whole = f"checkpoint {source} is of another architecture"
    for name, tensor in rest.items():
        if tensor.ndim > 2:
            raise SettingsError(f"{whole}: it also has {name} of {list(tensor.shape)}")
    own = f"{head_prefix(model)}weight"
    matrices = [name for name, tensor in rest.items() if tensor.ndim == 2]
    if not matrices:
        raise SettingsError(f"{whole}: the {len(found)} tensors of the trunk leave no head")
    name = own if own in rest else matrices[-1]
    if len(rest[name]) != classes:
        raise SettingsError(
            f"checkpoint {source}: its head {name} has {len(rest[name])} classes, expected {classes}"
        )
    return found
