"""Networks that are one chain of layers: perceptrons and plain convolutional networks (LeNet-5, VGG)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from common.core.models.network import (
    BatchNorm2d,
    Chain,
    ChannelGroup,
    Conv2d,
    Linear,
    Network,
    checked_widths,
)

VGG: dict[str, list[int | str]] = {
    "vgg11": [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "vgg13": [64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "vgg16": [64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"],
    "vgg19": [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"],
}


class MLP(Network):
    """Linear layers with ReLU between them on the flattened image. widths: units of the hidden layers."""

    def __init__(
        self,
        classes: int,
        image_shape: Sequence[int],
        widths: Sequence[int] | None,
        *,
        hidden: Sequence[int] = (100, 100),
    ):
        super().__init__()
        # the number of hidden layers is the caller's choice here
        widths = checked_widths(widths, hidden if widths is None else [1] * len(widths))
        channels, height, width = image_shape
        layers: list[nn.Module] = [nn.Flatten()]
        units = channels * height * width
        for wanted in widths:
            layers += [Linear(units, wanted), nn.ReLU()]
            units = wanted
        self.layers = nn.Sequential(*layers, Linear(units, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def channel_groups(self) -> list[ChannelGroup]:
        names = [f"layers.{i}" for i, module in enumerate(self.layers) if isinstance(module, nn.Linear)]
        return [ChannelGroup(name, consumers=(reader,)) for name, reader in pairwise(names)]


class ConvNet(Network):
    """Convolutions with batch norm and ReLU, pooling between them, and one or more linear layers.

    cfg: a number is a convolution of that width, "M" a 2x2 max-pool, "S" gives the next convolution stride 2.
    hidden: units of linear layers before the last one, each followed by ReLU and dropout. widths: of the
    convolutions and then of the hidden layers (default: as in cfg and hidden). padding: of all convolutions
    or of each (default: half the kernel). head: `gap` averages the last maps, `flatten` gives the linear
    layer one column for each position. final_pool: `average` leaves out a max-pool at the end, so that `gap`
    averages what it would have pooled.
    """

    def __init__(
        self,
        classes: int,
        image_shape: Sequence[int],
        widths: Sequence[int] | None,
        *,
        cfg: Sequence[int | str],
        hidden: Sequence[int] = (),
        head: Literal["gap", "flatten"] = "gap",
        final_pool: Literal["max", "average"] = "max",
        batch_norm: bool = True,
        conv_bias: bool = False,
        kernel: int = 3,
        padding: int | Sequence[int] | None = None,
        dropout: float = 0.5,
    ):
        super().__init__()
        if head not in ("gap", "flatten"):
            raise ValueError(f"head = {head!r}: must be gap or flatten")
        if final_pool not in ("max", "average"):
            raise ValueError(f"final_pool = {final_pool!r}: must be max or average")
        cfg = list(cfg)
        if final_pool == "average" and cfg and cfg[-1] == "M":
            cfg = cfg[:-1]
        convolutions = [item for item in cfg if not isinstance(item, str)]
        if not convolutions or any(item not in ("M", "S") for item in cfg if isinstance(item, str)):
            raise ValueError(f"cfg = {cfg}: must be widths, 'M' for a max-pool and 'S' for a stride of 2")
        widths = checked_widths(widths, [*convolutions, *hidden])
        units = widths[len(convolutions) :]
        if padding is None or isinstance(padding, int):
            padding = [kernel // 2 if padding is None else padding] * len(convolutions)
        self.features, channels, positions = _features(
            image_shape, cfg, widths[: len(convolutions)], kernel, padding, batch_norm, conv_bias
        )
        self.head = head
        inputs = channels * (positions if head == "flatten" else 1)
        layers: list[nn.Module] = []
        for wanted in units:
            layers += [Linear(inputs, wanted), nn.ReLU(), nn.Dropout(dropout)]
            inputs = wanted
        last = Linear(inputs, classes)
        self.classifier = nn.Sequential(*layers, last) if layers else last

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if self.head == "flatten":
            return self.classifier(x.flatten(1))
        # over positions in their memory order: the gradient comes back in channels-last layout
        return self.classifier(x.permute(0, 2, 3, 1).flatten(1, 2).mean(1))

    def channel_groups(self) -> list[ChannelGroup]:
        named = [(f"features.{i}", module) for i, module in enumerate(self.features)]
        norms = {before: name for (before, _), (name, m) in pairwise(named) if isinstance(m, BatchNorm2d)}
        names = [name for name, module in named if isinstance(module, nn.Conv2d)]
        if isinstance(self.classifier, nn.Linear):
            names.append("classifier")
        else:
            names += [f"classifier.{i}" for i, m in enumerate(self.classifier) if isinstance(m, nn.Linear)]
        return [ChannelGroup(n, norm=norms.get(n), consumers=(reader,)) for n, reader in pairwise(names)]


def _features(
    image_shape: Sequence[int],
    cfg: Sequence[int | str],
    widths: Sequence[int],
    kernel: int,
    padding: Sequence[int],
    batch_norm: bool,
    conv_bias: bool,
) -> tuple[Chain, int, int]:
    """The convolutional part, its number of output channels and of positions."""
    channels, *sides = image_shape
    remaining = iter(zip(widths, padding, strict=True))
    layers: list[nn.Module] = []
    stride = 1
    for item in cfg:
        if item == "S":
            stride = 2
            continue
        if item == "M":
            layers.append(nn.MaxPool2d(2))
            sides = [side // 2 for side in sides]
        else:
            width, around = next(remaining)
            layers.append(Conv2d(channels, width, kernel, stride, around, bias=conv_bias))
            if batch_norm:
                layers.append(BatchNorm2d(width))
            layers.append(nn.ReLU())
            sides = [(side + 2 * around - kernel) // stride + 1 for side in sides]
            channels, stride = width, 1
        if min(sides) < 1:
            raise ValueError(f"images of {image_shape[1]}x{image_shape[2]} are too small for {list(cfg)}")
    return Chain(*layers), channels, sides[0] * sides[1]
