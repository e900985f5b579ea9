"""Data sets as uint8 images, with batched augmentation and normalisation on the training device.

A `Dataset` holds three splits; `Batches` turns one split into the mini-batches of an epoch. An epoch's batches are a
pure function of (data, seed, epoch number), so a resumed run sees what an unbroken one would have seen. Images are
tensors on that device, or `ImageFiles` where memory cannot hold them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from common.core.identity import stream
from common.core.streamed import ImageFiles
from common.settings import AugmentationSettings, DataError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels of three splits.

    images: split name -> uint8 tensor [N, H, W, C] (channels last: a batch needs no copy for that memory format), or
    ImageFiles in its place.
    labels: split name -> int64 tensor [N].
    scale: the pixel value that means 1.0 (255, or 16 for the 8x8 digits).
    mean, std: per channel, in units of `scale`; used to normalise. A channel that is constant is divided by 1.
    """

    name: str
    images: dict[str, Tensor | ImageFiles]
    labels: dict[str, Tensor]
    classes: int
    scale: float = 255.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augmentation: AugmentationSettings = field(default_factory=AugmentationSettings)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        height, width, channels = self.images["train"].shape[1:]
        return channels, height, width

    @property
    def constant_channels(self) -> list[int]:
        """The channels that have one value in all training images; files are not looked into."""
        images = self.images["train"]
        if isinstance(images, ImageFiles):
            return []
        pixels = images.flatten(0, 2)
        return torch.nonzero(pixels.amin(0) == pixels.amax(0)).flatten().tolist()

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the pixels (or the digests of the files) and labels of all splits, 64 hexadecimal characters."""
        content = hashlib.sha256()
        for split in SPLITS:
            for values in (self.images[split], self.labels[split]):
                array = values.digests if isinstance(values, ImageFiles) else values.cpu().numpy()
                content.update(f"{split} {array.dtype} {array.shape}".encode())
                content.update(array.tobytes())
        return content.hexdigest()

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on `device`."""
        return replace(
            self,
            images={k: v.to(device) for k, v in self.images.items()},
            labels={k: v.to(device) for k, v in self.labels.items()},
        )

    def with_train_size(self, count: int, seed: int) -> Dataset:
        """The same data with only `count` training images, stratified by class and chosen by `seed`."""
        labels = self.labels["train"].cpu().numpy()
        (kept,) = stratified(labels, [count], stream(seed, "train-subset", self.name))
        check_classes(labels[kept], self.classes, self.name)
        index = torch.from_numpy(kept).to(self.labels["train"].device)
        return replace(
            self,
            images=self.images | {"train": self.images["train"][index]},
            labels=self.labels | {"train": self.labels["train"][index]},
        )


def stratified(labels: np.ndarray, counts: Sequence[int], seed: int) -> list[np.ndarray]:
    """Disjoint sorted index sets of the given sizes, each with the class proportions of `labels` (to within one).

    Raises DataError when the counts add up to more than there is.
    """
    if sum(counts) > len(labels):
        raise DataError(
            f"{sum(counts)} images are asked for (splits of {list(counts)}) but there are {len(labels)}"
        )
    rng = np.random.default_rng(seed)
    left = {int(c): list(rng.permutation(np.flatnonzero(labels == c))) for c in np.unique(labels)}
    parts = []
    for count in counts:
        total = sum(map(len, left.values()))
        exact = {c: count * len(index) / max(total, 1) for c, index in left.items()}
        take = {c: int(share) for c, share in exact.items()}
        by_remainder = sorted(exact, key=lambda c: (take[c] - exact[c], c))
        for c in by_remainder[: count - sum(take.values())]:
            take[c] += 1
        parts.append(np.sort(np.array([left[c].pop() for c in left for _ in range(take[c])], dtype=np.int64)))
    return parts


