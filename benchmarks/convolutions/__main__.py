"""`python -m benchmarks.convolutions --out FILE`: measure narrow convolutions on one NVIDIA GPU."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convolutions", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="JSON, written after each case"
    )
    parser.add_argument(
        "--budget", type=float, default=100, metavar="S", help="seconds in all (default: 100)"
    )
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: torch sees no GPU", file=sys.stderr)
        return 2
    # only now: the kernels need Triton, which comes with torch where there is a GPU
    from benchmarks.convolutions import compiling
    from benchmarks.convolutions.clock import GraphClock
    from benchmarks.convolutions.measure import SHAPES, Kit

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    properties = torch.cuda.get_device_properties(0)
    processors, capability = properties.multi_processor_count, properties.major * 10 + properties.minor
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(workers, get_context("spawn"), compiling.begin, (capability,)) as pool:
        submit = partial(pool.submit, partial(compiling.compile_one, processors))
        found = Kit(chosen.out, chosen.budget, processors, GraphClock(), submit).all(SHAPES)
        pool.shutdown(wait=False, cancel_futures=True)
    for name, microseconds in found["estimates"].items():
        print(f"{name}: {microseconds} us")
    print(f"{chosen.out}: {len(found['cases'])} cases, {len(found['errors'])} failures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
