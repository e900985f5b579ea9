"""Folders of images, one for each class: which files they hold, and these as arrays or as an index.

Nothing is taken for a class or an image in silence, nor left out: what is passed over, and what is no plain picture of 8
bits, is said in remarks.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.core.files import Arrays
from common.core.pictures import ENDINGS, indexed, read_picture
from common.settings import DataError, DatasetSettings

_LEFTOVERS = ("__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
"""What systems and programs leave in folders, beside what begins with a dot."""
_HIDDEN = "are hidden, or left by a system or a notebook"
_NOT_SQUARE = "are not square: only the square in their middle is taken"
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_NO_CLASSES = "not a folder of class folders with images"


@dataclass
class Images:
    """The images in class folders: paths, and labels that count `classes`."""

    classes: list[str]
    paths: list[Path] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


class _Walk:
    """Class folders, followed through links, but none entered twice: its images would count as several."""

    def __init__(self, root: Path):
        self.root, real = root, root.resolve()
        self.entered = {folder: folder for folder in (real, *real.parents)}
        self.skipped: Counter[str] = Counter()

    def images(self, folder: Path) -> Images:
        """What the class folders in a folder hold. Raises DataError."""
        entries = self._entries(folder)
        folders = [path for path in entries if path.is_dir()]
        self.skip("are images in no class folder", sum(_is_image(p) and not p.is_dir() for p in entries))
        found = Images([path.name for path in folders])
        for label, path in enumerate(folders):
            files = list(self._files(path))
            found.paths += files
            found.labels += [label] * len(files)
        if empty := sorted(set(range(len(folders))) - set(found.labels)):
            names = ", ".join(found.classes[label] for label in empty[:5])
            raise DataError(
                f"{folder}: {_NO_CLASSES}: no valid file for the classes {names}; files end in {', '.join(ENDINGS)}"
            )
        if len(folders) < 2:
            raise DataError(
                f"{folder}: {_NO_CLASSES}: it has {len(folders)} of them, and two are needed at least"
            )
        return found

    def enter(self, folder: Path) -> None:
        """Go into a folder. Raises DataError where that has been done."""
        real = folder.resolve()
        if real in self.entered:
            raise DataError(
                f"{folder}: a link to {self.entered[real]}, whose images would count twice: remove it"
            )
        self.entered[real] = folder

    def _files(self, folder: Path) -> Iterator[Path]:
        """The image files in a folder and in those below it."""
        self.enter(folder)
        for path in self._entries(folder):
            if path.is_dir():
                yield from self._files(path)
            elif _is_image(path):
                yield path
            else:
                self.skip(f"end in {path.suffix.lower()}" if path.suffix else "have no ending")

    def _entries(self, folder: Path) -> list[Path]:
        """What is in a folder, without leftovers."""
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            raise DataError(f"{folder}: {_NO_CLASSES}: {error.strerror}") from None
        kept = [name for name in names if not _is_left(name)]
        self.skip(_HIDDEN, len(names) - len(kept))
        return [folder / name for name in kept]

    def skip(self, why: str, count: int = 1) -> None:
        """Note what is passed over."""
        if count:
            self.skipped[why] += count

    def remarks(self) -> list[str]:
        """What was passed over."""
        return [
            f"{self.root}: {count} files or folders {why}: not read"
            for why, count in sorted(self.skipped.items())
        ]


def _is_left(name: str) -> bool:
    return name.startswith(".") or name in _LEFTOVERS


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS


def listing(root: Path) -> tuple[dict[str, Images], list[str]]:
    """The images by split, `train` and `test`, or `all` without splits; and what was passed over. Raises DataError.

    They are in root/<class>, or in root/train/<class> and likewise in root/test or root/val.
    """
    walk, found = _Walk(root), dict[str, Images]()
    if not _holds_folders(root / "train"):  # else it is a class
        found["all"] = walk.images(root)
        classes = found["all"].classes
        if {name.casefold() for name in classes} <= _SPLITS:
            raise DataError(
                f"{root}: {', '.join(classes)} are no classes: a folder that is split has class folders in `train`, and in "
                "`test` or `val`"
            )
        return found, walk.remarks()
    test = _test_folder(root)
    for split, folder in (("train", root / "train"), ("test", test)):
        walk.enter(folder)
        found[split] = walk.images(folder)
    if odd := sorted(set(found["train"].classes) ^ set(found["test"].classes)):
        raise DataError(
            f"{root}: train and {test.name} have different classes; only in one of them: {', '.join(odd[:5])}"
        )
    unread = {path.name for path in root.iterdir() if path.is_dir() and not _is_left(path.name)}
    walk.skip(f"are beside train and {test.name}", len(unread - {"train", test.name}))
    return found, walk.remarks()


def read_folder(settings: DatasetSettings, remarks: list[str]) -> Arrays:
    """The images of class folders, see `listing`, as pixels, or as paths and digests where they are streamed.

    remarks: gets what was passed over, and what was no plain picture. Raises DataError.
    """
    root = Path(settings.origin)
    found, passed_over = listing(root)
    if settings.train_per_class and "test" in found:
        raise DataError(f"{root} has a test split of its own: dataset.train_per_class must be absent")
    arrays = {"classes": np.array(next(iter(found.values())).classes)}
    odd = _Odd(root)
    for split, images in found.items():
        arrays[f"y_{split}"] = np.array(images.labels)
        if settings.streamed:
            paths = [os.fsencode(os.path.relpath(path, root)) for path in images.paths]
            arrays[f"paths_{split}"] = np.array(paths)
            arrays[f"sha256_{split}"] = _digests(images.paths, odd)
        else:
            arrays[f"x_{split}"] = stacked(_pictures(images.paths, odd), settings)
    remarks += [*passed_over, *odd.remarks()]
    return arrays


def _holds_folders(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_dir() and not _is_left(path.name) for path in folder.iterdir())


def _test_folder(root: Path) -> Path:
    """`test`, or `val` where the test images have no labels, as in ImageNet."""
    return next((root / name for name in ("test", "val") if _holds_folders(root / name)), root / "test")


class _Odd:
    """Which images are no plain pictures, by what is other."""

    def __init__(self, root: Path):
        self.root = root
        self.found: dict[str, list[Path]] = {}

    def note(self, path: Path, remarks: Iterable[str]) -> None:
        """Keep what is said of one."""
        for remark in remarks:
            self.found.setdefault(remark, []).append(path)

    def remarks(self) -> Iterator[str]:
        """What is said of all."""
        for remark, paths in sorted(self.found.items()):
            yield f"{self.root}: {len(paths)} images {remark} (the first: {paths[0].relative_to(self.root)})"


def _pictures(paths: Sequence[Path], odd: _Odd) -> Iterator[Image.Image]:
    for path in paths:
        picture = read_picture(path)
        width, height = picture.image.size
        odd.note(path, (*picture.remarks, *([_NOT_SQUARE] if width != height else [])))
        yield picture.image


def _digests(paths: Sequence[Path], odd: _Odd) -> np.ndarray:
    """SHA-256 of files, uint8 [N, 32]. Raises DataError naming one that is no image."""
    with ThreadPool() as pool:
        found = pool.imap(indexed, paths, chunksize=64)
        read = list(tqdm(found, total=len(paths), desc="reading image files", unit="file", disable=None))
    for path, (_, remarks) in zip(paths, read, strict=True):
        odd.note(path, remarks)
    return np.frombuffer(b"".join(digest for digest, _ in read), np.uint8).reshape(-1, 32)


def stacked(images: Iterator[Image.Image], settings: DatasetSettings) -> np.ndarray:
    """uint8 [N, height, width, 3] of RGB images. Raises DataError when sizes differ."""
    squares = [_squared(image, settings.size) for image in images]
    sizes = sorted({len(square) for square in squares})
    if len(sizes) > 1:
        raise DataError(
            f"{settings.origin}: images of different sizes ({sizes[0]} to {sizes[-1]} pixels): give dataset.size"
        )
    return np.stack(squares)


def _squared(image: Image.Image, size: int | None) -> np.ndarray:
    """An RGB image with its centre square resized to `size` x `size` by averaging."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    size = size or side
    return np.asarray(image.resize((size, size), Image.Resampling.BOX, (left, top, left + side, top + side)))
