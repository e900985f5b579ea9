"""Relevance of every feature map for the true class, by the rules of the authors' compute_rscore.py.

The rules take batches: x is a layer's input [N, ...], `relevance` that of its output [N, ...]; they return
the relevance of the input, shaped like x. `EPS` is added to every denominator, whatever its sign.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d as convolve
from torch.nn.functional import max_pool2d as pool
from torch.nn.functional import relu
from torch.nn.grad import conv2d_input

from common.core.models.chain import ConvNet
from common.core.models.resnet import Block, ResNet
from common.settings import SettingsError

EPS = 1e-9

Back = Callable[[Tensor], Tensor]
"""Takes the relevance of a layer's output to that of its input."""


def linear(x: Tensor, weight: Tensor, relevance: Tensor, alpha: float = 2.0) -> Tensor:
    """Alpha-beta rule of a linear layer, beta = alpha - 1; x [N, in], weight [out, in]; no bias."""
    positive, negative = weight.clamp(min=0), weight.clamp(max=0)
    upper = alpha * relevance / (x @ positive.T + EPS)
    lower = (1 - alpha) * relevance / (x @ negative.T + EPS)
    return x * (upper @ positive + lower @ negative)


def conv2d(
    x: Tensor,
    weight: Tensor,
    relevance: Tensor,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    alpha: float = 2.0,
) -> Tensor:
    """Alpha-beta rule of a convolution.

    As in the authors' code, weights are kept at least EPS away from zero on their side, so a filter of zeros
    still hands relevance on. Both signs go through one convolution of twice the filters.
    """
    both = torch.cat([weight.clamp(min=EPS), weight.clamp(max=-EPS)])
    upper, lower = (convolve(x, both, stride=stride, padding=padding) + EPS).chunk(2, 1)
    shares = torch.cat([alpha * relevance / upper, (1 - alpha) * relevance / lower], 1)
    return x * conv2d_input(x.shape, both, shares, stride=stride, padding=padding)


def max_pool2d(x: Tensor, relevance: Tensor, kernel: int | tuple[int, int]) -> Tensor:
    """All of a window's relevance goes to its first maximum in row-major order; stride = kernel."""
    largest, where = pool(x, kernel, return_indices=True)
    handed_on = relevance * largest / (largest + EPS)
    return torch.zeros_like(x).flatten(2).scatter(2, where.flatten(2), handed_on.flatten(2)).view(x.shape)


def avg_pool2d(x: Tensor, relevance: Tensor, kernel: tuple[int, int]) -> Tensor:
    """In proportion to x over its window's mean; the total grows by the window's size, as in their code.

    kernel: rows and columns of a window, which is also the stride.
    """
    share = relevance / (nn.functional.avg_pool2d(x, kernel) + EPS)
    spread = share.repeat_interleave(kernel[0], 2).repeat_interleave(kernel[1], 3)
    # rows and columns that no window covers get nothing
    uncovered = (0, x.shape[3] - spread.shape[3], 0, x.shape[2] - spread.shape[2])
    return x * nn.functional.pad(spread, uncovered)


