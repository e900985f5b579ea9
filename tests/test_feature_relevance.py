"""Behaviour of the feature-relevance replication beyond the golden vectors."""

import copy
import re

import pytest
import torch

from common import settings as common_settings
from common.arena import Contest
from common.core.compute import Compute
from common.core.data import FixedBatches
from common.core.experiment import listed
from common.core.failures import RunFailed
from common.core.models import build
from common.core.pruning import channels
from common.core.recipe import Recipe
from common.core.run import Cell, Context
from common.core.trainer import Trainer
from common.core.tuning import Tuned
from common.settings import AugmentationSettings, DatasetSettings, ExecutionSettings, Profile, SettingsError
from common.stage.scheduler import in_order
from common.stage.store import Store
from common.stage.worker import perform
from replications.equal_footing.protocol import Contend
from replications.feature_relevance import baselines, method, protocol
from replications.feature_relevance.contender import contend
from replications.feature_relevance.costs import CostTable, even_share, forward_macs
from replications.feature_relevance.method import (
    Goal,
    GradualPruning,
    Pruner,
    until_at_most,
    until_channels,
)
from replications.feature_relevance.relevance import relevances

CLASSES, SHAPE = 3, (1, 8, 8)
DIGITS = DatasetSettings(train=100, test=100, split="shared")
CRITERIA = {
    "relevance": method.Relevance(),
    "taylor": baselines.Taylor(),
    "l1": baselines.L1(),
    "random": baselines.Random(),
}


def _batches(count=3, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, size, *SHAPE, generator=generator, dtype=torch.float64)
    labels = torch.arange(size).remainder(CLASSES).expand(count, size)
    # a mean that tells the classes apart, so that the network learns something
    return FixedBatches([(x + y.view(-1, 1, 1, 1), y) for x, y in zip(images, labels)])


def _network(name="resnet14", **options):
    defaults = {"resnet14": {"stem": 4}, "vgg_mini": {"dropout": 0.0}}.get(name, {})
    return build(name, classes=CLASSES, image_shape=SHAPE, seed=1, **{**defaults, **options}).double()


def _trainer(model, physical, events=(1, 2, 3), taken=6, units=0, minimum=1, nesterov=False, **options):
    pruner = Pruner(copy.deepcopy(model), _batches(seed=9), minimum=minimum)
    hook = GradualPruning(pruner, dict.fromkeys(events, Goal(until_channels(taken), units)), physical)
    trainer = Trainer(
        copy.deepcopy(model), _batches(), hooks=hook, weight_decay=0.01, nesterov=nesterov, **options
    )
    return trainer, hook


def _fit(trainer, epochs=5):
    trainer.fit([0.05] * (epochs * len(trainer.batches)))


def _logits(trainer, training):
    images, _ = next(iter(_batches(seed=5).epoch(0)))
    trainer.model.train(training)
    return trainer.logits(images)


# ----------------------------------------------------------------------------------- narrowing while training


@pytest.mark.slow
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet14", {}), ("resnet164", {"blocks": [1, 2, 1], "stem": 4}), ("vgg_mini", {})],
)
def test_narrowed_training_equals_masked_training(name, options, nesterov):
    model = _network(name, **options)
    (narrow, physical), (wide, masked) = (
        _trainer(model, p, units=2, nesterov=nesterov) for p in (True, False)
    )
    _fit(narrow), _fit(wide)
    assert physical.pruner.removed == masked.pruner.removed
    assert sum(p.numel() for p in narrow.model.parameters()) < sum(p.numel() for p in wide.model.parameters())
    for training in (True, False):
        assert torch.allclose(_logits(narrow, training), _logits(wide, training), atol=1e-9, rtol=0)


def test_twin_is_the_masked_network_with_the_norms_of_removed_channels():
    model = _network()
    (narrow, physical), (wide, masked) = (_trainer(model, p, events=(2,)) for p in (True, False))
    _fit(narrow), _fit(wide)
    twin = physical.removal.masked(narrow, physical.pruner.kept).state_dict()
    expected = wide.model.state_dict() | masked.weights(wide)
    before = model.state_dict()
    assert any(not torch.equal(before[name], expected[name]) for name in before if "running_mean" in name)
    for name, value in expected.items():
        assert torch.allclose(twin[name].double(), value.double(), atol=1e-12, rtol=1e-9), name


