"""The IMP paper's method and protocol beyond the golden vectors."""

import copy

import pytest
import torch
from torch import nn

from common.core.data import FixedBatches
from common.core.failures import RunFailed
from common.core.models import build
from common.core.pruning.masks import KeepMasked, Masks
from common.core.trainer import Hooks, Trainer
from common.reading import read_yaml
from common.settings import (
    ROOT,
    DatasetSettings,
    ExecutionSettings,
    Profile,
    SettingsError,
    validated,
)
from common.stage import papers
from common.stage.scheduler import in_order
from common.stage.store import Store
from common.stage.worker import perform
from common.statistics.claims import read
from replications.imp_slr import baselines, measures, method, protocol

HISTORY = method.History([0.1] * 20 + [0.01] * 20)


def network(norm=False):
    torch.manual_seed(0)
    extra = [nn.BatchNorm1d(12)] if norm else []
    return nn.Sequential(nn.Linear(6, 12), *extra, nn.ReLU(), nn.Linear(12, 4))


def batches(count=4):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 16, 6, generator=generator)
    return FixedBatches([(x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()) for x in images])


def trainer_of(model, *hooks, **options):
    return Trainer(model, batches(), nesterov=True, weight_decay=1e-3, hooks=hooks, **options)


# ------------------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize("kind", method.SCHEDULES + method.TUNABLES)
@pytest.mark.parametrize("length", [0, 1, 7, 40])
def test_every_schedule_has_one_rate_per_iteration_and_stays_in_bounds(kind, length):
    rates = method.retraining_rates(kind, HISTORY, length, start=0.1)
    assert len(rates) == length
    assert all(0 <= rate <= 0.1 + 1e-12 for rate in rates)


@pytest.mark.parametrize("kind", ["SLR", "CLR", "LLR", "ALLR", "stepped"])
def test_restarts_warm_up_from_zero_and_then_stand_at_the_start_value(kind):
    rates = method.retraining_rates(kind, HISTORY, 40, start=0.05)
    assert rates[0] == 0
    assert rates[4] == pytest.approx(0.05)
    assert rates[-1] < 0.02


def test_the_warmup_of_dense_training_is_left_out_of_retraining():
    history = method.History([0.0, 0.05] + [0.1] * 6 + [0.01] * 2, warmup=2)
    assert history.eta_min == 0.01
    assert set(method.retraining_rates("SLR", history, 9)) == {0.1, 0.01}


def test_rewinding_beyond_the_start_of_training_is_an_error():
    with pytest.raises(RunFailed, match="LRW cannot rewind 41 iterations: dense training had 40"):
        method.retraining_rates("LRW", HISTORY, 41)


def test_unknown_kinds_and_missing_start_values_are_named():
    with pytest.raises(ValueError, match="unknown retraining schedule 'XLR'; allowed: FT, LRW"):
        method.retraining_rates("XLR", HISTORY, 10)
    for kind in ("ALLR", "constant"):
        with pytest.raises(ValueError, match=f"{kind} needs a start value"):
            method.retraining_rates(kind, HISTORY, 10)


def test_the_adaptive_start_lies_between_its_floor_and_the_highest_rate():
    starts = [method.adaptive_start(0.1, drop, 0.5, 3, 30) for drop in (0.0, 0.3, 0.6, 5.0)]
    assert starts[0] == pytest.approx(0.01) and starts[-1] == 0.1
    assert starts == sorted(starts)


def test_cycles_meet_the_goal_and_share_the_epochs():
    assert method.cumulative_sparsities(0.98, 5)[-1] == pytest.approx(0.98)
    assert method.cycles_needed(0.36) == 2
    assert method.cycle_epochs(3, split=10) == [3, 3, 4]
    for options in ({}, {"each": 2, "split": 6}):
        with pytest.raises(ValueError):
            method.cycle_epochs(3, **options)


def test_most_of_a_gain_is_counted_from_right_after_the_pruning():
    assert measures.accuracy_at_gain(0.4, 0.9, 0.9) == pytest.approx(0.85)
    assert measures.accuracy_at_gain(0.9, 0.8, 0.9) == pytest.approx(0.81)  # nine tenths of a loss


