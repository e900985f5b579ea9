"""What only a GPU can show: captured steps, several runs in turns on streams, memory that runs out, a fault of CUDA."""

import contextlib
import gc
import io
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from common.core import compute, steps
from common.core.compute import Compute
from common.core.data import SPLITS, Batches
from common.core.failures import RunFailed
from common.core.loading import make_dataset
from common.core.models import build, fused
from common.core.models.network import BatchNorm2d, Conv2d
from common.core.pruning import channels
from common.core.pruning.masks import KeepMasked, Masks
from common.core.run import Cell
from common.core.trainer import Hooks, Trainer
from common.settings import AugmentationSettings, DatasetSettings, ExecutionSettings
from common.stage.scheduler import execute
from common.stage.store import Store
from common.stage.worker import prepare_process
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
from replications.pruning_from_scratch.bpcp import BlockGates
from replications.pruning_from_scratch.jobs import Dense
from replications.pruning_from_scratch.method import Gates, Training

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

BATCH, RATE = 32, 0.05
EPOCHS = 4


@pytest.fixture(autouse=True)
def _deterministic():
    prepare_process(ExecutionSettings(deterministic=True))
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are captured, each with how often it is replayed."""
    found, capture = [], compute.capture_graph

    def noted(run, pool):
        replay = capture(run, pool)
        found.append(0)
        number = len(found) - 1

        def replayed():
            found[number] += 1
            replay()

        return replayed

    monkeypatch.setattr(compute, "capture_graph", noted)
    return found


def _images(count=200, seed=0):
    """Images whose class shows in their brightness, so that there is something to learn."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    pixels = random.integers(0, 60, (count, 32, 32, 3)) + 19 * labels[:, None, None, None]
    return pixels.astype(np.uint8), labels


def _data():
    pixels, labels = _images()
    parts = dict(zip(SPLITS, np.split(np.arange(len(pixels)), [144, 160]), strict=True))
    augmentation = AugmentationSettings(crop_padding=4, flip=True)
    return make_dataset("made up", parts, pixels, labels, 10, 255.0, augmentation).to(torch.device("cuda"))


def _network(architecture="resnet8"):
    return build(architecture, classes=10, image_shape=(3, 32, 32), seed=1)


def _masked(model):
    masks = Masks.dense(model)
    masks.prune(model, 0.9)
    masks.apply(model)
    return {"hooks": KeepMasked(masks)}


def _lambdas():
    return LambdaTraining(rates=[RATE] * EPOCHS * 5)


def _penalised(model):
    return {"hooks": HALO(penalised(model, "conv"), xi=1e-5, psi=1e-3, training=_lambdas())}


def _gated(model):
    gates = Gates(model, [g.norm for g in model.channel_groups() if g.norm], weight=0.5, level=0.5)
    return {"hooks": gates, "optimizer": gates.optimizer()}


