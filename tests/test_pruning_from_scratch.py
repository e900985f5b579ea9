"""Pruning from scratch beyond its golden vectors: gates, structures, planned runs and what a run leaves."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from common.arena import Contest
from common.core import loading
from common.core.compute import Compute
from common.core.data import Batches
from common.core.experiment import listed
from common.core.identity import canonical
from common.core.pruning import channels
from common.core.recipe import Recipe
from common.core.run import Cell, Context
from common.core.trainer import Trainer
from common.core.tuning import Tuned
from common.settings import DatasetSettings, ExecutionSettings, Profile, SettingsError, validated
from common.stage.scheduler import in_order
from common.stage.store import Store
from common.stage.worker import perform
from replications.equal_footing.protocol import Contend
from replications.pruning_from_scratch import bpcp, method, protocol
from replications.pruning_from_scratch.contender import contend
from replications.pruning_from_scratch.jobs import largest_norms
from replications.pruning_from_scratch.structure import (
    Layout,
    Ranking,
    SearchSettings,
    largest_reduction,
    noise_gates,
    search,
    uniform_widths,
)

DATA = DatasetSettings(train=120, validation=60, test=200)
CPU = ExecutionSettings(device="cpu", precision="float32", workers=1)


def digits_layout(name="digits_vgg"):
    return Layout.of(name, 10, (1, 8, 8))


def gate_trainer(layout, **options):
    model = layout.build(seed=1)
    gates = method.Gates(model, layout.gated, weight=0.5, level=0.3)
    data = loading.load(DATA)
    batches = Batches(data, "train", 40, seed=0, shuffle=True)
    return Trainer(model, batches, hooks=gates, optimizer=gates.optimizer(), **options), gates


# ---------------------------------------------------------------------------------------------- gates


def test_only_gates_and_running_statistics_change():
    layout = digits_layout().expanded(1.25)
    trainer, gates = gate_trainer(layout)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.fit([0.01] * 6)
    changed = {n for n, value in trainer.model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {n for n in before if "running" in n}
    assert (gates.values != 1).all() and gates.values.min() >= 0 and gates.values.max() <= 1


def test_a_closed_gate_stays_closed():
    trainer, gates = gate_trainer(digits_layout())
    gates.values.data[[0, 20, 50]] = 0.0
    trainer.fit([0.05] * 9)
    assert gates.values[[0, 20, 50]].tolist() == [0.0, 0.0, 0.0]
    assert (gates.values == 0).sum() == 3


@pytest.mark.parametrize("name", ["digits_vgg", "resnet8", "mobilenet_t8", "mobilenet_v2"])
@pytest.mark.parametrize("training", [True, False])
def test_folded_gates_multiply_what_the_norms_put_out(name, training):
    layout = digits_layout(name)
    # in double precision: MobileNetV2's norms over few values magnify what single precision rounds
    model = layout.build(seed=3).double().train(training)
    gates = method.Gates(model, layout.gated, 0.5, 0.5)
    gates.values.data.uniform_(generator=torch.Generator().manual_seed(0))
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.bias.data.normal_(generator=torch.Generator().manual_seed(norm.num_features))
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    folded = torch.func.functional_call(model, gates.weights(None), (x,))
    for norm, gate in zip(layout.gated, gates.layers(), strict=True):
        model.get_submodule(norm).register_forward_hook(
            lambda module, inputs, output, gate=gate: output * gate[:, None, None]
        )
    torch.testing.assert_close(folded, model(x))


def test_the_penalty_draws_the_mean_to_its_level_from_both_sides():
    for start in (0.1, 0.9):
        values = nn.Parameter(torch.full((8,), start))
        optimizer = torch.optim.Adam([values], lr=0.02)
        for _ in range(200):
            optimizer.zero_grad()
            method.regulariser(values, 0.5, 0.4).backward()
            optimizer.step()
        assert values.mean().item() == pytest.approx(0.4, abs=0.02)


class Memory:
    """Checkpoints that hold the state after the first epoch."""

    def __init__(self):
        self.kept = None

    def load(self, fit):
        return self.kept

    def offer(self, fit, state, finished):
        self.kept = self.kept or copy.deepcopy(state())


def test_interrupted_gate_learning_ends_as_an_unbroken_one():
    unbroken, expected = gate_trainer(digits_layout())
    unbroken.fit([0.01] * 9)
    memory = Memory()
    gate_trainer(digits_layout(), checkpoints=memory)[0].fit([0.01] * 9)
    assert memory.kept["epochs_of_fit"] == 1
    resumed, gates = gate_trainer(digits_layout(), checkpoints=memory)
    resumed.fit([0.01] * 9)
    assert torch.equal(gates.values, expected.values)
    assert len(gates.epochs) == 3 and all(map(torch.equal, gates.epochs, expected.epochs))


# ---------------------------------------------------------------------------------------------- structures


def test_random_ties_are_repeatable_and_leave_distinct_gates_alone():
    tied = [torch.ones(6), torch.tensor([1.0, 0.0, 1.0, 0.0])]
    first, drawn, again, other = (
        torch.cat(Ranking.of(tied, ties, seed).masks(4, 0)).tolist()
        for ties, seed in (("first", 0), ("random", 1), ("random", 1), ("random", 2))
    )
    assert first == [True] * 4 + [False] * 6
    assert drawn == again != first
    assert other != drawn
    distinct = noise_gates([5, 7], seed=0)
    assert torch.equal(Ranking.of(distinct).rank, Ranking.of(distinct, "random", 5).rank)


def test_tied_share_counts_what_the_tie_rule_chose():
    ranking = Ranking.of([torch.tensor([1.0, 1.0, 0.9]), torch.tensor([1.0, 0.2])])
    assert ranking.tied_share(2) == 1.0
    assert ranking.tied_share(3) == 0.0
    assert Ranking.of([torch.tensor([1.0, 0.5, 0.5])]).tied_share(2) == 0.5
    assert ranking.tied_share(0) == ranking.tied_share(5) == 0.0


@pytest.mark.parametrize("unit", ["macs", "parameters"])
@pytest.mark.parametrize("target", [0.05, 0.5, 0.9])
def test_search_meets_budgets_of_either_unit(unit, target):
    base = digits_layout()
    wide = base.expanded(1.25)
    found = {
        rule: search(
            Ranking.of(noise_gates(wide.widths, 4)),
            wide.spends(unit),
            base.cost()[unit],
            target,
            min_channels=2,
            returned=rule,
        )
        for rule in ("best", "last")
    }
    best, last = found["best"].candidate, found["last"].candidate
    assert min(best.widths) >= 2
    assert abs(best.reduction - target) <= abs(last.reduction - target)
    assert best.reduction == pytest.approx(target, abs=0.02)
    assert best.cost == wide.cost(best.widths)[unit] == round((1 - best.reduction) * base.cost()[unit])
    assert [int(mask.sum()) for mask in found["best"].masks] == list(best.widths)


def test_every_layer_keeps_its_least_width_and_the_search_goes_round_it():
    options = SearchSettings(min_channels=3, min_share=0.2)
    assert options.least([20, 8, 41]) == [4, 3, 9]
    base = digits_layout()
    wide = base.expanded(1.25)
    gates = noise_gates(wide.widths, 4)
    gates[2] = gates[2] * 1e-3
    found = [
        search(Ranking.of(gates), wide.spends("macs"), base.cost()["macs"], 0.7, min_channels=least)
        for least in (1, options.least(wide.widths))
    ]
    assert found[0].candidate.widths[2] == 1
    assert found[1].candidate.widths[2] == 8
    for structure in found:
        assert structure.candidate.reduction == pytest.approx(0.7, abs=0.02)
    assert found[1].floor == largest_reduction(
        wide.widths, wide.spends("macs"), base.cost()["macs"], (4, 4, 8, 8)
    )


@pytest.mark.parametrize("name", ["digits_vgg", "resnet8", "mobilenet_t8"])
def test_channels_of_least_l1_norm_leave(name):
    model = digits_layout(name).build(seed=3)
    widths = [max(1, width // 3) for width in model.widths]
    norms = {
        group.name: [filters.abs().sum().item() for filters in model.get_parameter(f"{group.name}.weight")]
        for group in model.channel_groups()
        if group.norm
    }
    kept = largest_norms(model, widths)
    for (group, all_of_it), width in zip(norms.items(), widths, strict=True):
        stays = kept[group].tolist()
        assert len(stays) == width and stays == sorted(stays)
        gone = set(range(len(all_of_it))) - set(stays)
        assert min(all_of_it[c] for c in stays) >= max(all_of_it[c] for c in gone)
    channels.remove(model, kept)
    assert model.widths == widths


def test_of_equal_norms_the_first_stays():
    model = digits_layout().build()
    for group in model.channel_groups():
        model.get_parameter(f"{group.name}.weight").data.fill_(0.1)
    assert [kept.tolist() for kept in largest_norms(model, [2, 1, 3, 1]).values()] == [
        [0, 1],
        [0],
        [0, 1, 2],
        [0],
    ]


def test_an_unreachable_budget_is_a_status_with_its_floor():
    base = digits_layout("resnet8")
    wide = base.expanded(1.25)
    ranking = Ranking.of(noise_gates(wide.widths, 0))
    found = search(ranking, wide.spends("macs"), base.cost()["macs"], 0.99)
    assert found.status == "unreachable"
    assert found.candidate.widths == (1, 1, 1)
    assert found.candidate.reduction == found.floor < 0.99
    reachable = search(ranking, wide.spends("macs"), base.cost()["macs"], found.floor)
    assert reachable.status != "unreachable"
    for target in (0.0, 1.0, 1.2):
        with pytest.raises(ValueError, match=f"{target}"):
            search(ranking, wide.spends("macs"), base.cost()["macs"], target)


def test_uniform_widths_are_the_largest_that_fit():
    base = digits_layout()
    found = uniform_widths(base.widths, base.spends("macs"), 0.6)
    assert found.reachable and found.cost <= 0.4 * base.cost()["macs"]
    wider = [width + 1 for width in found.widths]
    assert base.cost(wider)["macs"] > 0.4 * base.cost()["macs"]
    assert not uniform_widths(base.widths, base.spends("macs"), 0.9999).reachable


def test_expansion_widens_the_stream_of_basic_blocks_only():
    residual = digits_layout("resnet8").expanded(1.25)
    assert residual.widths == (20, 40, 80)
    assert residual.build().conv1.out_channels == 20 and residual.build().linear.in_features == 80
    bottleneck = Layout.of("resnet50", 10, (3, 32, 32)).expanded(1.25)
    assert bottleneck.widths[0] == 80 and bottleneck.build(device="meta").linear.in_features == 2048
    assert digits_layout().expanded(1.5).widths == (24, 24, 48, 48)


def test_networks_that_cannot_be_gated_or_built_are_named():
    with pytest.raises(SettingsError, match="'mlp'.*no batch norm"):
        digits_layout("mlp")
    with pytest.raises(SettingsError, match="'vgg16'.*8x8"):
        digits_layout("vgg16")
    with pytest.raises(SettingsError, match="'digits_vg'.*digits_vgg"):
        digits_layout("digits_vg")
    with pytest.raises(SettingsError, match="kernal"):
        Layout.of("digits_vgg", 10, (1, 8, 8), {"kernal": 5})
    with pytest.raises(SettingsError, match="'seed' is not an option"):
        Layout.of("digits_vgg", 10, (1, 8, 8), {"seed": 5})


# ---------------------------------------------------------------------------------------------- blocks


def residual(name="resnet14", stem=4):
    """A residual network whose batch norms and their statistics are all different."""
    model = Layout.of(name, 10, (1, 8, 8), {"stem": stem}).build(seed=2)
    generator = torch.Generator().manual_seed(5)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for values in (norm.weight.data, norm.bias.data, norm.running_mean):
            values.normal_(generator=generator)
        norm.running_var.uniform_(0.5, 2.0, generator=generator)
    return model


IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def block_trainer(**options):
    model = residual()
    gates = bpcp.BlockGates(model, weight=0.5, rate=0.1)
    batches = Batches(loading.load(DATA), "train", 40, seed=0, shuffle=True)
    return Trainer(model, batches, hooks=gates, **options), gates


def test_blocks_are_drawn_in_training_and_decided_in_evaluation():
    trainer, gates = block_trainer()
    gates.alpha.data = torch.tensor([9.0, -9.0, 0.0, -0.1, 0.1, 0.0])
    gates.epoch_started(trainer, 0)
    norms = [f"{name}.bn2" for name, _ in trainer.model.blocks()]

    def open_gates():
        scales = gates.weights(trainer)
        return [(scales[f"{n}.weight"] / trainer.model.get_submodule(n).weight).mean().item() for n in norms]

    draws = []
    for trainer.iteration in range(3):
        draws.append(open_gates())
    assert {gate for draw in draws for gate in draw} == {0.0, 1.0}
    assert all(draw[:2] == [1.0, 0.0] for draw in draws)
    assert draws[0] != draws[1] or draws[1] != draws[2]
    trainer.model.eval()
    assert open_gates() == [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]


def test_a_block_search_learns_at_its_own_rate_and_the_penalty_closes_blocks():
    trainer, gates = block_trainer()
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    gates.weight = 5.0
    trainer.fit([0.0] * 9)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
    assert not bpcp.kept(gates.alpha).any()


def test_an_interrupted_block_search_ends_as_an_unbroken_one():
    unbroken, expected = block_trainer()
    unbroken.fit([0.01] * 9)
    memory = Memory()
    block_trainer(checkpoints=memory)[0].fit([0.01] * 9)
    resumed, gates = block_trainer(checkpoints=memory)
    resumed.fit([0.01] * 9)
    assert len(resumed.history) == 3 and gates.alpha.abs().min() > 0
    assert torch.equal(gates.alpha, expected.alpha)


@pytest.mark.parametrize("name", ["resnet14", "resnet50"])
@pytest.mark.parametrize("training", [True, False])
def test_a_removed_block_is_a_closed_gate_and_costs_nothing(name, training):
    model = residual(name).double().train(training)
    gates = bpcp.BlockGates(model, 0.0, 0.1)
    gates.alpha.data[1], gates.alpha.data[3] = -1.0, -2.0
    closed = {
        f"{name}.bn{len(block.kernels)}.{entry}": IMAGES.new_zeros(block.scatter.channels)
        for name, block in (model.blocks()[1], model.blocks()[3])
        for entry in ("weight", "bias")
    }
    expected = torch.func.functional_call(copy.deepcopy(model), closed, (IMAGES,))
    blocks = dict(model.blocks())
    kept = sum(p.numel() for n, p in model.named_parameters() if not _inside(n, list(blocks)[1:4:2]))
    removed = bpcp.drop_blocks(model, gates.alpha, 0, lambda network: 1)
    assert removed == [list(blocks)[3], list(blocks)[1]]
    torch.testing.assert_close(model(IMAGES), expected)
    assert sum(p.numel() for p in model.parameters()) == kept


def _inside(parameter, blocks):
    return any(parameter.startswith(f"{block}.") and ".shortcut." not in parameter for block in blocks)


@pytest.mark.slow
def test_blocks_leave_in_the_order_of_their_probability_while_the_budget_lets_them():
    layout = Layout.of("resnet14", 10, (1, 8, 8), {"stem": 4})
    alpha = torch.tensor([-0.1, -3.0, 2.0, -1.0, 0.0, -2.0])
    order = ["layer1.1", "layer3.1", "layer2.1", "layer1.0"]

    def macs(network):
        return layout.cost_of(network)["macs"]

    costs = []
    for count in range(5):
        model = residual()
        for name in order[:count]:
            bpcp._drop_block(model, name)
        costs.append(macs(model))
    for count, cost in enumerate(costs):
        model = residual()
        assert bpcp.drop_blocks(model, alpha, cost, macs) == order[:count]
        assert macs(model) == cost


# ---------------------------------------------------------------------------------------------- channels


@pytest.mark.parametrize("name", ["resnet14", "resnet50"])
@pytest.mark.parametrize("training", [True, False])
def test_a_narrowed_network_is_one_whose_channels_are_silent(name, training):
    model = residual(name).double().train(training)
    removed = model.blocks()[3][0]
    bpcp._drop_block(model, removed)
    silent = copy.deepcopy(model)
    keep = {}
    for n, group in enumerate(bpcp.channel_groups(model)):
        channels = silent.get_submodule(group.norm).num_features
        keep[group.name] = [channel for channel in range(channels) if (channel + n) % 3]
        gone = [channel for channel in range(channels) if not (channel + n) % 3]
        for member in (group.norm, *(f for f in group.followers if ".bn" in f or ".shortcut.1" in f)):
            silent.get_submodule(member).weight.data[gone] = 0
            silent.get_submodule(member).bias.data[gone] = 0
    expected = silent(IMAGES)
    bpcp.narrow(model, keep)
    torch.testing.assert_close(model(IMAGES), expected)
    assert model.linear.in_features < silent.linear.in_features


def test_layers_of_a_stream_are_joined_and_leave_together():
    model = residual()
    found = {group.name: (group.norm, *group.followers) for group in bpcp.channel_groups(model)}
    assert found["conv1"] == ("bn1", "layer1.0.conv2", "layer1.0.bn2", "layer1.1.conv2", "layer1.1.bn2")
    assert found["layer2.0.shortcut.0"][0] == "layer2.0.shortcut.1"
    scores = bpcp.importance(model)
    assert [len(scores[name]) for name in ("layer1.0.conv1", "conv1", "layer3.0.shortcut.0")] == [1, 3, 3]
    assert torch.equal(scores["conv1"][1], model.layer1[0].bn2.weight.abs())


def test_channels_that_must_stay_are_passed_over():
    scores = {
        "a": [torch.tensor([0.1, 0.2, 0.3])],
        "b": [torch.tensor([0.9, 0.4]), torch.tensor([0.5, 0.45])],
    }
    assert bpcp.removal_order(scores, 99, least=1) == [("a", 0), ("a", 1), ("b", 1)]
    assert bpcp.removal_order(scores, 3) == [("a", 0), ("a", 1), ("a", 2)]
    assert bpcp.removal_order(scores, 99, least=2) == [("a", 0)]


@pytest.mark.slow
def test_channels_leave_until_the_cost_is_nearest_to_the_budget():
    layout = Layout.of("resnet8", 10, (1, 8, 8), {"stem": 4})
    scores = bpcp.importance(residual("resnet8"))
    order = bpcp.removal_order(scores, 10**6, least=2)
    costs = []
    for length in range(len(order) + 1):
        model, gone = residual("resnet8"), set(order[:length])
        keep = {n: [c for c in range(len(layers[0])) if (n, c) not in gone] for n, layers in scores.items()}
        bpcp.narrow(model, keep)
        costs.append(layout.cost_of(model))
    for unit, share in (("macs", 0.4), ("parameters", 0.7), ("macs", 0.0)):
        budget = share * layout.cost()[unit]
        model = residual("resnet8")
        bpcp.drop_channels(model, budget, lambda network, unit=unit: layout.cost_of(network)[unit], least=2)
        found = layout.cost_of(model)[unit]
        assert abs(found - budget) == min(abs(cost[unit] - budget) for cost in costs)


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"variants": {"pfs-e": [1.2]}}, ["pfs-e", "1.2", "less than 1"]),
        ({"variants": {"pfs-e": [0.0]}}, ["pfs-e", "above 0"]),
        ({"variants": {"pfs": [0.5]}}, ["pfs", "pfs-e"]),
        ({"search": {"min_channels": 0}}, ["min_channels", "0", "greater than or equal to 1"]),
        ({"search": {"returned": "first"}}, ["returned", "'best' or 'last'"]),
        ({"search": {"min_share": 1.0}}, ["min_share", "1.0", "less than 1"]),
        ({"fine_tuning": {"epochs": 3}}, ["fine_tuning.epochs"]),
        ({"expansion": 0.5}, ["expansion", "0.5"]),
        ({"gates": {"level": 1.5}}, ["level", "1.5"]),
        ({"training": {"epoch": 3}}, ["epoch", "did you mean 'epochs'"]),
        ({"blocks": {"weight": -0.1}}, ["blocks.weight", "-0.1"]),
        (
            {"cells": [{"architecture": "mlp", "data": {"source": "cifar"}}]},
            ["cells[0].data.source", "'cifar'"],
        ),
    ],
)
def test_impossible_settings_are_named(values, named):
    with pytest.raises(SettingsError) as error:
        validated(protocol.Settings, values, "params.yaml")
    assert all(word in str(error.value) for word in named)


def runs_of(profile):
    """The runs of a profile."""
    return listed("pruning_from_scratch", protocol.Experiment, profile)


def profile(**values):
    settings = {
        "seeds": [0],
        "gates": {"epochs": 2},
        "training": {"epochs": 1},
        **values,
    }
    paper = validated(protocol.Settings, settings, "params.yaml")
    return Profile(name="test", dataset=DATA, execution=CPU, paper=paper)


@pytest.mark.parametrize(
    ("variant", "target", "options"),
    [
        ("pfs-e", 0.999, {}),
        ("trained-gates-b", 0.5, {"min_channels": 20}),
        ("pfs-b", 0.6, {"min_share": 0.6}),
        ("uniform-e", 0.999, {"budget": "parameters"}),
        ("l1-fine-tuned-e", 0.999, {}),
    ],
)
def test_a_budget_that_no_structure_meets_is_an_error_before_training(variant, target, options):
    with pytest.raises(SettingsError, match=f"variants.{variant}: a reduction of {target}") as error:
        runs_of(profile(variants={variant: [target]}, search=options))
    base = digits_layout()
    layout = base if variant in ("uniform-e", "l1-fine-tuned-e") else base.expanded(1.25)
    unit = options.get("budget", "macs")
    least = SearchSettings(**options).least(layout.widths)
    floor = largest_reduction(layout.widths, layout.spends(unit), base.cost()[unit], least)
    assert f"saves {floor:.4f} of the {unit}" in str(error.value)
    runs_of(profile(variants={variant: [floor]}, search=options))


@pytest.mark.parametrize(
    ("architecture", "named"),
    [
        ({"architecture": "digits_vgg"}, ["variants.bpcp-e", "digits_vgg", "resnet20", "resnet<6n+2>"]),
        ({"architecture": "mobilenet_t8"}, ["variants.bpcp-e", "mobilenet_t8", "resnet20"]),
        (
            {"architecture": "resnet8", "options": {"shortcut": "A"}},
            ["variants.bpcp-e", "resnet8", "shortcut B"],
        ),
    ],
)
def test_networks_without_removable_blocks_are_named_before_training(architecture, named):
    with pytest.raises(SettingsError) as error:
        runs_of(profile(variants={"bpcp-e": [0.5]}, cells=[architecture]))
    assert all(word in str(error.value) for word in named)
    runs_of(profile(variants={"pfs-e": [0.5]}, cells=[architecture]))


def test_a_budget_beyond_the_narrowest_residual_network_is_an_error_before_training():
    for target, least in ((0.9999, 1), (0.5, 24)):
        plan = profile(
            variants={"bpcp-e": [target]}, cells=[{"architecture": "resnet8"}], search={"min_channels": least}
        )
        with pytest.raises(SettingsError, match=f"variants.bpcp-e: a reduction of {target}"):
            runs_of(plan)


def test_an_architecture_can_have_its_own_data(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 300), ("test", 60)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % 3
    np.savez(tmp_path / "own.npz", **arrays)
    own = {"source": "npz", "path": str(tmp_path / "own.npz"), "validation": 60}
    variants = {"uniform-e": [0.5]}
    plan = profile(
        variants=variants, cells=[{"architecture": "digits_vgg"}, {"architecture": "digits_vgg", "data": own}]
    )
    runs = runs_of(plan)
    assert [run.dataset for run in runs] == ["digits", "digits", "own", "own"]
    assert runs[2].settings["data"] == DatasetSettings(**own).model_dump(mode="json")
    assert perform(runs[3], Store(tmp_path), CPU, False).record.status == "ok"
    same = profile(variants=variants, cells=[{"architecture": "digits_vgg", "data": DATA.model_dump()}])
    assert [run.settings_hash for run in runs_of(same)] == [run.settings_hash for run in runs[:2]]
    for repeated in (
        {"architecture": "digits_vgg"},
        {"architecture": "digits_vgg", "data": {"source": "digits"}},
    ):
        plan = profile(variants=variants, cells=[{"architecture": "digits_vgg"}, repeated])
        with pytest.raises(SettingsError, match="must not repeat .*digits_vgg .* on digits"):
            runs_of(plan)


def test_gates_are_shared_between_budgets_unless_their_level_follows_the_budget():
    variants = {"pfs-e": [0.5, 0.8], "pfs-b": [0.5], "trained-gates-e": [0.5]}
    for level, count in ((0.5, 1), ("budget", 2)):
        planned = in_order(runs_of(profile(variants=variants, gates={"level": level})))
        gates = [run for run in planned if run.variant == "gates-on-random-weights"]
        assert len(gates) == count
        assert [run.variant for run in planned].count("expanded") == 1
    assert [(run.target, run.settings["gates"]["level"]) for run in gates] == [
        (0.5, 0.5),
        (0.8, pytest.approx(0.2)),
    ]


SWITCHED = {
    "pfs-last-e": {"search": {"returned": "last"}},
    "pfs-level-0.2-e": {},
    "pfs-expansion-1-e": {"expansion": 1.0},
    "pfs-expansion-1.5-e": {"expansion": 1.5},
    "trained-gates-one-channel-e": {"search": {"min_share": 0.0}},
    "l1-fine-tuned-low-rate-e": {"fine_tuning": {"learning_rate": 0.001, "milestones": []}},
}


def test_a_switch_changes_one_setting_and_runs_share_all_that_it_leaves_alone():
    assert {f"{name}-e" for name in protocol.SWITCHES} == SWITCHED.keys()
    plain = ("pfs-e", "trained-gates-e", "l1-fine-tuned-e")
    options = {"min_channels": 1, "min_share": 0.2}
    variants = dict.fromkeys((*plain, *SWITCHED), [0.5])
    planned = in_order(runs_of(profile(variants=variants, search=options)))
    by_name = {run.variant: run for run in planned}
    assert len({canonical(run.identity) for run in planned}) == len(planned) == len(by_name)
    for variant, changes in SWITCHED.items():
        run, other = by_name[variant], next(by_name[name] for name in plain if variant.startswith(name[:-2]))
        assert run.settings == other.settings | {
            name: {**other.settings[name], **value} if isinstance(value, dict) else value
            for name, value in changes.items()
        } | ({"gates": run.settings["gates"]} if "gates" in run.settings else {})
        own = {need.settings_hash for need in run.needs} - {need.settings_hash for need in other.needs}
        assert bool(own) == variant.startswith(("pfs-level", "pfs-expansion"))
    levels = [by_name[f"gates-on-random-weights{end}"].settings for end in ("", "-pfs-level-0.2")]
    assert [settings["gates"]["level"] for settings in levels] == [0.5, 0.2]
    wide = by_name["gates-on-random-weights-pfs-expansion-1.5"].settings
    assert wide == levels[0] | {"expansion": 1.5}


def test_the_switch_of_a_variant_counts_for_what_it_can_reach():
    options = {"min_share": 0.6}
    runs_of(profile(variants={"trained-gates-one-channel-e": [0.8]}, search=options))
    with pytest.raises(SettingsError, match="variants.pfs-last-e: a reduction of 0.8 cannot be reached"):
        runs_of(profile(variants={"pfs-last-e": [0.8]}, search=options))


# ---------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The records of every kind of variant, each run for an epoch or two, by variant and target."""
    everything = ("pfs", "trained-gates", "random-gates", "constant-gates", "uniform", "l1-fine-tuned")
    variants = {f"{source}-e": [0.6] for source in everything}
    variants |= dict.fromkeys(("pfs-b", "uniform-b", "l1-fine-tuned-b", "pfs-expansion-1.5-e"), [0.6])
    store = Store(tmp_path_factory.mktemp("runs"))
    done = {}
    for run in in_order(runs_of(profile(variants=variants))):
        entry = perform(run, store, CPU, keep_state=True).model_dump()
        assert entry["record"]["status"] == "ok", entry["record"]
        done[run.variant, run.target] = entry["record"]
    return done


