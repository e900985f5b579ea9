"""The training core: SGD, hooks, divergence, checkpoints, determinism."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo import OptimizedModule

from common.core.compute import Compute
from common.core.data import Batches, FixedBatches
from common.core.failures import Diverged, RunFailed
from common.core.loading import load
from common.core.models import build
from common.core.models.network import weights_in_place
from common.core.pruning import channels
from common.core.sgd import SGD
from common.core.trainer import Hooks, Trainer
from common.settings import DatasetSettings, SettingsError
from common.statistics import inference


def _network(dropout=0.0):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(144, 10),
    ]
    return nn.Sequential(*layers)


def _batches(count=4, size=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, size, 1, 8, 8, generator=generator)
    y = torch.randint(10, (count, size), generator=generator)
    return FixedBatches(list(zip(x, y)))


def test_a_fit_equals_the_plain_loop():
    rates = [0.1, 0.05, 0.02, 0.01] * 2
    model, twin = _network(), _network()
    trainer = Trainer(model, _batches(), momentum=0.9, nesterov=True, weight_decay=0.01)
    trainer.fit(rates)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    for epoch in range(2):
        for rate, (x, y) in zip(rates[4 * epoch :], _batches().epoch(epoch)):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            nn.functional.cross_entropy(twin(x), y).backward()
            optimizer.step()
    for one, other in zip(model.state_dict().values(), twin.state_dict().values()):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9, "weight_decay": 0.01}, {"momentum": 0.9, "nesterov": True}]
)
def test_the_optimiser_has_the_numbers_of_torchs_own(options):
    models, states = [], []
    for kind in (SGD, torch.optim.SGD):
        model = _network()
        first, *others = model.parameters()
        optimizer = kind([{"params": [first]}], lr=0.1, fused=True, **options)
        optimizer.add_param_group({"params": others, "weight_decay": 0.5})
        for epoch in range(2):
            for x, y in _batches().epoch(epoch):
                optimizer.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(model(x), y).backward()
                first.grad = first.grad if epoch else None  # a layer that takes no part at first
                optimizer.step()
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer.load_state_dict(saved)
        models.append(model.state_dict())
        states.append(saved)
    assert all(torch.equal(one, other) for one, other in zip(*(model.values() for model in models)))
    assert states[0]["param_groups"] == states[1]["param_groups"]
    buffers = [[part.get("momentum_buffer") for part in state["state"].values()] for state in states]
    assert (
        len(buffers[0])
        == len(buffers[1])
        == (len(states[0]["param_groups"][1]["params"]) + 1) * bool(options)
    )
    assert all(torch.equal(one, other) for one, other in zip(*buffers))


def test_weights_stand_in_for_a_networks_own_and_gradients_go_to_them():
    model, (x, _) = _network(), next(iter(_batches().epoch(0)))
    own = dict(model.named_parameters())
    weights = {name: (2 * own[name].detach()).requires_grad_() for name in ("0.weight", "5.bias")}
    with weights_in_place(model, weights):
        found = model(x)
    found.sum().backward()
    gradients = {name: weight.grad for name, weight in weights.items()}
    assert own["0.weight"].grad is None and own["0.bias"].grad is not None
    for weight in weights.values():
        weight.grad = None
    expected = torch.func.functional_call(model, weights, (x,))
    assert torch.equal(found, expected)
    expected.sum().backward()
    assert all(torch.equal(gradients[name], weight.grad) for name, weight in weights.items())
    with pytest.raises(KeyError), weights_in_place(model, {**weights, "0.scale": x}):
        pass
    assert all(model.get_parameter(name) is parameter for name, parameter in own.items())


def test_history_has_the_loss_and_accuracy_of_each_epoch():
    trainer = Trainer(_network(), _batches(), validation=_batches(1))
    trainer.fit([0.0] * 8, "idle")
    trainer.fit([0.1] * 4, "train")
    assert [row["phase"] for row in trainer.history] == ["idle", "idle", "train"]
    assert [row["epoch"] for row in trainer.history] == [0, 1, 2]
    assert trainer.history[0]["train_loss"] == pytest.approx(trainer.history[1]["train_loss"])
    assert set(trainer.history[2]) >= {"lr", "train_loss", "train_accuracy", "validation_accuracy"}


class _Recorder(Hooks):
    def __init__(self):
        self.calls = []

    def epoch_started(self, trainer, epoch):
        self.calls.append(("started", epoch))

    def loss(self, trainer):
        return 0.5 * 0.1 * sum((p**2).sum() for p in trainer.model.parameters())

    def gradients_ready(self, trainer):
        self.calls.append(("gradients", trainer.iteration))

    def stepped(self, trainer):
        with torch.no_grad():
            trainer.model[0].weight[0] = 0

    def epoch_ended(self, trainer, epoch):
        self.calls.append(("ended", epoch))


def test_hooks_are_called_in_order_and_can_change_loss_and_weights():
    hook = _Recorder()
    trainer = Trainer(_network(), _batches(2), momentum=0.0, hooks=hook)
    trainer.fit([0.1] * 4)
    epoch = lambda e: [("started", e), ("gradients", 2 * e), ("gradients", 2 * e + 1), ("ended", e)]  # noqa: E731
    assert hook.calls == epoch(0) + epoch(1)
    assert trainer.model[0].weight[0].abs().max() == 0
    decayed = Trainer(_network(), _batches(2), momentum=0.0, weight_decay=0.1)
    decayed.fit([0.1] * 4)
    free = [p for name, p in trainer.model.named_parameters() if name == "5.weight"]
    assert not torch.equal(free[0], decayed.model[5].weight)  # row 0 of the conv is zero only in one of them
    plain = Trainer(_network(), _batches(1), momentum=0.0, weight_decay=0.1)
    plain.fit([0.1])
    by_loss = Trainer(
        _network(), _batches(1), momentum=0.0, hooks=type("L", (Hooks,), {"loss": _Recorder.loss})()
    )
    by_loss.fit([0.1])
    torch.testing.assert_close(by_loss.model[5].weight, plain.model[5].weight)


def test_effective_weights_are_used_in_training_and_evaluation():
    class Halved(Hooks):
        def weights(self, trainer):
            return {"5.weight": trainer.model[5].weight * 0.5}

    model, twin = _network(), _network()
    twin[5].weight.data *= 0.5
    trainer, other = Trainer(model, _batches(), hooks=Halved()), Trainer(twin, _batches())
    assert trainer.evaluate(_batches()) == pytest.approx(other.evaluate(_batches()))
    trainer.fit([0.0] * 4)
    other.fit([0.0] * 4)
    assert trainer.history[0]["train_loss"] == pytest.approx(other.history[0]["train_loss"])
    torch.testing.assert_close(model[5].weight.grad, 0.5 * twin[5].weight.grad)


def test_weight_decay_can_leave_parameters_out():
    trainer = Trainer(_network(), _batches(), weight_decay=0.5, decays=lambda name, p: p.ndim > 1)
    decay = {id(p): g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert {n: decay[id(p)] for n, p in trainer.model.named_parameters() if n.startswith(("0", "1."))} == {
        "0.weight": 0.5, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0,
    }  # fmt: skip


def test_divergence_ends_the_run_with_its_reason():
    with pytest.raises(Diverged, match="training loss is (nan|inf) in epoch"):
        Trainer(_network(), _batches(), weight_decay=1.0).fit([1e30] * 40)


def test_iterations_must_be_whole_epochs():
    with pytest.raises(ValueError, match="5 learning rates are not whole epochs of 4"):
        Trainer(_network(), _batches()).fit([0.1] * 5)


class _Memory:
    """Keeps every state of a fit, and can stop the run after some epochs."""

    def __init__(self, stop_after=None, states=None):
        self.states, self.stop_after, self.offers = states if states is not None else {}, stop_after, 0

    def load(self, fit):
        return copy.deepcopy(self.states.get(fit))

    def offer(self, fit, state, finished):
        self.states[fit] = copy.deepcopy(state())
        self.offers += 1
        if self.offers == self.stop_after:
            raise InterruptedError


class _Counter(Hooks):
    """A hook with state of its own: it scales gradients by the number of steps."""

    def __init__(self):
        self.steps = 0

    def gradients_ready(self, trainer):
        self.steps += 1
        for parameter in trainer.model.parameters():
            parameter.grad *= 1 / self.steps

    def state(self):
        return {"steps": self.steps}

    def load_state(self, trainer, state):
        self.steps = state["steps"]


def _trained(checkpoints=None):
    data = load(DatasetSettings(train=96))
    trainer = Trainer(
        _network(dropout=0.3),
        Batches(data, "train", 32, seed=5, shuffle=True),
        weight_decay=1e-3,
        hooks=_Counter(),
        seed=5,
        checkpoints=checkpoints,
    )
    trainer.fit([0.1] * 9, "one")
    trainer.fit([0.05] * 6, "two")
    return trainer


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_a_resumed_fit_equals_an_unbroken_one_bit_for_bit(stop_after):
    whole = _trained()
    states = {}
    with pytest.raises(InterruptedError):
        _trained(_Memory(stop_after, states))
    resumed = _trained(_Memory(None, states))
    assert resumed.history == whole.history
    for one, other in zip(whole.model.state_dict().values(), resumed.model.state_dict().values()):
        assert torch.equal(one, other)


def test_a_missing_gpu_is_named():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SettingsError, match="execution.device = 'cuda:1': no CUDA device"):
        Compute.choose("cuda:1")
    assert Compute.choose("auto", "float32").device.type == "cpu"


@pytest.mark.parametrize(("capabilities", "chosen"), [({"amx_bf16": True}, torch.bfloat16), ({}, None)])
def test_auto_precision_on_a_cpu_depends_on_its_matrix_units(monkeypatch, capabilities, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert Compute.choose("cpu").autocast is chosen
    assert Compute.choose("cpu", "float32").autocast is None


@pytest.mark.slow
@pytest.mark.long
def test_the_fast_mode_is_equivalent_in_accuracy_over_seeds():
    """bfloat16 and kernels of free choice against float32 in a fixed order: within 2 points, by two one-sided tests."""
    data = load(DatasetSettings())
    accuracy = {"float32": [], "bfloat16": []}
    for precision, found in accuracy.items():
        compute = Compute.choose("auto", precision, "auto")
        torch.use_deterministic_algorithms(precision == "float32", warn_only=True)
        for seed in range(8):
            model = build("digits_cnn", classes=10, image_shape=(1, 8, 8), widths=[8, 16, 16], seed=seed)
            batches = Batches(data.to(compute.device), "train", 50, seed=seed, shuffle=True)
            trainer = Trainer(model, batches, compute=compute)
            trainer.fit([0.05] * len(batches) * 6)
            found.append(trainer.evaluate(Batches(data.to(compute.device), "test"))["accuracy"])
    torch.use_deterministic_algorithms(False)
    exact, fast = accuracy["float32"], accuracy["bfloat16"]
    assert fast != exact
    low, high = inference.Student(inference.differences(fast, exact)).ends(0.05)
    assert -0.02 < low and high < 0.02


@pytest.mark.slow
def test_a_compiled_network_trains_alike_also_after_it_has_shrunk():
    data = load(DatasetSettings(train=120))
    scores = []
    for compilation in ("off", "compile"):
        compute = Compute.choose("cpu", "float32", compilation)
        assert compute.compiled == (compilation == "compile")
        model = build("digits_cnn", classes=10, image_shape=(1, 8, 8), widths=[4, 8, 8], seed=1)
        trainer = Trainer(model, Batches(data, "train", 40, shuffle=True), compute=compute)
        trainer.fit([0.05] * 6)
        keep = {group.name: torch.arange(3) for group in model.channel_groups()}
        channels.remove(model, keep, trainer.optimizer)
        trainer.fit([0.05] * 6)
        scores.append([row["train_loss"] for row in trainer.history])
        assert isinstance(trainer._network(), OptimizedModule) == (compilation == "compile")
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)
    assert Compute.choose("cpu").compiled is False


def test_training_goes_on_from_where_another_stood():
    whole = Trainer(_network(), _batches(), momentum=0.9)
    whole.fit([0.1] * 2 * len(whole.batches))
    states = {"model": whole.model.state_dict(), "optimizer": whole.optimizer.state_dict()}
    states, history = copy.deepcopy(states), list(whole.history)
    whole.fit([0.1] * len(whole.batches))
    other = Trainer(_network(), _batches(), momentum=0.9)
    other.go_on_from(2, history, **states)
    other.fit([0.1] * len(other.batches))
    assert other.history == whole.history and other.epochs_done == 3
    assert len(history) == 2  # the row of another training is not added to


def test_a_fresh_optimizer_has_no_momentum_and_the_options_given():
    trainer = Trainer(_network(), _batches(), momentum=0.9, decays=lambda name, p: p.ndim > 1)
    trainer.fit([0.1] * len(trainer.batches))
    weight = next(trainer.model.parameters())
    assert trainer.momentum_buffer(weight) is not None
    trainer.fresh_optimizer(weight_decay=0.5)
    assert trainer.momentum_buffer(weight) is None
    assert {(g["weight_decay"], g["momentum"]) for g in trainer.optimizer.param_groups} == {(0.5, 0.9)}


def test_a_hook_that_is_added_brings_its_parameters():
    own = torch.nn.Parameter(torch.ones(()))

    class Scaled(Hooks):
        def parameter_groups(self):
            return [{"params": [own]}]

        def loss(self, trainer):
            return own.square()

    trainer = Trainer(_network(), _batches())
    trainer.add_hook(Scaled())
    trainer.fit([0.1] * len(trainer.batches))
    assert own < 1


class _Hungry(nn.Module):
    """A network that has memory for `most` images."""

    def __init__(self, most):
        super().__init__()
        self.linear, self.most = nn.Linear(64, 10), most

    def forward(self, images):
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.linear(images.flatten(1))


@pytest.mark.parametrize("most, fits", [(5, "a batch of 4 fits"), (0, "not even one image fits")])
def test_a_batch_that_does_not_fit_is_named_with_one_that_does(most, fits):
    with pytest.raises(
        RunFailed, match=rf"out of memory on cpu with a batch of 8 images of \(1, 8, 8\); {fits}"
    ):
        Trainer(_Hungry(most), _batches()).fit([0.1] * 4)
