"""Networks of one's own: any `nn.Module`, by a function in a file of the project that builds it.

The architecture `tutorials/networks.py:separable` is `def separable(classes, image_shape, *, width=16)` in that file: a
module that gives [B, classes] for images [B, *image_shape]. The function's further arguments are options of the network.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from common.core.identity import GLOBAL_GENERATOR, digest
from common.core.models.network import ChannelGroup, Network
from common.settings import ROOT, SettingsError

_INNER = "network"


class Undescribed(SettingsError, ValueError):
    """What a network of one's own does not say of itself."""


class Own(Network):
    """A module of one's own among the suite's networks. It may describe its removable channels (`channel_groups`)."""

    convention = "products"
    """How it is counted: with the products of layers that the suite does not know."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def channel_groups(self) -> list[ChannelGroup]:
        """Those that the module describes, by their names here. Raises Undescribed."""
        describe = getattr(self.network, "channel_groups", None)
        if describe is None:
            raise Undescribed(
                f"{type(self.network).__name__} describes no removable channels: it needs a method channel_groups, which "
                "lists them as of common.core.models.ChannelGroup"
            )
        return [_inside(group) for group in describe()]

    @property
    def widths(self) -> list[int]:
        """Channels of each group that the module describes; none where it describes nothing."""
        return super().widths if hasattr(self.network, "channel_groups") else []


def _inside(group: ChannelGroup) -> ChannelGroup:
    def named(name: str) -> str:
        return f"{_INNER}.{name}"

    return replace(
        group,
        name=named(group.name),
        norm=group.norm and named(group.norm),
        followers=tuple(map(named, group.followers)),
        consumers=tuple(map(named, group.consumers)),
        scatter=group.scatter and named(group.scatter),
    )


def is_own(architecture: str) -> bool:
    """Whether a name is that of a function in a file."""
    return ".py:" in architecture


def file_of(architecture: str) -> str:
    """The file of such a network, relative to the project. Raises SettingsError."""
    found = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)*\.py):(\w+)", architecture)
    if found is None or ".." in found[1].split("/"):
        raise SettingsError(
            f"architecture = {architecture!r}: a network of one's own is FILE.py:FUNCTION, a file of the project by its path there"
        )
    return found[1]


@functools.cache
def function(architecture: str) -> Callable[..., nn.Module]:
    """The function that builds such a network. Raises SettingsError."""
    file = file_of(architecture)
    if not (ROOT / file).is_file():
        raise SettingsError(f"architecture = {architecture!r}: there is no file {file} in the project")
    found = getattr(_module(ROOT / file), name := architecture.rpartition(":")[2], None)
    if not inspect.isfunction(found):
        raise SettingsError(f"architecture = {architecture!r}: {file} has no function {name}")
    if list(inspect.signature(found).parameters)[:2] != ["classes", "image_shape"]:
        raise SettingsError(
            f"architecture = {architecture!r}: its first arguments must be classes and image_shape"
        )
    return found


@functools.cache
def _module(file: Path) -> ModuleType:
    module = ModuleType(f"_own_{digest(str(file))[:16]}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), module.__dict__)
    except Exception as error:  # code of one's own may fail in any way
        raise SettingsError(f"{file}: cannot be loaded: {type(error).__name__}: {error}") from None
    return module


def options_of(architecture: str) -> dict[str, Any]:
    """The kinds of the function's options, by name; those that say nothing may be anything. Raises SettingsError."""
    found = function(architecture)
    hints = get_type_hints(found)
    return {name: hints.get(name, Any) for name in list(inspect.signature(found).parameters)[2:]}


def build_own(
    architecture: str, classes: int, image_shape: Sequence[int], seed: int, options: dict[str, Any]
) -> Own:
    """A fresh network on the CPU; what its function draws from torch's generator follows from the seed.

    Raises SettingsError where the function fails or returns no module.
    """
    with GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            network = function(architecture)(classes, tuple(image_shape), **options)
        except Exception as error:  # code of one's own may fail in any way
            raise SettingsError(f"architecture {architecture!r}: {type(error).__name__}: {error}") from None
    if not isinstance(network, nn.Module):
        raise SettingsError(f"architecture {architecture!r} returns {type(network).__name__}, no nn.Module")
    return Own(network)
