"""Tensors by name in one file of the format safetensors: a table of what is where, then the values; nothing that can run.

https://github.com/huggingface/safetensors describes it. `packed` and `unpacked` are each other's inverse.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_ABOUT = "__metadata__"


def packed(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> bytes:
    """The content of a file with these tensors, and words about them. The same tensors give the same bytes."""
    table: dict[str, Any] = {_ABOUT: dict(about)}
    values, end = [], 0
    for name, tensor in tensors.items():
        values.append(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        begin, end = end, end + len(values[-1])
        table[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, *values])


def unpacked(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of such a file, and the words about them. Raises ValueError where it is none, or damaged."""
    size = int.from_bytes(content[:8], "little")
    if not 2 <= size <= len(content) - 8 or content[8:9] != b"{":
        raise ValueError("no safetensors file")
    try:
        table = json.loads(content[8 : 8 + size])
        about = table.pop(_ABOUT, {})
        places = {name: (_TYPES[e["dtype"]], e["shape"], *e["data_offsets"]) for name, e in table.items()}
        found = {name: _tensor(content, 8 + size, *place) for name, place in places.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"a damaged safetensors file ({type(error).__name__}: {error})") from None
    return found, about


def _tensor(content: bytes, start: int, dtype: torch.dtype, shape: list[int], begin: int, end: int) -> Tensor:
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{[*shape, begin, end]} are no sizes")
    if end > len(content) - start or math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{shape} does not fit {end - begin} bytes")
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content[start + begin : start + end]), dtype=dtype).view(shape)