def test_weights_of_masked_channels_do_not_come_back():
    trainer, hook = _trainer(_network(), physical=False)
    _fit(trainer)
    masks = channels.masks(trainer.model, hook.pruner.kept, norms=False)
    for name, weight in hook.weights(trainer).items():
        assert not weight[~masks[name]].any()


def test_pruned_branches_leave_a_working_network():
    trainer, hook = _trainer(_network(), physical=True, events=(1, 2), taken=52, minimum=0)
    _fit(trainer, 4)
    assert 0 in hook.pruner.left.values()
    assert _logits(trainer, training=False).isfinite().all()


class _Memory:
    """Checkpoints in memory; the run is interrupted after `stop` epochs."""

    def __init__(self, stop=None):
        self.stop, self.saved, self.count = stop, None, 0

    def load(self, fit):
        return copy.deepcopy(self.saved)

    def offer(self, fit, state, finished):
        self.count += 1
        if self.count == self.stop:
            self.saved = copy.deepcopy(state())
            raise KeyboardInterrupt


@pytest.mark.parametrize("physical", [True, False])
def test_interrupted_pruning_goes_on_as_if_nothing_had_happened(physical):
    model = _network()
    whole, hook = _trainer(model, physical)
    _fit(whole)
    memory = _Memory(stop=2)
    with pytest.raises(KeyboardInterrupt):
        _fit(_trainer(model, physical, checkpoints=memory)[0])
    memory.stop = None
    resumed, other = _trainer(model, physical, checkpoints=memory)
    _fit(resumed)
    assert other.pruner.removed == hook.pruner.removed and other.log == hook.log
    assert torch.equal(_logits(whole, training=False), _logits(resumed, training=False))


# --------------------------------------------------------------------------------------- scores and selection


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scoring_changes_nothing(criterion):
    model = _network()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    pruner = Pruner(model, _batches(), CRITERIA[criterion])
    pruner.criterion.scores(model, pruner.layers, pruner.batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_scores_do_not_depend_on_how_images_are_batched():
    model = _network()
    [(images, labels)] = _batches(count=1, size=30).epoch(0)
    layers = [group.name for group in method.prunable_layers(model)[0]]
    whole = method.Relevance().scores(model, layers, FixedBatches([(images, labels)])).scores
    parts = list(zip(images.split(7), labels.split(7)))
    for name, scores in method.Relevance().scores(model, layers, FixedBatches(parts)).scores.items():
        assert torch.allclose(scores, whole[name], rtol=1e-9, atol=1e-12)


def test_taylor_is_activation_times_gradient():
    model = _network().eval()
    [(images, labels)] = _batches(count=1).epoch(0)
    outputs = {}
    for name in (names := ["layer1.0.conv1", "layer3.1.conv2"]):

        def keep(_module, _inputs, output, name=name):
            output.retain_grad()
            outputs[name] = output

        model.get_submodule(name).register_forward_hook(keep)
    torch.nn.functional.cross_entropy(model(images), labels, reduction="sum").backward()
    expected = {n: (o * o.grad).sum((0, 2, 3)).abs().detach() for n, o in outputs.items()}
    found = baselines.Taylor().scores(model, names, FixedBatches([(images, labels)])).scores
    for name, values in expected.items():
        assert torch.allclose(found[name], values / values.norm(), rtol=1e-6)


def test_alpha_of_one_leaves_positive_relevance_only():
    model = _network("vgg_mini").eval()
    [(images, labels)] = _batches(count=1).epoch(0)
    _, found = relevances(model, images, labels, alpha=1.0)
    assert all((values >= 0).all() for values in found.values())


def test_branch_share_scores_less_than_the_sum_only_at_the_end_of_blocks():
    model = _network().eval()
    [(images, labels)] = _batches(count=1).epoch(0)
    (_, of_sum), (_, of_branch) = (
        relevances(model, images, labels, branch_share=share) for share in (False, True)
    )
    different = {name for name in of_sum if not torch.allclose(of_sum[name], of_branch[name])}
    assert different == {f"{name}.conv2" for name, _ in model.blocks()}


def test_pool_gives_nothing_to_rows_and_columns_that_it_leaves_out():
    model = build("vgg_mini", classes=CLASSES, image_shape=(1, 9, 9), seed=1, dropout=0.0).double().eval()
    _, found = relevances(model, torch.rand(2, 1, 9, 9).double(), torch.tensor([0, 1]))
    assert all(values.isfinite().all() for values in found.values())


def test_shares_are_the_same_in_every_layer():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(width, generator=generator) for width in (8, 16, 32)]
    removed = [[], [3, 5], []]
    chosen = method.select(baselines.same_share(scores, removed), removed, until_channels(26))
    taken = [sum(layer == i for layer, _ in chosen) + len(gone) for i, gone in enumerate(removed)]
    assert taken == [4, 8, 16]
    for layer, values in enumerate(scores):
        order = [channel for i, channel in chosen if i == layer]
        assert order == sorted(order, key=lambda channel: values[channel].item())


