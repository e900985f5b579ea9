"""Channel removal from networks that the suite has not built: right, or refused by name with nothing changed."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from common.core.models import ChannelGroup, Network
from common.core.pruning import channels
from common.core.pruning.masks import Masks, prunable

KEEP = [0, 1, 4, 5]


class Net(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.how = forward

    def forward(self, x):
        return self.how(self, x)


def conv(inputs, outputs, kernel=1, **options):
    return nn.Conv2d(inputs, outputs, kernel, **options)


def chain(*layers, norm=None, followers=()):
    """Layers in a row, of which the first has the channels and the last reads them."""
    group = ChannelGroup("0", norm, followers, (str(len(layers) - 1),))
    return nn.Sequential(*layers), group


def behind(how, reader, **others):
    """A convolution `a` of 8 channels, what is done with them, and the layer `c` that reads them."""
    return Net(how, a=conv(3, 8), c=reader, **others), ChannelGroup("a", consumers=("c",))


RIGHT = {
    "Linear and BatchNorm1d": chain(
        nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), norm="1"
    ),
    "Conv1d": chain(nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.Conv1d(8, 4, 3), norm="1"),
    "Conv3d": chain(nn.Conv3d(2, 8, 3), nn.BatchNorm3d(8), nn.Conv3d(8, 4, 3), norm="1"),
    "BatchNorm without scales": chain(
        conv(3, 8), nn.BatchNorm2d(8, affine=False), conv(8, 4), followers=("1",)
    ),
    "InstanceNorm": chain(conv(3, 8), nn.InstanceNorm2d(8, affine=True), conv(8, 4), norm="1"),
    "whole groups of GroupNorm": chain(conv(3, 8), nn.GroupNorm(4, 8), conv(8, 4), norm="1"),
    "PReLU": chain(conv(3, 8), nn.PReLU(8), conv(8, 4), followers=("1",)),
    "PReLU of one slope": chain(conv(3, 8), nn.PReLU(), conv(8, 4), followers=("1",)),
    "flattened maps": behind(lambda net, x: net.c(net.a(x).flatten(1)), nn.Linear(8 * 49, 4)),
    "outputs in a table": behind(lambda net, x: {"logits": [net.c(net.a(x))]}, conv(8, 4)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_narrowed_equals_masked(name):
    model, group = RIGHT[name]
    model = copy.deepcopy(model).eval()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = channels.masks(twin, {group.name: KEEP}, [group])
    channels.remove(model, {group.name: KEEP}, optimizer, [group])
    with torch.no_grad():
        for parameter, mask in masks.items():
            twin.get_parameter(parameter).mul_(mask)
    first = next(m for m in model.modules() if hasattr(m, "weight"))
    sizes = {nn.Linear: (12,), nn.Conv1d: (2, 9), nn.Conv3d: (2, 7, 7, 7)}.get(type(first), (3, 7, 7))
    x = torch.randn(2, *sizes)
    got, wanted = model(x), twin(x)
    if isinstance(got, dict):
        (got,), (wanted,) = got["logits"], wanted["logits"]
    torch.testing.assert_close(got, wanted)
    assert len(first.weight) == 4 and repr(first) != repr(twin.get_submodule(group.name))


def squeezed(net, x):
    return net.c(torch.cat([net.a(x), net.a(x)], 1).mean((2, 3)))


WRONG = {
    "reader in groups": (chain(conv(3, 8), conv(8, 6, groups=2)), "1, which reads its 8 channels, is a Conv2d in 2 groups"),
    "producer in groups": (chain(conv(4, 8, groups=2), conv(8, 6)), "removed from a Conv2d in 2 groups"),
    "depthwise with a multiplier": (
        chain(conv(3, 8), conv(8, 16, groups=8), conv(16, 6), followers=("1",)), "1, which goes along .* 8 to 16 channels in 8 groups"
    ),
    "transposed producer": (chain(nn.ConvTranspose2d(3, 8, 2), conv(8, 6)), "from a ConvTranspose2d"),
    "transposed reader": (chain(conv(3, 8), nn.ConvTranspose2d(8, 8, 2)), "1, which reads .* a ConvTranspose2d"),
    "LayerNorm": (chain(conv(3, 8), nn.LayerNorm([8, 7, 7]), conv(8, 4), norm="1"), "1, which goes along .* a LayerNorm"),
    "parts of groups of GroupNorm": (chain(conv(3, 8), nn.GroupNorm(2, 8), conv(8, 4), norm="1"), "1 is a GroupNorm.* of 4 channels"),
    "norm of flattened maps": (
        chain(conv(3, 8), nn.Flatten(), nn.BatchNorm1d(392), nn.Linear(392, 4), norm="2"), "a BatchNorm1d of 392 channels"
    ),
    "LSTM": (behind(lambda net, x: net.c(net.a(x).flatten(2).mT)[0], nn.LSTM(8, 4)), "c, which reads .* a LSTM"),
    "pruned by torch": (chain(prune.random_unstructured(conv(3, 8), "weight", 0.5), conv(8, 4)), "no plain parameter"),
    "a name that is none": ((chain(conv(3, 8), conv(8, 4))[0], ChannelGroup("0", consumers=("7",))), "called '7'"),
    "a part of the channels": (behind(lambda net, x: net.c(net.a(x)[:, :4]), conv(4, 4)), "a Conv2d of 4 inputs"),
    "concatenation": (
        behind(lambda net, x: net.c(torch.cat([net.a(x), net.b(x)], 1)), conv(12, 4), b=conv(3, 4)), "c, which reads .* of 12 inputs"
    ),
    "concatenation with itself": (behind(squeezed, nn.Linear(16, 4)), "mixes channels"),
    "sum": (behind(lambda net, x: net.c(net.a(x) + net.b(x)), conv(8, 4), b=conv(3, 8)), "a: without .* no longer computes"),
    "a reader that is not named": (
        behind(lambda net, x: net.c(net.a(x)) + net.d(net.a(x)), conv(8, 4), d=conv(8, 4)), "in d Conv2d"
    ),
    "a norm that is not named": (chain(conv(3, 8), nn.BatchNorm2d(8), conv(8, 4)), "in 1 BatchNorm2d"),
    "position by position": (
        behind(lambda net, x: net.c(net.a(x).permute(0, 2, 3, 1).flatten(1)), nn.Linear(392, 4)), "mixes channels"
    ),
    "largest of the channels": (
        behind(lambda net, x: net.c(net.a(x)) + net.a(x).amax(1, keepdim=True), conv(8, 4)), "mixes channels"
    ),
    "smallest of the channels": (
        behind(lambda net, x: net.c(net.a(x)) + net.a(x).amin(1, keepdim=True), conv(8, 4)), "mixes channels"
    ),
    "softmax over channels": (chain(conv(3, 8), nn.Softmax(1), conv(8, 4)), "mixes channels"),
    "local response": (chain(conv(3, 8), nn.LocalResponseNorm(3), conv(8, 4)), "mixes channels"),
    "a network that says nothing": (
        behind(lambda net, x: 0 * net.c(net.a(x) + net.b(x)), conv(8, 4), b=conv(3, 8)), "no longer computes"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_removed_is_named_and_nothing_changes(name):
    (model, group), message = WRONG[name]
    keep = [0, 1, 2, 5]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        channels.remove(model, {group.name: keep}, groups=[group], image_shape=None)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_tied_producers_are_refused():
    model = Net(
        lambda net, x: net.c(net.b(net.a(x))), a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3)
    )
    model.b.weight = model.a.weight
    with pytest.raises(ValueError, match="a: without these channels"):
        channels.remove(model, {"a": KEEP}, groups=[ChannelGroup("a", consumers=("b",))])


def test_a_network_that_describes_itself_is_tried_too():
    class Own(Network):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = conv(3, 8), conv(3, 8), conv(8, 4)

        def forward(self, x):
            return self.c(self.a(x) + self.b(x))

        def channel_groups(self):
            return [ChannelGroup("a", consumers=("c",))]

    with pytest.raises(ValueError, match="no longer computes"):
        channels.remove(Own(), {"a": KEEP})


def test_images_that_are_not_usual_must_be_described():
    layers = (conv(5, 8), nn.AdaptiveAvgPool2d((2, 3)), conv(8, 4), nn.Flatten(), nn.Linear(24, 2))
    model = Net(lambda net, x: net.s(x) if x.shape[2:] == (9, 13) else net.missing, s=nn.Sequential(*layers))
    group = ChannelGroup("s.0", consumers=("s.2",))
    with pytest.raises(ValueError, match="say image_shape="):
        channels.remove(model, {"s.0": KEEP}, groups=[group])
    with pytest.raises(ValueError, match=r"Net does not take images of \(5, 9, 12\)"):
        channels.remove(model, {"s.0": KEEP}, groups=[group], image_shape=(5, 9, 12))
    channels.remove(model, {"s.0": KEEP}, groups=[group], image_shape=(5, 9, 13))
    assert model.s[2].in_channels == 4


@pytest.mark.parametrize("keep", [[True, False] * 4, torch.tensor([0.0, 1.0]), [[0, 1]]])
def test_channels_are_kept_by_their_numbers(keep):
    model, group = chain(conv(3, 8), conv(8, 4))
    with pytest.raises(ValueError, match="0: the numbers of the channels that stay are needed"):
        channels.remove(model, {"0": keep}, groups=[group])


def test_a_tied_weight_is_masked_once():
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10))
    model[2].weight = model[0].weight
    masks = Masks.dense(model)
    masks.prune(model, 0.5)
    masks.apply(model)
    assert list(masks.kept) == ["0.weight"] and masks.sparsity == 0.5
    assert int((model[2].weight == 0).sum()) == 50


def test_a_weight_that_is_tied_to_another_kind_of_layer_has_its_first_name():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6))
    model[1].weight = model[0].weight
    masks = Masks.dense(model)
    masks.prune(model, 0.25)
    masks.apply(model)
    assert int((model[1].weight == 0).sum()) == 6


def test_a_weight_that_cannot_be_masked_is_named():
    with pytest.raises(ValueError, match="1: the weight of this LazyLinear is no plain parameter"):
        prunable(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))
    with pytest.raises(ValueError, match="0: the weight of this Linear"):
        prunable(nn.Sequential(prune.random_unstructured(nn.Linear(2, 2), "weight", 0.5)))


def test_a_network_without_layers_that_can_be_pruned_is_named():
    with pytest.raises(ValueError, match=r"LSTM has none of the layers .* \(conv\+linear\)"):
        Masks.dense(nn.LSTM(3, 4))
    with pytest.raises(ValueError, match=r"Linear has none of the layers .* \(conv\)"):
        Masks.dense(nn.Linear(3, 4), "conv")
