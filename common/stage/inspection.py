"""The gate behind the split: what training will see of a data set that it had better not, in words.

What makes training impossible is refused where data is loaded; what is said here a user should know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.core import loading
from common.core.data import SPLITS, Dataset
from common.core.files import reading
from common.core.streamed import ImageFiles
from common.settings import DatasetSettings
from common.stage.outputs import makers

_DARK = 0.25
"""Training images none of whose pixels is above this share of what means 1.0 have fewer bits than that says."""


def is_told(settings: DatasetSettings) -> bool:
    """Whether there is something to say of a data set: it is prepared, or a local file that no stage makes, and is there."""
    if settings.source == "npz":
        return Path(settings.local).exists() and settings.local not in makers()
    return settings.source != "digits" and loading.prepared_file(settings).exists()


def remarks_file(settings: DatasetSettings) -> Path:
    """Where is kept what was said when a data set was prepared, as a list in JSON."""
    return loading.prepared_file(settings).with_suffix(".json")


def remarks(settings: DatasetSettings) -> list[str]:
    """What a user should know of a data set as the first seed sees it, a line each. Raises DataError."""
    source = loading.read(settings)
    file, kept = remarks_file(settings), list[str]()
    if file.exists():
        with reading(file, "damaged; delete it"):
            kept = [str(remark) for remark in json.loads(file.read_text())]
    found = (*_of_splits(source.drawn(0)), *_of_copies(source))
    return [*kept, *(f"{settings.origin}: {remark}" for remark in found)]


def described(settings: DatasetSettings) -> dict[str, Any]:
    """A data set as the first seed sees it: classes, digest, images by split, remarks. Raises DataError."""
    data = loading.load(settings)
    counts = {split: len(data.labels[split]) for split in SPLITS}
    return {"classes": data.classes, "digest": data.digest, "images": counts, "remarks": remarks(settings)}


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