@pytest.mark.slow
def test_every_variant_meets_its_budget(records):
    for (variant, target), record in records.items():
        assert 0 <= record["metrics"]["test_accuracy"] <= 1
        if target:
            cost = record["cost"]
            assert 1 - cost["macs"] / cost["dense_macs"] == pytest.approx(record["metrics"]["reduction"])
            # constant gates empty whole layers, so their structures are the coarsest
            assert record["metrics"]["reduction"] == pytest.approx(target, abs=0.05), variant
            assert min(record["details"]["widths"]) >= 1


@pytest.mark.slow
def test_equal_epochs_or_equal_macs(records):
    dense = records["dense", 0.0]["details"]["epochs"]
    assert dense == records["pfs-e", 0.6]["details"]["epochs"] == 1
    assert records["pfs-b", 0.6]["details"]["epochs"] == math.floor(dense / 0.4)
    assert records["pfs-b", 0.6]["details"]["widths"] == records["pfs-e", 0.6]["details"]["widths"]


@pytest.mark.slow
def test_the_whole_of_either_pipeline_costs_the_same(records):
    def spent(variant):
        return records[variant, 0.6]["metrics"]["training_cost"]

    def epochs(variant):
        return records[variant, 0.6]["details"]["epochs"]

    # one epoch of base training and two of gates on 1.55 times the MACs, in this profile
    assert epochs("pfs-e") + 2 == epochs("l1-fine-tuned-e") + 1 == 3
    assert epochs("l1-fine-tuned-b") == math.floor(2 * 1.5546 / 0.4)
    assert spent("pfs-b") == pytest.approx(2 * 1.5546 + 2 * 0.4, abs=0.05)
    assert spent("l1-fine-tuned-b") == pytest.approx(1 + 7 * 0.4, abs=0.05)
    assert spent("trained-gates-e") == pytest.approx(spent("pfs-e") + 1.5546, abs=0.1)
    assert spent("uniform-e") == pytest.approx(0.4, abs=0.03)
    tuned = records["l1-fine-tuned-e", 0.6]
    assert tuned["details"]["widths"] == records["uniform-e", 0.6]["details"]["widths"]


