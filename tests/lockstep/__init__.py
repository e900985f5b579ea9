"""Trainings that are frozen: same initial weights, same batches, same weights at the end.

The arrays beside this file were made by this suite at revision 510c674, in float64. That revision had been compared
with the authors' releases, executed from their own text on the same weights and batches (of larger networks, and real
images): HALO's arms, the retraining schedules and the methods that prune during training of IMP+SLR, and the gates of
pruning from scratch agreed to 3e-14 and their masks and structures exactly; DNW and DST to 5e-9. CS and DST did with
`double_decay`; without it they are this suite's reading. Feature relevance, pre-training, HALO's MCP, intended rates
and magnitude baseline, and BIMP of 2022 had no such counterpart. All these hold what 510c674 does.

`start.npz` has what all cases start from: images, the order of each epoch, and the networks' initial weights.
`<paper>.npz` has what each case ends with. Nothing is drawn, loaded or augmented when a case is trained again.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.core.models import build

HERE = Path(__file__).parent
PAPERS = ("halo", "imp_slr", "pruning_from_scratch", "feature_relevance", "pretraining_impact")
SHAPE = {"classes": 10, "image_shape": (3, 8, 8)}
CHAIN = {"cfg": [4, 6, "M", 8, 8], "hidden": [12], "linear_init": "torch"}
BATCH, PER_EPOCH = 10, 4

Case = Callable[[], Mapping[str, Any]]
"""Trains anew; returns what it ends with by name: tensors, or lists of numbers."""


def cases(paper: str) -> dict[str, Case]:
    """The cases of a paper by name."""
    return importlib.import_module(f"lockstep.{paper}").CASES


def frozen(paper: str) -> dict[str, dict[str, np.ndarray]]:
    """What each case of a paper ended with."""
    stored = _read(HERE / f"{paper}.npz")
    return {
        name.removesuffix("/layout"): _unpacked(stored, name.removesuffix("/layout"))
        for name in stored
        if name.endswith("/layout")
    }


def arrays(result: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A case's result as arrays: float64, or int64 for what was chosen and counted."""
    found = {}
    for name, value in result.items():
        array = value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
        found[name] = array.astype(np.int64) if array.dtype.kind in "biu" else array
    return found


def packed(case: str, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A case in three arrays, since each costs half a kilobyte in the file."""
    layout = [(name, value.dtype.kind, value.shape) for name, value in found.items()]
    parts = {kind: [np.empty(0)] for kind in "fi"}
    for value in found.values():
        parts[value.dtype.kind].append(value.ravel())
    floats, integers = (np.concatenate(parts[kind]) for kind in "fi")
    content = {
        "layout": np.array(json.dumps(layout)),
        "floats": floats,
        "integers": integers.astype(np.int64),
    }
    return {f"{case}/{name}": array for name, array in content.items()}


def _unpacked(stored: Mapping[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    left = {"f": stored[f"{case}/floats"], "i": stored[f"{case}/integers"]}
    found = {}
    for name, kind, shape in json.loads(str(stored[f"{case}/layout"])):
        size = math.prod(shape)
        found[name], left[kind] = left[kind][:size].reshape(shape), left[kind][size:]
    return found


@functools.cache
def _read(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as content:
        return dict(content)


def start() -> dict[str, Tensor]:
    """What all cases start from."""
    return {name: torch.from_numpy(value) for name, value in _read(HERE / "start.npz").items()}


class StoredBatches:
    """The stored images in the stored order of each epoch, in double precision."""

    def __init__(self) -> None:
        stored = start()
        self.images, self.labels, self.orders = (stored[name] for name in ("images", "labels", "orders"))

    def __len__(self) -> int:
        return PER_EPOCH

    def epoch(self, number: int) -> list[tuple[Tensor, Tensor]]:
        parts = self.orders[number].long().split(BATCH)
        return [((self.images[part].double() - 128) / 64, self.labels[part].long()) for part in parts]


def started(name: str, model: nn.Module) -> nn.Module:
    """`model` in double precision with the stored initial weights of the network `name`; it may lack some of them."""
    prefix = f"{name}/"
    stored = {k.removeprefix(prefix): v for k, v in start().items() if k.startswith(prefix)}
    model = model.double()
    model.load_state_dict({key: stored[key] for key in model.state_dict()})
    return model


def resnet(shortcut: str = "B") -> nn.Module:
    """ResNet-8 with a stem of 2."""
    return started("resnet", build("resnet8", stem=2, shortcut=shortcut, **SHAPE))


def chain() -> nn.Module:
    """Four convolutions and a hidden linear layer."""
    return started("chain", build("convnet", **CHAIN, **SHAPE))


def ended(model: nn.Module) -> dict[str, Tensor]:
    """The weights and running statistics of a network."""
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
