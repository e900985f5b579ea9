"""`python -m benchmarks.gpu.parts`: an array file in parts that small transfers hold, and back.

    python -m benchmarks.gpu.parts split cifar10.npz FOLDER --size 55     # FOLDER/cifar10.0.part, cifar10.1.part, ...
    python -m benchmarks.gpu.parts join FOLDER cifar10.npz

A part is an .npz of columns of images, as lossless WebP (half as large as the pixels), with their labels.
`python -m common.stage.prepare --from` checks the digest of what was joined.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common.settings import DataError

HIGHEST = 16383
"""Pixels that a WebP image may have."""
SPLITS = ("train", "test")


def split(file: Path, folder: Path, megabytes: float) -> list[Path]:
    """Write an .npz with x_train, y_train, x_test and y_test (uint8 RGB images) as parts of at most so many 10^6 bytes.

    Raises DataError for other arrays, or where a column alone is larger.
    """
    limit, parts = int(megabytes * 1e6), list[dict[str, np.ndarray]]()
    room = 0
    for name, column, labels in _columns(file):
        size = len(column) + labels.nbytes + 1024  # and the headers of both in the zip file
        if size > limit:
            raise DataError(
                f"{file}: parts of {megabytes:g} MB are too small: {len(labels)} images take {size / 1e6:.1f}"
            )
        if size > room:
            parts.append({})
            room = limit - 1024
        parts[-1] |= {f"{name}.webp": np.frombuffer(column, np.uint8), f"{name}.labels": labels}
        room -= size
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{file.stem}.{number}.part" for number in range(len(parts))]
    for path, arrays in zip(files, parts):
        with path.open("wb") as opened:
            np.savez(opened, **arrays)
    return files


def _columns(file: Path) -> Iterator[tuple[str, bytes, np.ndarray]]:
    """Name, WebP and labels of each column."""
    with np.load(file) as arrays:
        for part in SPLITS:
            images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
                raise DataError(f"{file}: x_{part} must be uint8 [N, height, width, 3]")
            height, width = images.shape[1:3]
            count = HIGHEST // height
            for start in range(0, len(images), count):
                column = Image.fromarray(images[start : start + count].reshape(-1, width, 3))
                buffer = io.BytesIO()
                # more effort takes several times as long for a hundredth of the size
                column.save(buffer, "webp", lossless=True, quality=0, method=2, exact=True)
                yield f"{part}.{start:08}", buffer.getvalue(), labels[start : start + count]


def join(files: Sequence[Path], file: Path) -> None:
    """Write the .npz that was split, or as much of it as these parts hold. Raises DataError for what is no part."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for path in files:
        try:
            with np.load(path) as arrays:
                for name in (key.removesuffix(".webp") for key in arrays.files if key.endswith(".webp")):
                    labels = arrays[f"{name}.labels"]
                    with Image.open(io.BytesIO(arrays[f"{name}.webp"].tobytes())) as column:
                        pixels = np.asarray(column.convert("RGB"))
                    found[name] = pixels.reshape(len(labels), -1, *pixels.shape[1:]), labels
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: not a readable part: {error}") from None
    sides = defaultdict[str, list[np.ndarray]](list)
    for name, (images, labels) in sorted(found.items()):
        sides[f"x_{name.split('.')[0]}"].append(images)
        sides[f"y_{name.split('.')[0]}"].append(labels)
    if set(sides) != {f"{letter}_{part}" for letter in "xy" for part in SPLITS}:
        raise DataError(
            f"{', '.join(map(str, files)) or file.stem}: parts with images to train and to test are missing"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as opened:
        np.savez(opened, **{key: np.concatenate(arrays) for key, arrays in sides.items()})


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.parts", description=__doc__.split("\n")[0]
    )
    known = parser.add_subparsers(dest="command", required=True)
    cut = known.add_parser("split", help="write the parts of FILE into FOLDER")
    cut.add_argument("file", type=Path, metavar="FILE.npz")
    cut.add_argument("folder", type=Path)
    cut.add_argument(
        "--size", type=float, default=55, help="10^6 bytes of a part at most (default: %(default)s)"
    )
    whole = known.add_parser("join", help="write FILE from its parts in FOLDER")
    whole.add_argument("folder", type=Path)
    whole.add_argument("file", type=Path, metavar="FILE.npz")
    options = parser.parse_args(arguments)
    try:
        if options.command == "split":
            for part in split(options.file, options.folder, options.size):
                print(f"{part}: {part.stat().st_size / 1e6:.1f} MB")
        else:
            join(sorted(options.folder.glob(f"{options.file.stem}.*.part")), options.file)
    except (DataError, OSError, KeyError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
