"""The experiment of the HALO paper: penalties masked once after training, against magnitude pruning with fine-tuning.

Each setting of a penalty is trained once per seed; the masks of all targets start from that network. Fine-tuned
magnitude pruning starts from a network that was trained without a penalty. At each target, a variant's run is that of
its settings with the best validation accuracy of its seed there.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from torch import nn

from common.core import experiment, tuning
from common.core.experiment import Cells, CellSettings, Cuts, VariantSettings
from common.core.failures import Unreachable
from common.core.models import Network
from common.core.models.network import Fill
from common.core.pruning.masks import KeepMasked, Layers, Masks, prunable
from common.core.recipe import NotNegative, Recipe
from common.core.run import Context, Job, Outcome
from common.core.trainer import Trainer
from common.core.tuning import Tuned
from common.records import TRIAL
from common.settings import Count, Rate, SettingsError, Strict
from replications.halo import measures, method

Variant = Literal[
    "none", "none-shortened", "none-fan-out", "l1", "sws", "mcp",
    "halo", "halo-official", "halo-decay", "halo-fan-out",
    "magnitude-one-shot", "magnitude-equal-budget", "magnitude-iterative",
    "magnitude-low-rate", "magnitude-fan-out",
]  # fmt: skip
Kind = Literal["none", "l1", "sws", "mcp", "halo"]
Grid = Literal["l1", "sws", "mcp", "halo", "halo_decay"]


@dataclass(frozen=True)
class Trained:
    """How a variant is trained before it is masked.

    grid: its trials. coupling: which reading of the learning rates. shortened: by the epochs of fine-tuning.
    conv_init: in place of the cell's.
    """

    penalty: Kind = "none"
    grid: Grid | None = None
    coupling: method.Coupling = "intended"
    shortened: bool = False
    conv_init: Fill | None = None


@dataclass(frozen=True)
class FineTuned:
    """What magnitude pruning starts from, whether it goes in rounds, and its learning rate if it is not tuned."""

    start: str = "none"
    in_rounds: bool = False
    rate: float | None = None


TRAINED = {
    "none": Trained(),
    "none-shortened": Trained(shortened=True),
    "none-fan-out": Trained(conv_init="fan_out"),
    "l1": Trained("l1", "l1"),
    "sws": Trained("sws", "sws"),
    "mcp": Trained("mcp", "mcp"),
    "halo": Trained("halo", "halo"),
    "halo-official": Trained("halo", "halo", coupling="official"),
    "halo-decay": Trained("halo", "halo_decay"),
    "halo-fan-out": Trained("halo", "halo", conv_init="fan_out"),
}
FINE_TUNED = {
    "magnitude-one-shot": FineTuned(),
    "magnitude-equal-budget": FineTuned("none-shortened"),
    "magnitude-iterative": FineTuned(in_rounds=True),
    # of the code base that the authors' code grew from
    "magnitude-low-rate": FineTuned(rate=0.001),
    "magnitude-fan-out": FineTuned("none-fan-out"),
}
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

    l1: Trials = _grid((5e-3, 7e-3, 1e-2))
    sws: Trials = _grid((3e-3,), (0.5, 1.0, 3.0))
    mcp: Trials = _grid((1e-2,), (30.0, 100.0, 300.0))
    halo: Trials = _grid((1e-3,), (3e-3, 6e-3, 1e-2))
    halo_decay: Trials | None = None
    """Of `halo-decay`: as in the released command, weight decay and not psi is to pull the lambdas."""
    fine_tuning: Annotated[tuple[Rate, ...], Field(min_length=1)] = (0.1, 0.03, 0.01)
    """Constant learning rates."""

    @field_validator("mcp")
    @classmethod
    def _has_a_knot(cls, trials: tuple[Strength, ...]) -> tuple[Strength, ...]:
        if any(trial.psi == 0 for trial in trials):
            raise ValueError("psi of MCP must be above 0")
        return trials

    @model_validator(mode="after")
    def _equally_many(self) -> TrialSettings:
        grids = {name: getattr(self, name) for name in type(self).model_fields}
        counts = {name: len(grid) for name, grid in grids.items() if grid is not None}
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


class Settings(VariantSettings):
    cells: Cells = (CellSettings(architecture="digits_cnn", options={"conv_init": "fan_in"}),)
    targets: Cuts = (0.9, 0.95, 0.98)
    """Sparsities of the mask after training, without fine-tuning."""
    variants: dict[Variant, Cuts | Literal["all"]] = {
        "none": (0.95,), "l1": "all", "sws": (0.95, 0.98), "mcp": (0.95, 0.98), "halo": "all",
        "magnitude-one-shot": "all", "magnitude-equal-budget": "all", "magnitude-iterative": (0.9, 0.95),
    }  # fmt: skip
    """Magnitude pruning is fine-tuned after its mask; the targets of the iterative one are its rounds."""
    layers: Layers = "conv"
    """Whose weights and biases are penalised, and weights pruned: `conv` as in the CIFAR scripts, or all."""
    training: Recipe = Recipe(epochs=24, batch_size=30, learning_rate=0.1, weight_decay=1e-4)
    step_iterations: Count | None = None
    """Drop every so many iterations (MNIST script) in place of the milestones (CIFAR scripts)."""
    lambdas: LambdaSettings = LambdaSettings()
    fine_tuning_epochs: Count = 6
    """Of magnitude pruning, after the mask or after each round; `-shortened` networks are trained so many fewer."""
    trials: TrialSettings = TrialSettings()
    fixed_threshold: Rate = 1e-3
    """After training, the share of weights below this and the accuracy without them are measured too."""

    @model_validator(mode="after")
    def _possible(self) -> Settings:
        for name in (name for name, found in FINE_TUNED.items() if found.in_rounds and name in self.wanted):
            if list(self.wanted[name]) != sorted(self.wanted[name]):
                raise ValueError(f"variants.{name}: its rounds must rise")
        for name, found in TRAINED.items():
            if name in self.wanted and found.grid and getattr(self.trials, found.grid) is None:
                raise ValueError(f"variants.{name} needs trials.{found.grid}")
        starts = {found.start for name, found in FINE_TUNED.items() if name in self.wanted}
        shortened = any(TRAINED[name].shortened for name in {*starts, *self.wanted} & {*TRAINED})
        if shortened and self.fine_tuning_epochs >= self.training.epochs:
            raise ValueError(
                f"fine_tuning_epochs must be fewer than the {self.training.epochs} epochs of training, which "
                "magnitude-equal-budget has fewer of"
            )
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
    strength: Strength | None
    conv_init: Fill | None
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

    def penalty_on(self, model: Network, per_epoch: int) -> method.Penalty | None:
        """The penalty of a network that is about to be trained."""
        if (strength := self.strength) is None:
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

    def trained(self, context: Context) -> tuple[Trainer, method.Penalty | None, measures.NearZero]:
        """The network at the end of its training, its penalty and the counts of near-zero weights."""
        initial = {"conv_init": self.conv_init} if self.conv_init else {}
        model, per_epoch = context.network(**initial), self.training.per_epoch(context.data)
        penalty, counters = self.penalty_on(model, per_epoch), measures.NearZero()
        hooks = [counters] if penalty is None else [penalty, counters]
        trainer = self.training.trainer(context, model, hooks)
        trainer.fit(self.rates(per_epoch)[0])
        return trainer, penalty, counters


class Train(Penalised):
    """One setting of a penalty, or none, and the network before any mask."""

    fixed_threshold: Rate

    def execute(self, context: Context) -> Outcome:
        strength = self.strength
        trainer, penalty, counters = self.trained(context)
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


CARRIED = ("training_epochs", "lambda_correlation", "directions_mean")
"""What a masked network has from before its mask."""


class Mask(Job):
    """A trained network, masked once; no fine-tuning, and no new batch-norm statistics."""

    start: Train

    def execute(self, context: Context) -> Outcome:
        start = context.of(self.start)
        trainer = _restored(self.start.training, context, start.state["model"])
        found = _cut(trainer.model, self.start.layers, self.target)
        outcome = _masked(context, trainer, found, self.start.layers)
        before = start.record.metrics
        outcome.metrics |= {name: before[name] for name in CARRIED if name in before}
        outcome.metrics["accuracy_before_mask"] = before["test_accuracy"]
        outcome.details["chosen"] = self.start.strength
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
    training: Recipe

    def execute(self, context: Context) -> Outcome:
        start, recipe = context.of(self.start), self.training
        trainer = _restored(recipe, context, start.state["model"])
        # of the weights that earlier rounds have left; rounded, because 0.4999... of an even number is one less
        share = round(1 - (1 - self.target) / (1 - self.start.target), 12)
        found = _cut(trainer.model, self.layers, share)
        trainer.add_hook(KeepMasked(Masks(found.kept)))
        trainer.fit(recipe.rates(len(trainer.batches)), "fine-tuning")
        outcome = _masked(context, trainer, found, self.layers)
        outcome.metrics["training_epochs"] = start.record.metrics["training_epochs"] + trainer.epochs_done
        outcome.details["chosen"] = recipe.learning_rate
        outcome.curves = trainer.history
        return outcome


FineTune.model_rebuild()


class Chosen(tuning.Chosen):
    """The best of a variant's trials at a target, as it is."""


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
    outcome = context.measured(trainer, state={"model": trainer.model.state_dict()})
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
            if (of := FINE_TUNED.get(name)) is not None:
                yield from self.fine_tuned(name, of, targets, seed)
                continue
            options = self.trained(name, seed)
            if len(options) == 1:
                yield from options
            for target in targets:
                masked = (self.job(Mask, start.variant, seed, target, start=start) for start in options)
                yield self.best(name, seed, target, masked)

    def trained(self, variant: str, seed: int) -> list[Train]:
        """The networks that are trained as the variant says, one for each of its settings."""
        how, settings = TRAINED[variant], self.settings
        epochs = settings.training.epochs - (settings.fine_tuning_epochs if how.shortened else 0)
        training = settings.training.changed(epochs=epochs)
        strengths: Sequence[Strength | None] = getattr(settings.trials, how.grid) if how.grid else (None,)
        return [
            self.job(
                Train,
                name,
                seed,
                penalty=how.penalty,
                coupling=how.coupling,
                conv_init=how.conv_init,
                training=training,
                strength=strength,
            )
            for name, strength in zip(_names(variant, len(strengths)), strengths, strict=True)
        ]

    def fine_tuned(self, variant: str, how: FineTuned, targets: Sequence[float], seed: int) -> Iterator[Job]:
        """Magnitude pruning to each target, in rounds or at once."""
        settings = self.settings
        recipe = settings.training.changed(epochs=settings.fine_tuning_epochs, schedule="constant")
        (start,) = self.trained(how.start, seed)
        rates = settings.trials.fine_tuning if how.rate is None else (how.rate,)
        last: list[Train | FineTune] = [start] * len(rates)
        for target in targets:
            done = [
                self.job(
                    FineTune, name, seed, target, start=before, training=recipe.changed(learning_rate=rate)
                )
                for name, before, rate in zip(_names(variant, len(rates)), last, rates, strict=True)
            ]
            if how.in_rounds:
                last = [*done]
            yield self.best(variant, seed, target, done)

    def best(self, variant: str, seed: int, target: float, trials: Iterable[Mask | FineTune]) -> Job:
        """What the variant is at a target: the best of its trials, or the only one."""
        found = tuple(trials)
        if len(found) == 1:
            return found[0]
        choice = Tuned(found, tuple((trial,) for trial in found))
        return self.job(Chosen, variant, seed, target, choice=choice)


def _names(variant: str, count: int) -> list[str]:
    """What so many trials of a variant are called; one alone is the variant itself."""
    return [variant] if count == 1 else [f"{TRIAL}{variant}-{number}" for number in range(count)]