@pytest.mark.parametrize(
    ("epochs", "warmup", "drops"), [(40, 4, (22, 31)), (72, 7, (39, 55)), (152, 15, (83, 117))]
)
def test_slr_of_le_and_hua_drops_when_their_scripts_do(epochs, warmup, drops):
    """Their budgets of retraining, after a dense training whose rates are .1, .01 and .001."""
    history = method.History([0.1] * 160 + [0.01] * 80 + [0.001] * 80)
    rates = method.retraining_rates("SLR-Le-Hua", history, 2 * epochs, per_epoch=2)
    assert rates[::2] == rates[1::2]  # one rate an epoch
    by_epoch = rates[::2]
    assert by_epoch[0] == pytest.approx(0.001) and by_epoch[:warmup] == sorted(by_epoch[:warmup])
    assert by_epoch[warmup - 1] < by_epoch[warmup] == 0.1
    assert tuple(e for e in range(warmup, epochs) if by_epoch[e] < by_epoch[e - 1]) == drops
    assert by_epoch[-1] == pytest.approx(0.001)


# ------------------------------------------------------------------------------------------ prune and retrain


def retraining(**options):
    return method.Retraining(options.pop("schedule", "SLR"), HISTORY, 10, **options)


def pruned_network(sparsity=0.75, epochs=(2, 2), model=None, **options):
    model = model or network()
    masks = Masks.dense(model)
    trainer = trainer_of(model, KeepMasked(masks))
    cycles = method.prune_and_retrain(trainer, masks, sparsity, epochs, retraining(**options))
    return trainer, masks, cycles


@pytest.mark.parametrize("epochs", [(4,), (2, 2), (0, 0, 3)])
def test_imp_ends_at_the_asked_sparsity_with_zeros_in_the_weights(epochs):
    trainer, masks, cycles = pruned_network(epochs=epochs)
    assert masks.sparsity == pytest.approx(0.75, abs=0.02)
    assert all(torch.equal(w != 0, masks.kept[name]) for name, w in masks.weights(trainer.model).items())
    assert [len(cycle.rates) for cycle in cycles] == [4 * count for count in epochs]
    assert [row["phase"] for row in trainer.history[-1:]] == [f"retrain {len(epochs)}"]


def test_recalibration_changes_statistics_and_no_weight():
    model = network(norm=True)
    trainer = trainer_of(model)
    before = copy.deepcopy(model.state_dict())
    method.recalibrate(trainer)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_momentum_is_kept_across_prunings_unless_it_is_reset():
    class Watch(Hooks):
        def __init__(self):
            self.seen = []

        def epoch_started(self, trainer, epoch):
            self.seen.append(trainer.momentum_buffer(trainer.model[0].bias) is not None)

    for reset, expected in ((False, [False, True]), (True, [False, False])):
        model, watch = network(), Watch()
        masks = Masks.dense(model)
        trainer = trainer_of(model, KeepMasked(masks), watch)
        method.prune_and_retrain(trainer, masks, 0.5, [1, 1], retraining(reset_momentum=reset))
        assert watch.seen == expected


def test_the_older_adaptive_start_uses_its_formula_in_the_last_cycle_only():
    starts = [c.start for c in pruned_network(0.3, (2, 2, 2), schedule="ALLR", adaptive_from=2)[2]]
    assert starts[:2] == [0.1, 0.1] and starts[2] < 0.1


@pytest.mark.parametrize("kind", ["LC", "LCT", "LCN"])
def test_other_adaptive_starts_are_bounded_by_their_floors(kind):
    cycles = pruned_network(0.5, (1, 1), schedule=kind)[2]
    floors = [0.01 * 0.1] * 2 if kind == "LCT" else [0.02, 0.01]
    assert all(floor <= cycle.start + 1e-12 <= 0.1 + 1e-9 for floor, cycle in zip(floors, cycles))


def test_bimp_as_one_run_prunes_when_and_as_much_as_planned():
    model = network()
    masks, seen = Masks.dense(model), []

    class Watch(Hooks):
        def epoch_ended(self, trainer, epoch):
            seen.append(round(masks.sparsity, 2))

    events = method.bimp_events(0.75, 8, 4, 2)
    trainer = trainer_of(model, method.PruneAt(masks, events), Watch())
    trainer.fit(method.bimp_rates(0.1, 8, 4, 2, len(trainer.batches)))
    assert seen == [0, 0, 0, 0.5, 0.5, 0.75, 0.75, 0.75]
    assert all(not w[~masks.kept[name]].any() for name, w in masks.weights(model).items())
    with pytest.raises(ValueError, match="leave no pruning interval"):
        method.bimp_events(0.75, 5, 4, 2)


class Memory:
    """Checkpoints after every epoch."""

    def __init__(self):
        self.states = {}

    def load(self, fit):
        return copy.deepcopy(self.states.get(fit))

    def offer(self, fit, state, finished):
        self.states[fit] = copy.deepcopy(state())


