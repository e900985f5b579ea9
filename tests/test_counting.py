"""Counting: against closed forms, torch's own counter, and the conventions of the papers."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.flop_counter import FlopCounterMode

from common.core.models import build
from common.core.pruning.counting import cost, layer_costs

DIGITS, CIFAR = (1, 8, 8), (3, 32, 32)


def odd_network():
    """A padded, an unpadded, a grouped and a depthwise convolution on an oblong image."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 8, (3, 1), groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def test_layers_by_hand():
    # 11x7 -> 6x4 -> 4x4 -> 4x4
    layers = layer_costs(odd_network(), (2, 11, 7))
    assert [(c.name, c.kind, c.shape, c.positions, c.macs) for c in layers] == [
        ("0", "conv", (4, 2, 3, 3), 24, 72 * 24),
        ("2", "grouped", (8, 2, 3, 1), 16, 48 * 16),
        ("4", "depthwise", (8, 1, 3, 3), 16, 72 * 16),
        ("8", "linear", (3, 8), 1, 24),
    ]


def test_average_pools_count_their_inputs_when_asked():
    plain = cost(odd_network(), (2, 11, 7))["macs"]
    pooled = cost(odd_network(), (2, 11, 7), convention="pool_inputs")["macs"]
    assert pooled - plain == 8 * 4 * 4 + 8 * 2 * 2


def test_the_same_padding_rule_ignores_padding_and_groups():
    layers = layer_costs(odd_network(), (2, 11, 7), "same_padding")
    assert [c.macs for c in layers] == [72 * 24, 4 * 8 * 3 * 24, 8 * 8 * 9 * 16, 24]


@pytest.mark.parametrize(
    "name, shape, options",
    [
        ("resnet20", CIFAR, {}),
        ("resnet50", (3, 224, 224), {}),
        ("resnet164", CIFAR, {}),
        ("vgg16", CIFAR, {}),
        ("mobilenet_v1", (3, 224, 224), {}),
        ("mobilenet_v2", (3, 96, 96), {"multiplier": 1.4}),
        ("wide_resnet28_10", CIFAR, {}),
        ("lenet5", (1, 28, 28), {}),
        ("resnet14", DIGITS, {"stem": 8, "widths": [1, 2, 3, 4, 5, 6]}),
    ],
)
def test_agrees_with_the_counter_of_torch(name, shape, options):
    model = build(name, classes=10, image_shape=shape, device="meta", **options).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *shape, device="meta"))
    assert 2 * cost(model, shape)["macs"] == counter.get_total_flops()


def test_zero_weights_cost_nothing():
    model = build("digits_cnn", classes=10, image_shape=DIGITS)
    with torch.no_grad():
        model.features[0].weight[:4] = 0
        model.classifier.weight[:, ::2] = 0
        model.classifier.bias[:] = 1
    found = cost(model, DIGITS)
    # batch-norm shifts and nothing else were zero before
    zeros = 4 * 9 + 10 * 32
    assert found["parameters"] - found["nonzero_parameters"] == zeros + 16 + 32 + 64
    assert found["macs"] - found["sparse_macs"] == 4 * 9 * 64 + 320
    assert found["nonzero_weights"] == found["weights"] - zeros
    assert found["sparsity"] == pytest.approx(zeros / 23_824)
    assert found["sparsity_all"] == pytest.approx((zeros + 112) / 24_058)
    assert found["compression"] == 24_058 / found["nonzero_parameters"]
    assert found["theoretical_speedup"] == found["macs"] / found["sparse_macs"]
    assert (found["dense_parameters"], found["dense_macs"]) == (found["parameters"], found["macs"])


def test_a_narrower_network_beside_its_dense_one():
    dense = cost(build("vgg_t8", classes=10, image_shape=DIGITS, device="meta"), DIGITS)
    small = build("vgg_t8", classes=10, image_shape=DIGITS, widths=[8, 8, 16, 16, 32, 32], device="meta")
    found = cost(small, DIGITS, dense)
    assert (found["parameters"], found["macs"]) == (18_482, 152_384)
    assert (found["dense_parameters"], found["dense_macs"]) == (72_666, 599_680)
    assert found["compression"] == 72_666 / 18_482
    assert found["theoretical_speedup"] == 599_680 / 152_384
    assert found["sparsity"] == pytest.approx(1 - small_weights(small) / 72_208)


