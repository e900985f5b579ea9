"""Networks by name, built from lists of widths: a pruned network is the same class with smaller numbers.

build("resnet20", classes=10, image_shape=(3, 32, 32), widths=[8] * 3 + [16] * 3 + [32] * 3, seed=1)
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, get_type_hints

import torch
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError

from common.core.models import own
from common.core.models.chain import MLP, VGG, ConvNet
from common.core.models.mobilenet import MobileNetV1, MobileNetV2
from common.core.models.network import (
    ChannelGroup,
    Fill,
    Network,
    Scatter,
    initialise,
    module_of,
    weight_of,
)
from common.core.models.resnet import BasicBlock, Block, Bottleneck, ResNet, WideResNet
from common.settings import SettingsError, hint

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ArchitectureName",
    "ChannelGroup",
    "Network",
    "Scatter",
    "architecture",
    "build",
    "check_options",
    "module_of",
    "own_code",
    "weight_of",
]


@dataclass(frozen=True)
class Architecture:
    """A network class with the options that make it a named architecture, and its default initialisation."""

    network: type[Network]
    options: dict[str, Any] = field(default_factory=dict)
    conv_init: Fill = "fan_out"
    linear_init: Fill = "normal"


def _residual(block: type[Block], blocks: Sequence[int], **options: Any) -> Architecture:
    return Architecture(ResNet, {"block": block, "blocks": list(blocks), **options}, linear_init="torch")


def _cifar_resnet(depth: int) -> Architecture:
    return _residual(BasicBlock, [(depth - 2) // 6] * 3)


def _chain(cfg: Sequence[int | str], **options: Any) -> Architecture:
    return Architecture(ConvNet, {"cfg": list(cfg), **options})


_BIASED = {"batch_norm": False, "conv_bias": True, "head": "flatten"}

ARCHITECTURES: dict[str, Architecture] = {
    "mlp": Architecture(MLP, linear_init="torch"),
    "lenet300": Architecture(MLP, {"hidden": [300, 100]}, linear_init="torch"),
    "lenet5": Architecture(
        ConvNet,
        {
            "cfg": [6, "M", 16, "M"],
            "kernel": 5,
            "padding": [2, 0],
            "hidden": [120, 84],
            "dropout": 0.0,
            **_BIASED,
        },
        conv_init="torch",
        linear_init="torch",
    ),
    # any chain of convolutions: needs the option cfg
    "convnet": Architecture(ConvNet),
    "digits_cnn": _chain([16, 32, "M", 64]),
    "digits_cnn_strided": _chain([16, "S", 32, "S", 64]),
    "digits_vgg": _chain([16, 16, "M", 32, 32]),
    "vgg_t8": _chain([16, 16, "M", 32, 32, "M", 64, 64]),
    "vgg_mini": _chain([8, 16, "M", 16, 32, "M", 32, "M"], hidden=[32]),
    **{name: _chain(cfg) for name, cfg in VGG.items()},
    **{f"resnet{depth}": _cifar_resnet(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "resnet50_cifar": _cifar_resnet(50),
    "resnet164": _residual(Bottleneck, [18] * 3),
    "resnet18": _residual(BasicBlock, [2, 2, 2, 2], stem=64),
    # 3x3 stem without stride and an unpadded pool on large images, as in the feature-relevance release
    "resnet34": _residual(BasicBlock, [3, 4, 6, 3], stem=64, pool_padding=0),
    "resnet50": _residual(Bottleneck, [3, 4, 6, 3], stem=64, large=True, pool_padding=1),
    "wide_resnet28_10": Architecture(WideResNet, linear_init="torch"),
    "mobilenet_v1": Architecture(MobileNetV1),
    "mobilenet_v1_cifar": Architecture(MobileNetV1, {"stem_stride": 1}),
    "mobilenet_t8": Architecture(
        MobileNetV1, {"default": [16, 32, 32, 64, 64, 64], "strides": [1, 2, 1, 2, 1], "stem_stride": 1}
    ),
    "mobilenet_v2": Architecture(MobileNetV2),
}


def architecture(name: str) -> Architecture:
    """The architecture of that name. Raises SettingsError with the names that exist.

    Besides those listed, resnet<depth> is a CIFAR network for any depth 6n+2.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if own.is_own(name):
        raise SettingsError(
            f"architecture = {name!r}: a network of one's own cannot stand here, only one of the suite"
        )
    depth = re.fullmatch(r"resnet(\d+)", name)
    if depth and int(depth[1]) > 2 and int(depth[1]) % 6 == 2:
        return _cifar_resnet(int(depth[1]))
    raise SettingsError(f"architecture = {name!r}: unknown; {hint(name, [*ARCHITECTURES, 'resnet<6n+2>'])}")