def test_minimum_keeps_channels():
    scores = [torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.9, 0.8])]
    chosen = method.select(scores, [[], []], until_channels(99), minimum=1)
    assert chosen == [(0, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize("criterion", ["relevance", "random", "l1"])
def test_equal_macs_are_met_to_within_one_channel(criterion):
    model = _network()
    table = CostTable(model, SHAPE)
    pruner = Pruner(model, _batches(), CRITERIA[criterion])
    most = table.macs(table.even(pruner.layers, 0.5))
    pruner.event(model, Goal(until_at_most(table.macs, most)))
    assert table.macs(pruner.left) <= most
    largest = max(table.macs() - table.macs({name: width - 1}) for name, width in pruner.widths.items())
    assert table.macs(pruner.left) > most - largest


def test_an_event_with_several_bounds_goes_on_until_all_are_met():
    enough = method.until_all([until_channels(2), until_at_most(lambda left: sum(left.values()), 5)])
    found = [enough(taken, {"a": left}) for taken, left in ((1, 5), (2, 6), (2, 5), (3, 4))]
    assert found == [False, False, True, True]


def test_even_share_is_the_smallest_that_is_enough():
    table = CostTable(_network(), SHAPE)
    layers = [group.name for group in method.prunable_layers(_network())[0]]

    def spent(share):
        return table.parameters(table.even(layers, share))

    most = table.parameters() / 2
    share = even_share(spent, most)
    assert spent(share) <= most < spent(share - 1e-9)
    assert even_share(spent, 0) == 1


def test_augmented_scoring_sees_all_images_and_others_at_each_event():
    data = _context(None).dataset(
        DIGITS.model_copy(update={"augmentation": AugmentationSettings(crop_padding=1)})
    )
    batches = method.augmented_batches(data, seed=3)
    first, again, second = (torch.cat([x for x, _ in batches.epoch(event)]) for event in (0, 0, 1))
    assert len(first) == 100 and torch.equal(first, again) and not torch.equal(first, second)
    model = build("resnet8", classes=10, image_shape=SHAPE, seed=1, stem=4)
    layers = [group.name for group in method.prunable_layers(model)[0]]
    scored = [
        method.Relevance(class_scale=False).scores(model, layers, batches, event) for event in (0, 0, 1)
    ]
    of_first, of_again, of_second = (torch.cat(list(s.scores.values())) for s in scored)
    assert torch.equal(of_first, of_again) and not torch.equal(of_first, of_second)


def test_cost_table_counts_what_is_physically_left():
    model = _network("vgg_mini")
    table = CostTable(model, SHAPE)
    pruner = Pruner(copy.deepcopy(model), _batches(), CRITERIA["l1"], minimum=1)
    pruner.event(model, Goal(until_channels(30), units=5))
    channels.remove(model, pruner.kept)
    narrow = CostTable(model, SHAPE)
    assert table.parameters(pruner.left) == pytest.approx(sum(p.numel() for p in model.parameters()))
    assert table.macs(pruner.left) == pytest.approx(narrow.macs())
    assert table.weights(pruner.left) == pytest.approx(narrow.weights())


def test_forward_macs_follow_the_events():
    table = CostTable(_network(), SHAPE)
    left = {name: 1 for name in table.widths}
    macs = forward_macs([{"epoch": 2, "left": left}], table, 4)
    assert macs == [table.macs()] * 2 + [table.macs(left)] * 2


def test_classes_that_are_never_right_stop_the_run():
    with pytest.raises(RunFailed, match="no class"):
        method.class_scale(torch.zeros(3))


def test_scores_that_are_no_numbers_stop_the_run():
    sums = torch.tensor([[1.0, float("inf")]])
    with pytest.raises(RunFailed, match="not finite"):
        method.channel_scores(sums, torch.tensor([2]), torch.tensor([0.8]))


def test_networks_without_a_rule_are_named():
    model = build("mobilenet_t8", classes=CLASSES, image_shape=SHAPE)
    with pytest.raises(SettingsError, match="MobileNetV1"):
        relevances(model.eval(), torch.rand(2, *SHAPE), torch.tensor([0, 1]))


# ------------------------------------------------------------------------------------------ protocol


def _profile(**paper):
    base = {
        "seeds": [0],
        "training": {"epochs": 4},
        "augmentation": {"crop_padding": 1},
        "every": 1,
        "last": 3,
        "cells": [{"architecture": "resnet8", "options": {"stem": 4}}],
        "targets": [0.4],
        "variants": {"frs": "all", "frs-once": "all", "frs-end": "all"},
    }
    settings = common_settings.validated(protocol.Settings, base | paper, "paper")
    return Profile(name="test", dataset=DIGITS, execution=ExecutionSettings(device="cpu"), paper=settings)


def _plain(**settings):
    """A cell with a plain network."""
    return {"architecture": "vgg_mini", "options": {"dropout": 0.0}, "settings": settings}


def _listed(**paper):
    return listed("feature_relevance", protocol.Experiment, _profile(**paper))


def _records(folder, **paper):
    store, execution = Store(folder), ExecutionSettings(device="cpu")
    runs = in_order(_listed(**paper))
    needed = {need.settings_hash for run in runs for need in run.needs}
    entries = [perform(run, store, execution, run.settings_hash in needed).model_dump() for run in runs]
    return {(e["record"]["architecture"], e["record"]["variant"]): e for e in entries}


@pytest.mark.slow
def test_runs_part_from_the_dense_one_at_their_first_event(tmp_path):
    entries = _records(tmp_path)
    assert all(entry["record"]["status"] == "ok" for entry in entries.values())
    dense = entries["resnet8", "dense"]["curves"]
    for variant, epochs in (("frs", 1), ("frs-once", 3), ("frs-end", 4)):
        curves = entries["resnet8", variant]["curves"]
        assert len(curves) == 4 and curves[:epochs] == dense[:epochs]
        assert [row["lr"] for row in curves] == [row["lr"] for row in dense]
        metrics = entries["resnet8", variant]["record"]["metrics"]
        # 56 channels, three events of round(0.4 * 56 / 3) = 7
        assert metrics["channels_removed"] == 21 / 56
        assert (metrics["training_cost"] == 1) == (variant == "frs-end")
    assert entries["resnet8", "frs"]["curves"][1:] != dense[1:]
    # one event at the full width's cost of training
    assert entries["resnet8", "frs-end"]["record"]["metrics"]["total_cost"] == 1 + 20 * 5 / (4 * 100 * 3)
    # three events, 20 of 100 images, five forward passes each; four epochs of 100 images at three passes
    assert entries["resnet8", "frs"]["record"]["metrics"]["scoring_cost"] == 3 * 20 * 5 / (4 * 100 * 3)


@pytest.mark.slow
def test_removed_and_masked_runs_leave_the_same_record(tmp_path):
    # two channels stay in each layer: with a dead branch, scores of what is left of it may differ
    found = []
    for removal in ("physical", "masked"):
        entries = _records(tmp_path, variants={"frs": [0.4]}, min_channels_per_layer=2, removal=removal)
        found.append(entries["resnet8", "frs"]["record"])
    assert found[0]["cost"] == found[1]["cost"]
    assert found[0]["metrics"]["test_accuracy"] == found[1]["metrics"]["test_accuracy"]
    assert found[0]["metrics"]["test_loss"] == pytest.approx(found[1]["metrics"]["test_loss"], rel=1e-4)


def test_the_budget_of_costs_meets_both_and_stops_there(tmp_path):
    methods = {
        "few-parameters": {"budget": "cost", "compression": 3.0},
        "few-macs": {"budget": "cost", "compression": 1.05},
    }
    variants = {"frs-headline": [0.56], "few-parameters": [0.1], "few-macs": [0.5]}
    entries = _records(tmp_path, methods=methods, variants=variants)
    found = {variant: entry["record"] for (_, variant), entry in entries.items() if variant in variants}
    reached = {name: (r["cost"]["compression"], r["metrics"]["macs_reduction"]) for name, r in found.items()}
    assert reached["frs-headline"][0] >= 2.4 and reached["frs-headline"][1] >= 0.56
    # the bound that takes more is met to within one channel, of 56; the other is passed
    assert 3.0 <= reached["few-parameters"][0] < 3.4 and reached["few-parameters"][1] > 0.3
    assert 0.5 <= reached["few-macs"][1] < 0.54 and reached["few-macs"][0] > 1.5


def test_what_the_authors_code_has_otherwise_is_part_of_a_run():
    names = {"frs-headline": [0.56], "headline-masked": [0.56], "headline-augmented": [0.56]}
    runs = {run.variant: run.settings for run in _listed(variants=names) if run.variant in names}
    assert {name: s["removal"] for name, s in runs.items()} == {
        "frs-headline": "physical",
        "headline-masked": "masked",
        "headline-augmented": "physical",
    }
    plain, augmented = (runs[name]["method"] for name in ("frs-headline", "headline-augmented"))
    assert plain | {"images": "augmented"} == augmented != plain


def test_the_cost_of_scoring_counts_all_augmented_images(tmp_path):
    entries = _records(tmp_path, variants={"headline-augmented": [0.3]})
    # three events over all 100 images
    cost = entries["resnet8", "headline-augmented"]["record"]["metrics"]["scoring_cost"]
    assert cost == 3 * 100 * 5 / (4 * 100 * 3)


def test_the_long_dense_network_has_more_epochs_and_is_run_where_wanted():
    assert [run.variant for run in _listed(variants={})] == ["dense"]
    dense, longer = _listed(variants={}, long_factor=3)
    assert (longer.variant, longer.target) == ("dense-long", 0)
    assert [run.settings["training"]["epochs"] for run in (dense, longer)] == [4, 12]


def test_plain_networks_lose_hidden_units_at_equal_macs(tmp_path):
    variants = {"frs-macs": [0.5], "l1-macs": [0.5]}
    entries = _records(tmp_path, cells=[_plain(units_per_event=2)], variants=variants)
    reductions = []
    for variant in ("frs-macs", "l1-macs"):
        record = entries["vgg_mini", variant]["record"]
        assert record["details"]["events"][-1]["left"]["classifier.0"] == 32 - 3 * 2
        reductions.append(record["metrics"]["macs_reduction"])
    assert reductions[0] == pytest.approx(reductions[1], abs=0.02)


@pytest.mark.parametrize(
    ("paper", "message"),
    [
        ({"cells": [{"architecture": "resnet9"}]}, "resnet9"),
        ({"variants": {"fsr": [0.4]}}, "did you mean 'frs'"),
        ({"variants": {"frs": [1.2]}}, "less than 1"),
        ({"variants": {"frs": [0.0]}}, "above 0"),
        ({"last": 5}, "last 5"),
        ({"methods": {"dense": {}}}, "not pruned"),
        ({"methods": {"dense-long": {}}}, "not pruned"),
        ({"long_factor": 1}, "long_factor"),
    ],
)
def test_settings_that_cannot_be_are_named(paper, message):
    with pytest.raises(SettingsError, match=message):
        _profile(**paper)


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("resnet8", {"variants": {"frs": [0.001]}}, "takes 0 channels"),
        ("resnet8", {"variants": {"frs": [0.99]}, "min_channels_per_layer": 8}, "can go in all"),
        ("resnet8", {"units_per_event": 1}, "no hidden linear layer"),
        ("vgg_mini", {"variants": {"frs": [0.4]}, "units_per_event": 11}, "none of 32 units"),
        ("vgg_mini", {"min_channels_per_layer": 0}, "must be 1 or more"),
        ("vgg_mini", {"variants": {"frs-macs": [0.9]}, "min_channels_per_layer": 8}, "narrowest network"),
        (
            "vgg_mini",
            {"variants": {"frs-headline": [0.1]}, "min_channels_per_layer": 16},
            "allows .* parameters; the narrowest network",
        ),
        ("vgg16", {}, "too small"),
        ("mobilenet_v1", {}, "plain and residual"),
        ("mlp", {}, "plain and residual"),
        (
            "vgg_mini",
            {"protected": ["features.0", "features.1"]},
            r"\(vgg_mini\): protected = 'features.1': allowed: features.0, features.3, .*classifier.0",
        ),
        (
            "resnet8",
            {"protected": ["layer1.0.conv3"]},
            r"\(resnet8\): protected = 'layer1.0.conv3': allowed: layer1.0.conv1.*did you mean 'layer1.0.conv\d'",
        ),
        (
            "vgg_mini",
            {"protected": ["classifier.0"], "units_per_event": 1},
            "every hidden linear layer: units_per_event must be 0, not 1",
        ),
        ("convnet", {"protected": ["features.0"]}, "every convolution"),
        ("resnet8", {"training": {"epochs": 3}}, r"milestones\[1\] = 0.75: must fall on a whole iteration"),
    ],
)
def test_plans_that_cannot_be_are_named_before_training(architecture, settings, message):
    options = {"convnet": {"cfg": [4]}}.get(architecture, {})
    cell = {
        "architecture": architecture,
        "options": options,
        "settings": {"variants": {"frs": [0.4]}, **settings},
    }
    with pytest.raises(SettingsError, match=r"feature_relevance.cells\[0\]") as error:
        _listed(cells=[cell], variants={})
    assert re.search(message, str(error.value))


