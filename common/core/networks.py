"""A trained network in one file of tensors, with all that builds it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from common.core import models
from common.core.identity import canonical
from common.core.models import Network, tensor_files
from common.core.run import Cell

_BUILT = "network"


def packed(
    model: nn.Module, cell: Cell, classes: int, image_shape: tuple[int, ...], about: Mapping[str, Any]
) -> bytes:
    """The content of a safetensors file with a network of this cell, and JSON values about it."""
    built = {"architecture": cell.architecture, "options": cell.options, "classes": classes}
    built |= {"image_shape": image_shape, "widths": model.widths if isinstance(model, Network) else None}
    words = {_BUILT: canonical(built)} | {name: canonical(value) for name, value in about.items()}
    return tensor_files.packed(model.state_dict(), words)


def unpacked(content: bytes) -> tuple[Network, dict[str, Any]]:
    """The network of such a file, in evaluation mode, and the values about it. Raises ValueError, SettingsError."""
    tensors, words = tensor_files.unpacked(content)
    about = {name: json.loads(value) for name, value in words.items()}
    built = about.pop(_BUILT)
    options = built["options"] | {"widths": built["widths"]}
    model = models.build(
        built["architecture"], classes=built["classes"], image_shape=built["image_shape"], **options
    )
    model.load_state_dict(tensors)
    return model.eval(), about | {"image_shape": built["image_shape"]}
