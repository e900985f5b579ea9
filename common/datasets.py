"""Data sets as uint8 images, with batched augmentation and normalisation on the training device.

A `Dataset` holds three splits; `Batches` turns one split into the mini-batches of an epoch. An epoch's batches are a
pure function of (data, seed, epoch number), so a resumed run sees what an unbroken one would have seen. Images are
tensors on that device, or `ImageFiles` where memory cannot hold them.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from common.settings import AugmentationSettings, DatasetSettings, SettingsError, stream

SPLITS = ("train", "validation", "test")
Arrays = dict[str, np.ndarray]
DIGITS_SHA256 = "65e5b4619795efb40c1082f4c350c049e4ad552200d369b6ae99e21eef5e72c5"
DIGITS_TEST = 1000
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# images that one process decodes before it hands them over: bounds the shared memory that large batches take
DECODED_AT_ONCE = 64


class DataError(SettingsError):
    """Data that is missing, damaged or of the wrong shape; the message names it in one line."""


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Make of what goes wrong with an image file a DataError that names it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror if error.filename else "damaged, or no image"
        raise DataError(f"{path}: not a readable image: {reason}") from None
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image: {error}") from None


def read_image(path: Path, sha256: bytes | None = None) -> Image.Image:
    """The image in a file as RGB. sha256: of the file's bytes, compared where given.

    Raises DataError naming a file that is missing, changed, damaged or no image.
    """
    with reading(path):
        content = path.read_bytes()
        if sha256 is not None and hashlib.sha256(content).digest() != sha256:
            raise DataError(f"{path}: damaged or changed since the data was prepared")
        return Image.open(BytesIO(content)).convert("RGB")


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images that stay on disk; takes the place of a uint8 tensor [N, size, size, 3].

    paths: [N] bytes, relative to root. digests: SHA-256 of each file, uint8 [N, 32]; every reading is checked by it.
    device: where decoded batches go.
    """

    root: Path
    paths: np.ndarray
    digests: np.ndarray
    size: int
    device: torch.device = torch.device("cpu")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As of the tensor."""
        return len(self.paths), self.size, self.size, 3

    def __getitem__(self, index: Tensor | np.ndarray) -> ImageFiles:
        chosen = torch.as_tensor(index).cpu().numpy()
        return replace(self, paths=self.paths[chosen], digests=self.digests[chosen])

    def to(self, device: torch.device | str) -> ImageFiles:
        """The same images, to be decoded for `device`."""
        return replace(self, device=torch.device(device))

    def batches(
        self, order: Tensor, batch_size: int, crops: int | None = None, flip: bool = False
    ) -> Iterator[Tensor]:
        """The images numbered `order`, uint8 [B, size, size, 3] on the device, decoded ahead by other processes.

        crops: seed of random resized crops, of which `flip` mirrors half; each depends on the seed and the image alone.
        Without it, centre crops of images resized to 256/224 of `size`. Raises DataError as `read_image`.
        """
        wanted = [batch.split(DECODED_AT_ONCE) for batch in order.cpu().split(batch_size)]
        loader = DataLoader(
            _Decoder(self, crops, flip),
            batch_size=None,
            sampler=[part.numpy() for parts in wanted for part in parts],
            num_workers=_decoders(self.device),
            pin_memory=self.device.type == "cuda",
            # its own, so that iterating leaves the global one as it is
            generator=torch.Generator(),
        )
        loaded = iter(loader)
        for parts in wanted:
            found = [next(loaded) for _ in parts]
            for part in found:
                if isinstance(part, DataError):
                    raise part
            yield torch.cat([part.to(self.device, non_blocking=True) for part in found])


class _Decoder:
    """What the decoding processes do: numbers of images -> uint8 [B, size, size, 3], or the DataError."""

    def __init__(self, files: ImageFiles, crops: int | None, flip: bool):
        from torchvision import transforms

        self.files, self.crops = files, crops
        if crops is None:
            steps = [transforms.Resize(round(files.size * 256 / 224)), transforms.CenterCrop(files.size)]
        else:
            steps = [transforms.RandomResizedCrop(files.size)]
            steps += [transforms.RandomHorizontalFlip()] if flip else []
        self.change = transforms.Compose(steps)

    def __getitem__(self, numbers: np.ndarray) -> Tensor | DataError:
        try:
            return torch.from_numpy(np.stack([self._image(number) for number in numbers]))
        except DataError as error:  # raised here, it would arrive with a traceback for a message
            return error

    def _image(self, number: int) -> np.ndarray:
        files, digest = self.files, self.files.digests[number].tobytes()
        if self.crops is not None:
            torch.default_generator.manual_seed(stream(self.crops, digest.hex()))
        return np.asarray(self.change(read_image(files.root / os.fsdecode(files.paths[number]), digest)))


def _decoders(device: torch.device) -> int:
    """How many processes decode: a GPU's share of the cores, or one beside a run that trains on a core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // torch.cuda.device_count()) if device.type == "cuda" else 1


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels of three splits.

    images: split name -> uint8 tensor [N, H, W, C] (channels last: a batch needs no copy for that memory format), or
    ImageFiles in its place.
    labels: split name -> int64 tensor [N].
    scale: the pixel value that means 1.0 (255, or 16 for the 8x8 digits).
    mean, std: per channel, in units of `scale`; used to normalise.
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
        matrix = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
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