def test_an_unknown_option_of_a_network_is_named():
    with pytest.raises(SettingsError, match="did you mean 'stem'"):
        _listed(cells=[{"architecture": "resnet14", "options": {"stern": 8}}])


def test_training_images_are_augmented_as_the_paper_says_or_else_as_the_data_set():
    data = {"source": "digits", "train": 100, "augmentation": {"flip": True}}
    cell = {"architecture": "resnet8", "data": data}
    for augmentation, wanted in (({"crop_padding": 1}, (1, False)), (None, (0, True))):
        for run in _listed(cells=[cell], augmentation=augmentation):
            found = run.settings["data"]["augmentation"]
            assert (found["crop_padding"], found["flip"]) == wanted


def test_a_method_of_ones_own_may_be_a_variant(tmp_path):
    own = {"criterion": "random", "allocation": "per_layer"}
    entries = _records(tmp_path, methods={"own": own}, variants={"own": "all"})
    left = entries["resnet8", "own"]["record"]["details"]["events"][-1]["left"]
    # 21 of 56 channels, in layers of 16, 8 and 4, to within one channel
    assert list(left.values()) == pytest.approx([10, 10, 5, 5, 2.5, 2.5], abs=1)


def test_protected_layers_are_part_of_a_run_and_lose_nothing(tmp_path):
    cells = [
        _plain(),
        _plain(protected=["features.3", "features.0"]),
        _plain(protected=["features.7", "features.0"]),
    ]
    dense, first = _listed(cells=cells[:1], variants={"frs": [0.3]})
    assert first.settings["protected"] == ["features.0", "features.3"]
    assert "protected" not in dense.settings
    found = [_listed(cells=[cell], variants={"frs": [0.3]})[-1].settings_hash for cell in cells]
    assert found[0] == found[1] != found[2]
    record = _records(tmp_path, cells=cells[2:], variants={"frs": [0.3]})["vgg_mini", "frs"]["record"]
    left = record["details"]["events"][-1]["left"]
    assert "features.3" in left and not {"features.0", "features.7"} & set(left)


