"""Where data sets come from: the embedded digits, local arrays, and the checked files that the stage `data` makes."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.core.data import SPLITS, Dataset, check_classes, stratified
from common.core.files import Arrays, read_npz, reading, size_of
from common.core.identity import digest, stream
from common.core.streamed import ImageFiles
from common.settings import AugmentationSettings, DataError, DatasetSettings

DIGITS_SHA256 = "65e5b4619795efb40c1082f4c350c049e4ad552200d369b6ae99e21eef5e72c5"
DIGITS_FILE = "sklearn/datasets/data/digits.csv.gz"
DIGITS_TEST = 1000
NEEDED = ("x_train", "y_train", "x_test", "y_test")
"""What an array file must hold."""
PREPARES = "`dvc repro data` or `python -m common.stage.prepare`"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load(settings: DatasetSettings, seed: int = 0) -> Dataset:
    """The data set that the settings name, split and ready to train on (on the CPU); see `read` and `Source.drawn`."""
    return read(settings).drawn(seed)


def read(settings: DatasetSettings) -> Source:
    """The images that the settings name.

    A local `.npz` is read as it is; all else but the embedded digits from the file that `common.stage.prepare` made.
    Raises DataError naming what is missing, damaged, wrongly shaped or wrongly labelled.
    """
    if settings.source == "digits":
        return _digits(settings)
    return _split(settings, _local(settings) if settings.source == "npz" else _prepared(settings))


@dataclass(frozen=True, eq=False)
class Source:
    """The images of a data set, before training and validation images are drawn from them.

    images: uint8 [N, H, W, C], or the files. labels: int64 [N]. train, validation, test: sorted indices; the first two
    by `split_seed`. rest: of all images that are not for test.
    """

    settings: DatasetSettings
    images: np.ndarray | ImageFiles
    labels: np.ndarray
    classes: int
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    rest: np.ndarray
    scale: float = 255.0

    def drawn(self, seed: int) -> Dataset:
        """The data set as the runs of a seed see it: with training and validation images of its own, or shared ones."""
        settings = self.settings
        train, validation = self.train, self.validation
        if settings.split == "per_seed":
            draw = stream(settings.split_seed, "split", settings.source, seed)
            counts = [len(train), len(validation)]
            train, validation = (self.rest[i] for i in stratified(self.labels[self.rest], counts, draw))
        check_classes(self.labels[train], self.classes, settings.origin)
        parts = dict(zip(SPLITS, (train, validation, self.test)))
        what = settings.source, parts, self.images, self.labels, self.classes
        data = make_dataset(*what, self.scale, settings.augmentation)
        if data.constant_channels == list(range(data.image_shape[0])):
            raise DataError(f"{settings.origin}: every channel of the training images is constant")
        return data


@functools.lru_cache(maxsize=64)
def fingerprint(settings: DatasetSettings) -> str:
    """SHA-256 of the images and labels that the settings name, before any split. Raises DataError."""
    if settings.source == "digits":
        return DIGITS_SHA256
    if settings.source != "npz":
        return str(_opened(prepared_file(settings), settings, "sha256").get("sha256"))
    with reading(settings.local, "cannot be read"):
        size_of(settings.local)
        with open(settings.local, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def prepared_file(settings: DatasetSettings) -> Path:
    """The array file that `python -m common.stage.prepare` makes of a data set; training reads only this."""
    names = {"source", "path", "size", "streamed"}
    if settings.source in ("caltech101", "folder"):  # may have no test split of their own
        names |= {"test", "train_per_class", "split_seed"}
    what = settings.model_dump(include=names)
    return Path("data/prepared") / f"{settings.source}-{digest(what)[:12]}.npz"


def _digits(settings: DatasetSettings) -> Source:
    """The 1,797 handwritten 8x8 digits that scikit-learn carries (UCI optical recognition, test part)."""
    # its file as it is: to load the package, as each process would have to, takes seconds
    files = (Path(folder, DIGITS_FILE) for folder in sys.path)
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise DataError(f"{DIGITS_FILE}: not where Python looks for packages; scikit-learn has it")
    with reading(file, "cannot be read"):
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    images = np.ascontiguousarray(table[:, :-1].reshape(-1, 8, 8, 1))
    labels = table[:, -1].astype(np.int64)
    found = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    if found != DIGITS_SHA256:
        raise DataError(
            f"the digits of scikit-learn have SHA-256 {found}, expected {DIGITS_SHA256}: damaged or changed"
        )
    test = settings.test or DIGITS_TEST
    train = settings.train or len(labels) - test - settings.validation
    asked = {"train": train, "validation": settings.validation, "test": test}
    parts = _drawn(settings, labels, asked, "digits")
    rest = np.setdiff1d(np.arange(len(labels)), parts[2])
    return Source(settings, images, labels, 10, parts[0], parts[1], parts[2], rest, scale=16.0)


def make_dataset(
    name: str,
    parts: dict[str, np.ndarray],
    images: np.ndarray | ImageFiles,
    labels: np.ndarray,
    classes: int,
    scale: float,
    augmentation: AugmentationSettings,
) -> Dataset:
    """A Dataset from index sets into one array [N, H, W, C]; mean and std are those of the training images.

    Files are normalised as is usual for ImageNet.
    """
    split: dict[str, torch.Tensor | ImageFiles]
    if isinstance(images, ImageFiles):
        mean, std = list(IMAGENET_MEAN), list(IMAGENET_STD)
        split = {part: images[index] for part, index in parts.items()}
    else:
        pixels = {part: torch.from_numpy(images[index]) for part, index in parts.items()}
        mean, std = _normalisation(pixels["train"], scale)
        split = dict(pixels)
    found = {part: torch.from_numpy(labels[index].astype(np.int64)) for part, index in parts.items()}
    return Dataset(name, split, found, classes, scale, tuple(mean), tuple(std), augmentation)


def _normalisation(pixels: torch.Tensor, scale: float) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 [N, H, W, C]; 1 where a channel is constant."""
    # from how often each value is there: in floating point all pixels would take eight times the memory, and seconds
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in pixels.unbind(-1)]).numpy()
    values, every = np.arange(256) / scale, counts.sum(1)
    mean = counts @ values / every
    variance = (counts * (values - mean[:, None]) ** 2).sum(1) / every
    return mean.round(6).tolist(), [deviation or 1.0 for deviation in np.sqrt(variance).round(6).tolist()]


