"""HALO: penalties act, lambdas move as they should, masks hold, validation chooses, bad input is named."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from common.core.compute import Compute
from common.core.data import FixedBatches
from common.core.experiment import listed
from common.core.failures import Diverged, RunFailed
from common.core.models import build
from common.core.pruning.masks import prunable
from common.core.run import Context, Needed
from common.core.trainer import Trainer
from common.records import Record
from common.settings import DatasetSettings, ExecutionSettings, Profile, SettingsError
from common.stage.scheduler import in_order
from common.stage.store import Store
from common.stage.worker import perform
from replications.halo import measures, method, protocol

DATA = DatasetSettings(train=90, validation=50, test=60)
SMALL = {
    "seeds": (0,),
    "training": {"epochs": 2, "milestones": (0.5,), "batch_size": 23},
    "targets": (0.5, 0.9),
    "fine_tuning_epochs": 1,
}
FINE_TUNED = dict.fromkeys(protocol.FINE_TUNED, (0.95, 0.98)) | {"magnitude-iterative": (0.9, 0.95, 0.98)}
SINGLE = {"l1": [{"xi": 1e-3}], "sws": [{"xi": 1e-3}], "mcp": [{"xi": 1e-2, "psi": 30}], "fine_tuning": [0.1]}
DECAY = [{"xi": 1e-3, "psi": 1e-8, "lambda_weight_decay": 0.2}]
SINGLE |= {"halo": [{"xi": 1e-3, "psi": 1e-2}], "halo_decay": DECAY}


def _profile(**changes):
    data, execution = DATA, ExecutionSettings(device="cpu", precision="float32")
    settings = protocol.Settings.model_validate(SMALL | changes)
    return Profile(name="test", dataset=data, execution=execution, paper=settings)


def _listed(**changes):
    return in_order(listed("halo", protocol.Experiment, _profile(**changes)))


def _executed(run, done):
    """The outcome of a run, after all that it needs; `done` remembers."""
    if run.settings_hash not in done:
        needs = []
        for need in run.needs:
            outcome = _executed(need, done)
            record = Record.model_construct(
                status="ok", metrics=outcome.metrics, details=outcome.details, settings_hash=""
            )
            needs.append(Needed(record, outcome.state))
        context = Context(run, Compute.choose("cpu", "float32"), tuple(needs))
        done[run.settings_hash] = run.job.execute(context)
    return done[run.settings_hash]


def _find(runs, variant, target):
    return next(run for run in runs if (run.variant, run.target) == (variant, target))


def _problem(seed=0):
    """A convolution and a linear layer on random images, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    batch = torch.randn(12, 1, 4, 4, generator=generator, dtype=torch.float64), torch.arange(12) % 3
    return model, FixedBatches([batch])


# ---------------------------------------------------------------------------------------------- penalties


