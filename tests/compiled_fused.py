"""Compiles what fused layers launch for an H100, which is not needed for that; prints the names of the kernels.

The interpreter takes what the compiler refuses. A process of its own, with a driver that only compiles.
"""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # the benchmark is no part of the installed packages

from benchmarks.convolutions import compiling
from benchmarks.gpu import ahead

if __name__ == "__main__":
    compiling.begin(90)
    # one of each kind: what stays on the chip or does not, what follows a norm, training or evaluation
    kinds = {}
    for launch in ahead.launches(["resnet8"], (128,), 132):
        constants = dict(launch[-1])
        kind = launch[1], *(constants.get(name) for name in ("RESIDENT", "MODE", "TRAINING"))
        kinds.setdefault(kind, launch)
    for launch in kinds.values():
        ahead.compile_one(launch)
        print(launch[1])