def load(settings: DatasetSettings) -> Dataset:
    """The data set that the settings name, split and ready to train on (on the CPU).

    A local `.npz` is read as it is; all else but the embedded digits from the file that `common.prepare` made.
    Raises DataError naming what is missing, damaged, wrongly shaped or wrongly labelled.
    """
    if settings.source == "digits":
        return _digits(settings)
    return _split(settings, _local(settings) if settings.source == "npz" else _prepared(settings))


@functools.lru_cache(maxsize=64)
def fingerprint(settings: DatasetSettings) -> str:
    """SHA-256 of the images and labels that the settings name, before any split. Raises DataError."""
    if settings.source == "digits":
        return DIGITS_SHA256
    if settings.source != "npz":
        return str(_opened(settings.prepared, settings, "sha256")["sha256"])
    try:
        with open(settings.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{settings.path}: cannot be read: {error.strerror}") from None


def _digits(settings: DatasetSettings) -> Dataset:
    """The 1,797 handwritten 8x8 digits that scikit-learn carries (UCI optical recognition, test part)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.ascontiguousarray(bunch.images.astype(np.uint8)[..., None])
    labels = bunch.target.astype(np.int64)
    found = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    if found != DIGITS_SHA256:
        raise DataError(
            f"the digits of scikit-learn have SHA-256 {found}, expected {DIGITS_SHA256}: damaged or changed"
        )
    test = settings.test or DIGITS_TEST
    train = settings.train or len(labels) - test - settings.validation
    parts = stratified(labels, [train, settings.validation, test], stream(settings.split_seed, "digits"))
    return make_dataset("digits", dict(zip(SPLITS, parts)), images, labels, 10, 16.0, settings.augmentation)


def make_dataset(
    name: str,
    parts: dict[str, np.ndarray],
    images: np.ndarray,
    labels: np.ndarray,
    classes: int,
    scale: float,
    augmentation: AugmentationSettings,
) -> Dataset:
    """A Dataset from index sets into one array [N, H, W, C]; mean and std are those of the training images."""
    pixels = images[parts["train"]].astype(np.float64) / scale
    return Dataset(
        name=name,
        images={split: torch.from_numpy(images[index]) for split, index in parts.items()},
        labels={split: torch.from_numpy(labels[index].astype(np.int64)) for split, index in parts.items()},
        classes=classes,
        scale=scale,
        mean=tuple(pixels.mean((0, 1, 2)).round(6).tolist()),
        std=tuple(pixels.std((0, 1, 2)).round(6).tolist()),
        augmentation=augmentation,
    )


def _opened(path: str | Path, settings: DatasetSettings, *keys: str) -> Arrays:
    """Arrays of an .npz file, all or those called `keys`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in keys or file.files}
    except FileNotFoundError:
        make = "" if settings.source == "npz" else "; `dvc repro data` or `python -m common.prepare` makes it"
        raise DataError(f"{path}: the array file of {settings.origin} is not there{make}") from None
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(f"{path}: not a readable .npz file, or damaged: {error}") from None


