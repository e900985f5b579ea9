"""Which runs test the claims of the HALO paper, and how one run is executed.

A penalty is trained once per seed; the masks of all targets start from that network. Fine-tuned magnitude
pruning starts from the network that was trained without a penalty. Each variant's setting is the one of its
trials with the best mean validation accuracy over the tuning seeds, at the tuning target.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from common.core.data import Batches, Dataset
from common.core.failures import Diverged, Unreachable
from common.core.identity import stream
from common.core.models import Network, architecture, build
from common.core.models.chain import MLP
from common.core.pruning.counting import cost
from common.core.pruning.masks import KeepMasked, Layers, Masks, prunable
from common.core.run import Context, Outcome, Run
from common.core.trainer import Hooks, Trainer
from common.settings import (
    CellSettings,
    Count,
    DatasetSettings,
    PaperSettings,
    Profile,
    Rate,
    Seeds,
    SettingsError,
    Sparsity,
    Strict,
    Targets,
)
from replications.halo import measures, method

PAPER = "halo"

Kind = Literal["none", "l1", "sws", "mcp", "halo"]
# variant -> its penalty, and which reading of the learning rates it is trained with
PENALISED: dict[str, tuple[Kind, method.Coupling]] = {
    "none": ("none", "intended"),
    "l1": ("l1", "intended"),
    "sws": ("sws", "intended"),
    "sws-official": ("sws", "official"),
    "mcp": ("mcp", "intended"),
    "halo": ("halo", "intended"),
    "halo-official": ("halo", "official"),
}
ONE_SHOT, ITERATIVE = "magnitude-one-shot", "magnitude-iterative"
# begins the names of runs from which a setting is chosen
TRIAL = "tuning-"
Variant = Literal[
    "none", "l1", "sws", "sws-official", "mcp", "halo", "halo-official",
    "magnitude-one-shot", "magnitude-iterative",
]  # fmt: skip
TRAINS_LAMBDAS = ("sws", "halo")
# how the paper's own networks differ from the architectures of the same name
OPTIONS: dict[str, dict[str, Any]] = {
    "digits_cnn": {"conv_init": "fan_in"},
    "vgg16": {"conv_init": "fan_in", "conv_bias": True, "final_pool": "average"},
}
# of the energy, the share that the counted directions hold
ENERGY = 0.9

NotNegative = Annotated[float, Field(ge=0)]
Several = Annotated[tuple[Sparsity, ...], Field(min_length=1)]


class Strength(Strict):
    """One setting of a penalty. psi acts in SWS, MCP and HALO, the lambdas' weight decay in SWS and HALO."""

    xi: Rate
    psi: NotNegative = 0.0
    lambda_weight_decay: NotNegative | None = None
    """As that of the weights when absent."""


Trials = Annotated[tuple[Strength, ...], Field(min_length=1)]


def _grid(xis: Sequence[float], psis: Sequence[float] = (0.0,)) -> tuple[Strength, ...]:
    return tuple(Strength(xi=xi, psi=psi) for xi in xis for psi in psis)


class TrialSettings(Strict):
    """The settings that are tried for each penalty and for fine-tuning: equally many, to be fair."""

    l1: Trials = _grid((3e-3, 5e-3, 1e-2, 2e-2))
    sws: Trials = _grid((1e-3, 3e-3), (1.0, 3.0))
    mcp: Trials = _grid((5e-3, 1e-2), (30.0, 100.0))
    halo: Trials = _grid((3e-4, 1e-3), (6e-3, 1e-2))
    fine_tuning: Annotated[tuple[Rate, ...], Field(min_length=1)] = (0.1, 0.03, 0.01, 0.001)
    """Constant learning rates."""

    @field_validator("mcp")
    @classmethod
    def _has_a_knot(cls, trials: tuple[Strength, ...]) -> tuple[Strength, ...]:
        if any(trial.psi == 0 for trial in trials):
            raise ValueError("psi of MCP must be above 0")
        return trials

    @model_validator(mode="after")
    def _equally_many(self) -> TrialSettings:
        counts = {name: len(getattr(self, name)) for name in type(self).model_fields}
        if len(set(counts.values())) > 1:
            raise ValueError(f"each must have the same number of trials, not {counts}")
        return self


