"""Physical removal of channels: a network becomes narrower in place, and so do the optimiser's moments.

The network (`Network.channel_groups`) or the caller describes what can be removed. A narrowed network equals
the one in which the removed channels are masked (see `masks`), in training and in evaluation mode. A description is
checked against the network before anything changes, and one that is not of a named architecture is tried on a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from common.core.models import ARCHITECTURES, ChannelGroup, Scatter, module_of, weight_of
from common.core.pruning import trial
from common.core.pruning.groups import channelwise, check, check_whole_groups
from common.core.pruning.layers import CHANNEL_NORMS, CONVOLUTIONS, NORMS
from common.settings import hint

Keep = Mapping[str, Sequence[int] | Tensor]
"""Channels that stay, by the name of their group: ascending indices among those still there."""


def groups_of(model: nn.Module) -> list[ChannelGroup]:
    """The removable channels that `model` describes. Raises ValueError when it describes none."""
    describe = getattr(model, "channel_groups", None)
    if describe is None:
        raise ValueError(
            f"{type(model).__name__} describes no removable channels: build it with common.core.models.build, "
            "or pass its channel groups"
        )
    return describe()


@torch.no_grad()
def remove(
    model: nn.Module,
    keep: Keep,
    optimizer: torch.optim.Optimizer | None = None,
    groups: Sequence[ChannelGroup] | None = None,
    image_shape: Sequence[int] | None = None,
    unfinished: bool = False,
) -> None:
    """Remove from the named groups every channel that `keep` leaves out, with all that belongs to it.

    Parameters stay the same objects, so an optimiser goes on with them; its state (momentum, Adam's moments)
    is narrowed when it is passed, and its next step fails otherwise. Batch-norm statistics stay with their
    channels. Gradients are dropped, and an earlier forward pass can no longer be differentiated. groups: for
    a network that does not describe itself. image_shape: (channels, height, width) of what goes into a network that is no
    named architecture, which is tried; found where it is usual. unfinished: whether the caller still changes what lies between
    the layers, so that nothing can be tried.

    Raises ValueError, before anything has changed, for an unknown group or network, for channels that do not exist, repeat or
    are too few, for layers whose channels cannot leave, and where the rest of the network would not compute what it
    computes with these channels masked.
    """
    chosen = _checked(model, keep, groups)
    described = groups is None and type(model) in {known.network for known in ARCHITECTURES.values()}
    if not (described or unfinished):
        _try(model, chosen, image_shape)
    _remove(model, chosen, optimizer)


def read(model: nn.Module, groups: Sequence[ChannelGroup] | None = None) -> dict[str, Tensor]:
    """The channels that do something, by group: those of which a reader has weights that are not zero, and in the last
    convolution of a branch those with such weights. The network computes the same without the others.

    As many stay as must, also if none does anything. Raises ValueError as `groups_of`.
    """
    found = {}
    for group in groups_of(model) if groups is None else groups:
        weight = weight_of(model, group.name)
        readers = [weight_of(model, name) for name in group.consumers]
        # [channels, all that belongs to each]
        parts = (
            [r.transpose(0, 1).reshape(len(weight), -1) for r in readers] if readers else [weight.flatten(1)]
        )
        alive = torch.stack([part.count_nonzero(1) > 0 for part in parts]).any(0)
        if not alive.sum() >= group.minimum:
            alive[: group.minimum] = True
        found[group.name] = alive.nonzero().flatten()
    return found


Chosen = Sequence[tuple[ChannelGroup, Tensor]]
"""Groups with the indices of the channels that stay."""


def _remove(model: nn.Module, chosen: Chosen, optimizer: torch.optim.Optimizer | None = None) -> None:
    for group, index in chosen:
        channels = weight_of(model, group.name).shape[0]
        if len(index) == channels:
            continue
        for _, module in channelwise(model, group):
            for entry in ("weight", "bias", "running_mean", "running_var"):
                _narrow(module, entry, 0, index, optimizer)
            _renumber(module, len(index))
        for name in group.consumers:
            module = model.get_submodule(name)
            _narrow(module, "weight", 1, _columns(weight_of(model, name), index, channels), optimizer)
            _renumber(module, len(index))
        if group.scatter is not None:
            scatter = module_of(model, group.scatter, Scatter)
            scatter.index = index if scatter.index is None else scatter.index[index]


def _try(model: nn.Module, chosen: Chosen, image_shape: Sequence[int] | None) -> None:
    """Remove from a copy and compare it with one that is masked. Raises ValueError."""
    whole, images = trial.copy_with_images(model, image_shape)
    names = ", ".join(group.name for group, _ in chosen)
    who = f"{names}: without these channels {type(model).__name__}"
    for masked in (whole, trial.with_negative_shifts(whole)):
        narrow = copy.deepcopy(masked)
        _remove(narrow, chosen)
        parameters = dict(masked.named_parameters())
        for name, mask in _masks(masked, chosen, norms=True).items():
            parameters[name].mul_(mask)
        found = trial.outputs(narrow, images, f"{who} no longer computes")
        if not trial.equal(found, trial.outputs(masked, images, f"{who} is masked, which does not compute")):
            raise ValueError(
                f"{who} computes something else than with them masked: something behind them mixes channels or is not in the group"
            )


def masks(
    model: nn.Module, keep: Keep, groups: Sequence[ChannelGroup] | None = None, norms: bool = True
) -> dict[str, Tensor]:
    """Boolean masks [shape of the parameter] by parameter name, False for what `remove` would remove.

    They cover the filters and their biases, the norm's scale and shift, followers, and the
    columns that read the channels. norms=False leaves out norms: what they emit for a masked channel is
    read by nothing. The norm behind a residual branch belongs to the stream and is never masked. Raises
    ValueError as `remove` does of layers and channels.
    """
    return _masks(model, _checked(model, keep, groups), norms)


def _masks(model: nn.Module, chosen: Chosen, norms: bool) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found: dict[str, Tensor] = {}

    def exclude(name: str, dim: int, index: Tensor) -> None:
        parameter = parameters.get(name)
        if parameter is None:
            return
        line = torch.zeros(parameter.shape[dim], dtype=torch.bool, device=parameter.device)
        line[index] = True
        shape = [-1 if i == dim else 1 for i in range(parameter.ndim)]
        found[name] = found.get(name, True) & line.view(shape).expand_as(parameter)

    for group, index in chosen:
        channels = weight_of(model, group.name).shape[0]
        for name, module in channelwise(model, group):
            if norms or not isinstance(module, NORMS):
                exclude(f"{name}.weight", 0, index)
                exclude(f"{name}.bias", 0, index)
        for name in group.consumers:
            exclude(f"{name}.weight", 1, _columns(weight_of(model, name), index, channels))
    return found


def _checked(
    model: nn.Module, keep: Keep, groups: Sequence[ChannelGroup] | None
) -> list[tuple[ChannelGroup, Tensor]]:
    """The named groups with the indices of the channels that stay, on the device of their layer."""
    by_name = {group.name: group for group in (groups_of(model) if groups is None else groups)}
    chosen = []
    for name, indices in keep.items():
        if name not in by_name:
            raise ValueError(f"no removable channels are called {name!r}; {hint(name, list(by_name))}")
        group = by_name[name]
        channels = check(model, group)
        index = _index(name, indices, channels).to(weight_of(model, name).device)
        if len(index) < group.minimum:
            raise ValueError(
                f"{name}: {len(index)} of {channels} channels kept; at least {group.minimum} must stay"
            )
        check_whole_groups(model, group, index)
        chosen.append((group, index))
    return chosen


def _index(name: str, indices: Sequence[int] | Tensor, channels: int) -> Tensor:
    index = torch.as_tensor(indices)
    if index.ndim != 1 or len(index) and (index.is_floating_point() or index.dtype == torch.bool):
        raise ValueError(
            f"{name}: the numbers of the channels that stay are needed, not {index.dtype} {tuple(index.shape)}"
        )
    index = index.long()
    if len(index) and (index[0] < 0 or index[-1] >= channels or (index.diff() < 1).any()):
        raise ValueError(
            f"{name}: kept channels must ascend from 0 to at most {channels - 1}: {index.tolist()}"
        )
    return index


def _columns(weight: Tensor, index: Tensor, channels: int) -> Tensor:
    """The columns of a consumer's weight that read the channels `index`: several each behind a flattened map."""
    each = weight.shape[1] // channels
    return (index[:, None] * each + torch.arange(each, device=index.device)).flatten()


def _narrow(
    module: nn.Module, entry: str, dim: int, index: Tensor, optimizer: torch.optim.Optimizer | None
) -> None:
    """Take `index` along `dim` of a parameter or buffer, and of the optimiser's state for it."""
    tensor = getattr(module, entry, None)
    if tensor is None:
        return
    if not isinstance(tensor, nn.Parameter):
        setattr(module, entry, _taken(tensor, dim, index))
        return
    if optimizer is not None and tensor in optimizer.state:
        state = optimizer.state[tensor]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == tensor.shape:
                state[key] = _taken(value, dim, index)
    tensor.grad = None
    tensor.data = _taken(tensor, dim, index)


def _taken(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    channels_last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return tensor.index_select(dim, index).contiguous(memory_format=layout)


def _renumber(module: nn.Module, channels: int) -> None:
    """Make a layer's own numbers agree with its weight, and those of a norm or an activation with its channels."""
    if isinstance(module, CHANNEL_NORMS):
        module.num_features = channels
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = channels * module.num_groups // module.num_channels
        module.num_channels = channels
    elif isinstance(module, nn.PReLU):
        module.num_parameters = channels
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, CONVOLUTIONS):
        module.out_channels = len(module.weight)
        if module.groups > 1:
            module.groups = module.in_channels = module.out_channels
        else:
            module.in_channels = module.weight.shape[1]
