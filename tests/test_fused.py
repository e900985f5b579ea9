"""Layers that go through kernels of the suite's own: what they compute, in Triton's interpreter, and what they leave to torch."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from project import ROOT
from torch import nn

from common.core.compute import Compute
from common.core.models import build, fused
from common.core.models.network import BatchNorm2d, Conv2d
from common.core.pruning.counting import cost
from common.settings import SettingsError

BOTH_WAYS = ("masked", "narrowed", "chain")


def ended(script, **variables):
    pytest.importorskip("triton", reason="Triton is not installed: there is none for this system")
    environment = os.environ | {"PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, ROOT / "tests" / script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def interpreted():
    return json.loads(ended("interpreted_fused.py", TRITON_INTERPRET="1"))


@pytest.mark.slow
def test_every_layer_computes_what_torch_computes(interpreted):
    errors = {name: error for name, error in interpreted.items() if name.startswith(("norm", *"136"))}
    wanted = {
        "1x1 gradient of w",
        "3->16 s1 gradient of w",
        "16->32 s2 gradient of x",
        "64->64 s1 forward",
        "norm, ReLU: of x",
    }
    assert wanted | {
        "norm, added, ReLU: of shortcut",
        "norm, ReLU: variance",
        "norm, evaluated: output",
    } < set(errors)
    assert {name: error for name, error in errors.items() if not error < 3e-5} == {}


@pytest.mark.slow
def test_a_network_trains_both_ways_alike_and_the_same_twice(interpreted):
    """Also with weights in place of the parameters, and with widths that do not fit. In float16, whose values have 11 bits."""
    for name in BOTH_WAYS:
        for what, bound in {"loss": 1e-3, "evaluated": 5e-3, "gradients": 2e-2, "statistics": 1e-3}.items():
            assert interpreted[f"{name}: {what}"] < bound, (name, what)


@pytest.mark.slow
def test_layers_that_fit_are_launched(interpreted):
    """Of two residual blocks: 5 convolutions of 3x3, of which 4 hand a gradient on, and 6 norms; all again in evaluation. Twice."""
    once = {"convolve": 5 + 4 + 5, "weight_gradient": 5, "weight_gradient_sum": 5}
    once |= {"statistics": 6, "normalise": 6 + 6, "gradient_sums": 6, "gradient": 6}
    assert interpreted["launches"] == {name: 2 * count for name, count in once.items()}


@pytest.mark.slow
def test_every_kernel_is_compiled_for_a_gpu_that_is_not_here(tmp_path):
    launched = Counter(
        ended("compiled_fused.py", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0").split()
    )
    # convolutions that keep the weights on the chip and others; norms alone, before a ReLU, and with a shortcut
    assert launched == {
        "convolve": 2,
        "weight_gradient": 1,
        "weight_gradient_sum": 1,
        "statistics": 1,
        "normalise": 3 + 3,
        "gradient_sums": 3,
        "gradient": 3,
    }


LEFT = {
    "five times five": lambda: (Conv2d(16, 16, 5, 1, 2, bias=False), 16),
    "groups": lambda: (Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), 16),
    "a bias": lambda: (Conv2d(16, 16, 3, 1, 1), 16),
    "no padding": lambda: (Conv2d(16, 16, 3, bias=False), 16),
    "another stride": lambda: (Conv2d(16, 16, 3, (1, 2), 1, bias=False), 16),
    "an odd width": lambda: (Conv2d(16, 13, 3, 1, 1, bias=False), 16),
    "wide layers": lambda: (Conv2d(128, 128, 3, 1, 1, bias=False), 128),
    "four channels that hand a gradient on": lambda: (Conv2d(4, 16, 3, 1, 1, bias=False), 4),
    "a large map": lambda: (Conv2d(64, 64, 3, 1, 1, bias=False), 64),
    "no scales": lambda: (nn.BatchNorm2d(16, affine=False), 16),
    "no running statistics": lambda: (nn.BatchNorm2d(16, track_running_stats=False), 16),
    "a cumulative mean": lambda: (nn.BatchNorm2d(16, momentum=None), 16),
    "evaluation with gradients": lambda: (nn.BatchNorm2d(16).eval(), 16),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_does_not_fit_is_left_to_torch(what):
    layer, width = LEFT[what]()
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.ones(2, width, 16, 16, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        x.requires_grad_()
        assert _through_kernels(layer, x) is None


def _through_kernels(layer, x):
    if isinstance(layer, nn.Conv2d):
        return fused.convolution(layer, x)
    return fused.norm(layer, x, relu=True)


def test_other_formats_and_layouts_are_left_to_torch():
    convolution, norm = Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
    x = torch.ones(2, 16, 8, 8).to(memory_format=torch.channels_last)
    assert fused.convolution(convolution, x) is None and fused.norm(norm, x, relu=True) is None
    with torch.autocast("cpu", torch.bfloat16):
        half = x.bfloat16()
        assert fused.norm(norm, x, relu=True) is None
        assert fused.norm(norm, half.contiguous(), relu=True) is None
        assert fused.norm(norm, half[:1, :, :1, :1], relu=True) is None
        assert fused.norm(norm, half, relu=True, shortcut=x) is None
        assert fused.convolution(convolution, half[:, :, :, :4]) is None
        # saliency maps ask for the gradient of images
        assert fused.convolution(Conv2d(3, 16, 3, 1, 1, bias=False), half[:, :3].requires_grad_()) is None


def test_the_cost_of_a_network_is_counted_whichever_way_its_layers_go():
    model, usual = (build("resnet8", classes=10, image_shape=(3, 8, 8)) for _ in range(2))
    Compute(torch.device("cpu"), torch.bfloat16, fused=True).place(model)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.ones(2, 16, 8, 8, device="meta")
        assert fused.convolution(Conv2d(16, 16, 3, 1, 1, bias=False), x) is None
        assert fused.norm(nn.BatchNorm2d(16), x.bfloat16(), relu=True) is None
    assert cost(model, (3, 8, 8)) == cost(usual, (3, 8, 8))


def test_a_choice_says_which_way_the_layers_of_a_network_go():
    model = build("resnet8", classes=10, image_shape=(3, 8, 8))
    layers = [module for module in model.modules() if isinstance(module, (Conv2d, BatchNorm2d))]
    for way in (True, False):
        Compute(torch.device("cpu"), fused=way).place(model)
        assert {layer.fused for layer in layers} == {way}
    assert not Compute.choose("cpu", "bfloat16").fused


def test_fused_layers_are_refused_where_there_are_none(monkeypatch):
    with pytest.raises(SettingsError, match="compilation = 'fused': a CPU has no graphs .* use 'auto'"):
        Compute.choose("cpu", "bfloat16", "fused")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with pytest.raises(SettingsError, match="compilation = 'fused': its kernels are for bfloat16"):
        Compute.choose("cuda", "float32", "fused")
    monkeypatch.setattr(fused, "problem", lambda device: "RuntimeError: Failed to find C compiler")
    with pytest.raises(
        SettingsError, match=r"compiles no kernels here \(RuntimeError: Failed to find C .* use 'auto'"
    ):
        Compute.choose("cuda", "auto", "fused")
    monkeypatch.setattr(fused, "problem", lambda device: None)
    chosen = Compute.choose("cuda", "auto", "fused")
    assert chosen.fused and chosen.captured and not chosen.compiled
    for capability, problem, precision, is_fused in [
        ((9, 0), None, "auto", True),
        ((9, 0), None, "float32", False),
        ((9, 0), "RuntimeError: no compiler", "auto", False),
        ((8, 0), None, "auto", False),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        monkeypatch.setattr(fused, "problem", lambda device, found=problem: found)
        chosen = Compute.choose("cuda", precision, "auto")
        assert chosen.fused == is_fused and chosen.captured
        assert not Compute.choose("cuda", precision, "capture").fused


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_stops_the_kernels_is_one_line():
    reason = fused.problem(torch.device("cuda"))
    assert reason and "\n" not in reason