class FineTuning(Strict):
    """Magnitude pruning of the network that was trained without a penalty."""

    epochs: Count = 6
    """After the mask, or after each round."""
    one_shot: Several = (0.95, 0.98)
    """Targets of one mask and one fine-tuning."""
    rounds: Several = (0.9, 0.95, 0.98)
    """Targets reached one after the other, with fine-tuning after each."""

    @field_validator("rounds")
    @classmethod
    def _rising(cls, rounds: tuple[float, ...]) -> tuple[float, ...]:
        if list(rounds) != sorted(set(rounds)) or rounds[0] == 0:
            raise ValueError("must rise from above 0")
        return rounds


class Settings(PaperSettings):
    architecture: str = "digits_cnn"
    layers: Layers = "conv"
    """Whose weights and biases are penalised, and weights pruned: `conv` as in the CIFAR scripts, or all."""
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)] = (
        "none", "l1", "sws", "mcp", "halo", "halo-official", "magnitude-one-shot", "magnitude-iterative",
    )  # fmt: skip
    targets: Targets = (0.8, 0.9, 0.95, 0.98, 0.99)
    """Sparsities of the mask after training, without fine-tuning."""
    trials: TrialSettings = TrialSettings()
    tuning_seeds: Seeds = (1000,)
    tuning_target: Sparsity = 0.98
    fine_tuning: FineTuning = FineTuning()
    epochs: Count = 24
    batch_size: Count = 32
    learning_rate: Rate = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NotNegative = 1e-4
    schedule: Literal["milestones", "steps"] = "milestones"
    """Drop before the epochs `milestones` (CIFAR scripts), or every `step_iterations` (MNIST script)."""
    milestones: tuple[Count, ...] = (12, 18)
    step_iterations: Count = 25000
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor of a drop."""
    lambda_learning_rate: Rate | None = None
    """First learning rate of the lambdas, lowered as theirs is; that of the weights when absent."""
    lambda_init: Rate = 1.0
    lambda_target: NotNegative = 0.0
    """HALO: the sum of all |lambda| that psi pulls towards; 0 is the paper's sum without a target."""
    lambda_target_mode: method.TargetMode = "L1"
    psi_every: Count | None = None
    """Multiply psi by 10 / gamma at every epoch divisible by this, epoch 0 included."""
    fixed_threshold: Rate = 1e-3
    """After training, the share of weights below this and the accuracy without them are measured too."""
    cells: Annotated[tuple[CellSettings, ...], Field(min_length=1)] = (CellSettings(),)
    """The experiment is made in each; one that changes nothing is the above on the profile's data set."""

    @field_validator("architecture")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            architecture(name)
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return name

    @model_validator(mode="after")
    def _possible(self) -> Settings:
        if set(self.seeds) & set(self.tuning_seeds):
            raise ValueError("seeds and tuning_seeds must have no seed in common")
        if 0 in (*self.targets, *self.fine_tuning.one_shot, self.tuning_target):
            raise ValueError("targets must be above 0; the unpruned network is always measured")
        if self.layers == "conv" and issubclass(architecture(self.architecture).network, MLP):
            raise ValueError(f"{self.architecture} has no convolutions: layers must be conv+linear")
        last = max(self.milestones, default=0)
        if list(self.milestones) != sorted(set(self.milestones)) or last >= self.epochs:
            raise ValueError(f"milestones must rise and lie before the end of the {self.epochs} epochs")
        if ITERATIVE in self.variants and self.tuning_target not in self.fine_tuning.rounds:
            raise ValueError(f"tuning_target = {self.tuning_target} must be one of fine_tuning.rounds")
        return self


def network(name: str, classes: int, image_shape: Sequence[int], **options: Any) -> Network:
    """The paper's form of an architecture; options as for `common.core.models.build`."""
    return build(name, classes=classes, image_shape=image_shape, **OPTIONS.get(name, {}), **options)


# ------------------------------------------------------------------------------------------ which runs


def runs(profile: Profile) -> list[Run]:
    """All runs of the profile; a run lists the trials that its setting is chosen from."""
    listed = []
    for number, cell in enumerate(profile.paper.cells):
        settings = profile.paper.changed(cell.settings, f"{PAPER}.cells[{number}].settings")
        of_cell = _Runs(settings, cell.data or profile.dataset)
        for seed in settings.seeds:
            for variant in settings.variants:
                listed += of_cell.of(variant, seed)
    return listed


