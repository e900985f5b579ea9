"""The gate behind the split: what training will see of a data set that it had better not, in words.

What makes training impossible is refused where data is loaded; what is said here a user should know.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from common.core import loading
from common.core.data import SPLITS, Dataset
from common.core.streamed import ImageFiles
from common.settings import DatasetSettings

_DARK = 0.25
"""Training images none of whose pixels is above this share of what means 1.0 have fewer bits than that says."""


def described(settings: DatasetSettings) -> dict[str, Any]:
    """A prepared or local data set as the first seed sees it: classes, digest, images by split, remarks. Raises DataError."""
    source = loading.read(settings)
    data = source.drawn(0)
    counts = {split: len(data.labels[split]) for split in SPLITS}
    found = [f"{settings.origin}: {remark}" for remark in (*_of_splits(data), *_of_copies(source))]
    return {"classes": data.classes, "digest": data.digest, "images": counts, "remarks": found}


def _of_splits(data: Dataset) -> Iterator[str]:
    """What a split lacks, and what its pixels lack."""
    for split in ("validation", "test"):
        absent = np.flatnonzero(np.bincount(data.labels[split].numpy(), minlength=data.classes) == 0)
        if len(absent):
            yield f"{len(absent)} of {data.classes} classes have no {split} image, as class {absent[0]}"
    for channel in data.constant_channels:
        yield f"channel {channel} of the training images is constant, and says nothing"
    if not isinstance(images := data.images["train"], ImageFiles):
        brightest = int(images.max())
        if brightest <= _DARK * data.scale:
            yield (
                f"no pixel of the training images is above {brightest} of {data.scale:g}: are they of fewer bits? "
                "Shades are lost where they were scaled down"
            )


def _of_copies(source: loading.Source) -> Iterator[str]:
    """Images that are there more than once, byte by byte."""
    if isinstance(source.images, ImageFiles):
        digests = [row.tobytes() for row in source.images.digests]
    else:
        digests = [hashlib.sha256(image.tobytes()).digest() for image in source.images]
    labels: dict[bytes, set[int]] = {}
    for index in source.rest:
        labels.setdefault(digests[index], set()).add(int(source.labels[index]))
    if again := len(source.rest) - len(labels):
        yield f"{again} of {len(source.rest)} images for training and validation are copies of others there"
    if sides := sum(len(found) > 1 for found in labels.values()):
        yield f"{sides} images for training and validation are in more classes than one"
    if leaked := sum(digests[index] in labels for index in source.test):
        yield (
            f"{leaked} of {len(source.test)} test images are for training or validation, too: accuracy on them is no "
            "measure of what was learned"
        )
