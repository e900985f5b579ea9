"""A trained network as plain `torch.nn` modules: for ONNX, for other people's counters, and for use without this project.

The suite's layers are subclasses, which counters that go by the type of a layer do not know.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Tracer
from torch.nn.functional import pad

from common.core.models.network import BatchNorm2d, Conv2d, Linear, Scatter


def plain(model: nn.Module, kept: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A copy of a network, in evaluation mode, whose layers are those of `torch.nn` with the same values and names.

    kept: masks by parameter name (see `common.core.pruning.masks`), which are applied to the copy. It computes what the
    network computes in float32. A network that torch.fx can trace, as all of this suite, becomes a graph of such layers that
    needs no code of anybody else; of another one the layers are replaced and its own classes stay. Where a branch has no
    channels left, one of zeros stands for them.
    """
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, mask in (kept or {}).items():
            twin.get_parameter(name).mul_(mask)
    # from the inside out, so that names stay valid
    for name, module in reversed(list(twin.named_modules())):
        if (replaced := _plain(module)) is not module:
            if not name:
                return replaced.eval()
            twin.set_submodule(name, replaced)
    try:
        graph = _Leaves().trace(twin)
    except Exception:  # a forward pass of one's own may do what cannot be traced
        return twin.eval()
    return GraphModule(twin, graph, type(model).__name__).eval()


class _Leaves(Tracer):
    """Goes into all modules but torch's own layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__.startswith("torch.nn.") and not isinstance(m, nn.Sequential)


def _plain(module: nn.Module) -> nn.Module:
    """The layer of torch in place of one of the suite; any other module as it is."""
    if isinstance(module, Scatter):
        return nn.Identity() if module.index is None else _Spread(module.index, module.channels)
    if type(module) is Conv2d:
        return _filled(nn.Conv2d, module)
    if type(module) is BatchNorm2d:
        return _filled(nn.BatchNorm2d, module) if module.num_features else nn.Identity()
    return _filled(nn.Linear, module) if type(module) is Linear else module


def _filled(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    """A layer of torch with the values and the numbers of one of its subclasses."""
    if isinstance(module, Conv2d) and not module.weight.numel():
        return _zeros(module)
    other = copy.copy(module)
    other.__class__ = kind
    if isinstance(other, nn.BatchNorm2d):
        other.register_buffer("num_batches_tracked", torch.tensor(0))
    return other


def _zeros(module: Conv2d) -> nn.Conv2d:
    """A convolution of zeros in place of one that has no inputs or no outputs, which torch refuses."""
    inputs, outputs = (max(1, n) for n in (module.in_channels, module.out_channels))
    other = nn.Conv2d(inputs, outputs, module.kernel_size, module.stride, module.padding, bias=False)
    nn.init.zeros_(other.weight)
    return other.to(module.weight)


class _Spread(nn.Module):
    """What Scatter does, as operations that can be traced."""

    source: Tensor

    def __init__(self, index: Tensor, channels: int):
        super().__init__()
        # of each channel its place among those that come in, of the others that of a channel of zeros behind them
        source = torch.full((channels,), max(1, len(index)), dtype=torch.long, device=index.device)
        source[index] = torch.arange(len(index), device=index.device)
        self.register_buffer("source", source)

    def forward(self, x: Tensor) -> Tensor:
        return pad(x, (0, 0, 0, 0, 0, 1)).index_select(1, self.source)