def _opened(path: str | Path, settings: DatasetSettings, *keys: str) -> Arrays:
    """Arrays of an .npz file, all or those called `keys`, where it has them."""
    if not Path(path).exists():
        make = "" if settings.source == "npz" else f"; {PREPARES} makes it"
        raise DataError(f"{path}: the array file of {settings.origin} is not there{make}")
    return read_npz(path, keys or None)


def checked(arrays: Arrays, origin: str) -> Arrays:
    """x_train, y_train, x_test, y_test (uint8 [N, H, W, C] and int64 [N]), `classes`, and `scale` if it is not 255.

    Images may come as [N, H, W], classes may be absent. origin: what messages call the data. Raises DataError.
    """
    for key in NEEDED:
        if key not in arrays:
            raise DataError(f"{origin}: {key} is missing; {', '.join(NEEDED)} are needed")
    classes = _classes(arrays, origin)
    found = {"classes": classes}
    if "scale" in arrays:
        found["scale"] = _scale(arrays["scale"], origin)
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        x = x[..., None] if x.ndim == 3 else x
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3) or 0 in x.shape:
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
    if len(classes) < 2:
        raise DataError(f"{origin}: there is one class only; two are needed at least")
    return found


def _classes(arrays: Arrays, origin: str) -> np.ndarray:
    """The names of the classes; numbers where the arrays have none. Raises DataError."""
    if "classes" not in arrays:
        labels = arrays["y_train"]
        highest = int(labels.max(initial=0)) if labels.dtype.kind in "iu" else 1
        if highest >= max(labels.size, 2):  # each class has a training image
            raise DataError(
                f"{origin}: y_train has a label {highest}, and {labels.size} training images cannot be of so many "
                "classes: they are numbered from 0 without gaps"
            )
        classes = np.asarray(range(highest + 1), dtype=str)
    else:
        classes = arrays["classes"]
        if classes.dtype.kind == "S":
            classes = np.char.decode(classes, "utf-8", "replace")
        if classes.ndim != 1 or classes.dtype.kind not in "iuU":
            raise DataError(
                f"{origin}: classes is {classes.dtype} {classes.shape}; a list of their names is needed"
            )
        classes = classes.astype(str)
    if len(set(classes.tolist())) < len(classes):
        raise DataError(f"{origin}: classes has a name twice; each class needs one of its own")
    return classes