def _known(name: str) -> str:
    try:
        own.function(name) if own.is_own(name) else architecture(name)
    except SettingsError as error:
        raise ValueError(str(error)) from None
    return name


ArchitectureName = Annotated[str, AfterValidator(_known)]
"""The name of an architecture, in settings."""


@functools.cache
def _kinds(name: str) -> dict[str, TypeAdapter[Any]]:
    """What the options of a network may be, by name: those of its class, and those of `build` for all."""
    if own.is_own(name):
        kinds = own.options_of(name)
    else:
        network = architecture(name).network
        hints = get_type_hints(network.__init__)
        parameters = inspect.signature(network.__init__).parameters.values()
        kinds = {p.name: hints.get(p.name, Any) for p in parameters if p.kind is p.KEYWORD_ONLY}
    shared = get_type_hints(build)
    kinds |= {name: shared[name] for name in ("widths", "conv_init", "linear_init", "norm_scale", "seed")}
    return {name: TypeAdapter(kind, config=ConfigDict(strict=True)) for name, kind in kinds.items()}


def own_code(name: str) -> tuple[str, ...]:
    """The file of a network of one's own, relative to the project; none for one of the suite. Raises SettingsError."""
    return (own.file_of(name),) if own.is_own(name) else ()


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise SettingsError for an option that a network of that architecture does not have, or that is of another kind."""
    known = _kinds(name)
    for option, value in options.items():
        if option not in known:
            raise SettingsError(f"option {option!r} of {name!r}: unknown; {hint(option, list(known))}")
        try:
            known[option].validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]["msg"].removeprefix("Input ")
            raise SettingsError(f"option {option!r} of {name!r} = {value!r}: {problem}") from None


def build(
    name: str,
    *,
    classes: int,
    image_shape: Sequence[int],
    widths: Sequence[int] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    conv_init: Fill | None = None,
    linear_init: Fill | None = None,
    norm_scale: float = 1.0,
    **options: Any,
) -> Network:
    """A freshly initialised network of that architecture, or of one's own (FILE.py:FUNCTION, see `own`).

    image_shape: (channels, height, width). widths: see `Network.widths` and the class of the architecture;
    its own when absent. seed: of the initial values, which are drawn on the CPU; the global random state is
    not touched. device: "meta" gives shapes without memory, for counting. conv_init, linear_init: see
    `initialise` (default: as the architecture says, or the function of one's own). norm_scale: first value of the batch norms' scales.
    options: of the network's class or function. Raises SettingsError for an unknown name or option, ValueError for widths
    or options that cannot be.
    """
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape = {tuple(image_shape)}: must be (channels, height, width)")
    if classes < 1:
        raise ValueError(f"classes = {classes}: must be at least 1")
    check_options(name, options)
    generator = torch.Generator().manual_seed(seed)
    if own.is_own(name):
        if widths:
            raise SettingsError(
                f"architecture {name!r}: a network of one's own has no other widths than its own"
            )
        found = own.build_own(name, classes, image_shape, seed, options)
        initialise(found, generator, conv_init, linear_init, None if norm_scale == 1.0 else norm_scale)
        return found.to(device)
    arch = architecture(name)
    options = {**arch.options, **options}
    for option, parameter in inspect.signature(arch.network.__init__).parameters.items():
        required = parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        if required and option not in options:
            raise SettingsError(f"option {option!r} of {name!r}: missing")
    hollow = torch.device(device).type == "meta"
    with torch.device("meta" if hollow else "cpu"):
        model = arch.network(classes, image_shape, widths, **options)
    if hollow:
        return model
    initialise(model, generator, conv_init or arch.conv_init, linear_init or arch.linear_init, norm_scale)
    return model.to(device)