class Break(Hooks):
    """Stops a training like a lost machine, once."""

    def __init__(self, after):
        self.left = after

    def epoch_started(self, trainer, epoch):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["imp", "gmp-recovering", "dpf", "str", "cs", "dst", "lc"])
def test_an_interrupted_training_goes_on_to_the_same_weights(name):
    def run(checkpoints, breaker):
        model = network(norm=True)
        if name == "imp":
            masks = Masks.dense(model)
            trainer = trainer_of(model, KeepMasked(masks), breaker, checkpoints=checkpoints)
            method.prune_and_retrain(trainer, masks, 0.75, [3, 3], retraining(recalibrate=True))
        else:
            hook = METHODS[name](model)
            trainer = trainer_of(model, hook, breaker, decays=hook.decays, checkpoints=checkpoints)
            trainer.fit([0.1] * 6 * len(trainer.batches))
            hook.finish(trainer)
        return model.state_dict()

    unbroken, kept = run(None, Break(100)), Memory()
    with pytest.raises(KeyboardInterrupt):
        run(kept, Break(5))
    resumed = run(kept, Break(100))
    assert all(torch.equal(unbroken[key], resumed[key]) for key in unbroken)


# ------------------------------------------------------------------------------------------ during training


def trained(make, epochs=6, **options):
    model = network()
    hook = make(model)
    trainer = trainer_of(model, hook, decays=hook.decays, **options)
    trainer.fit([0.1] * epochs * len(trainer.batches))
    return trainer, hook


METHODS = {
    "gmp": lambda m: baselines.GMP(m, 0.75, 6, 1),
    "gmp-recovering": lambda m: baselines.GMP(m, 0.75, 6, 1, recovering=True),
    "gmp-lamp": lambda m: baselines.GMP(m, 0.75, 6, 1, allocation="LAMP"),
    "dpf": lambda m: baselines.DPF(m, 0.75, 6, 1),
    "dnw": lambda m: baselines.DNW(m, 0.75),
    "str": lambda m: baselines.STR(m, -3.0),
    "cs": lambda m: baselines.CS(m, 0.0, 50.0, 1e-2, 24, 1e-3),
    "dst": lambda m: baselines.DST(m, 1e-2, 1e-3),
    "gsm": lambda m: baselines.GSM(m, 0.75),
    "lc": lambda m: baselines.LC(m, 0.75, 1e-3),
}


def opened(hook):
    """Mask parameters of CS that are clearly open or closed, as at the end of a long training."""
    for parameter in getattr(hook, "mask_parameters", []):
        parameter.data = torch.where(torch.rand_like(parameter) < 0.5, -1.0, 1.0)


@pytest.mark.parametrize("name", METHODS)
def test_the_finished_network_computes_what_the_method_trained(name):
    trainer, hook = trained(METHODS[name])
    opened(hook)
    images = next(trainer.batches.epoch(0))[0]
    with torch.no_grad():
        before = trainer.logits(images)
        masks = hook.finish(trainer)
        after = trainer.model(images)
    assert torch.allclose(before, after, atol=1e-5)
    assert all(not w[~masks.kept[n]].any() for n, w in masks.weights(trainer.model).items())
    if name in ("gmp", "gmp-recovering", "gmp-lamp", "dpf", "dnw"):
        assert masks.sparsity == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_holds_all_that_a_method_needs(name):
    _, hook = trained(METHODS[name])
    model = network()
    other = METHODS[name](model)
    other.load_state(trainer_of(model), hook.state())
    assert other.masks.counts == hook.masks.counts
    for own, saved in zip(other._tensors(), hook._tensors(), strict=True):
        assert torch.equal(own, saved)


def test_only_recovering_gmp_brings_weights_back():
    returned = {}
    for recovering in (False, True):

        class Watch(Hooks):
            def __init__(self, hook):
                self.hook, self.before, self.count = hook, None, 0

            def epoch_ended(self, trainer, epoch):
                now = torch.cat([mask.flatten() for mask in self.hook.masks.kept.values()])
                if self.before is not None:
                    self.count += int((now & ~self.before).sum())
                self.before = now

        model = network()
        hook = baselines.GMP(model, 0.6, 40, 1, recovering)
        watch = Watch(hook)
        trainer_of(model, hook, watch).fit([0.3] * 40 * 4)
        returned[recovering] = watch.count
    assert returned[False] == 0 and returned[True] > 0


