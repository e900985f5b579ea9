"""What a trained network takes on this machine beside its dense one: time and bytes, as plain modules of torch.

What multiply-accumulate operations promise, a machine need not keep: masked weights are multiplied as ever.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from common.core.models import tensor_files
from common.core.models.plain import plain
from common.core.run import Context

_WARM, _TIMES = 3, 15


def measured(context: Context, network: nn.Module) -> dict[str, float]:
    """Milliseconds for one image and bytes of a network's file, also compressed, and the same of the dense one of its cell.

    Medians of turns that the two take, in float32: other runs may train meanwhile. It takes some ten milliseconds and 36
    forward passes.
    """
    data, device = context.data, context.compute.device
    networks = {"": plain(network), "dense_": plain(context.network())}
    image = torch.zeros(1, *data.image_shape, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    with torch.inference_mode():
        for turn in range(_WARM + _TIMES):
            for name, one in networks.items():
                taken = _seconds(one, image)
                if turn >= _WARM:
                    seconds[name].append(taken)
    found: dict[str, float] = {}
    for name, one in networks.items():
        content = tensor_files.packed(one.state_dict(), {})
        found[f"{name}milliseconds"] = round(1000 * median(seconds[name]), 4)
        found[f"{name}bytes"] = len(content)
        found[f"{name}compressed_bytes"] = len(zlib.compress(content))
    return found


def _seconds(network: Callable[[Tensor], Tensor], image: Tensor) -> float:
    begun = time.perf_counter()
    network(image)
    if image.is_cuda:
        torch.cuda.current_stream(image.device).synchronize()  # not what other runs have to do
    return time.perf_counter() - begun
