"""The fine-tuned modality: a network that starts with the trunk of a pre-trained one and a fresh head."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from common.settings import Count, SettingsError, Strict

TORCHVISION = "torchvision:"


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
    """A file of torch.save, or `torchvision:<weights>`."""
    classes: Count = 1000
    """Classes of its head."""

    def trunk_for(self, model: nn.Module) -> tuple[dict[str, Tensor], str]:
        """Its trunk under the names of `model`, and a digest of what was read. Raises SettingsError."""
        state, digest = read_checkpoint(self.source)
        return trunk_from_checkpoint(model, state, self.classes, self.source), digest


def read_checkpoint(source: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a checkpoint by name, and a digest of what was read.

    source: a file that torch.save wrote (a state dict, or a table with one under `state_dict` or `model`), or
    `torchvision:<weights>`, e.g. torchvision:VGG16_BN_Weights.IMAGENET1K_V1, which torchvision downloads
    once. Raises SettingsError naming the source.
    """
    if source.startswith(TORCHVISION):
        return _torchvision_state(source), source
    try:
        content = Path(source).read_bytes()
        found: Any = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise SettingsError(f"checkpoint {source}: cannot be read: {error.strerror}") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SettingsError(
            f"checkpoint {source}: not a file of tensors that torch.save wrote: {reason}"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise SettingsError(
            f"checkpoint {source}: a table of tensors by name is needed, found {type(found).__name__}"
        )
    return dict(found), hashlib.sha256(content).hexdigest()


def _torchvision_state(source: str) -> dict[str, Tensor]:
    from torchvision.models import get_weight

    name = source.removeprefix(TORCHVISION)
    try:
        weights = get_weight(name)
    except ValueError:
        raise SettingsError(f"checkpoint {source}: torchvision has no weights called {name!r}") from None
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise SettingsError(
            f"checkpoint {source}: the download failed ({error}); give a local file instead"
        ) from None


def trunk_from_checkpoint(
    model: nn.Module, state: Mapping[str, Tensor], classes: int, source: str
) -> dict[str, Tensor]:
    """The checkpoint's trunk under the names of `model`, matched in order, so that names may differ.

    classes: of the checkpoint's head, its last matrix. Raises SettingsError naming the first tensor that does
    not fit, or the number of classes.
    """
    counters = "num_batches_tracked"
    offered = [(k, v) for k, v in state.items() if not k.endswith(counters)]
    wanted = [(k, v) for k, v in trunk(model).items() if not k.endswith(counters)]
    for (own, tensor), (theirs, other) in zip(wanted, offered):
        if tensor.shape != other.shape:
            raise SettingsError(
                f"checkpoint {source} is of another architecture: its {theirs} is {list(other.shape)} where "
                f"{own} is {list(tensor.shape)}"
            )
    matrices = [(k, v) for k, v in offered[len(wanted) :] if v.ndim == 2]
    if not matrices:
        raise SettingsError(
            f"checkpoint {source} is of another architecture: {len(offered)} tensors, of which {len(wanted)} "
            "would be the trunk's, leave no head"
        )
    name, head = matrices[-1]
    if len(head) != classes:
        raise SettingsError(
            f"checkpoint {source}: its head {name} has {len(head)} classes, expected {classes}"
        )
    return {own: other for (own, _), (_, other) in zip(wanted, offered)}
