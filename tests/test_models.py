"""Networks: their sizes as published, construction from widths, initial values, names, and bad input."""

import itertools
import math
import re

import pytest
import torch
from torch import nn
from torch.nn.functional import relu

from common.core.models import ARCHITECTURES, build, network, small_maps
from common.core.models.network import Conv2d
from common.core.pruning.counting import cost
from common.settings import SettingsError

DIGITS, MNIST, CIFAR, IMAGENET = (1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 224, 224)
SHAPES = {"lenet300": MNIST, "lenet5": MNIST, "resnet34": IMAGENET, "resnet50": IMAGENET} | {
    name: DIGITS
    for name in (
        "mlp",
        "digits_cnn",
        "digits_cnn_strided",
        "digits_vgg",
        "vgg_t8",
        "vgg_mini",
        "mobilenet_t8",
    )
}
FULL_HEAD = {"hidden": [4096, 4096], "head": "flatten", "conv_bias": True}
OPTIONS = {"convnet": {"cfg": [8, "M", 16, "S", 16]}}


def hollow(name, classes=10, shape=None, **options):
    """A network without memory for its values."""
    shape = shape or SHAPES.get(name, CIFAR)
    return build(name, classes=classes, image_shape=shape, device="meta", **(OPTIONS.get(name, {}) | options))


# name, options, image shape, classes, weights of convolutions and linear layers, parameters, MACs
SIZES = [
    # feature relevance, section 2.6
    ("vgg16", {"hidden": [512]}, CIFAR, 10, 14_977_728, 14_986_698, 313_463_808),
    ("resnet56", {}, CIFAR, 10, 851_504, 855_770, 125_747_840),
    ("resnet110", {}, CIFAR, 10, 1_722_416, 1_730_714, 253_149_824),
    ("resnet164", {}, CIFAR, 10, 1_679_024, 1_704_154, 247_646_720),
    ("resnet34", {}, IMAGENET, 1000, 21_771_968, 21_789_992, 14_218_833_920),
    # HALO, section 2.8
    ("vgg16", {"conv_bias": True, "final_pool": "average"}, CIFAR, 10, 14_715_584, 14_728_266, 313_201_664),
    ("vgg16", {"conv_bias": True, "final_pool": "average"}, CIFAR, 100, 14_761_664, 14_774_436, 313_247_744),
    ("resnet50_cifar", {}, CIFAR, 10, 754_736, 758_554, 111_592_064),
    ("resnet50_cifar", {}, CIFAR, 100, 760_496, 764_404, 111_597_824),
    ("lenet300", {}, MNIST, 10, 266_200, 266_610, 266_200),
    ("lenet5", {}, MNIST, 10, 61_470, 61_706, 416_520),
    # IMP+SLR, section 3
    ("resnet56", {"shortcut": "A"}, CIFAR, 10, 848_944, 853_018, 125_485_696),
    ("resnet18", {}, CIFAR, 10, 11_164_352, 11_173_962, 555_422_720),
    ("wide_resnet28_10", {}, CIFAR, 100, 36_518_832, 36_546_980, 5_951_175_168),
    ("resnet50", {}, IMAGENET, 1000, 25_502_912, 25_557_032, 4_089_184_256),
    # impact of pre-training, section 2.5
    ("vgg16", {}, CIFAR, 10, 14_715_584, 14_724_042, 313_201_664),
    ("mobilenet_v1_cifar", {}, CIFAR, 10, 3_195_328, 3_217_226, 46_354_432),
    ("vgg_t8", {}, DIGITS, 10, 72_208, 72_666, 599_680),
    ("mobilenet_t8", {}, DIGITS, 10, 14_432, 15_402, 147_584),
    ("mobilenet_v1", {}, IMAGENET, 1000, 4_209_088, 4_231_976, 568_740_352),
    ("vgg16", FULL_HEAD | {"batch_norm": False}, IMAGENET, 1000, 138_344_128, 138_357_544, 15_470_264_320),
    ("mobilenet_v2", {}, IMAGENET, 10, 2_202_560, 2_236_682, 299_507_072),
    # pruning from scratch, section 2.5 (its MACs less the average pools)
    ("vgg19", {"final_pool": "average"}, CIFAR, 10, 20_024_000, 20_035_018, 398_136_320),
    ("resnet20", {}, CIFAR, 10, 270_896, 272_474, 40_813_184),
    ("resnet20", {"stem": 20}, CIFAR, 10, 422_940, 424_910, 63_632_160),
    ("resnet32", {}, CIFAR, 10, 464_432, 466_906, 69_124_736),
    ("digits_vgg", {}, DIGITS, 10, 16_592, 16_794, 378_176),
    # small profiles
    ("digits_cnn_strided", {}, DIGITS, 10, 23_824, 24_058, 157_312),
    ("vgg_mini", {}, DIGITS, 10, 18_696, 18_946, 227_136),
    ("digits_cnn", {}, DIGITS, 10, 23_824, 24_058, 599_680),
    ("resnet14", {"stem": 8}, DIGITS, 10, 43_656, 44_226, 414_528),
]  # fmt: skip