class _Runs:
    """The runs of one cell. What several runs start from is the same run each time."""

    def __init__(self, settings: Settings, data: DatasetSettings):
        self.settings, self.data = settings, data
        self.tuned = len(self.settings.trials.halo) > 1

    def of(self, variant: Variant, seed: int) -> list[Run]:
        """The runs of a variant with a seed of the experiment."""
        trials, needs = self._trials(variant), self._tuning(variant)
        if variant == ONE_SHOT:
            dense = self._training("none", "none", seed)
            targets = self.settings.fine_tuning.one_shot
            return [self._fine_tuning(variant, target, seed, dense, trials, needs) for target in targets]
        if variant == ITERATIVE:
            return self._rounds(variant, seed, self._training("none", "none", seed), trials, needs)
        trained = self._training(variant, variant, seed, trials, needs)
        targets = self.settings.targets
        return [trained, *(self._run(variant, "mask", target, seed, {}, (trained,)) for target in targets)]

    def _trials(self, variant: Variant) -> list[Any]:
        if variant in (ONE_SHOT, ITERATIVE):
            return list(self.settings.trials.fine_tuning)
        kind = PENALISED[variant][0]
        strengths = () if kind == "none" else getattr(self.settings.trials, kind)
        return [strength.model_dump(mode="json") for strength in strengths]

    def _tuning(self, variant: Variant) -> list[Run]:
        """Every trial with every tuning seed, at the tuning target; none where there is no choice."""
        if not self.tuned:
            return []
        target = self.settings.tuning_target
        found = []
        for number, trial in enumerate(self._trials(variant)):
            for seed in self.settings.tuning_seeds:
                name = f"{TRIAL}{variant}-{number}"
                if variant in PENALISED:
                    found.append(self._training(name, variant, seed, [trial], step="trial", target=target))
                    continue
                dense = self._training(f"{TRIAL}none", "none", seed)
                if variant == ONE_SHOT:
                    found.append(self._fine_tuning(name, target, seed, dense, [trial]))
                else:
                    rounds = self._rounds(name, seed, dense, [trial])
                    found.append(next(run for run in rounds if run.target == target))
        return found

    def _training(
        self,
        name: str,
        variant: Variant,
        seed: int,
        trials: Sequence[Any] = (),
        needs: Sequence[Run] = (),
        step: str = "training",
        target: float = 0.0,
    ) -> Run:
        kind, coupling = PENALISED[variant]
        names = {"epochs", "learning_rate", "gamma", "schedule", "fixed_threshold"}
        names |= {"milestones"} if self.settings.schedule == "milestones" else {"step_iterations"}
        if kind in TRAINS_LAMBDAS:
            names |= {"lambda_learning_rate", "psi_every"}
        if kind == "halo":
            names |= {"lambda_target", "lambda_target_mode"}
        if kind in ("l1", *TRAINS_LAMBDAS):
            names |= {"lambda_init"}
        held = self.settings.model_dump(mode="json", include=names)
        held |= {"penalty": kind, "coupling": coupling, "trials": list(trials)}
        return self._run(name, step, target, seed, held, needs)

    def _fine_tuning(
        self,
        name: str,
        target: float,
        seed: int,
        start: Run,
        trials: Sequence[Any],
        needs: Sequence[Run] = (),
    ) -> Run:
        held = {"epochs": self.settings.fine_tuning.epochs, "trials": list(trials), "from": start.target}
        return self._run(name, "fine-tuning", target, seed, held, (start, *needs))

    def _rounds(
        self, name: str, seed: int, start: Run, trials: Sequence[Any], needs: Sequence[Run] = ()
    ) -> list[Run]:
        found: list[Run] = []
        for target in self.settings.fine_tuning.rounds:
            found.append(self._fine_tuning(name, target, seed, found[-1] if found else start, trials, needs))
        return found

    def _run(
        self, name: str, step: str, target: float, seed: int, held: dict[str, Any], needs: Sequence[Run]
    ) -> Run:
        shared = {"layers", "batch_size", "momentum", "weight_decay"}
        settings = {"step": step, "data": self.data.model_dump(mode="json")}
        settings |= self.settings.model_dump(mode="json", include=shared) | held
        place = (self.data.name, self.settings.architecture)
        return Run(PAPER, name, *place, target, seed, settings, tuple(needs))


