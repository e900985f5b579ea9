"""The fused layers in Triton's interpreter: run with TRITON_INTERPRET=1. Prints {what: relative error against torch's layers}.

A process of its own, since Triton looks at that variable when kernels are defined.
"""

import copy
import json
from collections import Counter
from math import inf, isnan

import torch
import torch.nn.functional as F
from torch import nn

from common.core.compute import Compute
from common.core.models import build, fused
from common.core.models.fused import convolutions, kernels, norm_kernels, norms
from common.core.models.network import BatchNorm2d, initialise, norm_relu
from common.core.models.resnet import BasicBlock, ResNet
from common.core.pruning import channels

# so that a program computes several tiles, and the interpreter has few programs
convolutions.processors = lambda device: 1
CONVOLUTIONS = [(3, 16, 1, 8), (16, 16, 1, 8), (16, 32, 2, 8), (32, 64, 2, 4), (64, 64, 1, 4)]
# the interpreter multiplies no matrices in bfloat16; float16 has three bits more
HALF = torch.float16

found = {}
weight_gradient = convolutions._weight_gradient


def coarse(shape, count):
    plan = weight_gradient(shape, count)
    plan.sum_constants["BE"], plan.sum_grid = 2048, (-(-9 * shape.ci * shape.co // 2048),)
    return plan


convolutions._weight_gradient = coarse


def close(name, got, want):
    error = ((got - want).abs().max() / want.abs().max().clamp(min=1e-9)).item()
    found[name] = max(found.get(name, 0.0), inf if isnan(error) else error)


def convolution(ci, co, stride, size):
    x, w = torch.randn(2, ci, size, size), torch.randn(co, ci, 3, 3) * 0.1
    x.requires_grad_(ci != 3)
    w.requires_grad_()
    assert convolutions.known(x, w, stride)
    got, want = (
        convolutions.convolve(x, w, stride, torch.float32),
        F.conv2d(x, w, stride=stride, padding=1),
    )
    of = [w] if ci == 3 else [x, w]
    g = torch.randn_like(want)
    name = f"{ci}->{co} s{stride}"
    close(f"{name} forward", got, want)
    for what, a, b in zip("wx", *(reversed(torch.autograd.grad(y, of, g)) for y in (got, want))):
        close(f"{name} gradient of {what}", a, b)


def product_of_matrices():
    x, w = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(32, 16, 1, 1, requires_grad=True)
    assert convolutions.narrow(x, w, 2) and not convolutions.narrow(x, w, 1)
    got, want = convolutions.multiply(x, w, 2), F.conv2d(x, w, stride=2)
    assert got.is_contiguous(memory_format=torch.channels_last)
    g = torch.randn_like(want)
    close("1x1 forward", got, want)
    for what, a, b in zip("xw", *(torch.autograd.grad(y, [x, w], g) for y in (got, want))):
        close(f"1x1 gradient of {what}", a, b)


class Modes:
    """A batch norm with ReLU, and what torch makes of it."""

    def __init__(self, shape, mean):
        self.channels = shape[1]
        self.x = (mean + torch.randn(shape)).to(memory_format=torch.channels_last)
        self.shortcut = torch.randn(shape)
        self.g = torch.randn(shape)

    def layer(self):
        layer = nn.BatchNorm2d(self.channels, momentum=0.3)
        with torch.no_grad():
            for number, tensor in enumerate([*layer.parameters(), *layer.buffers()][:4]):
                tensor.copy_(torch.rand(self.channels, generator=torch.Generator().manual_seed(number)) + 0.5)
        return layer

    def compare(self, relu, shortcut, ours, training=True):
        both = []
        for own in (True, False):
            layer = self.layer().train(training)
            x = self.x.clone(memory_format=torch.preserve_format).requires_grad_(training)
            z = self.shortcut.clone().requires_grad_(training) if shortcut else None
            if own:
                y = ours(layer, x, z, relu)
            else:
                y = layer(x) if z is None else layer(x) + z
                y = torch.relu(y) if relu else y
            left = {"output": y.detach(), "mean": layer.running_mean, "variance": layer.running_var}
            if training:
                y.backward(self.g)
                left |= {"of x": x.grad, "of weight": layer.weight.grad, "of bias": layer.bias.grad}
                left |= {} if z is None else {"of shortcut": z.grad}
            both.append(left)
        for what in both[1]:
            name = f"norm{', added' * shortcut}{', ReLU' * relu}{'' if training else ', evaluated'}: {what}"
            close(name, both[0][what], both[1][what])


def direct(layer, x, z, relu):
    z = None if z is None else z.contiguous(memory_format=torch.channels_last)
    running = layer.running_mean, layer.running_var
    return norms.Norm.apply(
        x, layer.weight, layer.bias, z, running, layer.momentum, layer.eps, relu, layer.training
    )


def normed():
    # several programs leave something to add up, each of several tiles
    norms._TILE, norms._PROGRAMS = 128, 6
    for shape, mean in (
        ((3, 16, 6, 6), 0.5),
        ((2, 5, 3, 7), 0.5),
        ((3, 40, 5, 5), 0.5),
        ((4, 8, 8, 8), 20.0),
    ):
        modes = Modes(shape, mean)
        for relu, shortcut in ((False, False), (True, False), (True, True)):
            modes.compare(relu, shortcut, direct)
            with torch.no_grad():
                modes.compare(relu, shortcut, direct, training=False)


def network(name, model, images, labels, effective=None):
    """Both ways, and the fused one twice: loss, gradients and running statistics."""
    left = []
    for way in (True, *[True] * (name == "masked"), False):
        net = Compute(torch.device("cpu"), HALF, channels_last=True, fused=way).place(copy.deepcopy(model))
        weights = {key: tensor * net.get_parameter(key) for key, tensor in (effective or {}).items()}
        with torch.autocast("cpu", HALF):
            logits = torch.func.functional_call(net, weights, (images,))
        loss = F.cross_entropy(logits.float(), labels)
        (256 * loss).backward()  # small gradients have few digits in float16
        with torch.no_grad(), torch.autocast("cpu", HALF):
            evaluated = net.eval()(images)
        gradients = {key: p.grad for key, p in net.named_parameters()}
        left.append(
            {"loss": loss.detach(), "evaluated": evaluated.float(), **gradients, **dict(net.named_buffers())}
        )
    one, usual = left[0], left[-1]
    assert all(torch.equal(one[key], again[key]) for again in left[1:-1] for key in one), name
    together = lambda tensors, keys: torch.cat([tensors[key].flatten() for key in keys])
    for what, keys in {
        "loss": ["loss"],
        "evaluated": ["evaluated"],
        "gradients": [key for key, _ in model.named_parameters()],
        "statistics": [key for key, _ in model.named_buffers() if "index" not in key],
    }.items():
        got, want = together(one, keys), together(usual, keys)
        found[f"{name}: {what}"] = ((got - want).norm() / want.norm()).item()


def networks():
    norms._TILE, norms._PROGRAMS = 4096, 256
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    model = ResNet(10, (3, 8, 8), None, block=BasicBlock, blocks=[1, 1])
    initialise(model, torch.Generator().manual_seed(1), "fan_out", "torch", 1.0)
    launched = counted()
    masks = {key: (torch.rand_like(p) < 0.5).float() for key, p in model.named_parameters() if p.dim() == 4}
    network("masked", model, images, labels, masks)
    found["launches"] = dict(launched)
    groups = model.channel_groups()
    channels.remove(model, {groups[0].name: torch.arange(7), groups[-1].name: torch.arange(0, 32, 3)})
    network("narrowed", model, images, labels)
    network("chain", build("vgg_mini", classes=10, image_shape=(3, 8, 8), seed=1, hidden=[]), images, labels)


def counted():
    """How often each kernel is launched from now on."""
    launches = Counter()
    for module, names in ((kernels, ["convolve", "weight_gradient", "weight_gradient_sum"]),
                          (norm_kernels, ["statistics", "normalise", "gradient_sums", "gradient"])):  # fmt: skip
        for name in names:
            setattr(module, name, Counted(getattr(module, name), name, launches))
    return launches


class Counted:
    def __init__(self, kernel, name, launches):
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid):
        self.launches[self.name] += 1
        return self.kernel[grid]


def watched():
    """A hook sees what the norm makes, before the ReLU."""
    layer, seen = BatchNorm2d(8), []
    layer.fused = True
    x = torch.randn(2, 8, 4, 4).to(HALF, memory_format=torch.channels_last)
    with torch.autocast("cpu", HALF):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        norm_relu(layer, x)
        assert (seen[0] < 0).any() and fused.norm(layer, x, relu=True) is not None


def not_a_number():
    modes = Modes((2, 8, 4, 4), 0.0)
    modes.x[0, 3, 1, 1] = torch.nan
    y = direct(modes.layer(), modes.x, None, True)
    assert y[:, 3].isnan().all() and not y[:, :3].isnan().any()


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for case in CONVOLUTIONS:
        convolution(*case)
    normed()
    watched()
    not_a_number()
    networks()
    product_of_matrices()
    print(json.dumps(found))