def _scale(scale: np.ndarray, origin: str) -> np.ndarray:
    """The pixel value that means 1.0. Raises DataError."""
    known = scale.size == 1 and scale.dtype.kind in "iuf"
    if not known or not 0 < scale.item() <= 255:
        raise DataError(f"{origin}: scale = {scale!r:.60}: must be a number above 0, and 255 at most")
    return scale


def _local(settings: DatasetSettings) -> Arrays:
    return checked(_opened(settings.local, settings, *NEEDED, "classes", "scale"), settings.local)


def content_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, types, shapes and bytes of arrays, 64 hexadecimal characters."""
    content = hashlib.sha256()
    for key in sorted(arrays):
        content.update(f"{key} {arrays[key].dtype} {arrays[key].shape}".encode())
        content.update(np.ascontiguousarray(arrays[key]).tobytes())
    return content.hexdigest()


def _prepared(settings: DatasetSettings) -> Arrays:
    """What `common.stage.prepare` wrote, checked against the digest in it."""
    arrays = _opened(prepared_file(settings), settings)
    if content_digest({k: v for k, v in arrays.items() if k != "sha256"}) != str(arrays.get("sha256")):
        raise DataError(
            f"{prepared_file(settings)}: damaged (its digest does not match); delete it and prepare it again"
        )
    return arrays


def _split(settings: DatasetSettings, arrays: Arrays) -> Source:
    labels = np.concatenate([arrays["y_train"], arrays["y_test"]]).astype(np.int64)
    count = len(arrays["y_train"])
    train = settings.train or count - settings.validation
    asked = {"train": train, "validation": settings.validation}
    first, second = _drawn(settings, arrays["y_train"], asked, settings.source)
    test = settings.test or len(labels) - count
    (tested,) = _drawn(settings, arrays["y_test"], {"test": test}, "test-subset")
    images: np.ndarray | ImageFiles
    if settings.streamed:
        images = _files(settings, arrays)
    else:
        images = np.concatenate([arrays["x_train"], arrays["x_test"]])
    scale = float(arrays["scale"].item()) if "scale" in arrays else 255.0
    classes, rest = len(arrays["classes"]), np.arange(count)
    return Source(settings, images, labels, classes, first, second, count + tested, rest, scale)


def _drawn(
    settings: DatasetSettings, labels: np.ndarray, asked: Mapping[str, int], draw: str
) -> list[np.ndarray]:
    """Disjoint parts of so many images, as of `stratified`. Raises DataError that names the settings."""
    if asked.get("train", 1) < 1:
        held = f"{settings.validation} validation images" + " and the test images" * ("test" in asked)
        raise DataError(f"{settings.origin}: {held} leave none of {len(labels)} for training")
    try:
        return stratified(labels, list(asked.values()), stream(settings.split_seed, draw))
    except DataError as error:
        named = " and ".join(f"dataset.{split} = {count}" for split, count in asked.items())
        raise DataError(f"{settings.origin}: {named}: {error}") from None


def _files(settings: DatasetSettings, index: Arrays) -> ImageFiles:
    """The images of a prepared index."""
    root, size = Path(settings.local), settings.size
    assert size is not None  # a rule of the settings
    if not root.is_dir():
        raise DataError(f"{root}: the folder of the streamed images is not there")
    paths, digests = (
        np.concatenate([index[f"{name}_train"], index[f"{name}_test"]]) for name in ("paths", "sha256")
    )
    return ImageFiles(root, paths, digests, size)