# ------------------------------------------------------------------------------------------ one run


def execute(run: Run, context: Context) -> Outcome:
    """Train, mask or fine-tune, and measure. Raises RunFailed."""
    steps = {"training": _train, "trial": _try, "mask": _mask, "fine-tuning": _fine_tune}
    return steps[run.settings["step"]](run, context, context.dataset(run.settings["data"]))


def _train(run: Run, context: Context, data: Dataset) -> Outcome:
    """Train with the best trial's penalty, and measure the network before any mask."""
    trial = _chosen(run, context.needs)
    trainer, penalty, counters = _training(run, context, data, trial)
    trainer.fit(_rates(run, len(trainer.batches))[0])
    logs = [counters.rows] if penalty is None else [counters.rows, penalty.log]
    curves = [dict(ChainMap(*rows)) for rows in zip(trainer.history, *logs, strict=True)]
    metrics, details = _measured(context, trainer, data)
    metrics |= {key: value for log in logs for key, value in log[-1].items()}
    metrics |= _lambda_metrics(run, penalty, trial)
    energies, details["directions"] = _energy(trainer.model, data)
    state = {"model": {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}}
    if isinstance(penalty, method.HALO):
        state["lambdas"] = penalty.lambdas_of(prunable(trainer.model, run.settings["layers"]))
    costs = cost(trainer.model, data.image_shape)
    # last, because it changes the network
    metrics |= energies | _at_fixed_threshold(run, trainer, data)
    return Outcome(metrics, costs, curves, state, details | {"chosen": trial})


def _try(run: Run, context: Context, data: Dataset) -> Outcome:
    """Train with one setting and mask; what diverges is scored as it is: it loses, and stops nothing."""
    (trial,) = run.settings["trials"]
    trainer, _, _ = _training(run, context, data, trial)
    details: dict[str, Any] = {"trial": trial}
    try:
        trainer.fit(_rates(run, len(trainer.batches))[0])
    except Diverged as reason:
        details["diverged"] = str(reason)
    else:
        _cut(run, trainer.model, run.target)
    costs = cost(trainer.model, data.image_shape)
    return Outcome(context.scores(trainer, data), costs, trainer.history, None, details)


def _mask(run: Run, context: Context, data: Dataset) -> Outcome:
    """Mask a trained network once; no fine-tuning, and no new batch-norm statistics."""
    (start,) = context.needs
    trainer = _restored(run, context, data)
    found = _cut(run, trainer.model, run.target)
    metrics, details = _measured(context, trainer, data, found)
    metrics["training_epochs"] = start.record.metrics["training_epochs"]
    if "lambdas" in start.state:
        weights = prunable(trainer.model, run.settings["layers"])
        survivors = [weights[name].detach()[mask] for name, mask in found.kept.items()]
        theirs = [start.state["lambdas"][name].to(mask.device)[mask] for name, mask in found.kept.items()]
        metrics["lambda_correlation_kept"] = measures.rank_correlation(survivors, theirs)
    return Outcome(metrics, cost(trainer.model, data.image_shape), [], None, details)


def _fine_tune(run: Run, context: Context, data: Dataset) -> Outcome:
    """Mask down to the target and train what is left, with the pruned weights held at zero."""
    start, *trials = context.needs
    rate = _chosen(run, trials)
    trainer = _restored(run, context, data)
    epochs = start.record.metrics["training_epochs"]
    if "diverged" in start.record.details:
        return _lost(context, trainer, data, epochs, start.record.details["diverged"])
    # of the weights that earlier rounds have left; rounded, because 0.4999... of an even number is one less
    share = round(1 - (1 - run.target) / (1 - run.settings["from"]), 12)
    found = _cut(run, trainer.model, share)
    trainer.add_hook(KeepMasked(Masks(found.kept)))
    try:
        trainer.fit([rate] * (run.settings["epochs"] * len(trainer.batches)), "fine-tuning")
    except Diverged as reason:
        if not run.variant.startswith(TRIAL):
            raise
        return _lost(context, trainer, data, epochs, str(reason))
    metrics, details = _measured(context, trainer, data, found)
    metrics["training_epochs"] = epochs + trainer.epochs_done
    state = {"model": trainer.model.state_dict()}
    costs = cost(trainer.model, data.image_shape)
    return Outcome(metrics, costs, trainer.history, state, details | {"chosen": rate})


