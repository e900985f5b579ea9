"""What the nodes of a cluster that do not see the project's folder get and give: files, by name and SHA-256.

The depot is an actor on the machine where the command runs. It reads and writes files below the project's folder there.
Nothing here loads torch.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
from pathlib import Path
from typing import Any

from common.stage.files import write_atomically


def sha256(content: bytes) -> str:
    """Of what travels."""
    return hashlib.sha256(content).hexdigest()


class Refused(OSError):
    """The machine of the command could not read or write a file, or does not answer."""


class Depot:
    """Files of the project's folder, to be made an actor there. root: the folder; names are relative to it."""

    def __init__(self, root: str):
        self._root = Path(root)

    def read(self, name: str) -> tuple[bytes, str] | None:
        """A file and its digest; None if it is not there."""
        try:
            content = (self._root / name).read_bytes()
        except FileNotFoundError:
            return None
        return content, sha256(content)

    def names(self, folder: str) -> list[str]:
        """The files below a folder."""
        below = (self._root / folder).rglob("*.pt")
        return sorted(str(file.relative_to(self._root)) for file in below)

    def write(self, name: str, content: bytes, digest: str) -> None:
        """Write a file that has arrived. Raises OSError."""
        _check(name, content, digest)
        write_atomically(self._root / name, content)


_arrived = set[tuple[str, str | None]]()
"""Files that this process has checked."""


class Reached:
    """The depot as a node reaches it; what is fetched once is there for all workers of the node.

    actor: a handle of the actor. Files go to where their names say, from the worker's folder.
    """

    def __init__(self, actor: Any):
        self._actor = actor

    def fetch(self, name: str, digest: str | None = None) -> bool:
        """Have a file here, checked by its digest; returns whether it is there at all. Raises OSError."""
        if digest and (name, digest) in _arrived:
            return True
        file = Path(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_name(f"{file.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if file.exists() and digest in (None, sha256(file.read_bytes())):
                _arrived.add((name, digest))
                return True
            if (found := _answer(self._actor.read.remote(name))) is None:
                return False
            content, sent = found
            _check(name, content, digest or sent)
            write_atomically(file, content)
            _arrived.add((name, digest))
            return True

    def restore(self, folder: str) -> None:
        """Have all files below a folder here, as they are there now. Raises OSError."""
        for name in _answer(self._actor.names.remote(folder)):
            Path(name).unlink(missing_ok=True)
            self.fetch(name)

    def send(self, name: str, content: bytes) -> None:
        """Have a file there. Raises OSError."""
        _answer(self._actor.write.remote(name, content, sha256(content)))


def _check(name: str, content: bytes, digest: str) -> None:
    if sha256(content) != digest:
        raise OSError(f"{name}: damaged on its way (its digest does not match)")


def _answer(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(cause := error.cause, OSError) and cause.errno:
            raise Refused(cause.errno, cause.strerror, cause.filename) from None
        raise cause from None
    except ray.exceptions.RayError:
        raise Refused(errno.EIO, "the machine of the command does not answer", "execution.address") from None
