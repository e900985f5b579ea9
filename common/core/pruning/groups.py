"""Whether a group of channels is one that can be removed: the layers that it names, each by its kind.

What is not known here is refused by name. What lies between these layers is seen by a forward pass (see `trial`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from common.core.models import ChannelGroup, Scatter
from common.core.pruning.layers import CHANNEL_NORMS, CONVOLUTIONS, weight_parameter

_Plain = (*CONVOLUTIONS, nn.Linear)


def check(model: nn.Module, group: ChannelGroup) -> int:
    """How many channels the group has. Raises ValueError naming the layer that is not there or not known."""
    producer = _module(model, group, group.name)
    if reason := _not_plain(producer):
        raise ValueError(f"{group.name}: no channels can be removed from {reason}")
    channels = len(weight_parameter(producer, group.name))
    for name, module in channelwise(model, group):
        if name != group.name and (reason := _not_channelwise(module, name, channels)):
            raise ValueError(
                f"{group.name}: {name}, which goes along with its {channels} channels, is {reason}"
            )
    for name in group.consumers:
        if reason := _no_reader(_module(model, group, name), name, channels):
            raise ValueError(f"{group.name}: {name}, which reads its {channels} channels, is {reason}")
    if group.scatter and not isinstance(_module(model, group, group.scatter), Scatter):
        raise ValueError(f"{group.name}: {group.scatter} is no Scatter")
    return channels


def channelwise(model: nn.Module, group: ChannelGroup) -> Iterator[tuple[str, nn.Module]]:
    """The producer, its norm and the followers, as far as they hold something for each channel."""
    for name in filter(None, (group.name, group.norm, *group.followers)):
        module = _module(model, group, name)
        one_slope = isinstance(module, nn.PReLU) and module.num_parameters == 1
        if not one_slope and any(True for _ in module.state_dict()):
            yield name, module


def check_whole_groups(model: nn.Module, group: ChannelGroup, index: Tensor) -> None:
    """Raise ValueError where the channels that stay are no whole groups of a group norm."""
    for name, module in channelwise(model, group):
        if isinstance(module, nn.GroupNorm):
            size = module.num_channels // module.num_groups
            whole = index[::size, None] + torch.arange(size, device=index.device)
            if len(index) % size or (index[::size] % size).any() or not torch.equal(whole.flatten(), index):
                raise ValueError(
                    f"{group.name}: {name} is a GroupNorm, which keeps or loses whole groups of {size} channels: {index.tolist()}"
                )


def _module(model: nn.Module, group: ChannelGroup, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{group.name}: no layer of {type(model).__name__} is called {name!r}") from None


def _called(module: nn.Module) -> str:
    return f"a {type(module).__name__}"


def _not_plain(module: nn.Module) -> str | None:
    """What a layer is that is no ungrouped convolution or linear layer."""
    if not isinstance(module, _Plain):
        return f"{_called(module)}; convolutions and linear layers are known"
    if getattr(module, "groups", 1) > 1:
        return f"{_called(module)} in {module.groups} groups"
    return None


def _not_channelwise(module: nn.Module, name: str, channels: int) -> str | None:
    """What a layer is that neither treats each of so many channels by itself nor writes as many into the same sum."""
    if isinstance(module, CONVOLUTIONS):
        alike = module.groups == 1 or module.groups == module.in_channels == module.out_channels
        if alike and module.out_channels == channels:
            weight_parameter(module, name)
            return None
        shape = f"{module.in_channels} to {module.out_channels} channels in {module.groups} groups"
        return f"{_called(module)} from {shape}; one filter for each channel is known, or a further layer that writes as many"
    if isinstance(module, CHANNEL_NORMS):
        found = module.num_features
    elif isinstance(module, nn.GroupNorm):
        found = module.num_channels
    elif isinstance(module, nn.PReLU):
        found = module.num_parameters
    else:
        return f"{_called(module)}; norms of each channel, group norms, PReLU and depthwise convolutions are known"
    return None if found == channels else f"{_called(module)} of {found} channels"


def _no_reader(module: nn.Module, name: str, channels: int) -> str | None:
    """What a layer is that does not read so many channels, or in a linear layer several columns for each."""
    if reason := _not_plain(module):
        return reason
    inputs = weight_parameter(module, name).shape[1]
    fits = inputs % channels == 0 if channels and isinstance(module, nn.Linear) else inputs == channels
    return None if fits else f"{_called(module)} of {inputs} inputs"
