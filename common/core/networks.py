"""A trained network in one file of tensors, with all that builds it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from common.core import models
from common.core.identity import canonical
from common.core.models import Network, own_code, tensor_files
from common.core.pruning import channels
from common.core.run import Cell

_BUILT = "network"


def packed(
    model: Network, cell: Cell, classes: int, image_shape: Sequence[int], about: Mapping[str, Any]
) -> bytes:
    """The content of a safetensors file with a network of this cell, and JSON values about it."""
    built = {"architecture": cell.architecture, "options": cell.options, "classes": classes}
    built |= {"image_shape": list(image_shape), "widths": model.widths}
    words = {_BUILT: canonical(built)} | {name: canonical(value) for name, value in about.items()}
    return tensor_files.packed(model.state_dict(), words)


def unpacked(content: bytes) -> tuple[Network, dict[str, Any]]:
    """The network of such a file, in evaluation mode, and the values about it. Raises ValueError, SettingsError."""
    tensors, words = tensor_files.unpacked(content)
    about = {name: json.loads(value) for name, value in words.items()}
    built = about.pop(_BUILT)
    name, widths = built["architecture"], built["widths"]
    wanted = {key: built[key] for key in ("classes", "image_shape")} | built["options"]
    if own_code(name):
        model = models.build(name, **wanted)
        if widths:
            groups = zip(model.channel_groups(), widths, strict=True)
            channels.remove(model, {group.name: range(width) for group, width in groups})
    else:
        model = models.build(name, **wanted, widths=widths)
    model.load_state_dict(tensors)
    return model.eval(), about | {"image_shape": built["image_shape"]}
