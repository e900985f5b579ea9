"""Residual networks with basic and bottleneck blocks, and wide ones with pre-activation.

A block adds a branch to the stream of channels that runs through the network. Inside the branch widths are
free; the stream keeps its width. A branch may also feed only some channels of the stream, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import pad

from common.core.models.network import (
    BatchNorm2d,
    ChannelGroup,
    Conv2d,
    Linear,
    Network,
    Scatter,
    checked_widths,
    norm_relu,
)

Shortcut = Literal["A", "B"]


class PaddedShortcut(nn.Module):
    """Every second position, and zero channels on either side (option A of He et al. 2016); no parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride = stride
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        return pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def _shortcut(inputs: int, outputs: int, stride: int, kind: Shortcut) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if kind == "A":
        return PaddedShortcut(inputs, outputs, stride)
    return nn.Sequential(Conv2d(inputs, outputs, 1, stride, bias=False), BatchNorm2d(outputs))


class Block(nn.Module):
    """Adds a branch of convolutions to the stream; ReLU after the sum.

    kernels: of the branch's convolutions; strided: which of them has the stride. expansion: of the stream's
    width. inner: widths of all but the last convolution. branch: how many channels of the stream the last one
    feeds. The batch norm at the branch's end covers the whole stream: a channel that gets no convolution gets
    what the norm makes of zeros, as a masked one would. A width of 0 leaves only that.
    """

    kernels: tuple[int, ...]
    strided: int
    expansion: int
    conv1: Conv2d
    bn1: BatchNorm2d
    conv2: Conv2d
    bn2: BatchNorm2d

    def __init__(
        self, inputs: int, inner: Sequence[int], branch: int, outputs: int, stride: int, shortcut: Shortcut
    ):
        super().__init__()
        widths = [inputs, *inner, branch]
        for i, kernel in enumerate(self.kernels):
            step = stride if i == self.strided else 1
            last = i == len(self.kernels) - 1
            conv = Conv2d(widths[i], widths[i + 1], kernel, step, kernel // 2, bias=False)
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", BatchNorm2d(outputs if last else widths[i + 1]))
        self.scatter = Scatter(branch, outputs)
        self.shortcut = _shortcut(inputs, outputs, stride, shortcut)


class BasicBlock(Block):
    """Two 3x3 convolutions."""

    kernels, strided, expansion = (3, 3), 0, 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.scatter(self.conv2(norm_relu(self.bn1, self.conv1(x))))
        return norm_relu(self.bn2, y, self.shortcut(x))


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions, the stride in the middle."""

    kernels, strided, expansion = (1, 3, 1), 1, 4
    conv3: Conv2d
    bn3: BatchNorm2d

    def forward(self, x: Tensor) -> Tensor:
        y = norm_relu(self.bn1, self.conv1(x))
        y = norm_relu(self.bn2, self.conv2(y))
        return norm_relu(self.bn3, self.scatter(self.conv3(y)), self.shortcut(x))


class ResNet(Network):
    """Stem, stages of blocks, global average pooling and a linear layer.

    widths: the inner widths of every block in turn (one for a basic block, two for a bottleneck); they may be
    followed by one number for each block: how many channels of the stream its branch feeds. Each may be 0.
    blocks: how many in each stage. stem: width of the stem and default inner width of the first stage,
    doubled in each further one; the stream has the same widths (four times these with bottlenecks).
    multiplier: of the widths of stem and stream, rounded down. large: the stem for large images, 7x7 with
    stride 2, in place of 3x3. pool_padding: of a 3x3 max-pool with stride 2 after the stem, None for none.
    """

    def __init__(
        self,
        classes: int,
        image_shape: Sequence[int],
        widths: Sequence[int] | None,
        *,
        block: type[Block],
        blocks: Sequence[int],
        stem: int = 16,
        multiplier: float = 1.0,
        shortcut: Shortcut = "B",
        large: bool = False,
        pool_padding: int | None = None,
    ):
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut = {shortcut!r}: must be A (zero padding) or B (1x1 convolution)")
        each = len(block.kernels) - 1
        inner = [stem * 2**stage for stage in range(len(blocks))]
        outputs = [int(width * block.expansion * multiplier) for width in inner]
        stem = int(stem * multiplier)
        default = [width for width, count in zip(inner, blocks) for _ in range(count * each)]
        branches = [width for width, count in zip(outputs, blocks) for _ in range(count)]
        if widths is not None and len(widths) == len(default) + len(branches):
            widths = checked_widths(widths, [*default, *branches], 0, [*[None] * len(default), *branches])
        else:
            widths = checked_widths(widths, default, 0) + branches
        fed = widths[len(default) :]
        kernel, stride = (7, 2) if large else (3, 1)
        self.conv1 = Conv2d(image_shape[0], stem, kernel, stride, kernel // 2, bias=False)
        self.bn1 = BatchNorm2d(stem)
        self.maxpool = nn.Identity() if pool_padding is None else nn.MaxPool2d(3, 2, pool_padding)
        self.stages = len(blocks)
        inputs, n = stem, 0
        for stage, (count, out) in enumerate(zip(blocks, outputs)):
            layers = []
            for i in range(count):
                stride = 2 if stage and not i else 1
                layers.append(block(inputs, widths[n * each : (n + 1) * each], fed[n], out, stride, shortcut))
                inputs, n = out, n + 1
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = Linear(inputs, classes)
        self.register_load_state_dict_pre_hook(_accept_other_names)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(norm_relu(self.bn1, self.conv1(x)))
        for layer in self.layers():
            x = layer(x)
        return self.linear(self.avgpool(x).flatten(1))

    def layers(self) -> list[nn.Sequential]:
        """The stages, each a sequence of blocks."""
        return [getattr(self, f"layer{stage + 1}") for stage in range(self.stages)]

    def blocks(self) -> list[tuple[str, Block]]:
        """All blocks with their names, from the stem on."""
        named = (
            (f"layer{s}.{i}", b) for s, layer in enumerate(self.layers(), 1) for i, b in enumerate(layer)
        )
        return [(name, block) for name, block in named if isinstance(block, Block)]

    def channel_groups(self) -> list[ChannelGroup]:
        inner, branches = [], []
        for name, block in self.blocks():
            last = len(block.kernels)
            inner += [
                ChannelGroup(
                    f"{name}.conv{i}", f"{name}.bn{i}", consumers=(f"{name}.conv{i + 1}",), minimum=0
                )
                for i in range(1, last)
            ]
            branches.append(ChannelGroup(f"{name}.conv{last}", scatter=f"{name}.scatter", minimum=0))
        return inner + branches

    @property
    def widths(self) -> list[int]:
        """Inner widths, and the branches' numbers of outputs too when one feeds only part of the stream."""
        widths, blocks = super().widths, self.blocks()
        if all(block.scatter.index is None for _, block in blocks):
            return widths[: -len(blocks)]
        return widths


def _accept_other_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """torchvision calls the shortcut `downsample` and the last layer `fc`."""
    for key in [key for key in state if key.startswith(prefix)]:
        name = key[len(prefix) :]
        renamed = name.replace(".downsample.", ".shortcut.")
        renamed = "linear" + renamed[2:] if renamed.startswith("fc.") else renamed
        if renamed != name:
            state[prefix + renamed] = state.pop(key)


class WideBlock(nn.Module):
    """Pre-activation block with dropout; the stride is in the second convolution."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, dropout: float):
        super().__init__()
        self.bn1 = BatchNorm2d(inputs)
        self.conv1 = Conv2d(inputs, inner, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.bn2 = BatchNorm2d(inner)
        self.conv2 = Conv2d(inner, outputs, 3, stride, 1)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(Conv2d(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.conv1(norm_relu(self.bn1, x)))
        return self.conv2(norm_relu(self.bn2, y)) + self.shortcut(x)


class WideResNet(Network):
    """Wide residual network (Zagoruyko & Komodakis 2016) as in the IMP+SLR release: convolutions have biases.

    widths: the inner width of every block. The last batch norm has momentum 0.9.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self,
        classes: int,
        image_shape: Sequence[int],
        widths: Sequence[int] | None,
        *,
        blocks: int = 4,
        factor: int = 10,
        dropout: float = 0.3,
    ):
        super().__init__()
        outputs = [16 * factor, 32 * factor, 64 * factor]
        widths = checked_widths(widths, [width for width in outputs for _ in range(blocks)])
        self.conv1 = Conv2d(image_shape[0], 16, 3, padding=1)
        inputs, inner = 16, iter(widths)
        for stage, out in enumerate(outputs):
            layers = []
            for i in range(blocks):
                layers.append(WideBlock(inputs, next(inner), out, 2 if stage and not i else 1, dropout))
                inputs = out
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.bn1 = BatchNorm2d(inputs, momentum=0.9)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.linear(self.avgpool(norm_relu(self.bn1, x)).flatten(1))

    def channel_groups(self) -> list[ChannelGroup]:
        stages = enumerate((self.layer1, self.layer2, self.layer3), 1)
        names = [f"layer{s}.{i}" for s, layer in stages for i in range(len(layer))]
        return [ChannelGroup(f"{name}.conv1", f"{name}.bn2", consumers=(f"{name}.conv2",)) for name in names]