def small_weights(model):
    return sum(p.numel() for p in model.parameters() if p.ndim > 1)


def test_ratios_are_undefined_when_nothing_is_left():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    nn.init.zeros_(model[1].weight)
    found = cost(model, (1, 2, 2))
    assert (found["compression"], found["theoretical_speedup"], found["sparsity"]) == (None, None, 1.0)


def test_an_empty_residual_branch_costs_nothing_and_its_neighbour_what_it_has():
    model = build("resnet8", classes=10, image_shape=DIGITS, stem=8, widths=[0, 5, 0, 8, 0, 32])
    costs = {c.name: c.macs for c in layer_costs(model, DIGITS)}
    assert [costs[f"layer{s}.0.conv{i}"] for s in (1, 2, 3) for i in (1, 2)] == [
        0,
        0,
        8 * 5 * 9 * 16,
        0,
        0,
        0,
    ]


def test_counting_leaves_the_network_as_it_was():
    model = build("resnet8", classes=10, image_shape=DIGITS, stem=8).double().train()
    model.layer1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    cost(model, DIGITS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())


class Sequence(nn.Module):
    """A layer of 4 features that sees the 16 pixels of an image one after another."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        found = self.layer(*[x.flatten(2).mT] * (3 if isinstance(self.layer, nn.MultiheadAttention) else 1))
        return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize(
    "layer, kind, macs",
    [
        (nn.Conv1d(16, 8, 3, padding=1, groups=2), "grouped", 8 * 8 * 3 * 4),
        (nn.ConvTranspose1d(16, 8, 2, 2), "transposed", 16 * 8 * 2 * 4),
    ],
)
def test_convolutions_of_sequences_and_transposed_ones(layer, kind, macs):
    (found,) = layer_costs(Sequence(layer), (4, 4, 4))
    assert (found.kind, found.macs, found.weights) == (kind, macs, layer.weight.numel())


def test_convolutions_of_volumes():
    (found,) = layer_costs(nn.Conv3d(2, 3, 3, padding=1, stride=2), (2, 4, 4, 4))
    assert (found.positions, found.weights) == (8, 2 * 3 * 27)


def test_layers_that_share_a_weight_have_it_once_and_use_it_twice():
    model = nn.Sequential(nn.Flatten(), nn.Linear(10, 10), nn.Linear(10, 10))
    model[2].weight = model[1].weight
    with torch.no_grad():
        model[1].weight[:5] = 0
    found = cost(model, (10, 1, 1))
    assert (found["weights"], found["parameters"], found["macs"]) == (100, 120, 200)
    assert (found["nonzero_weights"], found["sparse_macs"], found["sparsity"]) == (50, 100, 0.5)


ATTENTION = 4 * 4 * 4 * 16 + 2 * 4 * 16 * 16  # four products with weights, and two of activations


@pytest.mark.parametrize(
    "layer, macs",
    [
        (nn.MultiheadAttention(4, 2, batch_first=True), ATTENTION),
        (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), ATTENTION + 2 * 4 * 8 * 16),
        (nn.LSTM(4, 5, batch_first=True), 16 * 4 * 5 * (4 + 5)),
    ],
)
def test_products_outside_of_convolutions_and_linear_layers_are_named_or_counted(layer, macs):
    model = Sequence(layer).eval()
    where = r" \(layer.self_attn\)" if isinstance(layer, nn.TransformerEncoderLayer) else r" \(layer\)"
    with pytest.raises(ValueError, match=rf"conv_linear does not count the products in \w+{where}, which"):
        cost(model, (4, 4, 4))
    assert cost(model, (4, 4, 4), convention="products")["macs"] == macs


class Functional(nn.Module):
    """Uses the weight of a layer without the layer, and one of its own."""

    def __init__(self):
        super().__init__()
        self.encoder, self.own = nn.Linear(4, 6), nn.Parameter(torch.zeros(6, 4))

    def forward(self, x):
        y = self.encoder(x.flatten(1)) + self.own[:, 0]
        return y @ self.own + nn.functional.linear(y, self.encoder.weight.t())


def test_products_of_a_forward_pass_are_named_or_counted():
    with pytest.raises(ValueError, match="the products in Functional, which"):
        cost(Functional(), (4, 1, 1))
    assert cost(Functional(), (4, 1, 1), convention="products")["macs"] == 3 * 24


@pytest.mark.parametrize("convention", ["conv_linear", "products"])
def test_what_nobody_counts_is_named(convention):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = nn.Bilinear(4, 4, 3)

        def forward(self, x):
            return self.both(x.flatten(1), x.flatten(1))

    with pytest.raises(
        ValueError, match=r"Pair: \w+ does not count Bilinear \(both\), which calls _trilinear"
    ):
        cost(Pair(), (4, 1, 1), convention=convention)


class Weighted(nn.Module):
    """A matrix that is not applied by a product of matrices."""

    def __init__(self, forward):
        super().__init__()
        self.own, self.how = nn.Parameter(torch.ones(6, 4)), forward

    def forward(self, x):
        return self.how(x.flatten(1), self.own)


@pytest.mark.parametrize("convention", ["conv_linear", "products"])
@pytest.mark.parametrize(
    "forward, what",
    [
        (lambda x, own: (x[:, None] * own).sum(-1), "mul of each with each"),
        (lambda x, own: (x[:, None] - own).square().sum(-1), "sub of each with each"),
    ],
)
def test_products_that_are_written_out_are_named(convention, forward, what):
    with pytest.raises(
        ValueError, match=f"Weighted: {convention} does not count Weighted, which calls {what}"
    ):
        cost(Weighted(forward), (4, 1, 1), convention=convention)


def test_scales_and_shifts_of_each_entry_are_no_products():
    model = Weighted(lambda x, own: x[:, None].expand(-1, 6, -1) * own + own)
    assert cost(model, (4, 1, 1), convention="products")["macs"] == 0


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Conv2d(2, 3, 1), r"Conv2d: no shapes of \(4, 5, 5\) go through it"),
        (
            nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(5)),
            r"Sequential: no shapes of \(4, 5, 5\) go through it",
        ),
        (nn.DataParallel(nn.Conv2d(4, 3, 1)), "DataParallel: no shapes of .* with nn.DataParallel"),
        (Weighted(lambda x, own: x * x.mean().item()), r"Weighted: no shapes of .* Tensor.item\(\)"),
        (prune.random_unstructured(nn.Conv2d(4, 3, 1), "weight", 0.5), "this Conv2d is no plain parameter"),
        (nn.Sequential(spectral_norm(nn.Conv2d(4, 3, 1))), "0: the weight of this ParametrizedConv2d"),
        (nn.LazyConv2d(3, 1), "the weight of this LazyConv2d is no plain parameter"),
    ],
)
def test_a_network_that_cannot_be_counted_is_one_line(model, message):
    with pytest.raises(ValueError, match=message) as error:
        cost(model, (4, 5, 5))
    assert "\n" not in str(error.value)


def test_a_transformer_has_the_size_that_torchvision_publishes():
    from torchvision.models import vit_b_16

    with torch.device("meta"):
        model = vit_b_16().eval()
    assert cost(model, (3, 224, 224), convention="products")["macs"] == pytest.approx(17.56e9, rel=1e-3)


def test_an_unknown_convention_is_named():
    with pytest.raises(
        ValueError, match="'exact': must be one of conv_linear, pool_inputs, same_padding, pr"
    ):
        cost(odd_network(), (2, 11, 7), convention="exact")


class _Slow(nn.Identity):
    """Gives other threads a chance in the middle of a pass."""

    def forward(self, x):
        time.sleep(0.01)
        return x


def test_threads_that_count_the_same_network_do_not_disturb_one_another():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), _Slow(), nn.Conv2d(4, 8, 3))
    alone = layer_costs(model, (2, 11, 7))
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda _: layer_costs(model, (2, 11, 7)), range(12))) == [alone] * 12
