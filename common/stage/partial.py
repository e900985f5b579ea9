"""What a stage has finished so far, in one file that can be imported although the stage is not complete.

A stage appends each run that it finishes, so what is stopped or killed leaves all of them; a complete stage removes the
file. It is in a folder of its own, where neither DVC nor statistics take it for results.

Every line is the SHA-256 of a JSON text and that text: first the environment, then one `Entry` each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from common.core.identity import canonical
from common.reading import json_value, read_bytes
from common.records import Entry
from common.settings import SettingsError
from common.stage.store import StageError

FOLDER = "partial"
"""Below the results folder; it holds <profile>/<paper>.jsonl."""


def partial_file(results: Path, profile: str, paper: str) -> Path:
    """Where a stage that is not complete leaves what is finished."""
    return results / FOLDER / profile / f"{paper}.jsonl"


class PartialResults:
    """Writes such a file anew; use it as a context manager, within which runs are added. Raises OSError.

    environment: what the runs share, as `common.stage.records.environment` returns it.
    """

    def __init__(self, file: Path, environment: Mapping[str, Any]):
        self.file, self._environment = file, environment
        self._open: BinaryIO

    def __enter__(self) -> PartialResults:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._open = self.file.open("wb")
        self._append(self._environment)
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self._open.close()
        if kind is None:
            self.file.unlink()

    def add(self, entry: Entry) -> None:
        """Append a finished run; it is in the file when this returns."""
        self._append(entry)

    def _append(self, content: Any) -> None:
        text = canonical(content).encode()
        self._open.write(hashlib.sha256(text).hexdigest().encode() + b" " + text + b"\n")
        self._open.flush()


def read(file: Path) -> tuple[dict[str, Any], list[Entry]]:
    """The environment and the runs in such a file, but for a last line that a kill has left half written.

    Raises StageError that names a damaged line.
    """
    try:
        lines = read_bytes(file).split(b"\n")
    except SettingsError as error:
        raise StageError(str(error)) from None
    values = []
    for number, line in enumerate(lines[:-1], start=1):
        found, _, text = line.partition(b" ")
        if hashlib.sha256(text).hexdigest().encode() != found:
            raise StageError(
                f"{file}, line {number}: damaged or changed: its SHA-256 is not the one before it"
            )
        try:
            values.append(json_value(text.decode(), finite=True))
        except ValueError as error:
            raise StageError(f"{file}, line {number}: not valid JSON: {error}") from None
    if not values:
        raise StageError(f"{file}: it was stopped before it held anything")
    try:
        return values[0], [Entry.model_validate(value) for value in values[1:]]
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise StageError(f"{file}: of another revision's schema ({where}); use the same revision") from None
