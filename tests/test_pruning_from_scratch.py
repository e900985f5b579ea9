"""Pruning from scratch beyond its golden vectors: gates, structures, planned runs and what a run leaves."""

import copy
import math

import pytest
import torch
from torch import nn

from common import datasets
from common.arena import Arena, Contest
from common.runs import Context, Store, in_order, perform
from common.settings import DatasetSettings, ExecutionSettings, Profile, SettingsError, validated
from common.training import Compute, Trainer
from replications.pruning_from_scratch import method, protocol
from replications.pruning_from_scratch.structure import (
    Layout,
    Ranking,
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
    data = datasets.load(DATA)
    batches = datasets.Batches(data, "train", 40, seed=0, shuffle=True)
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
    model = layout.build(seed=3).train(training)
    gates = method.Gates(model, layout.gated, 0.5, 0.5)
    gates.values.data.uniform_(generator=torch.Generator().manual_seed(0))
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.bias.data.normal_(generator=torch.Generator().manual_seed(norm.num_features))
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    folded = torch.func.functional_call(model, gates.weights(None), (x,))
    for norm, gate in zip(layout.gated, gates.layers(), strict=True):
        model.get_submodule(norm).register_forward_hook(
            lambda module, inputs, output, gate=gate: output * gate[:, None, None]
        )
    torch.testing.assert_close(folded, model(x), rtol=1e-4, atol=1e-5)


def test_the_penalty_draws_the_mean_to_its_level_from_both_sides():
    for start in (0.1, 0.9):
        values = nn.Parameter(torch.full((8,), start))
        optimizer = torch.optim.Adam([values], lr=0.02)
        for _ in range(200):
            optimizer.zero_grad()
            method.regulariser(values, 0.5, 0.4).backward()
            optimizer.step()
        assert values.mean().item() == pytest.approx(0.4, abs=0.02)


def test_interrupted_gate_learning_ends_as_an_unbroken_one():
    class Memory:
        def __init__(self):
            self.kept = None

        def load(self, fit):
            return self.kept

        def offer(self, fit, state, finished):
            self.kept = self.kept or copy.deepcopy(state())

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


def test_decay_can_spare_norms_biases_and_depthwise_convolutions():
    model = digits_layout("mobilenet_t8").build()
    decays = protocol.weights_only(model)
    spared = {name for name, parameter in model.named_parameters() if not decays(name, parameter)}
    assert {"bn1.weight", "linear.bias", "blocks.0.conv1.weight"} <= spared
    assert not {"conv1.weight", "linear.weight", "blocks.0.conv2.weight"} & spared


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"variants": {"pfs-e": [1.2]}}, ["pfs-e", "1.2", "less than 1"]),
        ({"variants": {"pfs-e": [0.0]}}, ["pfs-e", "between 0 and 1"]),
        ({"variants": {"pfs": [0.5]}}, ["pfs", "pfs-e"]),
        ({"search": {"min_channels": 0}}, ["min_channels", "0", "greater than or equal to 1"]),
        ({"search": {"returned": "first"}}, ["returned", "'best' or 'last'"]),
        ({"expansion": 0.5}, ["expansion", "0.5"]),
        ({"gates": {"level": 1.5}}, ["level", "1.5"]),
        ({"training": {"epoch": 3}}, ["epoch", "did you mean 'epochs'"]),
        ({"architectures": [{"name": "resnet8"}, {"name": "resnet8"}]}, ["architectures", "repeat"]),
    ],
)
def test_impossible_settings_are_named(values, named):
    with pytest.raises(SettingsError) as error:
        validated(protocol.Settings, values, "params.yaml")
    assert all(word in str(error.value) for word in named)


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
        ("uniform-e", 0.999, {"budget": "parameters"}),
    ],
)
def test_a_budget_that_no_structure_meets_is_an_error_before_training(variant, target, options):
    with pytest.raises(SettingsError, match=f"variants.{variant}: a reduction of {target}") as error:
        protocol.runs(profile(variants={variant: [target]}, search=options))
    base = digits_layout()
    layout = base if variant == "uniform-e" else base.expanded(1.25)
    unit = options.get("budget", "macs")
    floor = largest_reduction(
        layout.widths, layout.spends(unit), base.cost()[unit], options.get("min_channels", 1)
    )
    assert f"saves {floor:.4f} of the {unit}" in str(error.value)
    protocol.runs(profile(variants={variant: [floor]}, search=options))


