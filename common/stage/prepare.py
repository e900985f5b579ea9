"""`python -m common.stage.prepare`: bring every data set of a profile into one checked array file each, once.

What the stage `data` of the pipeline calls. torchvision downloads and verifies its own data sets (into `data/downloads`, which
survives a broken attempt), unless `--from` has put a copy of CIFAR there; image folders are converted, or indexed where
they are to be streamed. A local `.npz` already is such a file and is read as it is. What was passed over, what was changed
and what training had better not see is said on stderr and in `data/prepared/manifest.json`.
"""

from __future__ import annotations

from common import commandline

if __name__ == "__main__":
    commandline.listen()  # before what takes long to load

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from common.core.data import stratified
from common.core.files import Arrays, read_npz
from common.core.identity import stream
from common.core.loading import NEEDED, checked, content_digest, prepared_file
from common.core.pictures import shown
from common.settings import PARAMS_FILE, DataError, DatasetSettings, SettingsError
from common.stage import inspection
from common.stage.data import MANIFEST
from common.stage.folders import read_folder, stacked
from common.stage.papers import profile_datasets

DOWNLOADS = Path("data/downloads")
CALTECH101_IMAGES = 8677
CIFAR_SHA256 = {
    "cifar10": "7a47f1124b687c0d7879bd234775caab1c8ef0437b5affa8cbc873fe86c0d219",
    "cifar100": "ab8d8a2c9d7e32cb9c5c6c7fca6ca0fffa18446e857ad908289c136998822988",
}
"""The digests of their arrays in canonical order, by which copies are known."""
CIFAR_CLASSES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split(),
    "cifar100": (
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly "
        "camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup "
        "dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower "
        "leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid "
        "otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray "
        "road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar "
        "sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle "
        "wardrobe whale willow_tree wolf woman worm"
    ).split(),
}
"""The names that the downloads have for the labels 0, 1, ..."""


def prepare(settings: DatasetSettings, remarks: list[str] | None = None) -> Arrays:
    """The arrays of a data set that is not one array file yet, in their canonical order. Raises DataError.

    See `common.core.loading.checked`; for streamed images paths and SHA-256 of the files stand in place of pixels.
    remarks: gets what was passed over in a folder, or changed.
    """
    remarks = [] if remarks is None else remarks
    arrays = canonical(_SOURCES[settings.source](settings, remarks))
    if settings.size and settings.source in _OF_ONE_SIZE:
        arrays |= {key: _resized(value, settings.size) for key, value in arrays.items() if key[:2] == "x_"}
    if "y_all" in arrays:
        arrays = _without_test(arrays, settings)
    return arrays if settings.streamed else checked(arrays, settings.origin)


def canonical(arrays: Arrays) -> Arrays:
    """The same images, those of each split (train, test, or all) by label and then by SHA-256 of their bytes.

    So a prepared file and its digest depend on the images alone, not on the order in which a source has them.
    """
    found = dict(arrays)
    for labels in [key for key in arrays if key.startswith("y_")]:
        split = labels.removeprefix("y")
        if (known := arrays.get(f"sha256{split}")) is not None:
            digests = [digest.tobytes() for digest in known]
        else:
            digests = [hashlib.sha256(image.tobytes()).digest() for image in arrays[f"x{split}"]]
        keys = list(zip(arrays[labels].tolist(), digests, strict=True))
        order = np.array(sorted(range(len(keys)), key=keys.__getitem__))
        found |= {key: value[order] for key, value in arrays.items() if key.endswith(split)}
    return found


def _downloaded(make: Callable, origin: str):
    """A torchvision data set, downloaded and verified by torchvision; its errors become a DataError."""
    try:
        return make()
    except DataError:
        raise
    except Exception as error:  # torchvision raises whatever the network or the archive raised
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{origin}: the download or its check failed ({type(error).__name__}: {reason}); what is complete is kept in "
            f"{DOWNLOADS}, the same command tries again. Without a network, give a local `.npz` or folder instead "
            "(of CIFAR: as it is in the settings, with --from)."
        ) from None