@pytest.mark.parametrize("name, options, shape, classes, weights, parameters, macs", SIZES)
def test_sizes_of_the_specifications(name, options, shape, classes, weights, parameters, macs):
    found = cost(hollow(name, classes, shape, **options), shape)
    assert (found["weights"], found["parameters"], found["macs"]) == (weights, parameters, macs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_widths_rebuild_the_same_shapes(name):
    model = hollow(name)
    narrow = [max(1, width // 3) for width in model.widths]
    for widths in (model.widths, narrow):
        twin = hollow(name, widths=widths)
        assert twin.widths == widths and all(type(width) is int for width in twin.widths)
        again = hollow(name, widths=twin.widths)
        assert [p.shape for p in again.parameters()] == [p.shape for p in twin.parameters()]
    assert sum(p.numel() for p in twin.parameters()) < sum(p.numel() for p in model.parameters())


def test_widths_come_in_the_order_of_the_channel_groups():
    model = hollow("mobilenet_v2", widths=list(range(11, 29)))
    groups = model.channel_groups()
    assert [model.get_submodule(group.norm).num_features for group in groups] == list(range(11, 29))
    assert [group.name for group in hollow("vgg_mini").channel_groups()] == [
        "features.0", "features.3", "features.7", "features.10", "features.14", "classifier.0",
    ]  # fmt: skip


def test_branches_of_a_resnet_may_be_narrowed_by_widths():
    widths = [3, 5, 0, 8, 0, 7]
    model = build("resnet8", classes=10, image_shape=DIGITS, stem=8, widths=widths)
    assert model.widths == widths
    assert model.layer1[0].conv2.weight.shape == (8, 3, 3, 3)
    assert model.layer2[0].conv2.weight.shape == (0, 5, 3, 3)
    assert model.layer3[0].conv2.weight.shape == (7, 0, 3, 3)
    logits = model(torch.randn(4, *DIGITS))
    logits.sum().backward()
    assert logits.shape == (4, 10) and model.layer1[0].conv1.weight.grad is not None


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3), (5, 5)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1), (3, 3)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 2), (1, 0)])
def test_matrix_products_are_the_convolution_with_its_gradients(kernel, stride, padding):
    torch.manual_seed(0)
    for size in itertools.product((1, 2, 5), (2, 3)):
        if any(n + 2 * p < k for n, p, k in zip(size, padding, kernel)):
            continue
        x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(4, 3, *kernel, dtype=torch.float64, requires_grad=True)
        wanted = nn.functional.conv2d(x, weight, None, stride, padding)
        found = small_maps.convolve(x, weight, stride, padding)
        torch.testing.assert_close(found, wanted)
        direction = torch.randn_like(wanted)
        gradients = [torch.autograd.grad(y, (x, weight), direction) for y in (found, wanted)]
        torch.testing.assert_close(*gradients)