def checked(arrays: Arrays, origin: str) -> Arrays:
    """x_train, y_train, x_test, y_test (uint8 [N, H, W, C] and int64 [N]), `classes`, and `scale` if it is not 255.

    Images may come as [N, H, W], classes may be absent. origin: what messages call the data. Raises DataError.
    """
    for key in ("x_train", "y_train", "x_test", "y_test"):
        if key not in arrays:
            raise DataError(f"{origin}: {key} is missing; x_train, y_train, x_test and y_test are needed")
    labels = arrays["y_train"]
    count = int(labels.max(initial=0)) + 1 if labels.dtype.kind in "iu" else 1
    classes = np.asarray(arrays.get("classes", range(count)), dtype=str)
    found = {"classes": classes} | {key: arrays[key] for key in ("scale",) if key in arrays}
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        x = x[..., None] if x.ndim == 3 else x
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3) or len(x) == 0:
            raise DataError(
                f"{origin}: x_{split} is {x.dtype} {x.shape}; uint8 [N, height, width, 1 or 3] is needed"
            )
        if y.shape != (len(x),) or y.dtype.kind not in "iu":
            raise DataError(
                f"{origin}: y_{split} is {y.dtype} {y.shape} for {len(x)} images; a whole number each is needed"
            )
        wrong = np.flatnonzero((y < 0) | (y >= len(classes)))
        if len(wrong):
            example = f"y_{split}[{wrong[0]}] = {y[wrong[0]]}"
            raise DataError(
                f"{origin}: {example}, but there are {len(classes)} classes (0 to {len(classes) - 1})"
            )
        found |= {f"x_{split}": x, f"y_{split}": y.astype(np.int64)}
    absent = set(range(len(classes))) - set(np.unique(found["y_train"]).tolist())
    if absent:
        raise DataError(f"{origin}: no training image of class {classes[min(absent)]} (label {min(absent)})")
    if found["x_train"].shape[1:] != found["x_test"].shape[1:]:
        shapes = f"{found['x_train'].shape[1:]} and {found['x_test'].shape[1:]}"
        raise DataError(f"{origin}: training and test images have different shapes, {shapes}")
    return found


def _local(settings: DatasetSettings) -> Arrays:
    return checked(_opened(settings.path, settings), settings.path)


def content_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, types, shapes and bytes of arrays, 64 hexadecimal characters."""
    content = hashlib.sha256()
    for key in sorted(arrays):
        content.update(f"{key} {arrays[key].dtype} {arrays[key].shape}".encode())
        content.update(np.ascontiguousarray(arrays[key]).tobytes())
    return content.hexdigest()


def _prepared(settings: DatasetSettings) -> Arrays:
    """What `common.prepare` wrote, checked against the digest in it."""
    arrays = _opened(settings.prepared, settings)
    if content_digest({k: v for k, v in arrays.items() if k != "sha256"}) != str(arrays.get("sha256")):
        raise DataError(
            f"{settings.prepared}: damaged (its digest does not match); delete it and prepare it again"
        )
    return arrays


def _split(settings: DatasetSettings, arrays: Arrays) -> Dataset:
    labels = np.concatenate([arrays["y_train"], arrays["y_test"]])
    count = len(arrays["y_train"])
    train = settings.train or count - settings.validation
    if train < 1:
        raise DataError(
            f"{settings.origin}: {settings.validation} validation images leave none of {count} for training"
        )
    kept = stratified(
        arrays["y_train"], [train, settings.validation], stream(settings.split_seed, settings.source)
    )
    test = settings.test or len(labels) - count
    (tested,) = stratified(arrays["y_test"], [test], stream(settings.split_seed, "test-subset"))
    parts = dict(zip(SPLITS, [*kept, count + tested]))
    classes = len(arrays["classes"])
    if settings.streamed:
        return _streamed(settings, arrays, parts, labels, classes)
    images = np.concatenate([arrays["x_train"], arrays["x_test"]])
    scale = float(arrays.get("scale", 255.0))
    return make_dataset(settings.source, parts, images, labels, classes, scale, settings.augmentation)


def _streamed(
    settings: DatasetSettings, index: Arrays, parts: dict[str, np.ndarray], labels: np.ndarray, classes: int
) -> Dataset:
    """The images of a prepared index; normalised as is usual for ImageNet."""
    root = Path(settings.path)
    if not root.is_dir():
        raise DataError(f"{root}: the folder of the streamed images is not there")
    columns = (
        np.concatenate([index[f"{name}_train"], index[f"{name}_test"]]) for name in ("paths", "sha256")
    )
    files = ImageFiles(root, *columns, settings.size)
    return Dataset(
        name=settings.source,
        images={split: files[chosen] for split, chosen in parts.items()},
        labels={split: torch.from_numpy(labels[chosen]) for split, chosen in parts.items()},
        classes=classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        augmentation=settings.augmentation,
    )
