"""`python -m common.prepare`: bring every data set of a profile into one checked array file each, once.

The stage `data` of the pipeline. torchvision downloads and verifies its own data sets (into `data/downloads`, which
survives a broken attempt); image folders are converted. A local `.npz` already is such a file and is read as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.datasets import SPLITS, Arrays, DataError, checked, content_digest, load, stratified
from common.settings import PARAMS_FILE, DatasetSettings, SettingsError, profile_datasets, stream

DOWNLOADS = Path("data/downloads")


def prepare(settings: DatasetSettings) -> Arrays:
    """The checked arrays of a data set that is not one array file yet, see `common.datasets.checked`. Raises DataError."""
    return checked(_SOURCES[settings.source](settings), settings.origin)


def _downloaded(make: Callable, origin: str):
    """A torchvision data set, downloaded and verified by torchvision; its errors become a DataError."""
    try:
        return make()
    except Exception as error:  # torchvision raises whatever the network or the archive raised
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{origin}: the download or its check failed ({type(error).__name__}: {reason}); what is complete is kept in "
            f"{DOWNLOADS}, the same command tries again. Without a network, give a local `.npz` or folder instead."
        ) from None


def _cifar(settings: DatasetSettings) -> Arrays:
    from torchvision import datasets as tv

    kind = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[settings.source]
    root = settings.path or DOWNLOADS
    train, test = (
        _downloaded(lambda t=t: kind(root, train=t, download=True), settings.source) for t in (True, False)
    )
    arrays = {"x_train": train.data, "y_train": np.array(train.targets), "classes": np.array(train.classes)}
    return arrays | {"x_test": test.data, "y_test": np.array(test.targets)}


def _svhn(settings: DatasetSettings) -> Arrays:
    from torchvision import datasets as tv

    arrays = {}
    for split in ("train", "test"):
        data = _downloaded(
            lambda s=split: tv.SVHN(settings.path or DOWNLOADS, split=s, download=True), "svhn"
        )
        arrays |= {f"x_{split}": data.data.transpose(0, 2, 3, 1), f"y_{split}": np.asarray(data.labels)}
    return arrays


def _caltech101(settings: DatasetSettings) -> Arrays:
    from torchvision import datasets as tv

    root = settings.path or DOWNLOADS
    data = _downloaded(lambda: tv.Caltech101(root, target_type="category", download=True), "caltech101")
    images = np.stack([_squared(image, settings.size) for image, _ in data])
    return _without_test(images, np.array(data.y), settings) | {"classes": np.array(data.categories)}


def _folder(settings: DatasetSettings) -> Arrays:
    """`path`/<class>/<image> or `path`/train/<class>/<image> with `path`/test/<class>/<image>."""
    from torchvision.datasets import ImageFolder

    root = Path(settings.path)

    def read(folder: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
        try:
            found = ImageFolder(str(folder))
            images = np.stack([_squared(_opened(found, path), settings.size) for path, _ in found.samples])
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{folder}: not a folder of class folders with images: {error}") from None
        return images, np.array(found.targets), found.classes

    if not (root / "train").is_dir():
        images, labels, classes = read(root)
        return _without_test(images, labels, settings) | {"classes": np.array(classes)}
    (x, y, classes), (x_test, y_test, test_classes) = read(root / "train"), read(root / "test")
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise DataError(
            f"{root}: train and test have different classes; only in one of them: {', '.join(odd[:5])}"
        )
    return {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test, "classes": np.array(classes)}


def _opened(found, path: str):
    try:
        return found.loader(path)
    except OSError as error:
        raise DataError(f"{path}: not a readable image: {error}") from None


def _squared(image, size: int | None) -> np.ndarray:
    """An RGB image with its centre square resized to `size` x `size` by averaging."""
    from PIL import Image

    image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    size = size or side
    return np.asarray(image.resize((size, size), Image.Resampling.BOX, (left, top, left + side, top + side)))


def _without_test(images: np.ndarray, labels: np.ndarray, settings: DatasetSettings) -> Arrays:
    """Hold out `settings.test` images, or all but `train_per_class` of each class, as the test split."""
    seed = stream(settings.split_seed, "test", settings.source)
    if settings.train_per_class:
        rng = np.random.default_rng(seed)
        chosen = [
            rng.permutation(np.flatnonzero(labels == c))[: settings.train_per_class]
            for c in np.unique(labels)
        ]
        train = np.sort(np.concatenate(chosen))
        test = np.setdiff1d(np.arange(len(labels)), train)
    elif settings.test:
        (test,) = stratified(labels, [settings.test], seed)
        train = np.setdiff1d(np.arange(len(labels)), test)
    else:
        raise DataError(f"{settings.origin} has no test split: give dataset.test or dataset.train_per_class")
    return {
        "x_train": images[train],
        "y_train": labels[train],
        "x_test": images[test],
        "y_test": labels[test],
    }


_SOURCES: dict[str, Callable[[DatasetSettings], Arrays]] = {
    "cifar10": _cifar,
    "cifar100": _cifar,
    "svhn": _svhn,
    "caltech101": _caltech101,
    "folder": _folder,
}


def write(path: Path, arrays: Arrays) -> None:
    """Write a prepared file with the digest of its arrays, whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays, sha256=np.array(content_digest(arrays)))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m common.prepare", description=__doc__)
    parser.add_argument("--params", default=PARAMS_FILE, help="settings file (default: %(default)s)")
    parser.add_argument("--profile", help="profile to use in place of the one that the file selects")
    options = parser.parse_args(arguments)
    manifest = {}
    try:
        for settings in profile_datasets(options.params, options.profile):
            if settings.source in _SOURCES:
                if not settings.prepared.exists():
                    write(settings.prepared, prepare(settings))
                data = load(settings)
                counts = {split: len(data.labels[split]) for split in SPLITS}
                manifest[settings.origin] = {"classes": data.classes, "digest": data.digest, "images": counts}
        folder = Path("data/prepared")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