def _mnist(settings: DatasetSettings, _: list[str]) -> Arrays:
    from torchvision import datasets as tv

    arrays: Arrays = {}
    for split in ("train", "test"):
        data = _downloaded(
            lambda s=split: tv.MNIST(settings.path or DOWNLOADS, train=s == "train", download=True), "mnist"
        )
        arrays |= {f"x_{split}": data.data.numpy(), f"y_{split}": data.targets.numpy()}
    return arrays


def _cifar(settings: DatasetSettings, _: list[str]) -> Arrays:
    from torchvision import datasets as tv

    if settings.path is None and (copy := _copy_of(settings.source)).exists():
        return cifar_copy(copy)[1]
    kind = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[settings.source]
    root = settings.path or DOWNLOADS
    train, test = (
        _downloaded(lambda t=t: kind(root, train=t, download=True), settings.source) for t in (True, False)
    )
    arrays = {"x_train": train.data, "y_train": np.array(train.targets), "classes": np.array(train.classes)}
    return arrays | {"x_test": test.data, "y_test": np.array(test.targets)}


def _copy_of(source: str) -> Path:
    """Where a copy of CIFAR stands in place of its download."""
    return DOWNLOADS / f"{source}.npz"


def cifar_copy(file: Path) -> tuple[str, Arrays]:
    """The source of which a file is a copy, `cifar10` or `cifar100`, and its arrays as the download has them.

    The file holds x_train, y_train, x_test and y_test in any order of the images; other arrays are passed over. Raises
    DataError if it is no such copy.
    """
    arrays = checked(read_npz(file, NEEDED), str(file))
    known = {len(names): source for source, names in CIFAR_CLASSES.items()}
    if (source := known.get(len(arrays["classes"]))) is None:
        raise DataError(
            f"{file}: neither CIFAR-10 nor CIFAR-100: it has labels of {len(arrays['classes'])} classes"
        )
    arrays = canonical(arrays | {"classes": np.array(CIFAR_CLASSES[source])})
    if (found := content_digest(arrays)) != CIFAR_SHA256[source]:
        counts = f"{len(arrays['y_train'])} training and {len(arrays['y_test'])} test images"
        raise DataError(
            f"{file}: not {source}: the {counts} have the digest {found[:12]}, not {CIFAR_SHA256[source][:12]}; "
            "an image or a label differs, or is missing"
        )
    return source, arrays


def _put_copy(file: Path, sources: Collection[str]) -> None:
    """Put a copy of CIFAR in place of its download. sources: what the profile reads. Raises DataError."""
    source, arrays = cifar_copy(file)
    if source not in sources:
        raise DataError(f"{file}: this is {source}, which the profile does not read; --profile names another")
    write(_copy_of(source), arrays)


def _svhn(settings: DatasetSettings, _: list[str]) -> Arrays:
    from torchvision import datasets as tv

    arrays: Arrays = {}
    for split in ("train", "test"):
        data = _downloaded(
            lambda s=split: tv.SVHN(settings.path or DOWNLOADS, split=s, download=True), "svhn"
        )
        arrays |= {f"x_{split}": data.data.transpose(0, 2, 3, 1), f"y_{split}": np.asarray(data.labels)}
    return arrays


def _caltech101(settings: DatasetSettings, _: list[str]) -> Arrays:
    from torchvision import datasets as tv

    root = settings.path or DOWNLOADS
    data = _downloaded(lambda: tv.Caltech101(root, target_type="category", download=True), "caltech101")
    # torchvision takes a folder for complete that a broken extraction has left
    if len(data) != CALTECH101_IMAGES:
        raise DataError(
            f"{data.root}: {len(data)} images in place of {CALTECH101_IMAGES}, as after a broken extraction; "
            "delete the folder and prepare again"
        )
    images = _downloaded(lambda: stacked((shown(image) for image, _ in data), settings), "caltech101")
    return {"x_all": images, "y_all": np.array(data.y), "classes": np.array(data.categories)}


