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
        order, labels, start = None, self.labels, 0
        if self.shuffle:
            order = torch.randperm(len(labels), generator=self._generator("order", number)).to(self.device)
            labels = labels[order]
        for pixels in self._pixels(order, number):
            x = (pixels.to(self.dtype) - self._shift) * self._gain
            x = x.permute(0, 3, 1, 2)
            if self.augmentation.rotation:
                x = self._rotated(x, number, start)
            yield x, labels[start : start + len(x)]
            start += len(x)

    def _generator(self, *names: str | int) -> torch.Generator:
        return torch.Generator().manual_seed(stream(self.seed, *names))

    def _pixels(self, order: Tensor | None, number: int) -> Iterable[Tensor]:
        """The images of the epoch in batches, cropped and flipped, still uint8. order: None as they are."""
        if isinstance(self.images, Tensor):
            return self._arranged(order, number).split(self.batch_size)
        crops = stream(self.seed, "crops", number) if self._augment else None
        order = torch.arange(len(self.labels)) if order is None else order
        return self.images.batches(order, self.batch_size, crops, self.augmentation.flip)

    def _arranged(self, order: Tensor | None, number: int) -> Tensor:
        count, height, width, _ = self.images.shape
        images = self._padded
        if not (self.augmentation.crop_padding or self.augmentation.flip):
            return images if order is None else images[order]
        order = torch.arange(count, device=self.device) if order is None else order
        generator = self._generator("augment", number)
        span = 2 * self.augmentation.crop_padding + 1
        offset = torch.randint(span, (2, count), generator=generator).to(self.device)
        rows = offset[0, :, None] + torch.arange(height, device=self.device)
        columns = offset[1, :, None] + torch.arange(width, device=self.device)
        if self.augmentation.flip:
            mirrored = (torch.rand(count, generator=generator) < 0.5).to(self.device)
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        return images[order[:, None, None], rows[:, :, None], columns[:, None, :]]

    def _rotated(self, x: Tensor, number: int, start: int) -> Tensor:
        angles = torch.rand(len(x), generator=self._generator("rotate", number, start)).to(x.device, x.dtype)
        angles = torch.deg2rad((2 * angles - 1) * self.augmentation.rotation)
        cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
        # the grid runs from -1 to 1 along either side, however long
        across = x.shape[2] / x.shape[3]
        rows = [torch.stack([cos, -sin * across, zero], 1), torch.stack([sin / across, cos, zero], 1)]
        matrix = torch.stack(rows, 1)
        grid = torch.nn.functional.affine_grid(matrix, list(x.shape), align_corners=False)
        return torch.nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


class FixedBatches:
    """A given list of (images, labels) pairs, the same in every epoch."""

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]]):
        self._batches = list(batches)

    def __len__(self) -> int:
        return len(self._batches)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches; `number` plays no role."""
        return iter(self._batches)