@pytest.mark.parametrize("kind", ["l1", "sws", "mcp", "halo", "halo-L1-target", "halo-L2-target"])
def test_closed_form_gradients_are_those_of_the_value(kind):
    torch.manual_seed(1)
    weights = [torch.randn(3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    training = method.LambdaTraining([], init=0.7)
    penalty = {
        "l1": lambda: method.L1(weights, 0.3, lambda_init=0.7),
        "mcp": lambda: method.MCP(weights, 0.3, 2.0),
        "sws": lambda: method.SWS(weights, 0.3, 0.2, training),
        "halo": lambda: method.HALO(weights, 0.3, 0.2, training),
        "halo-L1-target": lambda: method.HALO(weights, 0.3, 0.2, training, 3.0, "L1"),
        "halo-L2-target": lambda: method.HALO(weights, 0.3, 0.2, training, 3.0, "L2"),
    }[kind]()
    variables = [*penalty.tensors, *getattr(penalty, "lambdas", [])]
    for tensor in variables:
        tensor.requires_grad_()
    expected = torch.autograd.grad(penalty.value(), variables)
    with torch.no_grad():
        found = penalty.gradients() if hasattr(penalty, "lambdas") else (penalty.weight_gradients(), [])
    torch.testing.assert_close([*found[0], *found[1]], list(expected))


def test_lambdas_take_the_step_of_torch_s_own_sgd_at_the_old_weights():
    model, batches = _problem()
    twin = nn.Sequential(*[type(m)(*a) for m, a in ((model[0], (1, 4, 3)), (model[3], (16, 3)))]).double()
    reference = nn.Sequential(twin[0], nn.ReLU(), nn.Flatten(), twin[1])
    reference.load_state_dict(model.state_dict())
    rates, lambda_rates = [0.1, 0.1, 0.01], [0.2, 0.05, 0.05]
    training = method.LambdaTraining(lambda_rates, momentum=0.8, weight_decay=0.03)
    halo = method.HALO(method.penalised(model, "conv"), 0.02, 0.05, training)
    trainer = Trainer(model, batches, momentum=0.8, weight_decay=0.01, hooks=halo)
    trainer.fit(rates)

    lambdas = [torch.ones_like(p).requires_grad_() for p in reference[0].parameters()]
    of_weights = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.8, weight_decay=0.01)
    of_lambdas = torch.optim.SGD(lambdas, lr=0.1, momentum=0.8, weight_decay=0.03)
    for rate, lambda_rate in zip(rates, lambda_rates):
        of_weights.param_groups[0]["lr"], of_lambdas.param_groups[0]["lr"] = rate, lambda_rate
        images, labels = next(batches.epoch(0))
        loss = nn.functional.cross_entropy(reference(images), labels)
        for weight, scale in zip(reference[0].parameters(), lambdas):
            loss = loss + 0.02 * (weight.abs() / scale**2).sum() + 0.05 * scale.abs().sum()
        of_weights.zero_grad()
        of_lambdas.zero_grad()
        loss.backward()
        of_weights.step()
        of_lambdas.step()
    torch.testing.assert_close(list(model.parameters()), list(reference.parameters()))
    torch.testing.assert_close(halo.lambdas, [part.detach() for part in lambdas])


def test_a_penalty_moves_weights_to_zero_and_is_logged():
    model, batches = _problem()
    penalty = method.L1(method.penalised(model, "conv"), 0.2)
    before = measures.near_zero(penalty.tensors, [0.05])
    Trainer(model, batches, hooks=penalty).fit([0.02] * 80)
    assert measures.near_zero(penalty.tensors, [0.05])[0] > before[0]
    assert len(penalty.log) == 80 and penalty.log[-1]["penalty"] < penalty.log[0]["penalty"]


def test_lambdas_stay_in_single_precision_and_keep_the_weights_layout():
    weight = torch.randn(4, 3, 3, 3).to(torch.bfloat16).to(memory_format=torch.channels_last)
    (lambdas,) = method.HALO([weight], 0.1, 0.1, method.LambdaTraining([])).lambdas
    assert lambdas.dtype == torch.float32 and lambdas.is_contiguous(memory_format=torch.channels_last)


def test_large_tensors_that_take_their_steps_alone_take_the_same_steps(monkeypatch):
    def trained():
        torch.manual_seed(0)
        model, batches = _problem()
        halo = method.HALO(method.penalised(model, "conv"), 0.02, 0.05, method.LambdaTraining([0.1] * 3))
        Trainer(model, batches, hooks=halo).fit([0.1] * 3)
        return len(halo.parts()), [*halo.lambdas, *model.parameters()]

    parts, together = trained()
    assert parts == 1
    monkeypatch.setattr(method, "_LARGE_TENSOR", 1)
    parts, alone = trained()
    assert parts == 2
    torch.testing.assert_close(alone, together, rtol=0, atol=0)


def test_lambdas_follow_the_memory_format_that_the_trainer_gives_the_weights():
    model = build("resnet8", classes=3, image_shape=(1, 8, 8))
    batches = FixedBatches([(torch.randn(6, 1, 8, 8), torch.arange(6) % 3)])
    halo = method.HALO(method.penalised(model, "conv"), 1e-3, 1e-3, method.LambdaTraining([0.1]))
    Trainer(model, batches, hooks=halo, compute=Compute.choose("cpu", "float32")).fit([0.1])
    assert [part.stride() for part in halo.lambdas] == [weight.stride() for weight in halo.tensors]
    assert halo.lambdas[1].is_contiguous(memory_format=torch.channels_last)


def test_a_penalty_that_is_not_finite_stops_the_run():
    model, batches = _problem()
    halo = method.HALO(method.penalised(model, "conv"), 0.1, 0.1, method.LambdaTraining([0.1] * 2))
    with torch.no_grad():
        halo.tensors[0][0] = 0.0
        halo.lambdas[0][0] = 0.0
    with pytest.raises(Diverged, match="is nan: a lambda is zero"):
        halo.statistics()
    with pytest.raises(Diverged):
        Trainer(model, batches, hooks=halo).fit([0.1] * 2)


def test_an_interrupted_training_goes_on_as_if_nothing_had_happened():
    def halo(model):
        return method.HALO(method.penalised(model, "conv"), 0.02, 0.05, method.LambdaTraining([0.1] * 4))

    model, batches = _problem()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = halo(model)
    Trainer(model, batches, hooks=whole).fit([0.1] * 4)
    unbroken = [part.clone() for part in (*model.parameters(), *whole.lambdas)]

    class Kept:
        saved = None

        def load(self, fit):
            return self.saved

        def offer(self, fit, state, finished):
            if self.saved is None:
                self.saved = torch.utils._pytree.tree_map(
                    lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, state()
                )

    kept = Kept()
    model.load_state_dict(start)
    Trainer(model, batches, hooks=halo(model), checkpoints=kept).fit([0.1] * 4)
    model.load_state_dict(start)
    resumed = halo(model)
    Trainer(model, batches, hooks=resumed, checkpoints=kept).fit([0.1] * 4)
    torch.testing.assert_close([*model.parameters(), *resumed.lambdas], unbroken, rtol=0, atol=0)
    assert len(resumed.log) == 4


def test_psi_grows_by_epochs_only_where_it_is_asked_to():
    assert method.psi_schedule(1e-3, 0.1, None, 3) == [1e-3] * 3
    assert method.psi_schedule(1e-3, 0.1, 2, 4) == pytest.approx([0.1, 0.1, 10, 10])
    model, batches = _problem()
    training = method.LambdaTraining([0.0] * 2, psi_by_epoch=[1.0, 3.0])
    halo = method.HALO(method.penalised(model, "conv"), 0.1, 1.0, training)
    Trainer(model, batches, hooks=halo).fit([0.0] * 2)
    count = sum(part.numel() for part in halo.lambdas)
    assert halo.log[1]["penalty"] - halo.log[0]["penalty"] == pytest.approx(2 * count)


def test_stationary_lambda_balances_the_gradient_and_refuses_a_penalty_without_a_minimum():
    sizes = torch.tensor([0.0, 1e-7, 0.02, 3.0], dtype=torch.float64)
    root, penalty = method.stationary_lambda(sizes, 0.01, 0.003, 0.02)
    assert root[0] == penalty[0] == 0
    torch.testing.assert_close(2 * 0.01 * sizes[1:] / root[1:] ** 3, 0.003 + 0.02 * root[1:])
    with pytest.raises(ValueError, match="no finite lambda"):
        method.stationary_lambda(sizes, 0.01, 0.0, 0.0)


# ---------------------------------------------------------------------------------------- masks, measures


def test_the_cut_refuses_impossible_shares_and_empty_networks():
    weights = {"w": torch.tensor([1.0, -2.0, 3.0])}
    for share in (1.0, 1.2, -0.1):
        with pytest.raises(ValueError, match="at least 0 and below 1 is needed"):
            method.cut(weights, share)
    with pytest.raises(ValueError, match="nothing is left"):
        method.cut({"w": torch.zeros(3)}, 0.5)


@pytest.mark.parametrize("layers", ["conv", "conv+linear"])
def test_which_layers_are_penalised_and_pruned(layers):
    model = build("lenet5", classes=10, image_shape=(1, 28, 28))
    found = {id(p) for p in method.penalised(model, layers)}
    wanted = {
        id(p) for n, p in model.named_parameters() if layers == "conv+linear" or n.startswith("features")
    }
    assert found == wanted
    assert all(weight.dim() > 1 for weight in prunable(model, layers).values())


def test_directions_of_features():
    flat = torch.ones(20, 3)
    assert measures.directions(measures.energy(flat), 0.9) == 0
    line = torch.arange(20.0)[:, None] * torch.tensor([[1.0, -2.0, 0.5]])
    assert measures.directions(measures.energy(line), 0.99) == 1
    outputs = torch.arange(16.0).view(1, 2, 2, 4)
    assert measures.features(outputs, "corner").tolist() == [[0.0, 8.0]]
    assert measures.features(outputs, "mean").tolist() == [[3.5, 11.5]]


# ---------------------------------------------------------------------------------------------- protocol


@pytest.mark.slow
def test_every_variant_runs_and_is_measured():
    runs, done = _listed(trials=SINGLE, variants=dict.fromkeys(protocol.TRAINED, "all") | FINE_TUNED), {}
    outcomes = {(run.variant, run.target): _executed(run, done) for run in runs}
    assert not any(run.variant.startswith("tuning") for run in runs)
    for (variant, target), outcome in outcomes.items():
        assert 0 <= outcome.metrics["test_accuracy"] <= 1
        if target:
            total, kept = 23184, 23184 - outcome.details["pruned"]
            assert outcome.cost["nonzero_weights"] == kept + 640
            # the rule takes one weight more, in each round
            assert target * total <= outcome.details["pruned"] + 1e-6 <= target * total + 4
            assert outcome.metrics["kept_magnitude"] > 0
            assert abs(outcome.details["float32_index"] - outcome.details["index"]) <= 1
        rounds = FINE_TUNED.get(variant, ())
        extra = 0 if not rounds else rounds.index(target) + 1 if variant == "magnitude-iterative" else 1
        shorter = variant in ("none-shortened", "magnitude-equal-budget")
        assert outcome.metrics["training_epochs"] == 2 + extra - shorter
    trained = outcomes["halo", 0.0]
    assert -1 <= trained.metrics["lambda_correlation"] <= 1
    assert {"lambda_median", "penalty", "near_zero_0.001", "validation_accuracy"} <= set(trained.curves[-1])
    assert "lambda_correlation_kept" in outcomes["halo", 0.9].metrics
    assert "lambda_correlation" not in outcomes["sws", 0.0].metrics


def test_magnitude_pruning_at_equal_budget_has_the_whole_schedule_in_fewer_epochs():
    runs = _listed(trials=SINGLE, variants={"magnitude-equal-budget": (0.95,)}, training={"epochs": 9})
    start = _find(runs, "magnitude-equal-budget", 0.95).job.start
    assert start.training.epochs + 1 == 9 and start.penalty == "none"
    assert start.rates(4)[0] == pytest.approx([0.1] * 16 + [0.01] * 8 + [0.001] * 8)


def test_fan_out_networks_start_otherwise_and_magnitude_pruning_goes_on_from_them():
    variants = {"none": "all", "none-fan-out": "all", "halo-fan-out": "all", "magnitude-fan-out": (0.95,)}
    runs, first = _listed(trials=SINGLE, variants=variants), {}
    for variant in ("none", "none-fan-out", "halo-fan-out"):
        job = _find(runs, variant, 0.0).job.model_copy(
            update={
                "training": protocol.Recipe(epochs=1, batch_size=90, learning_rate=1e-12, milestones=()),
                "strength": None,
            }
        )
        trainer, _, _ = job.trained(Context(job.run, Compute.choose("cpu", "float32"), ()))
        first[variant] = next(iter(prunable(trainer.model, "conv").values()))
    # 1 input, 16 outputs: a quarter of the standard deviation
    torch.testing.assert_close(first["none-fan-out"] * 4, first["none"], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(first["halo-fan-out"], first["none-fan-out"], rtol=1e-3, atol=1e-6)
    assert _find(runs, "magnitude-fan-out", 0.95).job.start == _find(runs, "none-fan-out", 0.0).job


def test_the_low_rate_of_fine_tuning_is_not_tuned():
    trials = {name: of * 2 for name, of in SINGLE.items()}
    runs = _listed(trials=trials, variants={"magnitude-low-rate": (0.95,)})
    job = _find(runs, "magnitude-low-rate", 0.95).job
    assert isinstance(job, protocol.FineTune) and job.training.learning_rate == 0.001


def test_weight_decay_pulls_the_lambdas_of_halo_decay():
    job = _find(_listed(trials=SINGLE, variants={"halo-decay": "all"}), "halo-decay", 0.0).job
    model = build("digits_cnn", classes=10, image_shape=(1, 8, 8))
    halo = job.penalty_on(model, 1)
    assert (halo.psi, halo.training.weight_decay) == (1e-8, 0.2)


def test_official_rates_differ():
    variants = dict.fromkeys(["none", "halo", "halo-official"], "all")
    runs = _listed(trials=SINGLE, variants=variants, targets=(0.5,))
    rates = {run.variant: run.job.rates(1) for run in runs if run.target == 0}
    assert rates["none"] == ([0.1, 0.1 * 0.1], None)
    assert rates["halo"][0] == rates["halo"][1] == rates["none"][0]
    assert rates["halo-official"][0] == rates["none"][0]
    assert rates["halo-official"][1] == pytest.approx([0.1, 0.001])


def test_each_seed_tries_every_setting_once_and_chooses_among_them_at_each_target():
    runs = _listed(variants={"halo": "all"}, seeds=(3, 4))
    trained = [run for run in runs if isinstance(run.job, protocol.Train)]
    assert [(run.seed, run.variant) for run in trained] == [
        (seed, f"tuning-halo-{number}") for seed in (3, 4) for number in range(3)
    ]
    assert [run.job.strength for run in trained[:3]] == list(protocol.TrialSettings().halo)
    for target in (0.5, 0.9):
        chosen = _find(runs, "halo", target)
        assert [(need.job.start.run, need.target, need.seed) for need in chosen.needs] == [
            (run, target, 3) for run in trained[:3]
        ]


def test_the_best_on_validation_images_is_taken_as_it_is():
    trials = {name: of * 3 for name, of in SINGLE.items()}
    trials["halo"] = [{"xi": 1e-3, "psi": 1e-2}, {"xi": 1e-5, "psi": 1e-5}, {"xi": 1e-1, "psi": 1.0}]
    runs = _listed(trials=trials, variants={"halo": (0.9,)})
    chosen, done = _find(runs, "halo", 0.9), {}
    found = _executed(chosen, done)
    tried = [done[need.settings_hash] for need in chosen.needs]
    best = max(tried, key=lambda trial: trial.metrics["validation_accuracy"])
    assert len({trial.metrics["validation_accuracy"] for trial in tried}) > 1
    assert found.metrics == best.metrics and found.cost == best.cost
    assert found.details["chosen"] == best.details["chosen"]
    assert {"accuracy_before_mask", "lambda_correlation", "directions_mean"} <= found.metrics.keys()


@pytest.mark.parametrize("variant", ["magnitude-one-shot", "magnitude-equal-budget", "magnitude-iterative"])
def test_the_rate_of_fine_tuning_is_chosen_and_one_that_diverges_loses(variant, tmp_path):
    trials = {name: of * 2 for name, of in SINGLE.items()} | {"fine_tuning": [1e30, 0.01]}
    targets = FINE_TUNED[variant][:-1]
    runs = _listed(trials=trials, variants={variant: targets})
    store, execution = Store(tmp_path), ExecutionSettings(device="cpu", precision="float32")
    records = {}
    for run in runs:
        record = perform(run, store, execution, keep_state=True).record
        records[run.variant, run.target] = record
    assert records[variant, targets[-1]].details["chosen"] == 0.01
    assert records[f"tuning-{variant}-0", targets[0]].root.failure == "diverged"
    assert {record.status for name, record in records.items() if not name[0].endswith("-0")} == {"ok"}
    wild = {name: of * 2 for name, of in SINGLE.items()} | {"fine_tuning": [1e30, 1e29]}
    runs, store = _listed(trials=wild, variants={variant: targets}), Store(tmp_path / "wild")
    *_, last = (perform(run, store, execution, keep_state=True).record for run in runs)
    assert last.variant == variant and last.root.failure == "diverged"


def test_fine_tuning_keeps_pruned_weights_at_zero_and_rounds_go_on_from_one_another():
    runs, done = (
        _listed(trials=SINGLE, variants={"magnitude-iterative": FINE_TUNED["magnitude-iterative"]}),
        {},
    )
    first, second = (_executed(_find(runs, "magnitude-iterative", target), done) for target in (0.9, 0.95))
    for name, weight in first.state["model"].items():
        if name in first.details["density"]:
            assert weight.count_nonzero() == round(first.details["density"][name] * weight.numel())
            assert not (second.state["model"][name][weight == 0]).any()


def test_mnist_style_steps_and_all_layers():
    changes = {"cells": [{"architecture": "mlp"}], "layers": "conv+linear", "step_iterations": 2}
    runs = _listed(trials=SINGLE, variants={"halo-official": (0.5,)}, **changes)
    train = _find(runs, "halo-official", 0.0)
    assert train.job.rates(2) == (pytest.approx([0.1, 1e-3, 1e-3, 1e-5]), [0.1] * 4)
    outcome = _executed(_find(runs, "halo-official", 0.5), {})
    assert list(outcome.details["density"]) == ["layers.1.weight", "layers.3.weight", "layers.5.weight"]


def test_options_of_the_lambdas_reach_training():
    lambdas = {"learning_rate": 0.02, "init": 0.5, "psi_every": 1, "target": 9.0, "target_mode": "L2"}
    trials = SINGLE | {"halo": [{"xi": 1e-3, "psi": 1e-2, "lambda_weight_decay": 0.3}]}
    job = _find(_listed(trials=trials, variants={"halo": "all"}, lambdas=lambdas), "halo", 0.0).job
    model = build("digits_cnn", classes=10, image_shape=(1, 8, 8))
    halo = job.penalty_on(model, 1)
    assert (halo.target, halo.mode, halo.training.weight_decay) == (9.0, "L2", 0.3)
    assert halo.training.rates == pytest.approx([0.02, 0.002])
    assert halo.training.psi_by_epoch == pytest.approx([1.0, 100.0])
    assert all((part == 0.5).all() for part in halo.lambdas)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": (1.2,)}, "less than 1"),
        ({"targets": (0.0,)}, "above 0"),
        ({"cells": [{"architecture": "resnet21"}]}, "unknown"),
        ({"trials": {"l1": [{"xi": 1e-3}]}}, "same number of trials"),
        ({"trials": {**SINGLE, "mcp": [{"xi": 1e-2}]}}, "above 0"),
        ({"trials": {**SINGLE, "halo": [{"xi": -1}]}}, "greater than 0"),
        ({"variants": {"magnitude-iterative": (0.98, 0.9)}}, "must rise"),
        ({"variants": {"halo-decay": "all"}}, "variants.halo-decay needs trials.halo_decay"),
        ({"fine_tuning_epochs": 2}, "fewer than the 2 epochs"),
        ({"variants": {"scad": "all"}}, "Input should be"),
        ({"lambdas": {"init": 0}}, "greater than 0"),
        ({"training": {"schedule": "cosine"}}, "must be multistep"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        protocol.Settings.model_validate(SMALL | changes)


def test_a_network_without_convolutions_is_refused():
    with pytest.raises(SettingsError, match=r"halo\.cells\[0\] \(mlp\): .*no convolutions"):
        _listed(cells=[{"architecture": "mlp"}])


def test_a_network_that_cannot_be_cut_is_a_failed_run():
    runs, done = _listed(trials=SINGLE, variants={"none": (0.5,)}), {}
    trained = _executed(_find(runs, "none", 0.0), done)
    for name in trained.state["model"]:
        if name.endswith("weight"):
            trained.state["model"][name].zero_()
    with pytest.raises(RunFailed, match="nothing is left to prune"):
        _executed(_find(runs, "none", 0.5), done)
