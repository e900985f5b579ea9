"""Channel removal: a narrowed network equals the masked one, before and after further training."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from common.core.models import ChannelGroup, build
from common.core.pruning import channels
from common.core.pruning.counting import cost

DIGITS, MNIST, SMALL = (1, 8, 8), (1, 28, 28), (3, 16, 16)

OPTIMISERS = {
    "sgd": lambda parameters: torch.optim.SGD(
        parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3
    ),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=1e-3),
}

NETWORKS = [
    ("mlp", DIGITS, {}),
    ("digits_cnn", DIGITS, {}),
    ("lenet5", MNIST, {}),
    ("vgg_mini", DIGITS, {"dropout": 0.0}),
    ("vgg_t8", DIGITS, {"head": "flatten", "conv_bias": True}),
    ("resnet14", DIGITS, {"stem": 8}),
    ("resnet8", DIGITS, {"stem": 8, "shortcut": "A"}),
    ("resnet164", DIGITS, {"stem": 4, "blocks": [2, 1, 1]}),
    ("mobilenet_t8", DIGITS, {}),
    ("mobilenet_v2", SMALL, {"multiplier": 0.25}),
    ("wide_resnet28_10", DIGITS, {"blocks": 1, "factor": 1, "dropout": 0.0}),
]


def trained(name, shape, options, optimiser="sgd", steps=3):
    """A network in double precision after a few steps, its optimiser, and a function that makes one more
    step."""
    generator = torch.Generator().manual_seed(7)
    model = build(name, classes=10, image_shape=shape, seed=5, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.double)
    optimizer = OPTIMISERS[optimiser](model.parameters())
    batches = [
        (
            torch.randn(8, *shape, generator=generator, dtype=torch.double),
            torch.randint(10, (8,), generator=generator),
        )
        for _ in range(steps + 3)
    ]

    def step(model, optimizer, number):
        images, labels = batches[number]
        model.train()
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()

    for number in range(steps):
        step(model, optimizer, number)
    return model, optimizer, step, batches[-1][0]


def draw(model, seed, share=None):
    """Random channels to keep in every group, as few as allowed or more."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group, width in zip(channels.groups_of(model), full_widths(model)):
        least = group.minimum
        count = least + int(torch.randint(width - least + 1, (), generator=generator))
        count = count if share is None else max(least, int(share * width))
        keep[group.name] = torch.randperm(width, generator=generator)[:count].sort().values
    return keep


def full_widths(model):
    return [model.get_submodule(group.name).weight.shape[0] for group in channels.groups_of(model)]


