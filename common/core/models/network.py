"""What all networks share: layers that draw no values of their own, widths, and removable channels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, relu

from common.core.models import fused, small_maps

M = TypeVar("M", bound=nn.Module)

Fill = Literal["fan_out", "fan_in", "normal", "torch"]
_OVERRUNS = torch.backends.cpu.get_cpu_capability() == "AVX2"
"""Whether oneDNN here writes behind its memory for some gradients of weights (its issue 6035, seen with torch 2.15)."""
_BLOCK = 8
"""It does so for convolutions of 1x1 with a stride and fewer input channels than this, in channels_last."""


class Conv2d(nn.Conv2d):
    """A convolution that is created without values (`initialise` fills it) and may have no channels.

    Without input channels its output is zero; without output channels [B, 0, H, W]. Under autocast on a CPU it goes
    around slow bfloat16 kernels: in groups it stays in float32, and small maps go through `small_maps`. Where it is `fused`
    it goes through the kernels of `common.core.models.fused`, if these compute it. One that oneDNN would not survive takes
    the pixels that it sees first.
    """

    fused = False
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if self.in_channels and self.out_channels:
            if self.fused and (y := fused.convolution(self, x)) is not None:
                return y
            if _OVERRUNS and x.device.type == "cpu" and self._sees_few():
                seen = x[:, :, :: self.stride[0], :: self.stride[1]]
                return conv2d(seen, self.weight, self.bias, groups=self.groups)
            if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
                return self._in_lower_precision(x)
            return super().forward(x)
        sizes = zip(x.shape[2:], self.padding, self.kernel_size, self.stride)
        return x.new_zeros(len(x), self.out_channels, *((n + 2 * p - k) // s + 1 for n, p, k, s in sizes))

    def _sees_few(self) -> bool:
        """Whether it is of 1x1, leaves out pixels, and has few channels."""
        strided = self.kernel_size == (1, 1) and self.padding == (0, 0) and max(self.stride) > 1
        return strided and self.padding_mode == "zeros" and self.in_channels // self.groups < _BLOCK

    def _in_lower_precision(self, x: Tensor) -> Tensor:
        if self.groups > 1:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())
        if not small_maps.pays(x, self.weight):
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu")
        y = small_maps.convolve(x.to(dtype), self.weight.to(dtype), self.stride, self.padding)
        return y if self.bias is None else y + self.bias.to(dtype)[:, None, None]


class BatchNorm2d(nn.BatchNorm2d):
    """A batch norm that may have no channels, and without the counter of batches, which nothing reads.

    Leaving out the counter saves one kernel for each norm and step; states with or without it can be loaded. `fused`: as
    of Conv2d.
    """

    fused = False

    def __init__(self, channels: int, momentum: float = 0.1):
        super().__init__(channels, momentum=momentum)
        self.num_batches_tracked = None

    def forward(self, x: Tensor) -> Tensor:
        if self.fused and (y := fused.norm(self, x, relu=False)) is not None:
            return y
        return super().forward(x) if self.num_features else x

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: object) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)


def norm_relu(norm: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """relu(norm(x) + shortcut) of tensors [B, C, H, W], in one operation where the norm is `fused` and nobody watches it."""
    if isinstance(norm, BatchNorm2d) and norm.fused and not _watched(norm):
        if (y := fused.norm(norm, x, relu=True, shortcut=shortcut)) is not None:
            return y
    y = norm(x)
    return relu(y if shortcut is None else y + shortcut)


def _watched(module: nn.Module) -> bool:
    """Whether hooks want to see what goes through a module."""
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return any(hooks)


class Chain(nn.Sequential):
    """One layer after the other; a `fused` batch norm and the ReLU behind it are one operation."""

    def forward(self, x: Tensor) -> Tensor:
        done = False
        for layer, after in pairwise((*self, None)):
            if done:
                done = False
            elif (
                isinstance(layer, BatchNorm2d)
                and layer.fused
                and type(after) is nn.ReLU
                and not _watched(after)
            ):
                x, done = norm_relu(layer, x), True
            else:
                x = layer(x)
        return x


class Linear(nn.Linear):
    """A linear layer that is created without values; `initialise` fills it."""

    def reset_parameters(self) -> None:
        pass


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be removed together, described by module names.

    name: the convolution or linear layer that produces them. norm: the batch norm right behind it. followers:
    depthwise convolutions and their batch norms, which have no channels of their own choice. consumers:
    layers that read the channels; a linear layer behind a flattened map has several columns for each channel,
    channel-major. scatter: set for the last convolution of a residual branch, whose outputs go into a stream
    that keeps its width. minimum: how many channels must stay.
    """

    name: str
    norm: str | None = None
    followers: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    scatter: str | None = None
    minimum: int = 1


def weight_of(model: nn.Module, name: str) -> nn.Parameter:
    """The weight of the layer of that name."""
    return model.get_parameter(f"{name}.weight")


