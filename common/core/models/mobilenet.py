"""MobileNets: depthwise-separable convolutions (version 1) and inverted residuals (version 2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from common.core.models.network import (
    BatchNorm2d,
    Chain,
    ChannelGroup,
    Conv2d,
    Linear,
    Network,
    checked_widths,
    norm_relu,
)

V1_WIDTHS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
V1_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)

# version 2: hidden width, output width and stride of each block
V2_BLOCKS = (
    *[(32, 16, 1), (96, 24, 2), (144, 24, 1), (144, 32, 2), (192, 32, 1), (192, 32, 1), (192, 64, 2)],
    *[(384, 64, 1), (384, 64, 1), (384, 64, 1), (384, 96, 1), (576, 96, 1), (576, 96, 1), (576, 160, 2)],
    *[(960, 160, 1), (960, 160, 1), (960, 320, 1)],
)
V2_LAST = 1280


class Separable(nn.Module):
    """A depthwise 3x3 and a pointwise convolution, each with batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        self.bn1 = BatchNorm2d(inputs)
        self.conv2 = Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = norm_relu(self.bn1, self.conv1(x))
        return norm_relu(self.bn2, self.conv2(x))


class MobileNetV1(Network):
    """Stem, separable blocks, global average pooling and a linear layer.

    widths: of the stem and of each block's pointwise convolution; a depthwise convolution has the width of
    its input. default: the widths when none are given. strides: of the blocks.
    """

    def __init__(
        self,
        classes: int,
        image_shape: Sequence[int],
        widths: Sequence[int] | None,
        *,
        default: Sequence[int] = V1_WIDTHS,
        strides: Sequence[int] = V1_STRIDES,
        stem_stride: int = 2,
    ):
        super().__init__()
        widths = checked_widths(widths, default)
        self.conv1 = Conv2d(image_shape[0], widths[0], 3, stem_stride, 1, bias=False)
        self.bn1 = BatchNorm2d(widths[0])
        self.blocks = nn.Sequential(*map(Separable, widths, widths[1:], strides))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(norm_relu(self.bn1, self.conv1(x)))
        return self.linear(self.avgpool(x).flatten(1))

    def channel_groups(self) -> list[ChannelGroup]:
        blocks = [f"blocks.{i}" for i in range(len(self.blocks))]
        producers = [("conv1", "bn1"), *((f"{b}.conv2", f"{b}.bn2") for b in blocks)]
        readers = [((f"{b}.conv1", f"{b}.bn1"), f"{b}.conv2") for b in blocks] + [((), "linear")]
        return [ChannelGroup(*p, followers, (reader,)) for p, (followers, reader) in zip(producers, readers)]


def _conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int, groups: int, activation: type[nn.Module]
) -> Chain:
    conv = Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return Chain(conv, BatchNorm2d(outputs), activation())


class InvertedResidual(nn.Module):
    """Expand (but for the first block), depthwise 3x3, project; the input is added where the shape allows."""

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int, expand: bool):
        super().__init__()
        layers = [_conv_norm(inputs, hidden, 1, 1, 1, nn.ReLU6)] if expand else []
        layers.append(_conv_norm(hidden, hidden, 3, stride, hidden, nn.ReLU6))
        self.conv = nn.Sequential(*layers, Conv2d(hidden, outputs, 1, bias=False), BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(Network):
    """MobileNetV2 with the names of torchvision.

    widths: of the stem (also the first block's hidden width), the hidden widths of the other blocks, and the
    last 1x1 convolution. multiplier: of the blocks' output widths, rounded down. outer_relu6: ReLU6 behind
    the stem and the last convolution too, in place of ReLU.
    """

    def __init__(
        self,
        classes: int,
        image_shape: Sequence[int],
        widths: Sequence[int] | None,
        *,
        multiplier: float = 1.0,
        outer_relu6: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        widths = checked_widths(widths, [*(hidden for hidden, _, _ in V2_BLOCKS), V2_LAST])
        outer = nn.ReLU6 if outer_relu6 else nn.ReLU
        layers: list[nn.Module] = [_conv_norm(image_shape[0], widths[0], 3, 2, 1, outer)]
        inputs = widths[0]
        for i, (hidden, (_, base, stride)) in enumerate(zip(widths, V2_BLOCKS)):
            outputs = int(base * multiplier)
            layers.append(InvertedResidual(inputs, hidden, outputs, stride, expand=i > 0))
            inputs = outputs
        layers.append(_conv_norm(inputs, widths[-1], 1, 1, 1, outer))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), Linear(widths[-1], classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))

    def channel_groups(self) -> list[ChannelGroup]:
        last = len(self.features) - 1
        groups = []
        for i in range(1, last):
            block = f"features.{i}.conv"
            # the first block has no expansion: its hidden channels are the stem's
            producer, depthwise = ("features.0", f"{block}.0") if i == 1 else (f"{block}.0", f"{block}.1")
            reader = f"{block}.{1 if i == 1 else 2}"
            followers = (f"{depthwise}.0", f"{depthwise}.1")
            groups.append(ChannelGroup(f"{producer}.0", f"{producer}.1", followers, (reader,)))
        groups.append(ChannelGroup(f"features.{last}.0", f"features.{last}.1", consumers=("classifier.1",)))
        return groups