def residual_add(branch: Tensor, skip: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """The relevance of a sum, split in proportion to its two terms: (of the branch, of the skip)."""
    share = relevance / (branch + skip + EPS)
    return branch * share, skip * share


def relevances(
    model: nn.Module, images: Tensor, labels: Tensor, alpha: float = 2.0, branch_share: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward pass, and the relevance of every layer's output for the true class, mean over positions.

    Returns the logits [N, classes], and per layer name a tensor [N, channels], the layer next to the
    classifier first. The start is 1 for the true label and 0 elsewhere. The last convolution of a residual
    block stands for the sum of branch and skip, or for the branch alone when `branch_share` is set. The model
    must be in evaluation mode. Raises SettingsError for a network or layer that has no rule.
    """
    way = _Pass(model, alpha, branch_share)
    x, layers = _traced(model, images)
    logits, back = way.through(layers, x)
    back(nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype))
    return logits, way.found


def _traced(model: nn.Module, images: Tensor) -> tuple[Tensor, list[nn.Module]]:
    """The layers that relevance goes back through, and the input of the first one."""
    if isinstance(model, ResNet):
        # nothing before the first block is ever scored
        x = model.maxpool(relu(model.bn1(model.conv1(images))))
        return x, [*model.layers(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.linear]
    if isinstance(model, ConvNet):
        average = [nn.AdaptiveAvgPool2d(1)] if model.head == "gap" else []
        return images, [model.features, *average, nn.Flatten(), model.classifier]
    raise SettingsError(
        f"relevance has no rule for {type(model).__name__}: use a plain or residual CIFAR network"
    )


class _Pass:
    """A forward pass that remembers how relevance comes back.

    found: mean relevance [N, channels] by layer name.
    """

    def __init__(self, model: nn.Module, alpha: float, branch_share: bool):
        self.alpha, self.branch_share = alpha, branch_share
        self.names = {module: name for name, module in model.named_modules()}
        self.found: dict[str, Tensor] = {}

    def through(self, layers: Iterable[nn.Module], x: Tensor) -> tuple[Tensor, Back]:
        """Output of a chain of layers, and the function that takes its relevance to the relevance of x."""
        steps = []
        for layer in layers:
            x, back = self._layer(layer, x)
            steps.append(back)

        def back_through(relevance: Tensor) -> Tensor:
            for step in reversed(steps):
                relevance = step(relevance)
            return relevance

        return x, back_through

    def _layer(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, Back]:
        if isinstance(layer, nn.Sequential):
            return self.through(layer, x)
        if isinstance(layer, Block):
            return self._block(layer, x)
        return layer(x), self._rule(layer, x)

    def _rule(self, layer: nn.Module, x: Tensor) -> Back:
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            return lambda relevance: self._weighted(layer, x, relevance)
        if isinstance(layer, nn.MaxPool2d) and layer.stride == layer.kernel_size and not layer.padding:
            return lambda relevance: max_pool2d(x, relevance, layer.kernel_size)
        if isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size == 1:
            return lambda relevance: avg_pool2d(x, relevance, (x.shape[2], x.shape[3]))
        if isinstance(layer, nn.Flatten):
            return lambda relevance: relevance.view(x.shape)
        if isinstance(layer, (nn.ReLU, nn.BatchNorm2d, nn.Dropout, nn.Identity)):
            return lambda relevance: relevance
        raise self._no_rule(layer)

    def _weighted(self, layer: nn.Linear | nn.Conv2d, x: Tensor, relevance: Tensor) -> Tensor:
        self._note(layer, relevance)
        if isinstance(layer, nn.Linear):
            return linear(x, layer.weight, relevance, self.alpha)
        if isinstance(layer.padding, str):
            raise self._no_rule(layer)
        return conv2d(x, layer.weight, relevance, layer.stride, layer.padding, self.alpha)

    def _no_rule(self, layer: nn.Module) -> SettingsError:
        return SettingsError(f"relevance has no rule for the layer {self.names.get(layer)!r}: {layer}")

    def _block(self, block: Block, x: Tensor) -> tuple[Tensor, Back]:
        stream, back_skip = self._layer(block.shortcut, x)
        layers: list[nn.Module] = []
        for i in range(1, len(block.kernels) + 1):
            layers += [getattr(block, f"conv{i}"), getattr(block, f"bn{i}"), nn.ReLU()]
        last, layers = layers[-3], layers[:-1]
        branch, back_branch = self.through(layers, x)

        def back(relevance: Tensor) -> Tensor:
            if not self.branch_share:
                self._note(last, relevance)
            of_branch, of_skip = residual_add(branch, stream, relevance)
            return back_branch(of_branch) + back_skip(of_skip)

        return relu(branch + stream), back

    def _note(self, layer: nn.Module, relevance: Tensor) -> None:
        """Keep what is noted first for a layer: a block notes its sum before its last convolution."""
        self.found.setdefault(
            self.names[layer], relevance.flatten(2).mean(2) if relevance.ndim > 2 else relevance
        )
