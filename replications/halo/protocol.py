"""The experiment of the HALO paper: penalties masked once after training, against magnitude pruning with fine-tuning.

A penalty is trained once per seed; the masks of all targets start from that network. Fine-tuned magnitude
pruning starts from the network that was trained without a penalty. Each variant's setting is the one of its
trials with the best mean validation accuracy, at the tuning target.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from torch import nn

from common.core import experiment
from common.core.experiment import Cells, CellSettings, Cuts, VariantSettings
from common.core.failures import Unreachable
from common.core.models import Network
from common.core.pruning.masks import KeepMasked, Layers, Masks, prunable
from common.core.recipe import NotNegative, Recipe
from common.core.run import Context, Job, Outcome
from common.core.trainer import Trainer
from common.core.tuning import Tuned, TuningSettings, tuned
from common.records import TRIAL
from common.settings import Count, Rate, SettingsError, Sparsity, Strict
from replications.halo import measures, method

Variant = Literal[
    "none", "l1", "sws", "sws-official", "mcp", "halo", "halo-official",
    "magnitude-one-shot", "magnitude-iterative",
]  # fmt: skip
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
UNPENALISED, ONE_SHOT, ITERATIVE = "none", "magnitude-one-shot", "magnitude-iterative"
TRAINS_LAMBDAS = ("sws", "halo")

# ------------------------------------------------------------------------------------------ settings


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


class LambdaSettings(Strict):
    """How lambdas begin and are trained."""

    learning_rate: Rate | None = None
    """The first one, lowered as theirs is; that of the weights when absent."""
    init: Rate = 1.0
    target: NotNegative = 0.0
    """HALO: the sum of all |lambda| that psi pulls towards; 0 is the paper's sum without a target."""
    target_mode: method.TargetMode = "L1"
    psi_every: Count | None = None
    """Multiply psi by 10 / gamma at every epoch divisible by this, epoch 0 included."""


class Settings(VariantSettings, TuningSettings):
    cells: Cells = (CellSettings(architecture="digits_cnn", options={"conv_init": "fan_in"}),)
    targets: Cuts = (0.8, 0.9, 0.95, 0.98, 0.99)
    """Sparsities of the mask after training, without fine-tuning."""
    variants: dict[Variant, Cuts | Literal["all"]] = {
        "none": "all", "l1": "all", "sws": "all", "mcp": "all", "halo": "all", "halo-official": "all",
        "magnitude-one-shot": (0.95, 0.98), "magnitude-iterative": (0.9, 0.95, 0.98),
    }  # fmt: skip
    """Magnitude pruning is fine-tuned after its mask; the targets of the iterative one are its rounds."""
    layers: Layers = "conv"
    """Whose weights and biases are penalised, and weights pruned: `conv` as in the CIFAR scripts, or all."""
    training: Recipe = Recipe(epochs=24, batch_size=32, learning_rate=0.1, weight_decay=1e-4)
    step_iterations: Count | None = None
    """Drop every so many iterations (MNIST script) in place of the milestones (CIFAR scripts)."""
    lambdas: LambdaSettings = LambdaSettings()
    fine_tuning_epochs: Count = 6
    """Of magnitude pruning, after the mask or after each round."""
    trials: TrialSettings = TrialSettings()
    tuning_target: Sparsity = 0.98
    fixed_threshold: Rate = 1e-3
    """After training, the share of weights below this and the accuracy without them are measured too."""

    @model_validator(mode="after")
    def _possible(self) -> Settings:
        rounds = self.wanted.get(ITERATIVE)
        if rounds and list(rounds) != sorted(rounds):
            raise ValueError(f"variants.{ITERATIVE}: its rounds must rise")
        if rounds and self.tuning_target not in rounds:
            raise ValueError(f"tuning_target = {self.tuning_target} must be one of variants.{ITERATIVE}")
        if self.training.schedule != "multistep" or self.training.warmup_epochs:
            raise ValueError("training.schedule must be multistep without a warm-up")
        return self


# ------------------------------------------------------------------------------------------ jobs


