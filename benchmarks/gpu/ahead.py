"""`python -m benchmarks.gpu.ahead NETWORK...`: compile the kernels of fused layers on all cores, before a GPU waits for them.

Triton keeps them on the disk, where every later process finds them. Forward and backward passes of tensors without values
tell what is launched.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.convolutions import compiling
from common.core.compute import Compute
from common.core.models import build
from common.core.models.fused import convolutions, kernels, norm_kernels

BATCHES = (128, 72, 37, 32, 16)
"""Images of a batch: of the usual one, of CIFAR-10's last one, and of the tests."""
LARGE = 2000
"""Images of a batch that a network is evaluated on."""
_KERNELS = {
    kernels: ("convolve", "weight_gradient", "weight_gradient_sum"),
    norm_kernels: ("statistics", "normalise", "gradient_sums", "gradient"),
}

Launch = tuple[str, str, tuple[Any, ...], tuple[int, ...], tuple[tuple[str, Any], ...]]
"""Module and name of a kernel, its arguments (of tensors the format), grid, constants."""


def launches(
    networks: Sequence[str], batches: Sequence[int], processors: int, size: int = 32
) -> list[Launch]:
    """What fused layers launch to train networks on batches of images of that height = width, and to evaluate them."""
    noted = dict[Launch, None]()
    how = Compute(torch.device("cpu"), torch.bfloat16, channels_last=True, fused=True)
    models = [how.place(build(name, classes=10, image_shape=(3, size, size))) for name in networks]
    valueless = FakeTensorMode(allow_non_fake_inputs=True)
    with valueless, _noting(lambda launch: noted.setdefault(launch), processors):
        for model in models:
            for batch in batches:
                with how.precision():
                    model.train()(torch.zeros(batch, 3, size, size)).float().sum().backward()
            for batch in (*batches, LARGE):
                with how.precision(), torch.no_grad():
                    model.eval()(torch.zeros(batch, 3, size, size))
    return list(noted)


@contextmanager
def _noting(note: Callable[[Launch], object], processors: int) -> Iterator[None]:
    """Kernels are noted in place of being launched, as on a GPU of so many multiprocessors."""

    class Noted:
        def __init__(self, module: str, name: str):
            self.kernel = module, name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: Any, **constants: Any) -> None:
                types = tuple(a.dtype if isinstance(a, torch.Tensor) else a for a in arguments)
                note((*self.kernel, types, grid, tuple(sorted(constants.items()))))

            return launch

    changes = [patch.object(convolutions, "processors", lambda device: processors)]
    for module, names in _KERNELS.items():
        changes += [patch.object(module, name, Noted(module.__name__, name)) for name in names]
    for change in changes:
        change.start()
    try:
        yield
    finally:
        for change in changes:
            change.stop()


def compile_one(launch: Launch) -> None:
    """Compile what is launched, which leaves it on the disk."""
    module, name, types, grid, constants = launch
    getattr(sys.modules[module], name).warmup(*types, grid=grid, **dict(constants))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.ahead", description=__doc__)
    parser.add_argument("networks", nargs="+", metavar="NETWORK")
    parser.add_argument(
        "--batches", nargs="+", type=int, default=BATCHES, metavar="N", help="default: %(default)s"
    )
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: torch sees no GPU", file=sys.stderr)
        return 2
    properties = torch.cuda.get_device_properties(0)
    capability = properties.major * 10 + properties.minor
    found = launches(chosen.networks, chosen.batches, properties.multi_processor_count)
    workers = max(1, (os.cpu_count() or 2) - 2)
    with ProcessPoolExecutor(workers, get_context("spawn"), compiling.begin, (capability,)) as pool:
        failures = [pool.submit(compile_one, launch).exception for launch in found]
        reasons = {repr(error) for failure in failures if (error := failure())}
    for reason in sorted(reasons):  # whoever launches them says it again
        print(reason)
    print(f"{len(found)} launches")
    return 0


if __name__ == "__main__":
    sys.exit(main())