def test_dpf_goes_on_training_the_weights_behind_the_mask():
    trainer, hook = trained(METHODS["dpf"])
    hidden = {name: w.detach().clone() for name, w in hook.masks.weights(trainer.model).items()}
    masks = dict(hook.masks.kept)
    trainer.fit([0.1] * len(trainer.batches))
    moved = [(trainer.model.get_parameter(n).detach() - w)[~masks[n]] for n, w in hidden.items()]
    # far more than weight decay alone would move them
    assert max(float(change.abs().max()) for change in moved) > 1e-3


def test_gsm_keeps_as_many_gradients_as_weights_shall_stay():
    class Watch(Hooks):
        def gradients_ready(self, trainer):
            self.left = sum(int((p.grad != 0).sum()) for p in trainer.model.parameters())

    model, watch = network(), Watch()
    hook = baselines.GSM(model, 0.75)
    trainer_of(model, hook, watch).fit([0.1] * 4)
    assert watch.left == hook.places == int(0.25 * 120)


def test_ranking_over_prunable_weights_leaves_biases_their_gradient():
    model = network()
    hook = baselines.GSM(model, 0.99, rank_over="prunable")
    trainer_of(model, hook).fit([0.1] * 4)
    assert all(int((model[i].weight.grad != 0).sum()) <= hook.places for i in (0, 2))
    assert model[0].bias.grad.count_nonzero() > hook.places


def test_lc_decays_the_small_weights_only():
    model = network()
    large = model[0].weight.detach().abs() > 0.3
    hook = baselines.LC(model, 1 - int(large.sum()) / 120, 0.5)
    before = model[0].weight.detach().clone()

    class NoLoss(Hooks):
        def gradients_ready(self, trainer):
            for parameter in trainer.model.parameters():
                parameter.grad.zero_()

    trainer = Trainer(model, batches(), momentum=0.0, weight_decay=0.5, hooks=[NoLoss(), hook])
    trainer.fit([0.1] * len(trainer.batches))
    shrunk = model[0].weight.detach().abs() < before.abs() - 1e-6
    spared = hook._largest([p.abs() for p in model.parameters()])[0]
    assert not (shrunk & spared).any() and shrunk.any()


def test_the_growing_weight_decay_of_lc_reaches_the_optimiser():
    trainer, hook = trained(lambda m: baselines.LC(m, 0.5, 0.01, growth={0: 0.01, 2: 0.02}), epochs=3)
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.02 == hook.weight_decay


def test_stronger_penalties_prune_more():
    def sparsity(make):
        trainer, hook = trained(make, epochs=20)
        return hook.finish(trainer).sparsity

    assert (
        sparsity(lambda m: baselines.DST(m, 0.1, 1e-3))
        > sparsity(lambda m: baselines.DST(m, 0.0, 1e-3)) + 0.1
    )
    strong, weak = (sparsity(lambda m, p=p: baselines.CS(m, 0.0, 50.0, p, 80, 1e-3)) for p in (0.05, 0.0))
    assert strong > weak
    assert sparsity(lambda m: baselines.STR(m, -1.0)) > sparsity(lambda m: baselines.STR(m, -6.0))