def apply(masks, model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in masks:
                parameter *= masks[name]


def copied(model, optimizer, optimiser):
    twin = copy.deepcopy(model)
    other = OPTIMISERS[optimiser](twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twin, other


def assert_equal_outputs(model, twin, images):
    for training in (True, False):
        # copies, because training mode moves the running statistics
        got, wanted = (copy.deepcopy(m).train(training)(images) for m in (model, twin))
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(
    "name, shape, options",
    [
        pytest.param(*network, marks=[pytest.mark.slow] * (network[0] == "mobilenet_v2"))
        for network in NETWORKS
    ],
)
def test_narrowed_equals_masked_before_and_after_more_training(name, shape, options, norms, optimiser):
    model, optimizer, step, images = trained(name, shape, options, optimiser)
    twin, other = copied(model, optimizer, optimiser)
    keep = draw(model, seed=len(name))
    masks = channels.masks(twin, keep, norms=norms)
    apply(masks, twin)
    channels.remove(model, keep, optimizer)
    assert_equal_outputs(model, twin, images)
    for number in (3, 4):
        step(model, optimizer, number)
        step(twin, other, number)
        apply(masks, twin)
        assert_equal_outputs(model, twin, images)
    assert [len(keep[group.name]) for group in channels.groups_of(model)] == full_widths(model)
    narrow, masked = cost(model, shape), cost(twin, shape)
    assert (narrow["weights"], narrow["macs"]) == (masked["nonzero_weights"], masked["sparse_macs"])


@pytest.mark.parametrize("name, shape, options", NETWORKS)
def test_the_same_architecture_with_its_widths_takes_the_state(name, shape, options):
    model, _, _, images = trained(name, shape, options, steps=1)
    channels.remove(model, draw(model, seed=1))
    again = build(name, classes=10, image_shape=shape, widths=model.widths, **options).double()
    again.load_state_dict(model.state_dict())
    model.eval(), again.eval()
    assert torch.equal(again(images), model(images))
    for one, other in zip(model.modules(), again.modules()):
        for number in (
            "in_channels",
            "out_channels",
            "groups",
            "in_features",
            "out_features",
            "num_features",
        ):
            assert getattr(one, number, None) == getattr(other, number, None)


def test_channels_can_be_removed_little_by_little():
    model, optimizer, step, images = trained("resnet14", DIGITS, {"stem": 8})
    twin, other = copied(model, optimizer, "sgd")
    inner, branch = "layer1.0.conv1", "layer1.0.conv2"
    channels.remove(model, {inner: [0, 2, 3, 7], branch: [1, 2, 5, 6, 7]}, optimizer)
    step(model, optimizer, 3)
    channels.remove(model, {inner: [1, 3], branch: [0, 4]}, optimizer)
    step(model, optimizer, 4)
    masks = channels.masks(twin, {inner: [0, 2, 3, 7], branch: [1, 2, 5, 6, 7]})
    for number, keep in ((3, {}), (4, {inner: [2, 7], branch: [1, 7]})):
        masks |= channels.masks(twin, keep)
        apply(masks, twin)
        step(twin, other, number)
        apply(masks, twin)
    assert model.layer1[0].scatter.index.tolist() == [1, 7]
    assert_equal_outputs(model, twin, images)


def test_momentum_and_statistics_stay_with_their_channels():
    model, optimizer, *_ = trained("vgg_t8", DIGITS, {})
    conv, norm, reader = model.features[0], model.features[1], model.features[3]
    whole = {
        p: optimizer.state[p]["momentum_buffer"].clone() for p in (conv.weight, norm.bias, reader.weight)
    }
    mean = norm.running_mean.clone()
    index = torch.tensor([1, 4, 15])
    channels.remove(model, {"features.0": index}, optimizer)
    assert conv.weight.shape == (3, 1, 3, 3) and reader.weight.shape == (16, 3, 3, 3)
    assert torch.equal(optimizer.state[conv.weight]["momentum_buffer"], whole[conv.weight][index])
    assert torch.equal(optimizer.state[norm.bias]["momentum_buffer"], whole[norm.bias][index])
    assert torch.equal(optimizer.state[reader.weight]["momentum_buffer"], whole[reader.weight][:, index])
    assert torch.equal(norm.running_mean, mean[index])
    assert whole[conv.weight][index].abs().min() > 0


def test_an_optimiser_left_out_fails_instead_of_training_other_tensors():
    model, optimizer, step, _ = trained("vgg_t8", DIGITS, {})
    channels.remove(model, {"features.0": [0, 1]})
    with pytest.raises(RuntimeError, match="size"):
        step(model, optimizer, 3)


def test_training_goes_on_with_every_parameter():
    model, optimizer, step, _ = trained("resnet8", DIGITS, {"stem": 8})
    channels.remove(model, draw(model, seed=0, share=0.5), optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizer, 3)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model.parameters()
    }


def test_a_channel_removed_from_a_branch_leaves_the_constant_of_its_norm():
    """Feature relevance, section 2.5: beta in training mode; the running statistics' value of zero in
    evaluation mode."""
    model, *_, images = trained("resnet8", DIGITS, {"stem": 8})
    block, gone = model.layer2[0], 3
    channels.remove(model, {"layer2.0.conv2": [i for i in range(16) if i != gone]})
    emitted = []
    block.bn2.register_forward_hook(lambda module, inputs, output: emitted.append(output[:, gone]))
    norm = block.bn2
    beta, mean = norm.bias[gone].item(), norm.running_mean[gone].item()
    steady = (beta - norm.weight[gone] * mean / (norm.running_var[gone] + norm.eps).sqrt()).item()
    model.eval()(images)
    model.train()(images)
    assert torch.allclose(emitted[0], torch.full_like(emitted[0], steady)) and abs(steady - beta) > 1e-3
    assert torch.equal(emitted[1], torch.full_like(emitted[1], beta))
    # one batch of zeros later the running mean has decayed by the momentum
    assert norm.running_mean[gone].item() == pytest.approx(0.9 * mean)


def test_memory_format_survives():
    model = build("vgg_t8", classes=10, image_shape=DIGITS).to(memory_format=torch.channels_last)
    channels.remove(model, {"features.3": [0, 2, 5]})
    assert model.features[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert model.features[7].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_network_of_ones_own_with_groups_of_ones_own():
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(16, 3)).eval()
    nn.init.uniform_(model[1].bias, 0.5, 1)
    groups = [ChannelGroup("0", "1", consumers=("5",))]
    twin, x = copy.deepcopy(model), torch.randn(3, 2, 4, 4)
    masks = channels.masks(twin, {"0": [1, 2]}, groups)
    # the columns that read masked channels may stay: with scale and shift masked too these channels are zero
    del masks["5.weight"]
    apply(masks, twin)
    channels.remove(model, {"0": [1, 2]}, groups=groups)
    assert model[5].weight.shape == (3, 8)
    assert torch.allclose(model(x), twin(x), atol=1e-6)


@pytest.mark.parametrize("name, shape", [("resnet14", DIGITS), ("vgg_t8", DIGITS), ("mobilenet_t8", DIGITS),
                                         ("mobilenet_v2", SMALL), ("lenet5", MNIST)])  # fmt: skip
def test_agrees_with_a_dependency_graph_library(name, shape):
    tp = pytest.importorskip("torch_pruning")
    model = build(name, classes=10, image_shape=shape).eval()
    other, x = copy.deepcopy(model), torch.randn(2, *shape)
    keep = {
        g.name: draw(model, seed=2, share=0.6)[g.name] for g in channels.groups_of(model) if g.scatter is None
    }
    graph = tp.DependencyGraph().build_dependency(other, x)
    for layer, kept in keep.items():
        module = other.get_submodule(layer)
        prune = tp.prune_conv_out_channels if isinstance(module, nn.Conv2d) else tp.prune_linear_out_channels
        gone = sorted(set(range(module.weight.shape[0])) - set(kept.tolist()))
        graph.get_pruning_group(module, prune, idxs=gone).prune()
    channels.remove(model, keep)
    assert [p.shape for p in model.parameters()] == [p.shape for p in other.parameters()]
    assert torch.allclose(model(x), other(x), atol=1e-6)


@pytest.mark.parametrize(
    "keep, message",
    [
        ({"features.1": [0]}, "no removable channels are called 'features.1'; allowed: .*did you mean"),
        ({"features.0": []}, "features.0: 0 of 16 channels kept; at least 1 must stay"),
        ({"features.0": [0, 16]}, "features.0: kept channels must ascend from 0 to at most 15"),
        ({"features.0": [-1, 2]}, "must ascend"),
        ({"features.0": [2, 2]}, "must ascend"),
        ({"features.3": [0], "features.0": [3, 1]}, "must ascend"),
    ],
)
def test_impossible_removals_are_named_and_change_nothing(keep, message):
    model = build("vgg_t8", classes=10, image_shape=DIGITS)
    with pytest.raises(ValueError, match=message):
        channels.remove(model, keep)
    assert model.widths == [16, 16, 32, 32, 64, 64]


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match="Sequential describes no removable channels"):
        channels.remove(nn.Sequential(nn.Linear(2, 2)), {})
