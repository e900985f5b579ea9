"""Whole steps from tables, recorded once and done again: every method trains as it does eagerly, or is refused."""

import copy
import gc
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from recorded_graph import Graphs

from common.core import compute as computing
from common.core import steps as stepping
from common.core.compute import CaptureFailed, Compute
from common.core.data import Batches
from common.core.failures import Diverged, OutOfMemory
from common.core.loading import load
from common.core.models import build
from common.core.pruning import channels
from common.core.pruning.masks import KeepMasked, Masks
from common.core.trainer import Hooks, Trainer
from common.settings import AugmentationSettings, DatasetSettings, SettingsError
from replications.feature_relevance.method import (
    Goal,
    GradualPruning,
    Pruner,
    Relevance,
    scoring_batches,
    until_channels,
)
from replications.halo.method import HALO, L1, MCP, SWS, LambdaTraining, penalised
from replications.imp_slr import baselines
from replications.imp_slr.method import PruneAt
from replications.pretraining_impact.gradual import Gradual, KeepFiltersMasked
from replications.pretraining_impact.method import FilterSelection
from replications.pretraining_impact.training import OneCycleMomentum
from replications.pruning_from_scratch.bpcp import BlockGates
from replications.pruning_from_scratch.method import Gates

EPOCHS, BATCH, IMAGES = 3, 20, 190
PER_EPOCH = 10
RATES = [0.08 / (1 + i / 20) for i in range(EPOCHS * PER_EPOCH)]