def test_reparameterised_weights_decay_once_unless_doubled():
    for double, expected in ((False, 0.0), (True, 1e-3)):
        model = network()
        hook = baselines.DST(model, 0.0, 1e-3, double_decay=double)
        trainer = trainer_of(model, hook, decays=hook.decays)
        by_parameter = {id(p): g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
        assert by_parameter[id(model[0].weight)] == by_parameter[id(hook.thresholds[0])] == expected
        assert by_parameter[id(model[0].bias)] == 1e-3


def test_impossible_schedules_are_refused():
    with pytest.raises(ValueError, match="no pruning event"):
        baselines.gmp_events(0.9, 3, 2)
    with pytest.raises(RunFailed, match="at least one weight"):
        baselines.DNW(network(), 0.001)


# ------------------------------------------------------------------------------------------ protocol


def profile(**changed):
    paper = validated(protocol.Settings, changed, "params.yaml: imp_slr")
    data = DatasetSettings(train=128, validation=64, test=200)
    execution = ExecutionSettings(device="cpu", precision="float32", workers=1)
    return Profile(name="digits", dataset=data, execution=execution, paper=paper)


TINY = {
    "seeds": [0],
    "targets": [0.5],
    "training": {"epochs": 4},
    "retrain_epochs": 2,
    "learning_rates": [0.05],
    "cells": [{"architecture": "mlp", "options": {"widths": [12, 12]}}],
    "schedules": ["SLR", "LRW", "ALLR"],
    "lengths": [1, 4],
    "short_schedules": ["LLR"],
    "short_lengths": [1],
    "allocations": ["ERK", "random"],
    "cycles": [2],
    "bimp": {"shares": [0.5]},
}


def listed(settings):
    return papers.runs("imp_slr", settings)


def outcomes(settings, folder):
    planned = in_order(listed(settings))
    store = Store(folder)
    needed = {need.settings_hash for run in planned for need in run.needs}
    entries = [
        perform(run, store, settings.execution, run.settings_hash in needed).model_dump() for run in planned
    ]
    return {entry["record"]["variant"]: entry for entry in entries}


DURING = TINY | {
    "experiments": ["during"],
    "during": {"gmp": {}, "dpf": None},
    "cells": [{"architecture": "mlp", "options": {"widths": [12]}}],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return outcomes(profile(**TINY), tmp_path_factory.mktemp("runs"))


def test_every_kind_of_run_leaves_a_record_at_its_sparsity(tiny):
    assert {e["record"]["status"] for e in tiny.values()} == {"ok"}
    for name, entry in tiny.items():
        record = entry["record"]
        assert record["cost"]["sparsity"] == pytest.approx(record["target"], abs=0.02), name
        assert 0 <= record["metrics"]["test_accuracy"] <= 1


def test_methods_compared_train_for_equally_many_epochs(tiny):
    trained_for = {name: entry["record"]["metrics"]["epochs"] for name, entry in tiny.items()}
    for name in ("slr", "lrw", "allr", "slr-erk", "slr-2cycles", "gmp", "dpf", "bimp-50pct"):
        assert trained_for[name] == 6, name
    dense = tiny["dense"]["curves"]
    assert len(dense) == 4 and len(tiny["gmp"]["curves"]) == 6 and len(tiny["slr"]["curves"]) == 2
    assert [row["epoch"] for row in tiny["slr"]["curves"]] == [4, 5]


def test_arms_of_a_seed_start_from_the_same_weights(tiny):
    runs = {run.variant: run for run in in_order(listed(profile(**TINY)))}
    assert (
        runs["slr"].needs[0].settings_hash
        == runs["lrw"].needs[0].settings_hash
        == runs["dense"].settings_hash
    )
    first = {name: tiny[name]["curves"][0]["train_loss"] for name in ("dense", "gmp")}
    assert first["dense"] == pytest.approx(first["gmp"], abs=1e-6)


def test_a_run_says_at_which_accuracy_most_of_its_gain_is_reached(tiny):
    for name in ("slr-100pct", "slr-25pct"):
        metrics = tiny[name]["record"]["metrics"]
        gain = metrics["test_accuracy"] - metrics["pruned_accuracy"]
        assert gain != 0
        assert metrics["accuracy_at_90pct_gain"] == pytest.approx(metrics["test_accuracy"] - 0.1 * gain)


def test_learning_rates_are_chosen_by_validation_accuracy_alone(tmp_path):
    settings = DURING | {"learning_rates": [1e-4, 0.1], "tuning_seeds": [50, 51]}
    found = outcomes(profile(**settings), tmp_path)
    for name in ("dense", "gmp"):
        details = found[name]["record"]["details"]
        assert details["learning_rate"] == 0.1
        assert details["tuning"]["0.1"] > details["tuning"]["0.0001"]
    assert {found["slr"]["record"]["seed"], found["tuning-imp-1"]["record"]["seed"]} == {0, 51}


def test_a_rate_at_which_training_diverges_loses_the_search(tmp_path):
    settings = DURING | {"learning_rates": [0.05, 1e30], "tuning_seeds": [50]}
    found = outcomes(profile(**settings), tmp_path)
    for name in ("dense", "gmp"):
        assert found[name]["record"]["details"]["learning_rate"] == 0.05
        assert found[name]["record"]["details"]["tuning"]["1e+30"] is None
    assert found["slr"]["record"]["details"]["learning_rate"] == 0.05
    lost = {name for name, entry in found.items() if entry["record"]["status"] == "failed"}
    assert lost == {"tuning-imp-1-dense", "tuning-imp-1", "tuning-gmp-1"}


def test_where_every_rate_diverges_all_that_needs_one_fails(tmp_path):
    settings = DURING | {"learning_rates": [1e29, 1e30], "tuning_seeds": [50]}
    found = outcomes(profile(**settings), tmp_path)
    assert found["gmp"]["record"]["reason"].startswith("all trials of gmp are lost: ")
    assert found["dense"]["record"]["failure"] == "diverged" and found["slr"]["record"]["failure"] == "needs"


def test_a_learning_rate_is_tuned_with_each_seed_where_the_profile_says_so():
    settings = profile(**(DURING | {"seeds": [0, 1], "learning_rates": [0.01, 0.1], "tuning": "per_seed"}))
    planned = in_order(listed(settings))
    assert {run.seed for run in planned if run.variant.startswith("tuning-")} == {0, 1}
    for run in planned:
        assert {need.seed for need in run.needs} <= {run.seed}


def test_a_trial_with_the_seed_of_the_run_is_not_trained_again(tmp_path):
    settings = DURING | {"learning_rates": [1e-4, 0.1], "tuning": "per_seed", "during": {"dpf": {}}}
    found = outcomes(profile(**settings), tmp_path)
    for name in ("gmp", "dpf"):
        run, trial = found[name], found[f"tuning-{name}-1"]
        assert (run["record"]["paper"], run["record"]["settings"]["job"]) == ("imp_slr", "Chosen")
        for what in ("metrics", "details", "cost", "predictions"):
            assert run["record"][what] == trial["record"][what]
        assert run["curves"] == trial["curves"]


def test_each_method_is_tuned_with_as_many_pruned_networks_over_the_same_targets():
    settings = {"targets": [0.5, 0.7, 0.9], "at": {"during": [0.5, 0.7]}, "during": {}}
    settings |= {"learning_rates": [0.01, 0.1, 0.3], "tuning_seeds": [50]}
    planned = in_order(listed(profile(**(DURING | settings))))
    for name in ("imp", "gmp", "dpf"):
        trials = [run for run in planned if run.variant.startswith(f"tuning-{name}-") and run.target]
        expected = [(f"tuning-{name}-{number}", target) for number in range(3) for target in (0.5, 0.7)]
        assert sorted((run.variant, run.target) for run in trials) == expected
    for variant in ("gmp", "dpf", "slr"):
        assert [run.target for run in planned if run.variant == variant] == [0.5, 0.7]
    # one rate for all targets: all wait for the same trials
    needs = [[need.settings_hash for need in run.needs] for run in planned if run.variant == "gmp"]
    assert needs[0] == needs[1] and len(needs[0]) == 6


def test_an_experiment_runs_at_its_own_targets_where_it_has_some():
    settings = TINY | {"targets": [0.5, 0.9], "at": {"lengths": [0.9], "bimp": [0.7]}}
    targets = {}
    for run in listed(profile(**settings)):
        targets.setdefault(run.variant, set()).add(run.target)
    assert targets["slr-100pct"] == {0.9} and targets["bimp-50pct"] == {0.7}
    assert targets["slr"] == targets["gmp"] == {0.5, 0.9}


DEVIATIONS = TINY | {
    "cells": [
        {"architecture": "digits_cnn_strided", "options": protocol.AS_RELEASED | {"widths": [4, 6, 8]}}
    ],
    "experiments": ["schedules", "allocations", "bimp", "deviations"],
    "schedules": ["SLR", "SLR-Le-Hua"],
    "bimp": {"shares": [0.5], "readings": ["2023", "2022"], "interval": 1},
}


def test_a_deviation_differs_from_its_variant_in_nothing_else():
    runs = {run.variant: run for run in in_order(listed(profile(**DEVIATIONS)))}

    def differing(one, other):
        one, other = (runs[name].settings for name in (one, other))
        return {key for key in one if one[key] != other[key]}

    assert differing("slr-le-hua", "slr") == differing("slr-no-recalibration", "slr") == {"pruning"}
    assert runs["slr-no-recalibration"].settings["pruning"]["recalibrate"] is False
    for name in ("slr", "slr-erk", "slr-random"):
        # the network that it starts from is another one, as its needs say
        assert differing(f"{name}-he", name) == {"options", "start"}
        assert [need.settings_hash for need in runs[f"{name}-he"].needs] == [runs["dense-he"].settings_hash]
    assert differing("dense-he", "dense") == {"options"}
    assert runs["dense-he"].settings["options"]["conv_init"] == "fan_out"
    assert runs["bimp-50pct-2022"].settings["job"] == "BIMPInOneRun"
    assert runs["bimp-50pct"].settings["job"] == "PruneAndRetrain"


def test_deviations_change_what_is_trained(tmp_path):
    found = outcomes(profile(**DEVIATIONS), tmp_path)
    pairs = {f"slr-{change}": "slr" for change in ("no-recalibration", "le-hua", "he")}
    for name, other in (pairs | {"slr-erk-he": "slr-erk", "bimp-50pct-2022": "bimp-50pct"}).items():
        one, two = (found[variant]["record"] for variant in (name, other))
        assert one["metrics"]["test_loss"] != two["metrics"]["test_loss"], name
        assert one["cost"]["sparsity"] == pytest.approx(0.5, abs=0.02), name


# ------------------------------------------------------------------------------------------ profiles

PARAMS = ROOT / "params.yaml"
PROFILES = sorted(read_yaml(PARAMS)["profiles"])


def cells(name):
    """Each cell of a profile with the paper's settings there."""
    paper = papers.load("imp_slr", PARAMS, name).paper
    return [(cell, paper.changed(cell.settings, cell.architecture)) for cell in paper.cells]


@pytest.mark.parametrize("name", PROFILES)
def test_networks_start_as_the_release_starts_them(name):
    for cell, _ in cells(name):
        shape = (1, 8, 8) if name.startswith("digits") else (3, 32, 32)
        network = build(cell.architecture, classes=10, image_shape=shape, **cell.options)
        for layer in network.modules():
            if not isinstance(layer, nn.Conv2d | nn.Linear):
                continue
            weight = layer.weight.detach()
            if cell.architecture == "resnet50" and isinstance(layer, nn.Conv2d):  # torchvision's
                outputs = weight.shape[0] * weight[0, 0].numel()
                assert float(weight.std()) == pytest.approx((2 / outputs) ** 0.5, rel=0.1)
                continue
            bound = weight[0].numel() ** -0.5
            assert 0.9 * bound < float(weight.abs().max()) < 1.0001 * bound, (cell.architecture, layer)


@pytest.mark.parametrize("name", PROFILES)
def test_rewinding_is_not_fine_tuning_in_any_profile(name):
    for cell, settings in cells(name):
        if {"FT", "LRW"} <= set(settings.schedules) and "schedules" in settings.experiments:
            last = settings.training.epochs * (1 - settings.training.milestones[-1])
            assert settings.retrain_epochs > last + 1e-6, cell.architecture


def test_retraining_that_rewinds_to_the_last_rate_only_is_an_error():
    # dense training drops after 4 and 6 epochs
    settings = TINY | {"training": {"epochs": 8}, "experiments": ["schedules"], "schedules": ["FT", "LRW"]}
    with pytest.raises(SettingsError, match="retrain_epochs = 2: must reach back beyond the last drop"):
        listed(profile(**settings))
    listed(profile(**(settings | {"schedules": ["SLR", "LRW"]})))
    listed(profile(**(settings | {"retrain_epochs": 3})))


@pytest.mark.slow
def test_all_optional_arms_run(tmp_path):
    settings = TINY | {
        "cells": [{"architecture": "digits_cnn_strided", "options": {"widths": [4, 6, 8]}}],
        "experiments": ["schedules", "during", "cycles", "bimp"],
        "schedules": ["FT", "CLR", "LCN", "LC", "LCT", "LLR_min"],
        "tunables": [
            {"kind": "stepped", "initial": 0.05},
            {"kind": "constant", "initial": 0.01, "warmup_share": 0},
        ],
        "during": {
            "gmp": {"recovering": True, "interval": 2, "allocation": "uniform"},
            "gsm": {},
            "lc": {"growing": True, "rank_over": "prunable"},
            "dnw": {},
            "str": {"weight_decays": [1e-3], "initial": -2.0},
            "cs": {"initials": [0.0], "penalty": 1e-4},
            "dst": {"penalties": [0.01], "double_decay": True},
        },
        "cycles": ["20%"],
        "retraining": {
            "adaptive": "2022",
            "reset_momentum": True,
            "recalibrate": False,
            "cycle_epochs": "each",
        },
        "bimp": {"readings": ["2022"], "interval": 1, "shares": [0.5]},
    }
    found = outcomes(profile(**settings), tmp_path)
    assert {
        name: e["record"].get("reason") for name, e in found.items() if e["record"]["status"] != "ok"
    } == {}
    for name in ("ft", "gsm", "lc", "dnw", "gmp", "slr-20pct-cycles", "bimp-50pct-2022", "stepped-0.05-0.1"):
        assert found[name]["record"]["cost"]["sparsity"] == pytest.approx(0.5, abs=0.02), name
    # four cycles of 20 % each with two epochs
    assert found["slr-20pct-cycles"]["record"]["metrics"]["epochs"] == 4 + 4 * 2
    # methods without a target are met at the sparsity that they reached
    for name in ("str-0.001", "cs-0", "dst-0.01"):
        reached = found[name]["record"]["cost"]["sparsity"]
        assert found[f"slr-as-{name}"]["record"]["cost"]["sparsity"] == pytest.approx(reached, abs=0.01)


def test_a_method_that_pruned_nothing_leaves_nothing_to_compare_with(tmp_path):
    settings = DURING | {"during": {"gmp": None, "str": {"weight_decays": [0.0], "initial": -1000.0}}}
    record = outcomes(profile(**settings), tmp_path)["slr-as-str-0"]["record"]
    assert record["status"] == "failed" and "nothing to compare with" in record["reason"]


def planned_in(name):
    """The variant, architecture and target of each run of one seed."""
    loaded = papers.load("imp_slr", PARAMS, name)
    one = loaded.model_copy(update={"paper": loaded.paper.model_copy(update={"seeds": (0,)})})
    return {(run.variant, run.architecture, run.target) for run in in_order(papers.runs("imp_slr", one))}


def test_what_a_claim_compares_is_run_in_one_cell_at_the_same_targets():
    """By profile digits, and what only the ledger compares by its own."""
    planned = {name: planned_in(name) for name in ("digits", "digits-deviations")}
    for claim in read(ROOT / "replications/imp_slr/claims.yaml").claims:
        found = planned["digits-deviations" if claim.deviation else "digits"]
        sides = [side for pair in claim.pairs() for side in pair]
        variants = {part.variant for side in sides for part in (side, side.minus) if part}
        architectures = {a for _, a, _ in found if claim.covers("digits", a)}
        targets = [
            [{t for v, a, t in found if (v, a) == (variant, architecture)} for variant in variants]
            for architecture in architectures
        ]
        complete = [own for own in targets if all(own)]
        assert complete, claim.id
        assert all(one == own[0] for own in complete for one in own), claim.id


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cells": [{"architecture": "resnet57"}]}, "resnet57.*unknown"),
        ({"targets": [1.2]}, r"targets\[0\] = 1.2: should be less than 1"),
        ({"targets": [0.0]}, r"targets = \[0.0\]: must be above 0"),
        ({"tuning_seeds": [0]}, "no seed in common"),
        ({"lengths": [10]}, "lengths must leave out retrain_epochs = 10"),
        ({"training": {"epochs": 300}, "lengths": [30, 31]}, "lengths must differ by at least a percent"),
        ({"retrain_epochs": 31, "lengths": [30]}, "LRW can retrain for no more than the 30 epochs"),
        ({"during": {"gmp": {"interval": 21}}}, "during.gmp.interval must fit twice"),
        ({"bimp": {"shares": [0.99]}}, "bimp.shares must leave some"),
        ({"bimp": {"shares": [0.5, 0.501]}}, "bimp.shares must differ"),
        ({"bimp": {"readings": ["2022"], "interval": 30}}, "bimp.interval must fit"),
        ({"training": {"warmup_epochs": 30}}, "warmup_epochs must be fewer"),
        (
            {"training": {"milestones": [0.3, 0.77]}},
            r"cells\[0\] \(mlp\): training.milestones\[1\] = 0.77: must fall on a whole iteration",
        ),
        ({"training": {"optimizer": "adam"}}, "training must be by sgd"),
        ({"schedules": ["SLR", "XLR"]}, r"schedules\[1\]"),
        ({"cells": [{"architecture": "mlp", "options": {"widths": [0]}}]}, r"cells\[0\] \(mlp\): .*width"),
        ({"cycles": [1]}, r"cycles\[0\]"),
        ({"training": {"momentum": 0.0}}, "nesterov needs a momentum"),
        ({"cells": [{"architecture": "vgg16"}]}, r"cells\[0\] \(vgg16\): images of 8x8 are too small"),
        ({"cells": [{"architecture": "mlp", "options": {"depth": 3}}]}, "option 'depth'"),
        (
            {"cells": [{"architecture": "digits_cnn", "options": {"widths": [600, 1, 1]}}]},
            r"cells\[0\].*Uniform\+ cannot prune",
        ),
        (
            {"during": {"gmp": {"intervall": 3}}},
            "during.gmp.intervall: unknown key; .*did you mean 'interval'",
        ),
    ],
)
def test_impossible_settings_are_one_clear_error_before_training(changed, message):
    with pytest.raises(SettingsError, match=message):
        listed(profile(**changed))
