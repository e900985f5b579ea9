"""`python -m lockstep`, in tests/: freezes the cases that have no fixture yet.

What is frozen stays as it is. To freeze a case anew, because it was meant to change, name it: `python -m lockstep
halo/l1`; the commit should then say why.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from common.core.models import build
from lockstep import BATCH, CHAIN, HERE, PAPERS, PER_EPOCH, SHAPE, arrays, cases, frozen, packed
from lockstep.pruning_from_scratch import LAYOUTS, layout

EPOCHS = 24


def _start() -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    count = BATCH * PER_EPOCH
    labels = torch.arange(count) % SHAPE["classes"]
    # smooth patterns, a kind for each class, so that there is something to learn
    patterns = torch.randn(SHAPE["classes"], 3, 3, 3, generator=generator)
    images = torch.nn.functional.interpolate(patterns, size=8, mode="bilinear")[labels]
    images = 128 + 40 * images + 25 * torch.randn(images.shape, generator=generator)
    orders = torch.stack([torch.randperm(count, generator=generator) for _ in range(EPOCHS)])
    networks = {
        "resnet": build("resnet8", stem=2, seed=1, **SHAPE),
        "chain": build("convnet", seed=2, **CHAIN, **SHAPE),
        **{name: layout(name).expanded(1.25).build(seed=3) for name in LAYOUTS},
    }
    found = {
        "images": images.round().clamp(0, 255).to(torch.uint8),
        "labels": labels.to(torch.uint8),
        "orders": orders.to(torch.uint8),
    }
    found |= {f"{name}/{key}": v for name, model in networks.items() for key, v in model.state_dict().items()}
    return {name: value.numpy() for name, value in found.items()}


def main(again: list[str]) -> None:
    """Write what is missing; `again`: cases, as paper/case, that are written anew."""
    if not (HERE / "start.npz").exists():
        np.savez_compressed(HERE / "start.npz", **_start())
    for paper in PAPERS:
        file = HERE / f"{paper}.npz"
        kept = frozen(paper) if file.exists() else {}
        kept = {name: kept[name] for name in kept if name in cases(paper) and f"{paper}/{name}" not in again}
        for name, train in cases(paper).items():
            if name not in kept:
                print(f"{paper}/{name}")
                kept[name] = arrays(train())
        content = [packed(case, found) for case, found in kept.items()]
        np.savez_compressed(file, **{key: array for part in content for key, array in part.items()})


if __name__ == "__main__":
    main(sys.argv[1:])
