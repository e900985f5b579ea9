"""Predictions: the class that each run gives to each test image, packed beside the records of a paper.

`replications/CLAIMS.md` says what the file holds. With the true classes in it, whatever depends on which images a run has
right needs neither data nor network. Nothing here loads torch.
"""

from __future__ import annotations

import base64
import hashlib
import io
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.typing import ArrayLike

from common.reading import read_bytes
from common.records import Record
from common.settings import SettingsError

SUFFIX = ".predictions.npz"
"""How the name of the file ends that stands beside `<paper>.jsonl`."""
_CLASS = np.dtype("<u2")
_MOST_BYTES = 2**30
"""Of the predictions of a run, and of all those in a file."""
# what NumPy and zipfile raise at one wrong byte or another
_DAMAGED = (
    *(BadZipFile, struct.error, zlib.error, EOFError, LookupError),
    *(MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError),
)


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a run takes the test images for. labels, classes: true and predicted class of each, [images], as `of` makes them."""

    labels: np.ndarray
    classes: np.ndarray

    @classmethod
    def of(cls, labels: ArrayLike, classes: ArrayLike) -> Predictions:
        """Of classes in any type of number. Raises ValueError where they are not one of each an image."""
        true, predicted = (np.asarray(side).astype(_CLASS) for side in (labels, classes))
        if true.ndim != 1 or not len(true) or true.shape != predicted.shape:
            raise ValueError(f"true classes {true.shape} and predicted ones {predicted.shape}: [images] each")
        return cls(true, predicted)

    @cached_property
    def digest(self) -> str:
        """By what a record names them: SHA-256 of the true classes and then the predicted ones, two bytes each."""
        return hashlib.sha256(self._bytes).hexdigest()

    @property
    def correct(self) -> np.ndarray:
        """Whether the run has each image right, [images]."""
        return np.equal(self.labels, self.classes)

    @property
    def accuracy(self) -> float:
        """The share of images that it has right."""
        return int(self.correct.sum()) / len(self.labels)

    @property
    def text(self) -> str:
        """They as text, for an entry of a single run."""
        return base64.b64encode(zlib.compress(self._bytes, 9)).decode()

    @classmethod
    def from_text(cls, text: str) -> Predictions:
        """What `text` was made of. Raises ValueError for what it has not made."""
        try:
            inflater = zlib.decompressobj()
            found = inflater.decompress(base64.b64decode(text, validate=True), _MOST_BYTES)
            if not inflater.eof:
                raise ValueError("cut off, or too many classes")
            both = np.frombuffer(found, _CLASS)
        except zlib.error as error:
            raise ValueError(str(error)) from None
        images, rest = divmod(len(both), 2)
        if rest:
            raise ValueError("an odd number of classes")
        return cls.of(both[:images], both[images:])

    @property
    def _bytes(self) -> bytes:
        return self.labels.tobytes() + self.classes.tobytes()


def predictions_file(records: Path) -> Path:
    """The file with the predictions of the runs in a file of records."""
    return records.with_suffix(SUFFIX)


def packed(runs: Iterable[Predictions]) -> bytes:
    """The content of the file: each test set once, and with it what any run predicts for it, in order of appearance.

    Equal predictions stand there once. The same runs give the same bytes.
    """
    sets: dict[bytes, dict[str, Predictions]] = {}
    for run in runs:
        sets.setdefault(run.labels.tobytes(), {}).setdefault(run.digest, run)
    arrays: dict[str, Any] = {}
    for number, found in enumerate(sets.values()):
        rows = list(found.values())
        arrays[f"labels_{number}"] = rows[0].labels
        arrays[f"classes_{number}"] = np.stack([row.classes for row in rows], axis=1)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def unpacked(content: bytes, file: Path) -> dict[str, Predictions]:
    """Digest -> predictions, of what `packed` has made. Raises SettingsError that names the file."""
    try:
        with ZipFile(io.BytesIO(content)) as members:
            if sum(member.file_size for member in members.infolist()) > _MOST_BYTES:
                raise ValueError(f"larger than {_MOST_BYTES >> 20} MiB")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            found = [
                Predictions.of(arrays[f"labels_{number}"], row)
                for number in range(len(arrays.files) // 2)
                for row in arrays[f"classes_{number}"].T
            ]
    except _DAMAGED as error:
        raise SettingsError(f"{file}: no readable predictions, or damaged: {error}") from None
    return {predictions.digest: predictions for predictions in found}


def beside(records_file: Path, records: Iterable[Record]) -> dict[str, Predictions]:
    """Digest -> predictions of the runs in a file of records; none where no predictions are beside it. Raises SettingsError."""
    file = predictions_file(records_file)
    if not file.exists():
        return {}
    content = read_bytes(file)
    check(records, found := unpacked(content, file), file)
    return found


def check(records: Iterable[Record], found: Mapping[str, Predictions], file: Path) -> None:
    """Raises SettingsError that names the run where a record's predictions are missing or do not have its accuracy."""
    for record in records:
        if record.predictions is None:
            continue
        run = "{variant}, {dataset}, {architecture}, target {target:g}, seed {seed}".format(**record.identity)
        if record.predictions not in found:
            raise SettingsError(f"{file}: the predictions of {run} are missing or changed")
        accuracy, reported = found[record.predictions].accuracy, record.metrics.get("test_accuracy")
        if accuracy != reported:
            raise SettingsError(
                f"{file}: {run} predicts with an accuracy of {accuracy:g}, but its record says {reported}"
            )
