"""Compiles what fused layers launch for an H100, which is not needed for that; prints the names of the kernels.

The interpreter takes what the compiler refuses. A process of its own, with a driver that only compiles.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # the benchmark is no part of the installed packages

from benchmarks.convolutions import compiling
from common.core.models.fused import convolutions, kernels, norm_kernels, norms


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            types = [a.dtype if isinstance(a, torch.Tensor) else a for a in arguments]
            print(self.kernel.warmup(*types, grid=grid, **constants).metadata.name)

        return launch


def images(*shape):
    tensor = torch.empty(shape, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    return tensor.requires_grad_()


if __name__ == "__main__":
    compiling.begin(90)
    convolutions.processors = lambda device: 132
    for module, names in ((kernels, ["convolve", "weight_gradient", "weight_gradient_sum"]),
                          (norm_kernels, ["statistics", "normalise", "gradient_sums", "gradient"])):  # fmt: skip
        for name in names:
            setattr(module, name, Compiled(getattr(module, name)))
    # its forward pass keeps the weights on the chip, its backward pass to the input does not
    weight = torch.empty(32, 16, 3, 3, device="meta", requires_grad=True)
    convolutions.convolve(images(128, 16, 32, 32), weight, 2, torch.bfloat16).sum().backward()
    scale, shift, *running = (torch.empty(16, device="meta", requires_grad=i < 2) for i in range(4))
    for training, shortcut in ((True, None), (True, images(128, 16, 32, 32)), (False, None)):
        x = images(128, 16, 32, 32)
        y = norms.Norm.apply(x, scale, shift, shortcut, tuple(running), 0.1, 1e-5, True, training)
        if training:
            y.sum().backward()
