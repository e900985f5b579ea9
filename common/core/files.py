"""Files that somebody else has made: reading them is bounded, and what is wrong with one is a DataError that names it."""

from __future__ import annotations

import math
import os
import stat
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from common.settings import DataError

Arrays = dict[str, np.ndarray]
_EXPANDED, _SMALL = 200, 2**26
"""An array file may hold so many times its own size, or so many bytes: images hardly shrink more when compressed."""
_PIECE = 2**20
_LONGEST = 200


@contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """Make of whatever goes wrong with a file one DataError that names it. what: what is then said of it."""
    try:
        yield
    except DataError:
        raise
    except MemoryError:
        raise DataError(f"{path}: {what}: there is no memory for it") from None
    except Exception as error:  # decoders raise whatever damage leads them to
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        told = " ".join(reason.split())[:_LONGEST] or type(error).__name__
        raise DataError(f"{path}: {what}: {told}") from None


def size_of(path: str | Path) -> int:
    """Bytes of an ordinary file. Raises ValueError for a folder, a pipe or a device, OSError."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("no ordinary file")
    return found.st_size


def content_of(path: str | Path, most: int) -> bytes:
    """The bytes of an ordinary file. Raises ValueError for one of more than `most`, and as `size_of`."""
    if (size := size_of(path)) > most:
        raise ValueError(f"{size:,} bytes, and {most:,} at most can be")
    with open(path, "rb") as file:
        return file.read(most)


def read_npz(path: str | Path, keys: Collection[str] | None = None) -> Arrays:
    """The arrays of an .npz file, all or those of `keys` that it has; others are not read.

    Nothing is allocated that the file does not hold. Raises DataError naming what is missing or damaged.
    """
    with reading(path, "not a readable .npz file, or damaged"):
        most = max(_SMALL, _EXPANDED * size_of(path))
        with zipfile.ZipFile(path) as archive:
            members: dict[str, zipfile.ZipInfo] = {}
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if keys is None or name in keys:
                    if name in members:
                        raise ValueError(f"{name} is there twice")
                    members[name] = member
            if (claimed := sum(member.file_size for member in members.values())) > most:
                raise ValueError(f"it claims to hold {claimed:,} bytes, and {most:,} at most can be")
            return {name: _array(archive, name, member) for name, member in members.items()}


def _array(archive: zipfile.ZipFile, name: str, member: zipfile.ZipInfo) -> np.ndarray:
    """One array, in pieces. Raises whatever the damage leads to."""
    if member.flag_bits & 1:
        raise ValueError(f"{name} is encrypted")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that np.savez_compressed does not have")
    with archive.open(member) as file:
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        version = np.lib.format.read_magic(file)
        if version not in header:
            raise ValueError(f"{name} is no array of a known format")
        shape, by_column, dtype = header[version](file)
        if dtype.kind not in "buifSU":
            raise ValueError(f"{name} holds {dtype}, and numbers or text are needed")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or file.tell() + size != member.file_size:
            raise ValueError(f"{name} claims to be {dtype} {shape}, which is not what the file holds")
        found = np.empty(math.prod(shape), dtype)
        for start in range(0, size, _PIECE):
            wanted = min(_PIECE, size - start)
            part = np.frombuffer(file.read(wanted), np.uint8)
            if len(part) < wanted:
                raise EOFError(f"{name} ends before it should")
            found.view(np.uint8)[start : start + wanted] = part
        file.read(1)  # the end, where the checksum is compared
    if dtype.kind == "U":
        found.tolist()  # damaged text shows here
    return found.reshape(shape, order="F" if by_column else "C")