class _Shrinks(Hooks):
    """Removes half of the channels after the first epoch."""

    def epoch_ended(self, trainer, epoch):
        if epoch == 0:
            widths = zip(trainer.model.channel_groups(), trainer.model.widths)
            keep = {group.name: torch.arange(width // 2) for group, width in widths}
            channels.remove(trainer.model, keep, trainer.optimizer)


def _relevance(model, physical):
    pruner = Pruner(model, scoring_batches(_data(), 0.5), Relevance(), minimum=1)
    events = {1: Goal(until_channels(4)), 2: Goal(until_channels(2))}
    return {"hooks": GradualPruning(pruner, events, physical)}


def _filters(model, policy=None):
    masks = KeepFiltersMasked(policy) if policy else None
    gradual = Gradual(model, {6: 0.25, 8: 0.5}, FilterSelection(), masks=masks)
    return {"hooks": [masks, gradual] if masks else [gradual]}


METHODS = {
    "plain": lambda model: {},
    "masks": _masked,
    "HALO": _penalised,
    "SWS": lambda model: {"hooks": SWS(penalised(model, "conv"), 1e-5, 1e-3, _lambdas())},
    "L1": lambda model: {"hooks": L1(penalised(model, "conv"), 1e-4)},
    "MCP": lambda model: {"hooks": MCP(penalised(model, "conv"), 1e-4, 100.0)},
    "gates": _gated,
    "shrinking": lambda model: {"hooks": _Shrinks()},
    "pruned at epochs": lambda model: {"hooks": PruneAt(Masks.dense(model), [(1, 0.5), (2, 0.8)])},
    "GMP": lambda model: {"hooks": baselines.GMP(model, 0.8, EPOCHS, 1)},
    "DPF": lambda model: {"hooks": baselines.DPF(model, 0.8, EPOCHS, 1)},
    "DNW": lambda model: {"hooks": baselines.DNW(model, 0.5)},
    "STR": lambda model: {"hooks": baselines.STR(model, -5.0)},
    "relevance, masked": lambda model: _relevance(model, physical=False),
    "relevance, removed": lambda model: _relevance(model, physical=True),
    "filters removed": _filters,
    "filters masked after steps": lambda model: _filters(model, "after_step"),
    "filters masked before passes": lambda model: _filters(model, "before_forward"),
}
REFUSED = {
    "GSM": (lambda model: baselines.GSM(model, 0.5), "GSM ranks all entries"),
    "LC": (lambda model: baselines.LC(model, 0.5, 1e-3), "LC ranks all entries"),
    "CS": (lambda model: baselines.CS(model, 0.0, 10.0, 1e-4, 15, 1e-4), "CS has sharper masks"),
    "DST": (lambda model: baselines.DST(model, 1e-3, 1e-4), "DST asks in every step"),
    "block gates": (lambda model: BlockGates(model, 0.1, 0.1), "block gates are drawn anew"),
}


def _trained(method, captured, autocast=None, checkpoints=None, fused=False):
    compute = Compute(torch.device("cuda"), autocast, channels_last=True, captured=captured, fused=fused)
    data, model = _data(), compute.place(_network())
    batches = Batches(data, "train", BATCH, seed=3, shuffle=True, augment=True)
    trainer = Trainer(
        model,
        batches,
        weight_decay=5e-4,
        validation=Batches(data, "validation"),
        compute=compute,
        checkpoints=checkpoints,
        **METHODS[method](model),
    )
    trainer.fit([RATE / (1 + i / 10) for i in range(EPOCHS * len(batches))])
    return trainer


def _same(one, other):
    assert one.history == other.history
    for key, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[key]), key


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_captured_steps_train_as_eager_ones_bit_for_bit_and_again(method, autocast, graphs, capsys):
    eager = _trained(method, captured=False, autocast=autocast)
    _same(_trained(method, captured=False, autocast=autocast), eager)
    assert not graphs
    _same(_trained(method, captured=True, autocast=autocast), eager)
    # three eager steps, then replays of one and of several, and of the last batch of an epoch
    assert len(graphs) >= 2
    assert "captured" not in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_fused_layers_train_captured_as_eager_bit_for_bit_and_as_torchs_within_rounding(method, capsys):
    half = torch.bfloat16
    one = _trained(method, captured=True, autocast=half, fused=True)
    _same(_trained(method, captured=True, autocast=half, fused=True), one)
    _same(_trained(method, captured=False, autocast=half, fused=True), one)
    assert "captured" not in capsys.readouterr().err
    usual = _trained(method, captured=True, autocast=half)
    losses = [[row["train_loss"] for row in trainer.history] for trainer in (one, usual)]
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=0.05)


@pytest.mark.parametrize("batch", [128, 37])
def test_fused_layers_compute_what_torchs_compute(batch):
    """Every layer of a ResNet-20 that the kernels take, forward and backward, against float32 from the same numbers."""
    model = Compute(torch.device("cuda"), torch.bfloat16, channels_last=True, fused=True).place(
        _network("resnet20")
    )
    seen = []
    for layer in model.modules():
        if isinstance(layer, (Conv2d, BatchNorm2d)):
            layer.register_forward_hook(
                lambda layer, inputs, output: seen.append((layer, inputs[0].detach()))
            )
    with torch.autocast("cuda", torch.bfloat16):
        model(torch.randn(batch, 3, 32, 32, device="cuda"))
    taken = 0
    for layer, x in list(seen):  # the hooks go on
        x = x.bfloat16().to(memory_format=torch.channels_last).requires_grad_(x.shape[1] != 3)
        layer.fused = False
        with torch.autocast("cuda", torch.bfloat16):
            ours = (
                fused.convolution(layer, x) if isinstance(layer, Conv2d) else fused.norm(layer, x, relu=False)
            )
        taken += ours is not None
        g = torch.randn_like(ours)
        of = [layer.weight, x][: 1 + x.requires_grad]
        found = [ours, *torch.autograd.grad(ours, of, g)]
        wide = x.detach().float().requires_grad_(x.requires_grad)
        with torch.no_grad():
            layer.weight.copy_(layer.weight.bfloat16() if isinstance(layer, Conv2d) else layer.weight)
        exact = layer(wide)
        wanted = [exact, *torch.autograd.grad(exact, [layer.weight, wide][: len(of)], g.float())]
        for got, want in zip(found, wanted, strict=True):
            assert (got.float() - want).abs().max() < 0.02 * want.abs().max()
    assert taken == 21 + 21