def _lost(context: Context, trainer: Trainer, data: Dataset, epochs: float, reason: str) -> Outcome:
    """A trial of fine-tuning that has diverged, in this round or an earlier one, scored as it is."""
    metrics = context.scores(trainer, data) | {"training_epochs": epochs}
    state = {"model": trainer.model.state_dict()}
    costs = cost(trainer.model, data.image_shape)
    return Outcome(metrics, costs, trainer.history, state, {"diverged": reason})


def _chosen(run: Run, tuning: Sequence[Any]) -> Any:
    """The trial with the best mean validation accuracy, of equal ones the first; none that has diverged, if any has not."""
    trials = run.settings["trials"]
    if len(trials) < 2:
        return trials[0] if trials else None
    each = len(tuning) // len(trials)
    scores = [
        -1.0 if "diverged" in need.record.details else need.record.metrics["validation_accuracy"]
        for need in tuning
    ]
    means = [sum(scores[i * each : (i + 1) * each]) / each for i in range(len(trials))]
    return trials[means.index(max(means))]


# ------------------------------------------------------------------------------------------ training


def _network(run: Run, context: Context, data: Dataset) -> nn.Module:
    seed = stream(run.seed, "init")
    return context.compute.place(network(run.architecture, data.classes, data.image_shape, seed=seed))


def _trainer(
    run: Run, context: Context, data: Dataset, model: nn.Module, hooks: Sequence[Hooks] = ()
) -> Trainer:
    held = run.settings
    momentum, weight_decay = held["momentum"], held["weight_decay"]
    return context.trainer(
        model, data, held["batch_size"], hooks, momentum=momentum, weight_decay=weight_decay
    )