class Penalised(Job):
    """A training with a penalty."""

    training: Recipe
    layers: Layers
    penalty: Kind
    coupling: method.Coupling
    lambdas: LambdaSettings
    step_iterations: Count | None

    def rates(self, per_epoch: int) -> tuple[list[float], list[float] | None]:
        """Learning rates of the weights, and of lambdas if there are any."""
        recipe, by_step = self.training, self.step_iterations is not None
        if self.step_iterations is not None:
            drops = method.step_drops(recipe.epochs * per_epoch, self.step_iterations)
        else:
            drops = method.milestone_drops(recipe.epochs * per_epoch, recipe.drops(per_epoch))
        trains_lambdas = self.penalty in TRAINS_LAMBDAS
        rate, gamma = recipe.learning_rate, recipe.gamma
        return method.learning_rates(drops, rate, gamma, trains_lambdas, self.coupling, by_step)

    def penalty_on(self, model: Network, strength: Strength | None, per_epoch: int) -> method.Penalty | None:
        """The penalty of a network that is about to be trained."""
        if strength is None:
            return None
        common = method.penalised(model, self.layers), strength.xi, strength.psi
        if self.penalty == "l1":
            return method.L1(*common, self.lambdas.init)
        if self.penalty == "mcp":
            return method.MCP(*common)
        recipe, of_lambdas = self.training, self.rates(per_epoch)[1]
        assert of_lambdas is not None  # both penalties that are left train them
        factor = (self.lambdas.learning_rate or recipe.learning_rate) / recipe.learning_rate
        training = method.LambdaTraining(
            rates=[rate * factor for rate in of_lambdas],
            momentum=recipe.momentum,
            weight_decay=self.lambda_decay(strength),
            init=self.lambdas.init,
            psi_by_epoch=method.psi_schedule(
                strength.psi, recipe.gamma, self.lambdas.psi_every, recipe.epochs
            ),
        )
        if self.penalty == "sws":
            return method.SWS(*common, training)
        return method.HALO(*common, training, self.lambdas.target, self.lambdas.target_mode)

    def lambda_decay(self, strength: Strength) -> float:
        """Weight decay of the lambdas."""
        own = strength.lambda_weight_decay
        return self.training.weight_decay if own is None else own

    def trained(
        self, context: Context, strength: Strength | None
    ) -> tuple[Trainer, method.Penalty | None, measures.NearZero]:
        """The network at the end of its training, its penalty and the counts of near-zero weights."""
        model, per_epoch = context.network(), self.training.per_epoch(context.data)
        penalty, counters = self.penalty_on(model, strength, per_epoch), measures.NearZero()
        hooks = [counters] if penalty is None else [penalty, counters]
        trainer = self.training.trainer(context, model, hooks)
        trainer.fit(self.rates(per_epoch)[0])
        return trainer, penalty, counters


class Trial(Penalised):
    """One setting of a penalty, masked at the tuning target."""

    strength: Strength

    def execute(self, context: Context) -> Outcome:
        trainer, _, _ = self.trained(context, self.strength)
        _cut(trainer.model, self.layers, self.target)
        return context.measured(trainer, details={"trial": self.strength})


class Train(Penalised):
    """The best trial's penalty, and the network before any mask."""

    strength: Tuned[Strength] | None
    fixed_threshold: Rate

    def execute(self, context: Context) -> Outcome:
        strength = None if self.strength is None else self.strength.chosen(context)
        trainer, penalty, counters = self.trained(context, strength)
        model = trainer.model
        weights = prunable(model, self.layers)
        state = {"model": {name: tensor.clone() for name, tensor in model.state_dict().items()}}
        outcome = context.measured(trainer, state=state)
        logs = [counters.rows] if penalty is None else [counters.rows, penalty.log]
        outcome.curves = [dict(ChainMap(*rows)) for rows in zip(trainer.history, *logs, strict=True)]
        outcome.metrics |= {"training_epochs": trainer.epochs_done, **ChainMap(*(log[-1] for log in logs))}
        if isinstance(penalty, method.HALO) and strength:
            state["lambdas"] = penalty.lambdas_of(weights)
            outcome.metrics |= measures.lambdas(penalty, self.lambda_decay(strength))
        totals, directions = measures.output_directions(model, context.data)
        outcome.metrics |= totals
        outcome.details |= {"chosen": strength, "directions": directions}
        # last, because it changes the network
        outcome.metrics |= measures.at_threshold(trainer, context.data, weights, self.fixed_threshold)
        return outcome


class Mask(Job):
    """A trained network, masked once; no fine-tuning, and no new batch-norm statistics."""

    start: Train

    def execute(self, context: Context) -> Outcome:
        start = context.of(self.start)
        trainer = _restored(self.start.training, context, start.state["model"])
        found = _cut(trainer.model, self.start.layers, self.target)
        outcome = _masked(context, trainer, found, self.start.layers)
        outcome.metrics["training_epochs"] = start.record.metrics["training_epochs"]
        if lambdas := start.state.get("lambdas"):
            weights = prunable(trainer.model, self.start.layers)
            survivors = [weights[name].detach()[mask] for name, mask in found.kept.items()]
            theirs = [lambdas[name].to(mask.device)[mask] for name, mask in found.kept.items()]
            outcome.metrics["lambda_correlation_kept"] = measures.rank_correlation(survivors, theirs)
        return outcome


class FineTune(Job):
    """A network masked down to the target and trained on, with the pruned weights held at zero."""

    start: Train | FineTune
    layers: Layers
    training: Tuned[Recipe]

    def execute(self, context: Context) -> Outcome:
        start, recipe = context.of(self.start), self.training.chosen(context)
        trainer = _restored(recipe, context, start.state["model"])
        # of the weights that earlier rounds have left; rounded, because 0.4999... of an even number is one less
        share = round(1 - (1 - self.target) / (1 - self.start.target), 12)
        found = _cut(trainer.model, self.layers, share)
        trainer.add_hook(KeepMasked(Masks(found.kept)))
        trainer.fit(recipe.rates(len(trainer.batches)), "fine-tuning")
        outcome = _masked(context, trainer, found, self.layers)
        outcome.metrics["training_epochs"] = start.record.metrics["training_epochs"] + trainer.epochs_done
        outcome.details["chosen"] = recipe.learning_rate
        outcome.state, outcome.curves = {"model": trainer.model.state_dict()}, trainer.history
        return outcome


