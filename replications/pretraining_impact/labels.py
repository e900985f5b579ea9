"""Target data of which only a part of the training images is labelled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field

from common.core.data import Dataset
from common.core.identity import stream
from common.settings import Count, DataError

PerClass = Count | Annotated[float, Field(gt=0, lt=1)]
"""Images of each class: a number, or a share of the class."""


def labelled(data: Dataset, labels: int | None, per_class: PerClass | None, seed: int) -> Dataset:
    """The data with fewer training images, chosen by `seed`.

    labels: how many, stratified. per_class: how many, or which share, of each class. Raises DataError when
    there are not as many.
    """
    if labels is not None:
        return data.with_train_size(labels, seed)
    if per_class is None:
        return data
    found = data.labels["train"]
    order = torch.randperm(
        len(found), generator=torch.Generator().manual_seed(stream(seed, "per-class", data.name))
    )
    order = order.to(found.device)
    by_class = [order[found[order] == c] for c in range(data.classes)]
    counts = per_class_counts([len(index) for index in by_class], per_class)
    for c, (index, count) in enumerate(zip(by_class, counts)):
        if not 0 < count <= len(index):
            raise DataError(f"per_class = {per_class}: class {c} has {len(index)} training images")
    kept = torch.cat([index[:count] for index, count in zip(by_class, counts)]).sort().values
    return replace(
        data,
        images=data.images | {"train": data.images["train"][kept]},
        labels=data.labels | {"train": found[kept]},
    )


def per_class_counts(class_sizes: Sequence[int], amount: int | float) -> list[int]:
    """Training images of each class: `amount` of each, or the share `amount` < 1 of each, rounded down."""
    if isinstance(amount, int):
        return [amount] * len(class_sizes)
    return [math.floor(amount * n + 1e-9) for n in class_sizes]