def test_small_maps_take_matrix_products_in_bfloat16(monkeypatch):
    torch.manual_seed(0)
    conv = Conv2d(128, 128, 3, padding=1).to(memory_format=torch.channels_last)
    nn.init.normal_(conv.weight, 0, 0.03)
    nn.init.normal_(conv.bias)
    x = torch.randn(4, 128, 4, 4).to(memory_format=torch.channels_last)

    def trained(inputs):
        inputs = inputs.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(inputs)
        assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
        found = torch.autograd.grad(y.float().square().sum(), (inputs, conv.weight, conv.bias))
        # torch's fused SGD reads weights and gradients as if their memory were laid out alike
        assert found[1].stride() == conv.weight.stride()
        return y, *found

    calls = []
    convolve = small_maps.convolve
    monkeypatch.setattr(small_maps, "convolve", lambda *a: calls.append(a) or convolve(*a))
    ours = trained(x)
    assert len(calls) == 1
    monkeypatch.setattr(small_maps, "pays", lambda *_: False)
    for mine, theirs in zip(ours, trained(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.01 * theirs.detach().abs().max().item())
    monkeypatch.undo()
    assert not small_maps.pays(torch.empty(4, 128, 5, 5), conv.weight)
    assert not small_maps.pays(torch.empty(80, 128, 4, 4), conv.weight)  # more activations than weights
    assert len(calls) == 1


def test_convolutions_in_groups_stay_in_float32_on_a_cpu():
    depthwise, pointwise = Conv2d(4, 4, 3, groups=4, bias=False), Conv2d(4, 4, 1, bias=False)
    for layer in (depthwise, pointwise):
        nn.init.normal_(layer.weight)
    x = torch.randn(2, 4, 5, 5)
    wanted = nn.functional.conv2d(x, depthwise.weight, groups=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(depthwise(x), wanted)
        assert pointwise(x).dtype == torch.bfloat16


def test_an_empty_branch_leaves_the_skip():
    model = build("resnet14", classes=10, image_shape=DIGITS, stem=8, widths=[8, 0, 16, 16, 32, 32])
    block, x = model.layer1[1], torch.rand(2, 8, 8, 8)
    assert torch.equal(block(x), relu(x))
    assert cost(model, DIGITS)["macs"] == 414_528 - 2 * 8 * 8 * 9 * 64


def test_seed_decides_the_values_and_the_global_state_is_untouched():
    def values(seed):
        model = build("mobilenet_t8", classes=10, image_shape=DIGITS, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    before = torch.get_rng_state()
    assert torch.equal(values(3), values(3))
    assert not torch.equal(values(3), values(4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fill, fan", [("fan_out", 9 * 64), ("fan_in", 9 * 32)])
def test_normal_initialisation_by_fan(fill, fan):
    model = build("vgg_t8", classes=10, image_shape=DIGITS, conv_init=fill, conv_bias=True, norm_scale=0.5)
    weight = model.features[14].weight.detach()
    assert weight.shape[:2] == (64, 32)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.02)
    assert weight.mean().abs() < 4 * weight.std() / math.sqrt(weight.numel())
    assert not model.features[14].bias.any()
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.15)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all((norm.weight == 0.5).all() and not norm.bias.any() for norm in norms)


def test_uniform_initialisation_is_that_of_torch():
    model = build("lenet300", classes=10, image_shape=MNIST)
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
        bound = 1 / math.sqrt(layer.in_features)
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert 0.5 * bound < layer.bias.abs().max() <= bound


def test_torchvision_states_fit_by_name_and_shape():
    from torchvision import models

    with torch.device("meta"):
        theirs = {
            "resnet50": models.resnet50(),
            "mobilenet_v2": models.mobilenet_v2(),
            "vgg16": models.vgg16_bn(),
        }
    options = {"vgg16": FULL_HEAD}
    for name, reference in theirs.items():
        model = hollow(name, 1000, IMAGENET, **options.get(name, {}))
        model.load_state_dict(reference.state_dict(), assign=True)


def test_outputs_equal_torchvision():
    from torchvision import models
    from torchvision.models.resnet import Bottleneck, ResNet

    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    pairs = [
        (ResNet(Bottleneck, [1, 1, 1, 1], num_classes=7), {"name": "resnet50", "blocks": [1, 1, 1, 1]}),
        (models.mobilenet_v2(num_classes=7), {"name": "mobilenet_v2"}),
    ]
    for reference, arguments in pairs:
        model = build(classes=7, image_shape=(3, 64, 64), **arguments)
        model.load_state_dict(reference.state_dict())
        model.eval(), reference.eval()
        assert torch.allclose(model(x), reference(x), atol=1e-5)


def test_option_a_pads_channels_and_skips_positions():
    model = build("resnet8", classes=10, image_shape=DIGITS, stem=8, shortcut="A")
    x = torch.randn(2, 8, 6, 6)
    y = model.layer2[0].shortcut(x)
    assert torch.equal(y[:, 4:12], x[:, :, ::2, ::2]) and not y[:, :4].any() and not y[:, 12:].any()


def test_wide_network_strides_late_and_forgets_fast_at_its_end():
    model = hollow("wide_resnet28_10", 100)
    assert model.layer2[0].conv1.stride == (1, 1) and model.layer2[0].conv2.stride == (2, 2)
    assert model.bn1.momentum == 0.9 and model.layer1[0].bn1.momentum == 0.1
    assert model.layer1[0].dropout.p == 0.3


def test_average_instead_of_the_last_max_pool():
    x = torch.randn(3, *DIGITS)
    pooled = build("convnet", cfg=[4, "M", 6, "M"], classes=5, image_shape=DIGITS)
    averaged = build("convnet", cfg=[4, "M", 6, "M"], classes=5, image_shape=DIGITS, final_pool="average")
    averaged.load_state_dict(pooled.state_dict())
    pooled.eval(), averaged.eval()
    maps = pooled.features[:-1](x)
    assert torch.allclose(averaged(x), pooled.classifier(maps.mean((2, 3))))
    assert not torch.allclose(averaged(x), pooled(x))


@pytest.mark.parametrize("name", ["vgg_mini", "mlp", "mobilenet_t8", "resnet8", "lenet5"])
def test_no_activation_is_changed_after_it_was_computed(name):
    shape = SHAPES.get(name, DIGITS)
    model = build(name, classes=10, image_shape=shape)
    kept = []
    for module in model.modules():
        module.register_forward_hook(lambda m, i, o: kept.append((o, o.detach().clone())))
    model(torch.randn(4, *shape)).sum().backward()
    assert kept and all(torch.equal(now, then) for now, then in kept)


@pytest.mark.parametrize("name", ["resnet8", "vgg_t8"])
def test_states_with_a_batch_counter_load(name):
    model = build(name, classes=10, image_shape=DIGITS)
    state = model.state_dict()
    norm = next(key for key in state if key.endswith("running_mean")).removesuffix("running_mean")
    model.load_state_dict({**state, f"{norm}num_batches_tracked": torch.tensor(5)})


@pytest.mark.parametrize(
    "name, options, error, message",
    [
        ("resnet57", {}, SettingsError, "architecture = 'resnet57': unknown.*did you mean 'resnet5"),
        ("vgg-16", {}, SettingsError, "did you mean 'vgg16'"),
        ("resnet20", {"stemm": 8}, SettingsError, "option 'stemm'.*did you mean 'stem'"),
        ("convnet", {}, SettingsError, "option 'cfg' of 'convnet': missing"),
        ("convnet", {"cfg": [8, "P"]}, ValueError, "'M' for a max-pool"),
        ("resnet20", {"widths": [16] * 4}, ValueError, "4 widths given; this network has 9, by default"),
        ("resnet20", {"widths": [16] * 9 + [17] + [16] * 8}, ValueError, r"widths\[9\] = 17.*from 0 to 16"),
        ("vgg16", {"widths": [0] + [8] * 12}, ValueError, r"widths\[0\] = 0: must be .* at least 1"),
        ("vgg16", {"widths": [8.5] + [8] * 12}, ValueError, r"widths\[0\] = 8.5"),
        ("vgg16", {"image_shape": DIGITS}, ValueError, "8x8 are too small"),
        ("vgg16", {"image_shape": (32, 32)}, ValueError, "channels, height, width"),
        ("vgg16", {"classes": 0}, ValueError, "classes = 0"),
        ("vgg16", {"conv_init": "xavier", "widths": [1] * 13}, ValueError, "conv_init = 'xavier'.*fan_out"),
        (
            "resnet20",
            {"shortcut": "C"},
            SettingsError,
            "'shortcut' of 'resnet20' = 'C': should be 'A' or 'B'",
        ),
        (
            "resnet20",
            {"stem": "8"},
            SettingsError,
            "option 'stem' of 'resnet20' = '8': should be a valid integer",
        ),
        ("resnet20", {"stem": True}, SettingsError, "option 'stem' of 'resnet20' = True: should be"),
        (
            "vgg16",
            {"dropout": "no"},
            SettingsError,
            "option 'dropout' of 'vgg16' = 'no': should be a valid number",
        ),
        (
            "vgg16",
            {"hidden": [64.5]},
            SettingsError,
            r"option 'hidden' of 'vgg16' = \[64.5\]: should be a valid int",
        ),
    ],
)
def test_bad_input_is_named(name, options, error, message):
    arguments = {"classes": 10, "image_shape": CIFAR} | options
    with pytest.raises(error) as caught:
        build(name, **arguments)
    assert re.search(message, str(caught.value))


def test_any_depth_of_six_n_plus_two():
    assert cost(hollow("resnet26"), CIFAR)["parameters"] == 369_690
    assert len(hollow("resnet1202").blocks()) == 600


@pytest.mark.parametrize("inputs", [1, 4, 7, 8])
def test_a_strided_convolution_of_few_channels_leaves_memory_alone(inputs, monkeypatch):
    """What oneDNN gets wrong with AVX2: the gradient of the weights of a convolution of 1x1 that leaves out pixels."""
    monkeypatch.setattr(network, "_OVERRUNS", True)
    layer = network.Conv2d(inputs, 8, 1, 2)
    network.initialise(layer, torch.Generator().manual_seed(0), "fan_in", "torch", 1.0)
    layer = layer.to(memory_format=torch.channels_last)
    x = torch.randn(7, inputs, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, layer.weight, layer.bias], g)
    exact = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    want = torch.nn.functional.conv2d(*exact, stride=2)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, torch.autograd.grad(want, exact, g.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