FineTune.model_rebuild()


def _restored(recipe: Recipe, context: Context, weights: dict[str, Any]) -> Trainer:
    model = context.network()
    model.load_state_dict(weights)
    return recipe.trainer(context, model)


def _cut(model: Any, layers: Layers, share: float) -> method.Cut:
    """Find the mask of the paper's rule and apply it."""
    try:
        found = method.cut(prunable(model, layers), share)
    except ValueError as error:
        raise Unreachable(str(error)) from None
    Masks(found.kept).apply(model)
    return found


def _masked(context: Context, trainer: Trainer, found: method.Cut, layers: Layers) -> Outcome:
    """Scores, and what the mask has left in each layer."""
    outcome = context.measured(trainer)
    metrics, details = measures.of_mask(found, prunable(trainer.model, layers))
    outcome.metrics |= metrics
    outcome.details |= details
    return outcome


# ------------------------------------------------------------------------------------------ which jobs


class Experiment(experiment.Experiment[Settings]):
    """The jobs of one cell. What several jobs start from is the same job each time."""

    def jobs(self, seed: int) -> Iterator[Job]:
        if self.settings.layers == "conv" and not any(
            isinstance(m, nn.Conv2d) for m in self.network.modules()
        ):
            raise SettingsError("the network has no convolutions: layers must be conv+linear")
        for name, targets in self.settings.wanted.items():
            if name == ONE_SHOT:
                tuning = self.fine_tuning(name, targets, seed)
                dense = self.train(UNPENALISED, seed)
                yield from (self.fine_tuned(name, target, dense, tuning) for target in targets)
            elif name == ITERATIVE:
                tuning = self.fine_tuning(name, targets, seed)
                yield from self.rounds(name, targets, self.train(UNPENALISED, seed), tuning)
            else:
                trained = self.train(name, seed)
                yield trained
                for target in targets:
                    yield Mask(variant=name, cell=self.cell, target=target, seed=seed, start=trained)

    def penalised(self, variant: str) -> dict[str, Any]:
        """What a variant's training has in common with its trials."""
        penalty, coupling = PENALISED[variant]
        names = "training", "layers", "lambdas", "step_iterations"
        return {"cell": self.cell, "penalty": penalty, "coupling": coupling} | {
            name: getattr(self.settings, name) for name in names
        }

    def train(self, variant: str, seed: int) -> Train:
        """The network that is trained with a variant's penalty."""
        shared, penalty, strength = self.penalised(variant), PENALISED[variant][0], None
        if penalty != "none":
            strength = tuned(
                self.settings,
                seed,
                variant,
                getattr(self.settings.trials, penalty),
                lambda name, strength, seed: Trial(
                    variant=name, seed=seed, target=self.settings.tuning_target, strength=strength, **shared
                ),
            )
        # a seed that is there for tuning alone has no run of the experiment
        name = variant if seed in self.settings.seeds else f"{TRIAL}{variant}"
        threshold = self.settings.fixed_threshold
        return Train(variant=name, seed=seed, strength=strength, fixed_threshold=threshold, **shared)

    def fine_tuning(self, variant: str, targets: Sequence[float], seed: int) -> Tuned[Recipe]:
        """The recipe of fine-tuning, chosen at the tuning target."""
        recipe = self.settings.training.changed(epochs=self.settings.fine_tuning_epochs, schedule="constant")
        target = self.settings.tuning_target

        def trial(name: str, option: Recipe, seed: int) -> Job:
            dense, alone = self.train(UNPENALISED, seed), Tuned((option,))
            if variant == ONE_SHOT:
                return self.fine_tuned(name, target, dense, alone)
            return next(job for job in self.rounds(name, targets, dense, alone) if job.target == target)

        options = [recipe.changed(learning_rate=rate) for rate in self.settings.trials.fine_tuning]
        return tuned(self.settings, seed, variant, options, trial)

    def fine_tuned(
        self, name: str, target: float, start: Train | FineTune, training: Tuned[Recipe]
    ) -> FineTune:
        """A network that is masked and trained on."""
        identity = {"variant": name, "cell": self.cell, "target": target, "seed": start.seed}
        return FineTune(**identity, start=start, layers=self.settings.layers, training=training)

    def rounds(
        self, name: str, targets: Sequence[float], start: Train | FineTune, training: Tuned[Recipe]
    ) -> Iterator[FineTune]:
        """The rounds of iterative pruning, each from the one before."""
        for target in targets:
            start = self.fine_tuned(name, target, start, training)
            yield start
