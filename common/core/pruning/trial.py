"""A forward pass on copies, before channels leave a network that the suite has not tested.

It sees what no description of layers can: a sum or concatenation with another stream, a reader that is not named, an
operation that mixes channels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from common.core.pruning.layers import CONVOLUTIONS
from common.settings import parts

_SIDES = tuple(dict.fromkeys((32, 8, 16, 28, 64, 224, *range(1, 65), 96, 112, 128, 160, 192, 256, 299, 384)))
_FIRST = 3  # layers, in module order, one of which sees the images


def copy_with_images(model: nn.Module, image_shape: Sequence[int] | None) -> tuple[nn.Module, Tensor]:
    """A copy in evaluation mode, and two random images that it takes; of a shape that its first layers suggest by default.

    The values of the copy let every channel through, whatever they are in the network itself. They are of double precision,
    or single where the network does not compute in double. Raises ValueError.
    """
    shapes = dict.fromkeys(_shapes(model) if image_shape is None else [tuple(image_shape)])
    problem = ""
    for dtype in (torch.float64, torch.float32):
        twin = _copy_with_other_values(model, dtype)
        for shape in shapes:
            images = torch.randn(2, *shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
            images = images.to(next((p.device for p in model.parameters()), "cpu"))
            try:
                outputs(twin, images, f"{type(model).__name__} does not take images of {shape}")
            except ValueError as error:
                problem = str(error)
                continue
            return twin, images
    if image_shape is not None:
        raise ValueError(problem)
    raise ValueError(
        f"{type(model).__name__} must be tried before channels leave it, and takes none of the usual images: say "
        "image_shape=(channels, height, width)"
    )


def _copy_with_other_values(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    try:
        twin = copy.deepcopy(model).to(dtype).eval()
    except Exception as error:  # a class of one's own may fail in any way
        raise ValueError(f"{type(model).__name__} cannot be copied to try it: {_line(error)}") from None
    generator = torch.Generator().manual_seed(0)
    for name, tensor in chain(twin.named_parameters(), twin.named_buffers()):
        is_own = isinstance(tensor, nn.Parameter) or name.endswith(("running_mean", "running_var"))
        if tensor.is_meta or not tensor.is_floating_point() or not is_own:
            continue
        if tensor.ndim > 1:
            values = torch.randn(tensor.shape, generator=generator) / math.sqrt(max(1, tensor[:1].numel()))
        else:
            values = 0.5 + torch.rand(tensor.shape, generator=generator)
        tensor.data.copy_(values)
    return twin


def with_negative_shifts(model: nn.Module) -> nn.Module:
    """A copy whose biases, and what its norms add, are the opposite: zeros in place of channels are above all others then."""
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if name.endswith("bias"):
            parameter.data.neg_()
    return twin


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    layers = [m for m in model.modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))][:_FIRST]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            yield (layer.in_features,)
            for channels in (1, 3):
                side = math.isqrt(layer.in_features // channels)
                if channels * side * side == layer.in_features:
                    yield channels, side, side
        else:
            for side in _SIDES:
                yield layer.in_channels, *[side] * len(layer.kernel_size)


def outputs(model: nn.Module, images: Tensor, problem: str) -> list[Tensor]:
    """The tensors that come out. Raises ValueError that begins with `problem` and names the layer that fails."""
    entered: list[str] = []
    handles = [
        hook
        for name, module in model.named_modules()
        for hook in (
            module.register_forward_pre_hook(
                lambda m, _, name=name: entered.append(f"{name or 'its'} {type(m).__name__}")
            ),
            module.register_forward_hook(lambda *_: void(entered.pop())),
        )
    ]
    try:
        with torch.no_grad():
            return list(parts(model(images), Tensor))
    except Exception as error:  # a class of one's own may fail in any way
        raise ValueError(f"{problem}: in {entered[-1] if entered else 'it'}: {_line(error)}") from None
    finally:
        for handle in handles:
            handle.remove()


def void(_: object) -> None:
    """Nothing, whatever it gets: what a hook returns takes the place of an output."""


def equal(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether outputs are the same but for rounding."""
    return len(found) == len(wanted) and all(
        one.shape == other.shape and _close(one, other) for one, other in zip(found, wanted)
    )


def _close(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or not one.numel():
        return True
    tolerance = 1e-10 if one.dtype == torch.float64 else 1e-4
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