def test_fine_tuning_goes_on_with_the_weights_of_the_trained_network(tmp_path):
    rate = {"learning_rate": 1e-30, "milestones": []}
    plan = profile(variants={"l1-fine-tuned-e": [0.5]}, fine_tuning=rate)
    store = Store(tmp_path)
    dense, tuned = runs = in_order(runs_of(plan))
    entries = [perform(run, store, CPU, keep_state=True).model_dump() for run in runs]
    assert [(row["epoch"], row["phase"]) for row in entries[1]["curves"]] == [
        (1, "fine-tuning"),
        (2, "fine-tuning"),
    ]
    model = digits_layout().build()
    model.load_state_dict(store.state(dense))
    channels.remove(model, largest_norms(model, entries[1]["record"]["details"]["widths"]))
    left = store.state(tuned)
    for name, value in model.named_parameters():
        torch.testing.assert_close(left[name], value.detach())


def test_what_the_records_tell_about_search_and_structure(records):
    pfs, trained = records["pfs-e", 0.6], records["trained-gates-e", 0.6]
    assert pfs["metrics"]["search_cost"] == pytest.approx(2 * 1.5546, abs=1e-3)
    assert pfs["metrics"]["search_cost_published"] == pytest.approx(0.08745, abs=1e-4)
    assert -1 <= trained["metrics"]["similarity_to_random_weights"] <= 1
    assert pfs["details"]["kept_fractions"] == [
        w / f for w, f in zip(pfs["details"]["widths"], (20, 20, 40, 40))
    ]
    constant = records["constant-gates-e", 0.6]
    assert constant["details"]["widths"][0] == 20 and constant["details"]["widths"][3] == 1
    assert constant["metrics"]["tied_share"] == 1.0
    gates = records["gates-on-random-weights", 0.0]
    assert gates["cost"]["macs"] > gates["cost"]["dense_macs"]
    assert gates["metrics"]["mean_gate"] < 1