@contextmanager
def weights_in_place(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the layers of `model` find these weights by parameter name in place of their own, where no two share one.

    torch.func.functional_call, which is for all modules, takes as long as a small network itself.
    """
    stored: list[tuple[dict[str, Any], str, Tensor | None]] = []
    try:
        for name, weight in weights.items():
            path, _, own = name.rpartition(".")
            parameters: dict[str, Any] = model.get_submodule(path)._parameters
            stored.append((parameters, own, parameters[own]))
            parameters[own] = weight
        yield
    finally:
        for parameters, own, parameter in stored:
            parameters[own] = parameter


def module_of(model: nn.Module, name: str, kind: type[M]) -> M:
    """The module of that name, which is of that kind. Raises TypeError."""
    module = model.get_submodule(name)
    if not isinstance(module, kind):
        raise TypeError(f"{name}: a {type(module).__name__}, where a {kind.__name__} belongs")
    return module


class Network(nn.Module):
    """A network that is built from a list of widths, one for each group of removable channels."""

    def channel_groups(self) -> list[ChannelGroup]:
        """The groups of removable channels, in the order of the widths."""
        raise NotImplementedError

    @property
    def widths(self) -> list[int]:
        """Channels of each group; the same architecture built with them has the same shapes."""
        return [weight_of(self, group.name).shape[0] for group in self.channel_groups()]


class Scatter(nn.Module):
    """Puts [B, n, H, W] into the channels `index` of zeros [B, channels, H, W].

    With n = channels the input passes as it is. A batch norm behind it sees zeros where a convolution was
    pruned, exactly as behind a masked convolution.
    """

    index: Tensor | None

    def __init__(self, kept: int, channels: int):
        super().__init__()
        self.channels = channels
        # no entry in the state while nothing is removed: states of ordinary networks load as they are
        self.register_buffer("index", None if kept == channels else torch.arange(kept))

    def forward(self, x: Tensor) -> Tensor:
        if self.index is None:
            return x
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        shape = (x.shape[0], self.channels, *x.shape[2:])
        zeros = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout).zero_()
        return zeros.index_copy_(1, self.index, x)


def checked_widths(
    widths: Sequence[int] | None,
    default: Sequence[int],
    minimum: int = 1,
    maximum: Sequence[int | None] | None = None,
) -> list[int]:
    """`widths`, or `default` when None.

    minimum: of all entries. maximum: of each entry, None for no limit. Raises ValueError naming the entry and
    what it may be.
    """
    if widths is None:
        return list(default)
    if len(widths) != len(default):
        raise ValueError(
            f"{len(widths)} widths given; this network has {len(default)}, by default {list(default)}"
        )
    for i, (width, most) in enumerate(zip(widths, maximum or [None] * len(widths), strict=True)):
        whole = isinstance(width, int) and not isinstance(width, bool)
        if not whole or width < minimum or (most is not None and width > most):
            allowed = f"at least {minimum}" if most is None else f"from {minimum} to {most}"
            raise ValueError(f"widths[{i}] = {width!r}: must be a whole number, {allowed}")
    return list(widths)


def initialise(
    model: nn.Module,
    generator: torch.Generator,
    conv: Fill | None,
    linear: Fill | None,
    norm_scale: float | None,
) -> None:
    """Fill all convolutions and linear layers in module order, and set the scale of every batch norm; None leaves them.

    `fan_out`, `fan_in`: normal with standard deviation sqrt(2 / (k*k*outputs)) or sqrt(2 / (k*k*inputs)),
    zero bias; `normal`: standard deviation 0.01, zero bias; `torch`: uniform within 1/sqrt(inputs), bias too.
    Raises ValueError.
    """
    for what, fill in (("conv_init", conv), ("linear_init", linear)):
        if fill is not None and fill not in get_args(Fill):
            raise ValueError(f"{what} = {fill!r}: must be one of {', '.join(get_args(Fill))}")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and conv:
                _fill(module, conv, generator)
            elif isinstance(module, nn.Linear) and linear:
                _fill(module, linear, generator)
            elif isinstance(module, nn.BatchNorm2d) and norm_scale is not None:
                module.weight.fill_(norm_scale)


def _fill(layer: nn.Conv2d | nn.Linear, fill: Fill, generator: torch.Generator) -> None:
    weight, bias = layer.weight, layer.bias
    if not weight.numel():
        return
    inputs = math.prod(weight.shape[1:])
    if fill == "torch":
        bound = 1 / math.sqrt(inputs)
        weight.uniform_(-bound, bound, generator=generator)
        if bias is not None:
            bias.uniform_(-bound, bound, generator=generator)
        return
    outputs = weight.shape[0] * math.prod(weight.shape[2:])
    spread = 0.01 if fill == "normal" else math.sqrt(2 / (outputs if fill == "fan_out" else inputs))
    weight.normal_(0, spread, generator=generator)
    if bias is not None:
        bias.zero_()