def test_gates_are_shared_between_budgets_unless_their_level_follows_the_budget():
    variants = {"pfs-e": [0.5, 0.8], "pfs-b": [0.5], "trained-gates-e": [0.5]}
    for level, count in ((0.5, 1), ("budget", 2)):
        planned = in_order(protocol.runs(profile(variants=variants, gates={"level": level})))
        gates = [run for run in planned if run.variant == "gates-on-random-weights"]
        assert len(gates) == count
        assert [run.variant for run in planned].count("expanded") == 1
    assert [(run.target, run.settings["gates"]["level"]) for run in gates] == [
        (0.5, 0.5),
        (0.8, pytest.approx(0.2)),
    ]


# ---------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The records of every kind of variant, each run for an epoch or two, by variant and target."""
    everything = ("pfs", "trained-gates", "random-gates", "constant-gates", "uniform")
    variants = {f"{source}-e": [0.6] for source in everything} | {"pfs-b": [0.6], "uniform-b": [0.6]}
    store = Store(tmp_path_factory.mktemp("runs"), protocol.PAPER)
    done = {}
    for run in in_order(protocol.runs(profile(variants=variants))):
        entry = perform(run, store, CPU, keep_state=True)
        assert entry["record"]["status"] == "ok", entry["record"]
        done[run.variant, run.target] = entry["record"]
    return done


def test_every_variant_meets_its_budget(records):
    for (variant, target), record in records.items():
        assert 0 <= record["metrics"]["test_accuracy"] <= 1
        if target:
            cost = record["cost"]
            assert 1 - cost["macs"] / cost["dense_macs"] == pytest.approx(record["metrics"]["reduction"])
            # constant gates empty whole layers, so their structures are the coarsest
            assert record["metrics"]["reduction"] == pytest.approx(target, abs=0.05), variant
            assert min(record["details"]["widths"]) >= 1


def test_equal_epochs_or_equal_macs(records):
    dense = records["dense", 0.0]["details"]["epochs"]
    assert dense == records["pfs-e", 0.6]["details"]["epochs"] == 1
    assert records["pfs-b", 0.6]["details"]["epochs"] == math.floor(dense / 0.4)
    assert records["pfs-b", 0.6]["details"]["widths"] == records["pfs-e", 0.6]["details"]["widths"]


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


def test_the_larger_recipe_trains(tmp_path):
    recipe = {
        "schedule": "cosine",
        "nesterov": True,
        "decay": "weights",
        "label_smoothing": 0.1,
        "budget_epochs": 2,
    }
    plan = profile(
        variants={"uniform-b": [0.5]},
        training={"epochs": 1, **recipe},
        architectures=[{"name": "mobilenet_t8", "options": {"stem_stride": 2}}],
    )
    store = Store(tmp_path, protocol.PAPER)
    run = protocol.runs(plan)[-1]
    entry = perform(run, store, CPU, keep_state=False)
    assert entry["record"]["details"]["epochs"] == 2
    rates = [row["lr"] for row in entry["curves"]]
    assert rates == pytest.approx([0.1 * 64 / 256, 0.05 * 64 / 256])


def test_the_contender_spends_the_epochs_of_the_arena():
    run = protocol.runs(profile())[0]
    run = type(run)(run.paper, "pruning from scratch", run.dataset, "vgg_t8", 0.5, 0, run.settings)
    context = Context(run, Compute.choose("cpu", "float32"), ())
    outcome = protocol.contend(Contest(run, context, Arena(epochs=4)))
    cost = outcome.cost
    assert cost["parameters"] / cost["dense_parameters"] == pytest.approx(0.5, abs=0.02)
    assert [row["phase"] for row in outcome.curves] == ["train"] * 3
    wide = Layout.of("vgg_t8", 10, (1, 8, 8)).expanded(1.25).cost()["macs"]
    assert cost["training_macs"] == 3 * 120 * (wide + 3 * cost["macs"])
