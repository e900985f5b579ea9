"""What names a run and draws its numbers: the canonical text and digest of anything, and named random streams."""

from __future__ import annotations

import hashlib
import json
import threading
from typing import Any

from pydantic import BaseModel

GLOBAL_GENERATOR = threading.Lock()
"""Drawing from torch's global generator is for one thread at a time."""


def canonical(value: Any) -> str:
    """The one JSON text of `value`: sorted keys, no spaces, no NaN.

    Raises ValueError for NaN or infinity, TypeError for what JSON cannot hold.
    """
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of the canonical text, 64 hexadecimal characters."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def stream(seed: int, *names: str | float) -> int:
    """A 63-bit seed for the random stream called `names` of `seed`.

    Streams are independent of one another, so adding one shifts nothing.
    """
    text = canonical([seed, *names]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