def test_without_a_setting_the_paper_protects_two_convolutions_of_a_plain_network():
    plain, residual = (
        build(name, classes=10, image_shape=(1, 8, 8), device="meta") for name in ("vgg_mini", "resnet8")
    )
    layers, units = method.prunable_layers(plain)
    convolutions = [name for name, m in plain.named_modules() if isinstance(m, torch.nn.Conv2d)]
    assert [group.name for group in layers] == convolutions[:1:-1]
    assert [group.name for group in units] == ["classifier.0"]
    assert method.protected_layers(residual) == []
    assert len(method.prunable_layers(residual)[0]) == 6


def _context(run):
    return Context(run, Compute.choose("cpu"), ())


def test_scoring_images_are_balanced_and_fixed():
    data = _context(None).dataset(DIGITS)
    first, second = (method.scoring_batches(data, 0.3) for _ in range(2))
    assert torch.bincount(first.labels).tolist() == [3] * 10
    assert torch.equal(first.images, second.images)
    with pytest.raises(RunFailed, match="scoring_share"):
        method.scoring_batches(data, 0.01)


@pytest.mark.parametrize("architecture", ["vgg_t8", "resnet8"])
def test_contender_ends_with_few_enough_parameters(architecture):
    arena = Recipe(epochs=4, batch_size=64, learning_rate=0.1, schedule="linear")
    cell, name = Cell(architecture=architecture, data=DIGITS), "feature relevance"
    job = Contend(
        variant=name, cell=cell, target=0.75, seed=0, method=name, arena=arena, setting=Tuned(({},))
    )
    contest = Contest(_context(job.run), arena)
    outcome = contend(contest, last=0.75)
    assert outcome.cost["parameters"] <= 0.25 * contest.parameters
    assert outcome.cost["parameters"] > 0.2 * contest.parameters
    assert outcome.cost["training_macs"] < 3 * 4 * 100 * outcome.cost["dense_macs"]