@pytest.fixture(scope="module")
def pruned_blocks(tmp_path_factory):
    """The entries of bpcp-e and what it starts from, by variant and target; the penalty closes all blocks."""
    plan = profile(
        variants={"bpcp-e": [0.3, 0.8]},
        cells=[{"architecture": "resnet14", "options": {"stem": 4}}],
        blocks={"weight": 5.0, "recovery_epochs": 1},
        training={"epochs": 2},
    )
    store = Store(tmp_path_factory.mktemp("blocks"))
    runs = in_order(runs_of(plan))
    done = {(run.variant, run.target): perform(run, store, CPU, keep_state=True).model_dump() for run in runs}
    assert {entry["record"]["status"] for entry in done.values()} == {"ok"}
    return done


@pytest.mark.slow
def test_one_block_search_on_the_trained_network_serves_all_budgets(pruned_blocks):
    assert list(pruned_blocks) == [("dense", 0.0), ("block-search", 0.0), ("bpcp-e", 0.3), ("bpcp-e", 0.8)]
    record = pruned_blocks["block-search", 0.0]["record"]
    assert record["details"]["intermediate"] and max(record["details"]["probabilities"]) < 0.5
    assert record["cost"]["macs"] == record["cost"]["dense_macs"]
    assert [row["phase"] for row in pruned_blocks["block-search", 0.0]["curves"]] == ["blocks"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.3, 0.8])
