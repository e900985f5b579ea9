"""Networks as plain modules of torch: the same outputs, and layers that anybody's tools know."""

import copy

import pytest
import torch
from test_channels import DIGITS, NETWORKS, draw, trained
from torch import nn

from common.core.models import build
from common.core.models.plain import plain
from common.core.pruning import channels
from common.core.pruning.counting import cost
from common.core.pruning.masks import Masks


def assert_plain(found, model, images):
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(found(images), model(images), rtol=1e-6, atol=1e-6)
    layers = [m for m in found.modules() if not list(m.children()) and m is not found]
    assert layers and all(type(m).__module__.startswith("torch.nn.modules.") for m in layers)


@pytest.mark.parametrize("name, shape, options", NETWORKS)
def test_outputs_are_the_same_with_and_without_removed_channels(name, shape, options):
    model, _, _, images = trained(name, shape, options, steps=1)
    assert_plain(plain(model), model, images)
    channels.remove(model, draw(model, seed=1))
    found = plain(model)
    assert_plain(found, model, images)
    # what has no channels at all is one of zeros in its place
    extra = cost(found, shape)["macs"] - cost(model, shape)["macs"]
    assert extra >= 0 and (extra == 0 or 0 in model.widths)


def test_masks_are_applied_to_the_copy():
    model, _, _, images = trained("vgg_mini", DIGITS, {"dropout": 0.0}, steps=1)
    masks = Masks.dense(model)
    masks.prune(model, 0.8)
    twin = copy.deepcopy(model)
    masks.apply(twin)
    found = plain(model, masks.kept)
    assert_plain(found, twin, images)
    assert all(parameter.all() for name, parameter in model.named_parameters() if name in masks.kept)
    assert set(found.state_dict()) - set(model.state_dict()) == {
        f"{name}.num_batches_tracked" for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)
    }


def test_a_counter_that_goes_by_types_sees_every_layer():
    found = plain(build("resnet20", classes=10, image_shape=(3, 32, 32)))
    macs = []
    for module in found.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            positions = lambda m, _, y: macs.append(m.weight.numel() * y[0, 0].numel())  # noqa: E731
            module.register_forward_hook(positions)
    found(torch.randn(1, 3, 32, 32))
    assert sum(macs) == 40_813_184
    assert "GraphModule" in str(type(found).__mro__)


def test_a_graph_goes_through_torchs_own_export(tmp_path):
    model = build("resnet8", classes=10, image_shape=DIGITS, stem=8, widths=[4, 0, 16, 8, 8, 5])
    images = torch.randn(2, *DIGITS)
    torch.export.save(torch.export.export(plain(model), (images,)), tmp_path / "net.pt2")
    found = torch.export.load(tmp_path / "net.pt2").module()
    assert_close = torch.testing.assert_close
    assert_close(found(images), model.eval()(images), rtol=1e-6, atol=1e-6)


class Choosing(nn.Module):
    """A forward pass that cannot be traced."""

    def __init__(self):
        super().__init__()
        self.inner = build("digits_cnn", classes=10, image_shape=DIGITS)

    def forward(self, x):
        return self.inner(x if x.sum() > 0 else -x)


def test_layers_are_replaced_in_networks_that_cannot_be_traced():
    model = Choosing()
    found = plain(model)
    assert type(found) is Choosing
    assert {type(m) for m in found.modules() if isinstance(m, (nn.Conv2d, nn.Linear))} == {
        nn.Conv2d,
        nn.Linear,
    }
    assert torch.equal(found(torch.ones(2, *DIGITS)), model.eval()(torch.ones(2, *DIGITS)))