def _resized(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, size, size, ...] of [N, H, W, ...], by averaging."""
    pictures = (Image.fromarray(image).resize((size, size), Image.Resampling.BOX) for image in images)
    return np.stack([np.asarray(picture) for picture in pictures])


def _without_test(arrays: Arrays, settings: DatasetSettings) -> Arrays:
    """Hold out `settings.test` images, or all but `train_per_class` of each class, as the test split."""
    labels, seed = arrays["y_all"], stream(settings.split_seed, "test", settings.source)
    everything = np.arange(len(labels))
    if settings.train_per_class:
        rng = np.random.default_rng(seed)
        chosen = [
            rng.permutation(np.flatnonzero(labels == c))[: settings.train_per_class]
            for c in np.unique(labels)
        ]
        test = np.setdiff1d(everything, np.concatenate(chosen))
    elif settings.test:
        (test,) = stratified(labels, [settings.test], seed)
    else:
        raise DataError(f"{settings.origin} has no test split: give dataset.test or dataset.train_per_class")
    parts = {"train": np.setdiff1d(everything, test), "test": test}
    names = [key.removesuffix("_all") for key in arrays if key.endswith("_all")]
    split = {
        f"{name}_{part}": arrays[f"{name}_all"][index] for part, index in parts.items() for name in names
    }
    return split | {"classes": arrays["classes"]}


_OF_ONE_SIZE = ("mnist", "cifar10", "cifar100", "svhn")
"""Sources whose images are squares of one size."""
_SOURCES: dict[str, Callable[[DatasetSettings, list[str]], Arrays]] = {
    "mnist": _mnist,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "svhn": _svhn,
    "caltech101": _caltech101,
    "folder": read_folder,
}


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that is at `path` in the end, whole or not at all. Raises DataError."""
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from None


def write(path: Path, arrays: Arrays) -> None:
    """Write a prepared file with the digest of its arrays, whole or not at all. Raises DataError."""
    with _whole(path) as file:
        whole: dict[str, Any] = {**arrays, "sha256": np.array(content_digest(arrays))}
        np.savez(file, **whole)


def described(settings: DatasetSettings) -> dict[str, Any]:
    """What the manifest says of a data set, which is prepared if it is not yet; see `inspection.described`."""
    file = prepared_file(settings)
    if settings.source in _SOURCES and not file.exists():
        remarks: list[str] = []
        arrays = prepare(settings, remarks)
        with _whole(inspection.remarks_file(settings)) as beside:
            beside.write((json.dumps(remarks, indent=1) + "\n").encode())
        write(file, arrays)
    return inspection.described(settings)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status. What cannot be prepared is named after all else is done."""
    parser = argparse.ArgumentParser(prog="python -m common.stage.prepare", description=__doc__)
    parser.add_argument("--params", default=PARAMS_FILE, help="settings file (default: %(default)s)")
    parser.add_argument("--profile", help="profile to use in place of the one that the file selects")
    parser.add_argument(
        "--from",
        dest="copies",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.npz",
        help="a copy of CIFAR-10 or CIFAR-100 to use in place of the download, with x_train, y_train, x_test and y_test; "
        "which one it is, and whether it is whole, is told by its content; may be repeated",
    )
    options = parser.parse_args(arguments)
    manifest: dict[str, object] = {}
    errors: list[SettingsError] = []
    try:
        datasets = profile_datasets(options.params, options.profile)
        sources = {settings.source for settings in datasets if settings.path is None}
        for file in options.copies:
            try:
                _put_copy(file, sources)
            except DataError as wrong:
                errors.append(wrong)
        for settings in datasets:
            if settings.source in _SOURCES or inspection.is_told(settings):
                try:
                    manifest[settings.origin] = found = described(settings)
                except DataError as missing:
                    errors.append(missing)
                else:
                    for remark in found["remarks"]:
                        print(f"note: {remark}", file=sys.stderr)
        with _whole(MANIFEST) as file:
            file.write((json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    except SettingsError as wrong:
        errors.append(wrong)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 2 if errors else 0


if __name__ == "__main__":
    commandline.run(main)