def check_classes(labels: np.ndarray, classes: int, name: str) -> None:
    """Raise DataError, which begins with `name`, where a class has none of the training images."""
    absent = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
    if len(absent):
        raise DataError(
            f"{name}: the {len(labels)} training images have none of class {absent[0]}, and of {len(absent)} of {classes} "
            "classes in all: more training images are needed, or fewer classes"
        )


# of a pass without gradients
_PASS_IMAGES, _PASS_PIXELS = 2000, 2**22
_TOGETHER = 2**18
"""Values of small batches that are normalised together, at most."""


class Batches:
    """The mini-batches of one split of a data set.

    batch_size: None is as many as a pass without gradients takes at once, 2,000 or 4 million pixels.
    len() is the number of iterations of an epoch (a last partial batch is kept). `epoch(e)` yields pairs of
    normalised images [B, C, H, W] of `dtype` in channels-last memory, and labels [B].
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        batch_size: int | None = None,
        *,
        seed: int = 0,
        shuffle: bool = False,
        augment: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        self.images, self.labels = dataset.images[split], dataset.labels[split]
        height, width = self.images.shape[1:3]
        self.batch_size = batch_size or max(1, min(_PASS_IMAGES, _PASS_PIXELS // (height * width)))
        self.seed, self.shuffle, self.dtype = seed, shuffle, dtype
        self._augment = augment
        self.augmentation = dataset.augmentation if augment else AugmentationSettings()
        device = self.images.device
        self._shift = torch.tensor(dataset.mean, dtype=dtype, device=device) * dataset.scale
        self._gain = 1 / (torch.tensor(dataset.std, dtype=dtype, device=device) * dataset.scale)
        if isinstance(self.images, Tensor):
            padding = self.augmentation.crop_padding
            self._padded = torch.nn.functional.pad(self.images, (0, 0, padding, padding, padding, padding))

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch `number` (from 0)."""
        order, start = self._order(number), 0
        labels = self.labels if order is None else self.labels[order]
        for pixels in self._pixels(order, number):
            # several batches at once, as each of small ones would take as long as a layer
            for x in self._normalised(pixels).split(self.batch_size):
                if self.augmentation.rotation:
                    x = self._rotated(x, self._angles(number, start, len(x)))
                yield x, labels[start : start + len(x)]
                start += len(x)

    def tables(self) -> Tables | None:
        """What makes the batches of an epoch step by step on the device; None for images that stay on disk."""
        return Tables(self) if isinstance(self.images, Tensor) else None

    def _normalised(self, pixels: Tensor) -> Tensor:
        return ((pixels.to(self.dtype) - self._shift) * self._gain).permute(0, 3, 1, 2)

    def _order(self, number: int) -> Tensor | None:
        """The images of an epoch by their numbers [N]; None as they are."""
        if not self.shuffle:
            return None
        return torch.randperm(len(self.labels), generator=self._generator("order", number)).to(self.device)

    def _generator(self, *names: str | int) -> torch.Generator:
        return torch.Generator().manual_seed(stream(self.seed, *names))

    def _pixels(self, order: Tensor | None, number: int) -> Iterable[Tensor]:
        """The images of the epoch in one or more batches at a time, cropped and flipped, still uint8. order: None as they are."""
        if isinstance(self.images, Tensor):
            together = max(1, _TOGETHER // (self.batch_size * self.images.shape[1:].numel()))
            return self._arranged(order, number).split(together * self.batch_size)
        crops = stream(self.seed, "crops", number) if self._augment else None
        order = torch.arange(len(self.labels)) if order is None else order
        return self.images.batches(order, self.batch_size, crops, self.augmentation.flip)

    @property
    def _moves(self) -> bool:
        """Whether images are cropped or flipped."""
        return bool(self.augmentation.crop_padding or self.augmentation.flip)

    def _arranged(self, order: Tensor | None, number: int) -> Tensor:
        if not self._moves:
            return self._padded if order is None else self._padded[order]
        order = torch.arange(len(self.labels), device=self.device) if order is None else order
        return self._cut(order, *self._places(number))

    def _places(self, number: int) -> tuple[Tensor, Tensor]:
        """Which rows [N, H] and columns [N, W] of the padded images of an epoch are seen."""
        count, height, width, _ = self.images.shape
        generator = self._generator("augment", number)
        span = 2 * self.augmentation.crop_padding + 1
        offset = torch.randint(span, (2, count), generator=generator).to(self.device)
        rows = offset[0, :, None] + torch.arange(height, device=self.device)
        columns = offset[1, :, None] + torch.arange(width, device=self.device)
        if self.augmentation.flip:
            mirrored = (torch.rand(count, generator=generator) < 0.5).to(self.device)
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        return rows, columns

    def _cut(self, order: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return self._padded[order[:, None, None], rows[:, :, None], columns[:, None, :]]

    def _angles(self, number: int, start: int, count: int) -> Tensor:
        """By how many radians the images of the batch that begins at `start` are turned."""
        angles = torch.rand(count, generator=self._generator("rotate", number, start)).to(
            self.device, self.dtype
        )
        return torch.deg2rad((2 * angles - 1) * self.augmentation.rotation)

    def _rotated(self, x: Tensor, angles: Tensor) -> Tensor:
        cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
        # the grid runs from -1 to 1 along either side, however long
        across = x.shape[2] / x.shape[3]
        rows = [torch.stack([cos, -sin * across, zero], 1), torch.stack([sin / across, cos, zero], 1)]
        matrix = torch.stack(rows, 1)
        grid = torch.nn.functional.affine_grid(matrix, list(x.shape), align_corners=False)
        return torch.nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


class Tables:
    """The draws of an epoch in tables on the device: any step finds there which batch is its own.

    The tables keep their places, so that a captured step sees what `fill` has put there.
    """

    def __init__(self, batches: Batches):
        self.batches, count, device = batches, len(batches.labels), batches.device
        _, height, width, _ = batches.images.shape
        self._sizes = [1, height, width] if batches._moves else [1]
        # which image, and which of its rows and columns
        self._table = torch.empty(count, sum(self._sizes), dtype=torch.int64, device=device)
        self._labels = torch.empty_like(batches.labels)
        self._angles = torch.empty(count, dtype=batches.dtype, device=device)
        self._within = torch.arange(batches.batch_size, device=device)

    def fill(self, number: int) -> None:
        """Take up epoch `number` (from 0)."""
        own = self.batches
        order = own._order(number)
        order = torch.arange(len(own.labels), device=own.device) if order is None else order
        places = own._places(number) if own._moves else ()
        torch.cat([order[:, None], *places], 1, out=self._table)
        torch.index_select(own.labels, 0, order, out=self._labels)
        if own.augmentation.rotation:
            for start in range(0, len(order), own.batch_size):
                part = self._angles[start : start + own.batch_size]
                part.copy_(own._angles(number, start, len(part)))

    def size(self, step: int) -> int:
        """Images of the batch of a step (from 0)."""
        own = self.batches
        return min(own.batch_size, len(own.labels) - step * own.batch_size)

    def batch(self, step: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """As of `Batches.epoch`: the batch of a step, int64 [1] on the device, which has `size` images."""
        own = self.batches
        index = torch.add(self._within[:size], step, alpha=own.batch_size)
        chosen = self._table.index_select(0, index).split(self._sizes, 1)
        order = chosen[0][:, 0]
        x = own._normalised(own._cut(order, *chosen[1:]) if own._moves else own._padded[order])
        if own.augmentation.rotation:
            x = own._rotated(x, self._angles.index_select(0, index))
        return x, self._labels.index_select(0, index)


class FixedBatches:
    """A given list of (images, labels) pairs, the same in every epoch."""

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]]):
        self._batches = list(batches)

    def __len__(self) -> int:
        return len(self._batches)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches; `number` plays no role."""
        return iter(self._batches)