def test_blocks_and_channels_leave_until_the_budget_is_met(pruned_blocks, target):
    entry = pruned_blocks["bpcp-e", target]
    record = entry["record"]
    metrics, details, cost = record["metrics"], record["details"], record["cost"]
    assert 0 <= metrics["test_accuracy"] <= 1
    assert metrics["reduction"] == pytest.approx(target, abs=0.03)
    assert 1 - cost["macs"] / cost["dense_macs"] == pytest.approx(metrics["reduction"])
    assert details["removed_blocks"] and metrics["kept_blocks"] == 1 - len(details["removed_blocks"]) / 6
    assert cost["parameters"] < cost["dense_parameters"]
    assert [row["phase"] for row in entry["curves"]] == ["recovery", "train", "train"]
    assert [row["epoch"] for row in entry["curves"]] == [0, 1, 2]
    assert [row["lr"] for row in entry["curves"]] == pytest.approx([0.001, 0.1, 0.001])
    assert (details["epochs"], details["earlier_epochs"]) == (2, 5)


def test_the_larger_recipe_trains(tmp_path):
    recipe = {
        "schedule": "cosine",
        "nesterov": True,
        "decay": "not_depthwise",
        "label_smoothing": 0.1,
    }
    plan = profile(
        variants={"uniform-b": [0.5]},
        training={"epochs": 1, **recipe},
        budget_epochs=2,
        cells=[{"architecture": "mobilenet_t8", "options": {"stem_stride": 2}}],
    )
    store = Store(tmp_path)
    run = runs_of(plan)[-1]
    entry = perform(run, store, CPU, keep_state=False).model_dump()
    assert entry["record"]["details"]["epochs"] == 2
    rates = [row["lr"] for row in entry["curves"]]
    assert rates == pytest.approx([0.1 * 64 / 256, 0.05 * 64 / 256])


def test_the_contender_spends_the_epochs_of_the_arena():
    arena = Recipe(epochs=4, batch_size=64, learning_rate=0.1, schedule="linear")
    cell, name = Cell(architecture="vgg_t8", data=profile().dataset), "pruning from scratch"
    job = Contend(variant=name, cell=cell, target=0.5, seed=0, method=name, arena=arena, setting=Tuned(({},)))
    contest = Contest(Context(job.run, Compute.choose("cpu", "float32"), ()), arena)
    outcome = contend(contest, search_share=0.25)
    cost = outcome.cost
    assert cost["parameters"] / cost["dense_parameters"] == pytest.approx(0.5, abs=0.02)
    assert [row["phase"] for row in outcome.curves] == ["train"] * 3
    wide = Layout.of("vgg_t8", 10, (1, 8, 8)).expanded(1.25).cost()["macs"]
    assert cost["training_macs"] == 3 * 120 * (wide + 3 * cost["macs"])