@pytest.mark.parametrize("method", REFUSED)
def test_what_cannot_be_captured_is_refused_with_its_reason(method, graphs, capsys, monkeypatch):
    monkeypatch.setattr(steps, "_TOLD", set())
    make, reason = REFUSED[method]
    data, model = _data(), Compute(torch.device("cuda")).place(_network())
    batches = Batches(data, "train", BATCH, seed=3, shuffle=True, augment=True)
    trainer = Trainer(model, batches, hooks=make(model), compute=Compute(torch.device("cuda"), captured=True))
    trainer.fit([0.01] * EPOCHS * len(batches))
    assert reason in capsys.readouterr().err and not graphs


def test_a_pass_that_learns_nothing_leaves_the_statistics_of_an_eager_one(graphs):
    left = []
    for captured in (False, True):
        compute = Compute(torch.device("cuda"), torch.bfloat16, channels_last=True, captured=captured)
        batches = Batches(_data(), "train", BATCH, seed=3, shuffle=True, augment=True)
        trainer = Trainer(compute.place(_network()), batches, compute=compute)
        trainer.look()
        state = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
        trainer.fit([RATE] * 2 * len(batches))
        left.append((state, trainer.history))
    assert graphs and left[0][1] == left[1][1]
    for key, tensor in left[0][0].items():
        assert torch.equal(tensor, left[1][0][key]), key


def test_retraining_after_a_method_that_is_not_captured_begins_with_momentum_of_its_own(graphs):
    histories = []
    for captured in (False, True):
        compute = Compute(torch.device("cuda"), captured=captured)
        model = compute.place(_network())
        hook = baselines.GSM(model, 0.5)
        batches = Batches(_data(), "train", BATCH, seed=3, shuffle=True, augment=True)
        trainer = Trainer(model, batches, hooks=hook, compute=compute)
        trainer.fit([0.01] * 2 * len(batches))
        assert not graphs
        trainer.add_hook(KeepMasked(hook.finish(trainer)))
        trainer.fresh_optimizer(lr=0.01)
        trainer.fit([RATE] * 2 * len(batches))
        histories.append(trainer.history)
    assert graphs and histories[0] == histories[1]


class _Looks(Hooks):
    """Reads a value in each step, which no graph can, and says that it does not."""

    def in_graph(self, trainer):
        return ()

    def stepped(self, trainer):
        float(trainer._loss)


def _looked():
    """Histories without and with captures, and what was said; this process can capture nothing afterwards."""
    prepare_process(ExecutionSettings(deterministic=True))
    histories, said = [], io.StringIO()
    with contextlib.redirect_stderr(said):
        for captured in (False, True):
            how = Compute(torch.device("cuda"), captured=captured)
            batches = Batches(_data(), "train", BATCH, seed=3, shuffle=True, augment=True)
            for hook in (_Looks(), ()):  # the second trainer has nothing that a graph refuses
                trainer = Trainer(how.place(_network()), batches, hooks=hook, compute=how)
                trainer.fit([RATE] * 2 * len(batches))
                histories.append(trainer.history)
    return histories, said.getvalue()


def test_what_a_capture_refuses_is_trained_without_and_named():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        histories, said = pool.submit(_looked).result()
    assert "steps cannot be captured (" in said and said.count("\n") == 1
    assert histories[:2] == histories[2:]


def test_a_gpu_learns_what_a_cpu_learns():
    data = _data().to(torch.device("cpu"))
    losses = []
    for device in ("cuda", "cpu"):
        compute = Compute(torch.device(device), channels_last=True, captured=device == "cuda")
        batches = Batches(data.to(compute.device), "train", BATCH, seed=3, shuffle=True, augment=True)
        trainer = Trainer(_network(), batches, compute=compute)
        trainer.fit([RATE] * 4 * len(batches))
        losses.append([row["train_loss"] for row in trainer.history])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0][-1] < losses[0][0]


class _Memory:
    """Checkpoints in memory, on the CPU as those on a disk; stops the fit after an epoch."""

    def __init__(self, states, stop_after=None):
        self.states, self.stop_after = states, stop_after

    def load(self, fit):
        return self.states.get(fit)

    def offer(self, fit, state, finished):
        buffer = io.BytesIO()
        torch.save(state(), buffer)
        buffer.seek(0)
        self.states[fit] = torch.load(buffer, map_location="cpu", weights_only=True)
        if self.states[fit]["epochs_of_fit"] == self.stop_after:
            raise InterruptedError


