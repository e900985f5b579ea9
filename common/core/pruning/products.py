"""What a network multiplies outside of the layers that are counted: matrix products, convolutions, and what torch does not count.

torch's own counter has hooks on all modules of a process, which would be in the way of threads that train.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from common.core.pruning.layers import NORMS

_aten = torch.ops.aten
# what neither multiplies with a weight nor is entry by entry
_MOVES = {
    *(
        _aten.cat,
        _aten.stack,
        _aten.clone,
        _aten._to_copy,
        _aten.copy_,
        _aten.constant_pad_nd,
        _aten.roll,
        _aten.flip,
    ),
    *(_aten.index, _aten.index_select, _aten.gather, _aten.embedding, _aten.repeat, _aten.sum, _aten.mean),
    *(_aten.native_layer_norm, _aten._fused_rms_norm, _aten.native_group_norm, _aten.native_batch_norm),
    *(_aten.upsample_bilinear2d, _aten.upsample_bicubic2d, _aten.upsample_nearest2d),
    *(_aten._upsample_bilinear2d_aa, _aten._upsample_bicubic2d_aa),
}


def _normalised(args: Sequence[Any]) -> tuple[Tensor, ...] | None:
    """What a batch norm returns; None where its arguments do not fit."""
    x, *per_channel = args[:5]
    if any(values is not None and values.shape != x.shape[1:2] for values in per_channel):
        return None
    return torch.empty_like(x), *(x.new_empty(x.shape[1]) for _ in range(2))


# what most layers do, and torch takes apart in Python before it knows a shape
_KNOWN: Mapping[Any, Callable[[Sequence[Any]], Any]] = {
    _aten.native_batch_norm.default: _normalised,
    _aten.relu.default: lambda args: torch.empty_like(args[0]),
}


class Products(TorchDispatchMode):
    """Watches a pass of tensors without values through `model`, as a context manager.

    counted: kinds of layers that are left out. weights: the tensors in place of the model's. images: how many go through.
    macs: of each other module for one image, by name.
    """

    def __init__(
        self, model: nn.Module, counted: tuple[type[nn.Module], ...], weights: Sequence[Tensor], images: int
    ):
        super().__init__()
        self.macs: Counter[str] = Counter()
        self._unknown: dict[str, str] = {}
        self._modules = dict(model.named_modules())
        self._left_out = (*counted, *NORMS)
        self._images = images
        # kept, since an identity is free again when its tensor is gone
        self._weights = {id(weight): weight for weight in weights if weight.ndim > 1}
        self._within: list[str] = []
        self._silent = 0

    def __enter__(self) -> Products:
        self._handles = []
        for name, module in self._modules.items():
            self._handles.append(
                module.register_forward_pre_hook(lambda m, _, name=name: self._enter(name, m))
            )
            self._handles.append(module.register_forward_hook(lambda m, *_: self._leave(m)))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()

    def _enter(self, name: str, module: nn.Module) -> None:
        self._within.append(name)
        self._silent += isinstance(module, self._left_out)

    def _leave(self, module: nn.Module) -> None:
        self._within.pop()
        self._silent -= isinstance(module, self._left_out)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = _KNOWN[func](args) if func in _KNOWN else None
        out = func(*args, **kwargs) if out is None else out
        if not self._silent:
            self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        where = self._within[-1] if self._within else ""
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.macs[where] += count(*args, **kwargs, out_val=out) // 2 // self._images
        elif any(id(value) in self._weights for value in args):
            if func.is_view:
                self._weights[id(out)] = out
            elif torch.Tag.pointwise in func.tags:
                if self._pairs(args, out):
                    self._unknown[where] = f"{func._overloadpacket.__name__} of each with each"
            elif func._overloadpacket not in _MOVES:
                self._unknown[where] = func._overloadpacket.__name__

    def _pairs(self, args: Any, out: Tensor) -> bool:
        """Whether entries meet each entry of a weight, as in a product that is summed behind, and not one each."""
        others = [v.numel() for v in args if isinstance(v, Tensor) and id(v) not in self._weights]
        return bool(others) and out.numel() > max(others)

    def refusal(self, counts_products: bool) -> str | None:
        """What multiplies and is not counted, by kind and name; None where that is nothing."""
        found = [f"{who}, which calls {what}" for (who, what) in self._by_kind(self._unknown).items()]
        if not counts_products and self.macs:
            names = ", ".join(self._by_kind(dict.fromkeys(self.macs, "")))
            found.append(f"the products in {names}, which the convention 'products' adds")
        return "; ".join(found) or None

    def _by_kind(self, found: Mapping[str, str]) -> dict[str, str]:
        """The same for each kind of module: its first name and how many more there are, and the first value."""
        kinds: dict[str, list[str]] = {}
        for name in found:
            kinds.setdefault(type(self._modules[name]).__name__, []).append(name)
        return {
            f"{kind}{f' ({names[0]})' if names[0] else ''}{f' and {len(names) - 1} more' if names[1:] else ''}": found[
                names[0]
            ]
            for kind, names in kinds.items()
        }