def _training(
    run: Run, context: Context, data: Dataset, trial: Mapping[str, Any] | None
) -> tuple[Trainer, method.Penalty | None, measures.NearZero]:
    model = _network(run, context, data)
    per_epoch = -(-len(data.labels["train"]) // run.settings["batch_size"])
    penalty = _penalty(run, model, trial, per_epoch)
    log = measures.NearZero()
    hooks = [log] if penalty is None else [penalty, log]
    return _trainer(run, context, data, model, hooks), penalty, log


def _rates(run: Run, per_epoch: int) -> tuple[list[float], list[float] | None]:
    held = run.settings
    by_step = held["schedule"] == "steps"
    if by_step:
        drops = method.step_drops(held["epochs"] * per_epoch, held["step_iterations"])
    else:
        drops = method.milestone_drops(held["epochs"], per_epoch, held["milestones"])
    trains_lambdas = held["penalty"] in TRAINS_LAMBDAS
    rate, gamma = held["learning_rate"], held["gamma"]
    return method.learning_rates(drops, rate, gamma, trains_lambdas, held["coupling"], by_step)


def _penalty(
    run: Run, model: nn.Module, trial: Mapping[str, Any] | None, per_epoch: int
) -> method.Penalty | None:
    held = run.settings
    if trial is None:
        return None
    common = method.penalised(model, held["layers"]), trial["xi"], trial["psi"]
    if held["penalty"] == "l1":
        return method.L1(*common, held["lambda_init"])
    if held["penalty"] == "mcp":
        return method.MCP(*common)
    of_lambdas = _rates(run, per_epoch)[1]
    assert of_lambdas is not None  # both penalties that are left train them
    factor = (held["lambda_learning_rate"] or held["learning_rate"]) / held["learning_rate"]
    training = method.LambdaTraining(
        rates=[rate * factor for rate in of_lambdas],
        momentum=held["momentum"],
        weight_decay=_lambda_weight_decay(run, trial),
        init=held["lambda_init"],
        psi_by_epoch=method.psi_schedule(trial["psi"], held["gamma"], held["psi_every"], held["epochs"]),
    )
    if held["penalty"] == "sws":
        return method.SWS(*common, training)
    return method.HALO(*common, training, held["lambda_target"], held["lambda_target_mode"])


def _lambda_weight_decay(run: Run, trial: Mapping[str, Any]) -> float:
    own = trial["lambda_weight_decay"]
    return run.settings["weight_decay"] if own is None else own


def _restored(run: Run, context: Context, data: Dataset) -> Trainer:
    model = _network(run, context, data)
    model.load_state_dict(context.needs[0].state["model"])
    return _trainer(run, context, data, model)


def _cut(run: Run, model: nn.Module, share: float) -> method.Cut:
    """Find the mask of the paper's rule and apply it."""
    try:
        found = method.cut(prunable(model, run.settings["layers"]), share)
    except ValueError as error:
        raise Unreachable(str(error)) from None
    Masks(found.kept).apply(model)
    return found


# ------------------------------------------------------------------------------------------ measuring


def _measured(
    context: Context, trainer: Trainer, data: Dataset, found: method.Cut | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores, and what the mask has left in each layer."""
    metrics: dict[str, Any] = context.scores(trainer, data)
    if found is None:
        return metrics | {"training_epochs": trainer.epochs_done}, {}
    weights = prunable(trainer.model, context.run.settings["layers"])
    kept = torch.cat([weights[name].detach().abs()[mask] for name, mask in found.kept.items()])
    total = sum(w.numel() for w in weights.values())
    by_layer = measures.densities(found.kept)
    first, *_, last = by_layer.values()
    density = kept.numel() / total
    metrics |= {
        "prunable_sparsity": 1 - density,
        "kept_magnitude": kept.mean().item() if kept.numel() else None,
        "first_layer_density": first,
        "last_layer_density": last,
        "first_layer_ratio": first / density if density else None,
    }
    details = {
        "density": by_layer,
        "emptied": found.emptied,
        "threshold": found.threshold,
        "index": found.index,
        "float32_index": found.float32_index,
        "pruned": total - kept.numel(),
    }
    return metrics, details


def _lambda_metrics(
    run: Run, penalty: method.Penalty | None, trial: Mapping[str, Any] | None
) -> dict[str, float | None]:
    """HALO: how lambdas follow the weights, and how far they are from where they would settle."""
    if not isinstance(penalty, method.HALO) or trial is None:
        return {}
    metrics: dict[str, float | None] = {
        "lambda_correlation": measures.rank_correlation(penalty.tensors, penalty.lambdas)
    }
    decay = _lambda_weight_decay(run, trial)
    if penalty.psi > 0 or decay > 0:
        sizes = torch.cat([weight.detach().abs().flatten() for weight in penalty.tensors])
        lambdas = torch.cat([part.abs().flatten() for part in penalty.lambdas])
        settled, _ = method.stationary_lambda(sizes, penalty.xi, penalty.psi, decay)
        metrics["lambda_excess"] = (lambdas.double() / settled.clamp(min=1e-12)).log10().median().item()
    return metrics


def _energy(model: nn.Module, data: Dataset) -> tuple[dict[str, float], dict[str, Any]]:
    """Directions that hold most of the energy of each convolution's output over the training images."""
    batches = Batches(data, "train", shuffle=True, augment=True)
    found = measures.convolution_features(model, batches, ("corner", "mean"))
    details: dict[str, Any] = {
        kind: {name: measures.directions(measures.energy(values), ENERGY) for name, values in layers.items()}
        for kind, layers in found.items()
    }
    totals = {f"directions_{kind}": float(sum(layers.values())) for kind, layers in details.items() if layers}
    return totals, details


def _at_fixed_threshold(run: Run, trainer: Trainer, data: Dataset) -> dict[str, float]:
    """Sparsity and test accuracy when all weights below the fixed threshold go."""
    weights = prunable(trainer.model, run.settings["layers"])
    masks = Masks(method.fixed_threshold(weights, run.settings["fixed_threshold"]))
    masks.apply(trainer.model)
    scores = trainer.evaluate(Batches(data, "test"))
    return {"threshold_sparsity": masks.sparsity, "threshold_test_accuracy": scores["accuracy"]}