@pytest.mark.parametrize("method", ["plain", "masks", "HALO", "gates", "DPF", "relevance, removed"])
def test_a_resumed_fit_equals_an_unbroken_one(method):
    states = {}
    with pytest.raises(InterruptedError):
        _trained(method, captured=True, checkpoints=_Memory(states, stop_after=2))
    _same(_trained(method, captured=True, checkpoints=_Memory(states)), _trained(method, captured=True))


def _stage(tmp_path, name, workers, rates, faulty=None, compilation="auto"):
    """Entries of a stage of plain training runs, one for each learning rate; the one of that number is faulty."""
    file = tmp_path / "images.npz"
    if not file.exists():
        (x_train, y_train), (x_test, y_test) = _images(200), _images(60, seed=1)
        np.savez(file, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    cell = Cell(architecture="resnet8", data=DatasetSettings(source="npz", path=str(file), validation=40))
    runs = []
    for seed, rate in enumerate(rates):
        training = Training(epochs=EPOCHS, batch_size=BATCH, learning_rate=rate, weight_decay=1e-4)
        kind = Faulty if seed == faulty else Dense
        runs.append(kind(variant="dense", cell=cell, seed=seed, training=training).run)
    execution = ExecutionSettings(
        device="cuda", precision="bfloat16", compilation=compilation, workers=workers
    )
    store = Store(tmp_path / name, execution)
    return execute(runs, store, execution, name)


class Faulty(Dense):
    """Asks a GPU for what is not there, which nothing in its process survives."""

    def execute(self, context):
        table = torch.zeros(1, device=context.compute.device)
        return table[torch.full((1,), 10**6, device=context.compute.device)].sum().item()


def test_a_fault_ends_its_run_alone_and_the_others_go_on(tmp_path):
    entries = _stage(tmp_path, "fault", 4, [RATE] * 6, faulty=2)
    failures = [entry.record.failure for entry in entries]
    assert failures == [None, None, "died", None, None, None]
    whole = _stage(tmp_path, "whole", 4, [RATE] * 6)
    for number in (0, 1, 3, 4, 5):
        assert _record(entries[number]) == _record(whole[number])


def _record(entry):
    return json.dumps(entry.record.content(), sort_keys=True)


@pytest.mark.parametrize("compilation", ["auto", "capture"])
def test_runs_together_leave_the_records_of_runs_alone_and_a_diverging_one_ends_alone(tmp_path, compilation):
    rates = [RATE] * 3 + [1e12] + [RATE] * 4
    alone, together = (
        [_record(entry) for entry in _stage(tmp_path, name, workers, rates, compilation=compilation)]
        for name, workers in (("alone", 1), ("together", 8))
    )
    assert together == alone
    status = [json.loads(record)["status"] for record in together]
    assert status == ["ok"] * 3 + ["failed"] + ["ok"] * 4


def test_many_short_runs_capture_and_replay_side_by_side(tmp_path):
    """More captures than torch has streams, while the work of other threads goes on."""
    alone, together = (
        [_record(entry) for entry in _stage(tmp_path, name, workers, [RATE] * 48)]
        for name, workers in (("alone", 1), ("together", 16))
    )
    assert together == alone
    assert {json.loads(record)["status"] for record in together} == {"ok"}


def test_a_batch_that_does_not_fit_is_named_with_one_that_does():
    gc.collect()
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + 2**30
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        count = 4096
        pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        parts = dict(zip(SPLITS, np.split(np.arange(count), [count - 2, count - 1]), strict=True))
        data = make_dataset(
            "made up", parts, pixels, np.arange(count) % 10, 10, 255.0, AugmentationSettings()
        )
        compute = Compute(torch.device("cuda"), captured=True)
        batches = Batches(data.to(compute.device), "train", count)
        with pytest.raises(RunFailed, match=r"out of memory on cuda.*a batch of \d+ fits"):
            Trainer(_network("resnet56"), batches, compute=compute).fit([RATE])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_a_network_that_is_dropped_frees_its_memory():
    # cuBLAS keeps a work space for each of torch's 32 streams, which a capture takes in turn
    for _ in range(33):
        _trained("plain", captured=True)
    gc.collect()
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        for _ in range(3):
            _trained("plain", captured=True)
        assert torch.cuda.memory_allocated() < before + 2**20
    finally:
        gc.enable()