@pytest.fixture(scope="module")
def data():
    return load(DatasetSettings(train=IMAGES, augmentation=AugmentationSettings(crop_padding=1, flip=True)))


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Graphs that are recorded on the CPU, where Adam may be captured, too; nothing has been said yet."""
    found = Graphs()
    monkeypatch.setattr(computing, "capture_graph", found)
    adam = sys.modules["torch.optim.adam"]  # not an attribute of torch.optim
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
    monkeypatch.setattr(stepping, "_TOLD", set())
    return found


def _network(architecture="digits_cnn"):
    options = {"widths": [4, 8, 8]} if architecture == "digits_cnn" else {}
    return build(architecture, classes=10, image_shape=(1, 8, 8), seed=1, **options)


def _trainer(data, hooks=(), model=None, compute=None, **options):
    model = model or _network()
    batches = Batches(data, "train", BATCH, seed=3, shuffle=True, augment=True)
    compute = compute or Compute(torch.device("cpu"), captured=True)
    options = {"weight_decay": 1e-3, "momentum": 0.9, "validation": Batches(data, "validation")} | options
    return Trainer(model, batches, hooks=hooks, compute=compute, **options)


def _masked(model, data):
    masks = Masks.dense(model)
    masks.prune(model, 0.5)
    masks.apply(model)
    return KeepMasked(masks)


def _lambdas():
    return LambdaTraining(rates=RATES, weight_decay=1e-4)


class Shrinks(Hooks):
    """Removes channels after the first epoch."""

    def epoch_ended(self, trainer, epoch):
        if epoch == 0:
            keep = {group.name: torch.arange(3) for group in trainer.model.channel_groups()}
            channels.remove(trainer.model, keep, trainer.optimizer)


class Forgets(Hooks):
    """Starts the optimiser anew after each epoch."""

    def epoch_ended(self, trainer, epoch):
        trainer.fresh_optimizer()


def _relevance(model, data, physical):
    pruner = Pruner(model, scoring_batches(data, 0.5), Relevance(), minimum=1)
    return GradualPruning(pruner, {1: Goal(until_channels(4)), 2: Goal(until_channels(2))}, physical)


def _filters(model, masks=None):
    return Gradual(model, {12: 0.25, 17: 0.5}, FilterSelection(), masks=masks)


def _held_at_zero(model, policy):
    masks = KeepFiltersMasked(policy)
    return [masks, _filters(model, masks)]


CAPTURED = {
    "plain": lambda model, data: (),
    "masks": _masked,
    "pruned at epochs": lambda model, data: PruneAt(Masks.dense(model), [(1, 0.5), (2, 0.8)]),
    "shrinking": lambda model, data: Shrinks(),
    "forgetting": lambda model, data: Forgets(),
    "HALO": lambda model, data: HALO(penalised(model, "conv"), 1e-4, 1e-3, _lambdas()),
    "SWS": lambda model, data: SWS(penalised(model, "conv"), 1e-4, 1e-3, _lambdas()),
    "L1": lambda model, data: L1(penalised(model, "conv"), 1e-3),
    "MCP": lambda model, data: MCP(penalised(model, "conv"), 1e-3, 100.0),
    "gates": lambda model, data: Gates(model, [g.norm for g in model.channel_groups() if g.norm], 0.5, 0.5),
    "relevance, masked": lambda model, data: _relevance(model, data, physical=False),
    "relevance, removed": lambda model, data: _relevance(model, data, physical=True),
    "filters removed": lambda model, data: _filters(model),
    "filters masked after steps": lambda model, data: _held_at_zero(model, "after_step"),
    "filters masked before passes": lambda model, data: _held_at_zero(model, "before_forward"),
    "GMP": lambda model, data: baselines.GMP(model, 0.8, EPOCHS, 1),
    "DPF": lambda model, data: baselines.DPF(model, 0.8, EPOCHS, 1),
    "DNW": lambda model, data: baselines.DNW(model, 0.5),
    "STR": lambda model, data: baselines.STR(model, -3.0),
}
REFUSED = {
    "GSM": (lambda model: baselines.GSM(model, 0.5), "GSM ranks all entries"),
    "LC": (lambda model: baselines.LC(model, 0.5, 1e-3), "LC ranks all entries"),
    "CS": (lambda model: baselines.CS(model, 0.0, 10.0, 1e-4, len(RATES), 1e-4), "CS has sharper masks"),
    "DST": (lambda model: baselines.DST(model, 1e-3, 1e-4), "DST asks in every step"),
    "block gates": (lambda model: BlockGates(model, 0.1, 0.1), "block gates are drawn anew"),
}


def _trained(method, data, captured):
    """Eagerly, it takes the same steps from the same tables, as a GPU does without graphs."""
    model = _network()
    hooks = CAPTURED[method](model, data)
    options = {"optimizer": hooks.optimizer()} if method == "gates" else {}
    trainer = _trainer(data, hooks, model, **options)
    if not captured:
        trainer.compute = _Planned(torch.device("cpu"))
    trainer.fit(RATES)
    return trainer


class _Planned(Compute):
    """Steps from tables, and no graph."""

    @property
    def planned(self):
        return True


def _same(one, other):
    assert one.history == other.history
    for key, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[key]), key


@pytest.mark.parametrize("method", CAPTURED)
def test_captured_steps_train_as_eager_ones_bit_for_bit(method, data, graphs, capsys):
    eager, captured = (_trained(method, data, captured) for captured in (False, True))
    _same(captured, eager)
    assert not capsys.readouterr().err
    # three eager steps, and what is not the same from one step to the next
    assert graphs.replays >= (4 if method in ("DPF", "shrinking", "forgetting") else 5), method
    losses = [row["train_loss"] for row in eager.history]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["plain", "masks", "shrinking", "GMP", "DPF", "relevance, removed"])
def test_the_plan_trains_as_the_loop_without_tables_bit_for_bit(method, data):
    model = _network()
    plain = _trainer(data, CAPTURED[method](model, data), model, Compute(torch.device("cpu")))
    plain.fit(RATES)
    _same(_trained(method, data, captured=True), plain)


def test_rates_from_a_table_are_those_of_the_loop_to_the_last_digits_of_float32(data):
    """Only the product with the rate of the lambdas is rounded once more."""
    model = _network()
    plain = _trainer(data, CAPTURED["HALO"](model, data), model, Compute(torch.device("cpu")))
    plain.fit(RATES)
    captured = _trained("HALO", data, captured=True)
    assert captured.history[-1]["train_loss"] == pytest.approx(plain.history[-1]["train_loss"], rel=1e-3)
    for one, other in zip(captured.hooks[0].lambdas, plain.hooks[0].lambdas, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_several_steps_are_in_one_graph_and_masks_of_the_same_weights_need_no_other(data, graphs):
    _trained("pruned at epochs", data, captured=True)
    # three of the nine whole batches of an epoch, and the last, smaller batch
    assert graphs.captures == 2
    three, last = graphs.kernels
    assert three == 3 * last
    assert graphs.replays == 2 + 2 * (3 + 1)


@pytest.mark.parametrize("method", REFUSED)
def test_what_cannot_be_captured_is_refused_with_its_reason_and_trains_as_ever(method, data, graphs, capsys):
    make, reason = REFUSED[method]
    histories = []
    for captured in (False, True):
        model = _network("resnet8" if method == "block gates" else "digits_cnn")
        compute = Compute(torch.device("cpu"), captured=captured)
        trainer = _trainer(data, make(model), model, compute)
        trainer.fit([0.01] * 2 * PER_EPOCH)
        histories.append(trainer.history)
    assert graphs.captures == 0
    said = capsys.readouterr().err
    assert said.count(reason) == 1 and said.endswith("training goes on without captured steps\n")
    assert histories[0] == histories[1]


def test_a_method_that_has_finished_may_be_captured_once_its_new_optimiser_has_momentum(data, graphs):
    histories = []
    for compute in (_Planned(torch.device("cpu")), None):
        model = _network()
        hook = baselines.GSM(model, 0.5)
        trainer = _trainer(data, hook, model, *filter(None, [compute]))
        trainer.fit([0.01] * PER_EPOCH)
        assert graphs.captures == 0
        trainer.add_hook(KeepMasked(hook.finish(trainer)))
        trainer.fresh_optimizer(lr=0.01)
        trainer.fit([0.05] * 2 * PER_EPOCH)
        histories.append(trainer.history)
    assert graphs.captures == 2  # three steps, and the last, smaller batch
    assert histories[0] == histories[1]


def test_a_pass_that_learns_nothing_is_captured_and_leaves_the_same_statistics(data, graphs):
    """And what was captured of training stays."""
    left = []
    for compute in (_Planned(torch.device("cpu")), None):
        trainer = _trainer(data, (), _network("resnet8"), *filter(None, [compute]))
        trainer.fit([0.01] * 2 * PER_EPOCH)
        trainer.look()
        state = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
        trainer.fit([0.01] * PER_EPOCH)
        left.append((state, trainer.history))
    (eager, history), (captured, again) = left
    for key, tensor in eager.items():
        assert torch.equal(tensor, captured[key]), key
    assert history == again
    # steps of training, once: three, and the last, smaller batch; and three passes; its last batch is met once
    assert graphs.captures == 3
    assert graphs.replays == (2 + 3 + 1) + 2 + (3 + 1)


def test_the_momentum_of_one_cycle_training_is_refused(data, graphs, capsys):
    model = _network()
    trainer = _trainer(
        data, OneCycleMomentum(PER_EPOCH), model, optimizer=torch.optim.AdamW(model.parameters())
    )
    trainer.fit([0.01] * PER_EPOCH)
    assert graphs.captures == 0 and "one-cycle" in capsys.readouterr().err


def test_a_hook_that_does_not_say_what_a_graph_holds_of_it_is_refused(data, graphs, capsys):
    class Silent(Hooks):
        def gradients_ready(self, trainer):
            trainer.model.classifier.weight.grad.mul_(0.5)

    class Louder(KeepMasked):
        """What its base says of a captured step says nothing of this."""

        def loss(self, trainer):
            return trainer.model.classifier.weight.square().sum()

    masked = _masked(_network(), data)
    for hook in (Silent(), Louder(masked.masks)):
        _trainer(data, hook).fit([0.01] * PER_EPOCH)
        said = f"{type(hook).__name__} acts in every step and does not say what a graph holds of it"
        assert said in capsys.readouterr().err
    assert graphs.captures == 0


def test_dropout_and_other_optimisers_are_trained_without_graphs(data, graphs, capsys):
    class Dropped(torch.nn.Sequential):
        def __init__(self):
            super().__init__(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 10))

    model = Dropped()
    _trainer(data, model=model).fit([0.01] * PER_EPOCH)
    assert not capsys.readouterr().err
    model = _network()
    loose = torch.optim.SGD(model.parameters(), lr=0.0)
    _trainer(data, model=model, optimizer=loose).fit([0.01] * PER_EPOCH)
    assert graphs.captures == 0 and "SGD takes steps that are not captured" in capsys.readouterr().err


def test_a_resumed_fit_equals_an_unbroken_one(data):
    class Memory:
        def __init__(self, states, stop):
            self.states, self.stop = states, stop

        def load(self, fit):
            return copy.deepcopy(self.states.get(fit))

        def offer(self, fit, state, finished):
            self.states[fit] = copy.deepcopy(state())
            if self.states[fit]["epochs_of_fit"] == self.stop:
                raise InterruptedError

    def fitted(method, checkpoints):
        model = _network()
        trainer = _trainer(data, CAPTURED[method](model, data), model, checkpoints=checkpoints)
        trainer.fit(RATES)
        return trainer

    for method in ("HALO", "DPF", "relevance, removed"):
        states = {}
        with pytest.raises(InterruptedError):
            fitted(method, Memory(states, 2))
        _same(fitted(method, Memory(states, None)), fitted(method, None))


def test_a_loss_that_is_no_number_ends_the_run(data):
    with pytest.raises(Diverged, match="in epoch 1"):
        _trainer(data).fit([1e12] * PER_EPOCH)


def test_what_a_graph_refuses_is_trained_without(data, monkeypatch, capsys):
    def refuse(run, pool):
        raise CaptureFailed("steps cannot be captured (operation not permitted)")

    monkeypatch.setattr(computing, "capture_graph", refuse)
    refused = _trained("plain", data, captured=True)
    assert "cannot be captured (operation not permitted); training goes on without" in capsys.readouterr().err
    _same(refused, _trained("plain", data, captured=False))
    with pytest.raises(SettingsError, match="compilation = 'capture': a CPU has no graphs"):
        Compute.choose("cpu", "float32", "capture")


def test_memory_that_runs_out_in_a_capture_names_the_batch_that_fits(data, monkeypatch):
    def nested(run, pool):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(computing, "capture_graph", nested)
    with pytest.raises(OutOfMemory, match="out of memory on cpu with a batch of 20.*a batch of 10 fits"):
        _trainer(data).fit(RATES)


def test_a_trainer_that_is_dropped_frees_its_memory_at_once(data, monkeypatch):
    """Reference counting must do it: memory of a GPU does not make the garbage collector run."""

    def capture(run, pool):
        run()
        return lambda: None

    monkeypatch.setattr(computing, "capture_graph", capture)
    trainer = _trained("masks", data, captured=True)
    gone = weakref.ref(trainer)
    gc.collect()
    gc.disable()
    try:
        del trainer
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("rotation", [0.0, 15.0])
def test_tables_give_the_batches_of_the_epoch(data, augment, rotation):
    turned = replace(data, augmentation=data.augmentation.model_copy(update={"rotation": rotation}))
    batches = Batches(turned, "train", BATCH, seed=7, shuffle=True, augment=augment)
    tables = batches.tables()
    for epoch in (0, 3):
        tables.fill(epoch)
        for step, (images, labels) in enumerate(batches.epoch(epoch)):
            found = tables.batch(torch.tensor([step]), tables.size(step))
            assert torch.equal(found[0], images) and torch.equal(found[1], labels)
            assert found[0].stride() == images.stride()
