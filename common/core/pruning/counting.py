"""Counting: parameters, multiply-accumulates (MACs), sparsity and theoretical speed-up of a network.

One MAC is one multiplication with its addition. Convolutions and linear layers count, without their biases;
batch norm, activations and additions do not. A weight that is zero costs nothing. What multiplies in another way is
refused by name, or counted where the convention says so.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from common.core.pruning.layers import CONVOLUTIONS, TRANSPOSED, weight_parameter
from common.core.pruning.products import Products

Convention = Literal["conv_linear", "pool_inputs", "same_padding", "products"]

_Convolution = nn.modules.conv._ConvNd
_Weighted = _Convolution | nn.Linear
_Counted = _Weighted | nn.AvgPool2d | nn.AdaptiveAvgPool2d
_WEIGHTED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
_POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)


Call = tuple[torch.Size, torch.Size]
"""Shapes of what goes into a layer and of what comes out."""


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer for one image.

    kind: `conv`, `depthwise`, `grouped`, `transposed`, `linear`, `pool` or `products`. shape: of the weight. positions:
    how often each weight is used, by all layers that share it. nonzero: weights that are not zero. extra: MACs without
    such weights.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    positions: int
    nonzero: int
    extra: int = 0

    @property
    def weights(self) -> int:
        """Entries of the weight."""
        return math.prod(self.shape) if self.shape else 0

    @property
    def macs(self) -> int:
        """MACs with all weights."""
        return self.weights * self.positions + self.extra

    @property
    def sparse_macs(self) -> int:
        """MACs with non-zero weights only."""
        return self.nonzero * self.positions + self.extra


# hooks and tensors without values are put into the model for a moment
_COUNTING = threading.Lock()


def layer_costs(
    model: nn.Module, image_shape: Sequence[int], convention: Convention | None = None
) -> list[LayerCost]:
    """Cost of every convolution and linear layer, in module order, for one image of `image_shape` (C, H, W).

    Layers that share a weight are one, by the name of the first. convention: `conv_linear` by default, and `products` of a
    network of one's own (see `common.core.models.own`). `conv_linear` is exact, also for grouped, transposed and
    unpadded convolutions. `pool_inputs` adds average-pool
    modules at one MAC for each input element (pruning from scratch). `same_padding` is the rule of the
    IMP+SLR release: every convolution has ceil(side / stride) output positions a side, and groups are
    ignored. `products` adds the matrix products and convolutions of all other modules (attention, recurrent layers) as
    torch's own counter counts them, without regard to zeros. The model is neither run nor changed: only shapes go through
    it, of one model at a time, since threads may
    count the same one. Raises ValueError for an unknown convention or images that the network does not take, and naming layers
    that multiply and are not counted, or whose weight is no plain parameter.
    """
    own: Any = getattr(model, "convention", "conv_linear")
    chosen: Convention = convention or own
    if chosen not in get_args(Convention):
        raise ValueError(f"convention = {chosen!r}: must be one of {', '.join(get_args(Convention))}")
    counted = (*_WEIGHTED, *(_POOLS if chosen == "pool_inputs" else ()))
    names = {module: name for name, module in model.named_modules() if isinstance(module, counted)}
    for module, name in names.items():
        if isinstance(module, _WEIGHTED):
            weight_parameter(module, name)
    with _COUNTING:
        seen, others = _shapes(model, names, image_shape)
    if reason := others.refusal(counts_products=chosen == "products"):
        raise ValueError(f"{type(model).__name__}: {chosen} does not count {reason}")
    sharing: dict[nn.Module | Tensor, list[_Counted]] = {}
    for module in names:
        weight = module._parameters.get("weight")
        sharing.setdefault(module if weight is None else weight, []).append(module)
    costs = [
        _cost(names[modules[0]], modules[0], sum(_positions(m, seen[m], chosen) for m in modules))
        for modules in sharing.values()
    ]
    if chosen == "products":
        costs += [LayerCost(name, "products", (), 0, 0, macs) for name, macs in others.macs.items()]
    return costs


def _shapes(
    model: nn.Module, modules: Mapping[_Counted, str], image_shape: Sequence[int]
) -> tuple[dict[_Counted, list[Call]], Products]:
    """Input and output shapes of each call of `modules`, found with tensors that have no values, and what others do."""
    seen: dict[_Counted, list[Call]] = {module: [] for module in modules}

    def note(module: _Counted, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[module].append((inputs[0].shape, output.shape))

    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    hollow = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    # two images: batch norm in training mode refuses one value per channel
    images = torch.empty(2, *image_shape, dtype=dtype, device="meta")
    others = Products(model, _WEIGHTED, list(hollow.values()), len(images))
    handles = [module.register_forward_hook(note) for module in modules]
    try:
        with torch.no_grad(), others:
            torch.func.functional_call(model, hollow, (images,))
    except Exception as error:  # a network of any kind raises whatever its layers do
        told = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{type(model).__name__}: no shapes of {tuple(image_shape)} go through it, so it cannot be counted: {told}"
        ) from None
    finally:
        for handle in handles:
            handle.remove()
    return seen, others


def _positions(module: _Counted, calls: Sequence[Call], convention: Convention) -> int:
    """How often a layer's weights are used, or the inputs of a pool."""
    if isinstance(module, _POOLS):
        return sum(math.prod(inputs[1:]) for inputs, _ in calls)
    if isinstance(module, nn.Linear):
        return sum(math.prod(output[1:-1]) for _, output in calls)
    if isinstance(module, TRANSPOSED):
        return sum(math.prod(inputs[2:]) for inputs, _ in calls)
    if convention == "same_padding" and isinstance(module, CONVOLUTIONS):
        # each weight counts once for every group, because the rule takes the layer for an ungrouped one
        outputs = [[math.ceil(n / step) for n, step in zip(inputs[2:], module.stride)] for inputs, _ in calls]
        return module.groups * sum(map(math.prod, outputs))
    return sum(math.prod(output[2:]) for _, output in calls)


