"""Networks of one's own, each by the function that builds it: `architecture: tutorials/networks.py:separable`."""

from __future__ import annotations

from torch import nn
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

from common.core.models import ChannelGroup


def separable(classes: int, image_shape: tuple[int, int, int], *, width: int = 16) -> nn.Module:
    """A small chain of torchvision's blocks: a stem, a depthwise and a pointwise convolution, and squeeze-and-excitation."""
    return nn.Sequential(
        Conv2dNormActivation(image_shape[0], width),
        Conv2dNormActivation(width, width, groups=width),
        Conv2dNormActivation(width, 2 * width, 1, stride=2),
        SqueezeExcitation(2 * width, width // 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


class Described(nn.Module):
    """A network that says which of its channels can be removed."""

    def __init__(self, classes: int, inputs: int):
        super().__init__()
        self.first, self.norm = nn.Conv2d(inputs, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.second, self.head = nn.Conv2d(12, 8, 3), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))

    def channel_groups(self) -> list[ChannelGroup]:
        """What methods that remove channels need to know."""
        return [
            ChannelGroup("first", "norm", consumers=("second",)),
            ChannelGroup("second", consumers=("head",)),
        ]


def described(classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """A plain module whose channels the suite's methods can remove."""
    return Described(classes, image_shape[0])


def torchvisions(classes: int, image_shape: tuple[int, int, int], *, name: str = "resnet18") -> nn.Module:
    """Any classifier of torchvision, for images of three channels; timm's `create_model` serves as well."""
    from torchvision.models import get_model

    return get_model(name, num_classes=classes)
