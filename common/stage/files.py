"""Files that are there whole or not at all, and show damage. Nothing here loads torch."""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
from pathlib import Path

from common import commandline

_MACHINE = secrets.token_hex(4)
"""Tells processes of machines that share a folder apart, whose numbers may be the same."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also when the process is killed. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{_MACHINE}-{os.getpid()}.tmp")
    try:
        with commandline.naming(path), temporary.open("wb") as file:
            file.write(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checked(path: Path, content: bytes) -> None:
    """Write `content` behind a line with its SHA-256, which also shows what a power cut may leave half written."""
    write_atomically(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def load_checked(path: Path) -> bytes | None:
    """The content that `save_checked` wrote; None if the file is missing or damaged (then named on stderr)."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    found, _, content = raw.partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() == found:
        return content
    print(f"{path}: damaged (its digest does not match); the run is done again", file=sys.stderr)
    return None