def _cost(name: str, module: _Counted, positions: int) -> LayerCost:
    if isinstance(module, _POOLS):
        return LayerCost(name, "pool", (), 0, 0, positions)
    weight = module.weight
    return LayerCost(name, _kind(module), tuple(weight.shape), positions, _nonzero(weight))


def _kind(module: _Weighted) -> str:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, TRANSPOSED):
        return "transposed"
    if module.groups == module.in_channels > 1:
        return "depthwise"
    return "grouped" if module.groups > 1 else "conv"


def cost(
    model: nn.Module,
    image_shape: Sequence[int],
    dense: Mapping[str, Any] | None = None,
    convention: Convention | None = None,
) -> dict[str, Any]:
    """What a network costs, beside the dense network it comes from.

    dense: the `cost` of the dense network, when weights were removed and not only set to zero.

    Keys: `parameters` (all but running statistics) and `nonzero_parameters`; `weights` and `nonzero_weights`
    (of convolutions and linear layers); `macs` and `sparse_macs`; their dense counterparts
    `dense_parameters`, `dense_weights` and `dense_macs`; `compression` = dense parameters / non-zero
    parameters and `theoretical_speedup` = dense MACs / non-zero MACs, None where nothing is left; `sparsity`
    = share of the dense weights, and `sparsity_all` = share of all dense parameters, that are zero or
    removed.
    """
    layers = layer_costs(model, image_shape, convention)
    parameters = list(model.parameters())
    own = {
        "parameters": sum(p.numel() for p in parameters),
        "nonzero_parameters": sum(map(_nonzero, parameters)),
        "weights": sum(layer.weights for layer in layers),
        "nonzero_weights": sum(layer.nonzero for layer in layers),
        "macs": sum(layer.macs for layer in layers),
        "sparse_macs": sum(layer.sparse_macs for layer in layers),
    }
    whole = {f"dense_{key}": (dense or own)[key] for key in ("parameters", "weights", "macs")}
    return {
        **own,
        **whole,
        "compression": _ratio(whole["dense_parameters"], own["nonzero_parameters"]),
        "theoretical_speedup": _ratio(whole["dense_macs"], own["sparse_macs"]),
        "sparsity": _missing(own["nonzero_weights"], whole["dense_weights"]),
        "sparsity_all": _missing(own["nonzero_parameters"], whole["dense_parameters"]),
    }


def _nonzero(tensor: Tensor) -> int:
    """Entries that are not zero; all of them where there are no values."""
    return tensor.numel() if tensor.is_meta else int(tensor.detach().count_nonzero())


def _ratio(whole: int, part: int) -> float | None:
    return whole / part if part else None


def _missing(part: int, whole: int) -> float:
    return 1 - part / whole if whole else 0.0
