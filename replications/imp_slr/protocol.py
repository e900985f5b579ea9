"""The experiments of the IMP paper: pruning and retraining after dense training, against pruning during training.

One dense network per seed is shared by everything that prunes after training. Methods that prune during training start
from the same initial weights and train for as many epochs as dense training and retraining together. Each has one
learning rate, chosen on validation from the same grid and over the same targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from common.core import experiment, tuning
from common.core.data import Batches, Dataset
from common.core.experiment import Cells, CellSettings, Cuts, ExperimentSettings
from common.core.failures import Unreachable
from common.core.pruning.masks import Allocation, Infeasible, KeepMasked, Masks, layer_counts, prunable
from common.core.recipe import Recipe
from common.core.run import Cell, Context, Job, Outcome
from common.core.trainer import Trainer
from common.core.tuning import Tuned, TuningSettings, tuned
from common.settings import Count, Rate, Seeds, SettingsError, Strict
from replications.imp_slr import measures, method
from replications.imp_slr.during import Baseline, DuringSettings, Preparing, Swept
from replications.imp_slr.measures import percent
from replications.imp_slr.retraining import Pruning, RetrainingSettings, TunableSettings

ExperimentName = Literal[
    "schedules", "during", "allocations", "lengths", "cycles", "short", "bimp", "deviations"
]
DENSE, BASE = "dense", "slr"
"""The network that all start from which prune after training, and what most are compared with."""
AS_RELEASED = {"conv_init": "torch", "linear_init": "torch"}
"""How the release starts its networks: as torch does."""
HE = {"conv_init": "fan_out"}
"""The deviation from it that is measured: convolutions by He et al., normal with variance 2 / (k*k*outputs)."""
MOST = 0.9
"""Of the gain of retraining: what "most" means."""

# ------------------------------------------------------------------------------------------ settings


class BIMPSettings(Strict):
    shares: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (0.7,)
    """Of the total epochs, for dense training with a linear schedule."""
    cycles: Count = 1
    readings: Annotated[tuple[Literal["2023", "2022"], ...], Field(min_length=1)] = ("2023",)
    """Dense training followed by IMP with ALLR, or one run with prunings every `interval` epochs (`bimp-<n>pct-2022`)."""
    interval: Count = 4


class Settings(ExperimentSettings, TuningSettings):
    cells: Cells = (
        CellSettings(
            architecture="mlp",
            settings={"experiments": ["schedules", "during", "lengths", "cycles", "short", "bimp"]},
        ),
        CellSettings(
            architecture="digits_cnn_strided",
            options=AS_RELEASED,
            settings={"experiments": ["allocations"], "learning_rates": []},
        ),
    )
    targets: Cuts = (0.9, 0.95, 0.98)
    experiments: Annotated[tuple[ExperimentName, ...], Field(min_length=1)] = get_args(ExperimentName)[:-1]
    """What is run; all but `deviations` have their list or table below."""
    at: dict[ExperimentName, Cuts] = {}
    """The targets of an experiment that is run at other ones."""
    training: Recipe = Recipe(epochs=30, batch_size=64, learning_rate=0.1, nesterov=True, weight_decay=5e-4)
    """Of dense networks."""
    retrain_epochs: Count = 10
    """Of retraining; methods that prune during training have these on top of those of `training`."""
    learning_rates: tuple[Rate, ...] = (0.03, 0.1, 0.3)
    """Tried in place of that of `training`, which holds where there are none; each method has one for all targets."""
    tuning_seeds: Seeds = (1000, 1001)
    schedules: tuple[method.Schedule, ...] = ("SLR", "FT", "LRW")
    tunables: tuple[TunableSettings, ...] = ()
    during: DuringSettings = DuringSettings()
    allocations: tuple[Allocation, ...] = ("uniform_plus", "ERK", "LAMP")
    """Compared with global."""
    lengths: tuple[Count, ...] = (6, 30)
    """Epochs of retraining, beside `retrain_epochs`."""
    cycles: tuple[Annotated[int, Field(ge=2)] | Literal["20%"], ...] = (3,)
    """Compared with one; `20%` takes as many as it needs to prune that share in each."""
    short_schedules: tuple[method.Schedule, ...] = ("SLR", "LLR", "ALLR")
    short_lengths: tuple[Count, ...] = (3,)
    bimp: BIMPSettings = BIMPSettings()
    retraining: RetrainingSettings = RetrainingSettings()

    @property
    def total_epochs(self) -> int:
        return self.training.epochs + self.retrain_epochs

    def cuts(self, experiment: ExperimentName) -> Cuts:
        """The targets of an experiment."""
        return self.at.get(experiment, self.targets)

    def pruning(self, **changes: Any) -> Pruning:
        """One pruning by global magnitude, and SLR; with `changes`."""
        return Pruning(**{**dict(self.retraining), "epochs": self.retrain_epochs, **changes})

    def retrained(self, schedules: Sequence[method.Schedule], lengths: Sequence[int]) -> dict[str, Pruning]:
        """One pruning and any of the schedules with any of the lengths, which are named by percent of dense training."""
        found = {}
        for schedule in schedules:
            name = schedule.lower()
            if name in DuringSettings.model_fields:  # LC is a method that prunes during training as well
                name += "-schedule"
            for length in lengths:
                share = f"-{percent(length, self.training.epochs)}" if length != self.retrain_epochs else ""
                found[name + share] = self.pruning(schedule=schedule, epochs=length)
        return found

    @property
    def prunings(self) -> dict[ExperimentName, dict[str, Pruning]]:
        """What is done with the dense network in each experiment, by variant."""
        base = {BASE: self.pruning()}
        tunables = {
            f"{own.kind}-{own.initial:g}-{own.warmup_share:g}": self.pruning(
                schedule=own.kind, initial=own.initial, warmup_share=own.warmup_share
            )
            for own in self.tunables
        }
        allocations = {f"{BASE}-{name.lower()}": self.pruning(allocation=name) for name in self.allocations}
        cycles = {
            f"{BASE}-{'20pct-' if count == '20%' else count}cycles": self.pruning(cycles=count)
            for count in self.cycles
        }
        return {
            "schedules": self.retrained(self.schedules, [self.retrain_epochs]) | tunables,  # H1
            "during": base,  # H2, against methods that are no pruning of a dense network
            "allocations": base | allocations,  # H3
            "lengths": self.retrained(["SLR"], self.lengths),  # H4
            "cycles": base | cycles,  # H5
            "short": self.retrained(self.short_schedules, self.short_lengths),  # H6
            "bimp": {},  # H7, from dense networks of its own
            "deviations": base | {f"{BASE}-no-recalibration": self.pruning(recalibrate=False)},
        }

    @model_validator(mode="after")
    def _possible(self) -> Settings:
        if self.training.optimizer != "sgd" or self.training.decay != "all":
            raise ValueError("training must be by sgd with decay: all, as the compared methods change both")
        for name, lengths in (("lengths", self.lengths), ("short_lengths", self.short_lengths)):
            self._check_lengths(name, lengths)
        rewound = [self.retrain_epochs] * ("LRW" in self.schedules)
        rewound += [length for length in self.short_lengths if "LRW" in self.short_schedules]
        if any(length > self.training.epochs for length in rewound):
            raise ValueError(
                f"LRW can retrain for no more than the {self.training.epochs} epochs of dense training"
            )
        for name, gradual in (("gmp", self.during.gmp), ("dpf", self.during.dpf)):
            if gradual and self.total_epochs // gradual.interval < 2:
                raise ValueError(f"during.{name}.interval must fit twice into the {self.total_epochs} epochs")
        self._check_bimp()
        return self

    def _check_lengths(self, name: str, lengths: Sequence[int]) -> None:
        if self.retrain_epochs in lengths:
            raise ValueError(
                f"{name} must leave out retrain_epochs = {self.retrain_epochs}, which always runs"
            )
        if len({percent(length, self.training.epochs) for length in lengths}) < len(lengths):
            raise ValueError(f"{name} must differ by at least a percent of the {self.training.epochs} epochs")

    def _check_bimp(self) -> None:
        dense = [round(share * self.total_epochs) for share in self.bimp.shares]
        if not all(0 < epochs < self.total_epochs for epochs in dense):
            raise ValueError(f"bimp.shares must leave some of the {self.total_epochs} epochs on either side")
        if len({percent(share, 1) for share in self.bimp.shares}) < len(dense):
            raise ValueError("bimp.shares must differ by at least a percent")
        if "2022" in self.bimp.readings and self.total_epochs - max(dense) < self.bimp.interval:
            raise ValueError("bimp.interval must fit into the epochs after dense training")


# ------------------------------------------------------------------------------------------ jobs


class Train(Job):
    """A dense network."""

    training: Tuned[Recipe]

    def execute(self, context: Context) -> Outcome:
        recipe = self.training.chosen(context)
        trainer = recipe.trainer(context, context.network())
        trainer.fit(recipe.rates(len(trainer.batches)), "dense")
        outcome = _measured(context, trainer, recipe, self.training)
        outcome.state = {"model": trainer.model.state_dict()}
        return outcome

    def recipe(self, context: Context) -> Recipe:
        """How it was trained, for a job that starts from it."""
        rate = context.of(self).record.details["learning_rate"]
        return next(recipe for recipe in self.training.options if recipe.learning_rate == rate)


class PruneDuring(Job):
    """A network that is pruned while it trains, or prepared for the pruning after it."""

    method: str
    method_options: Baseline
    training: Tuned[Recipe]
    pruning: Pruning | None = None

    def execute(self, context: Context) -> Outcome:
        recipe, model = self.training.chosen(context), context.network()
        hook = self.method_options.hook(model, self.target, recipe, recipe.per_epoch(context.data))
        own = self.method_options.recipe(recipe)
        trainer = own.trainer(context, model, hook, decays=hook.decays)
        trainer.fit(own.rates(len(trainer.batches)), self.method)
        masks = hook.finish(trainer)
        if self.pruning is None:
            outcome = _measured(context, trainer, recipe, self.training)
        else:
            trainer.add_hook(KeepMasked(masks))
            trainer.fresh_optimizer(momentum=recipe.momentum, weight_decay=recipe.weight_decay)
            before = trainer.evaluate(Batches(context.data, "test"))["accuracy"]
            cycles, metrics = self.pruning.done(context, trainer, masks, self.target, recipe, before)
            outcome = _measured(context, trainer, recipe, self.training, cycles, metrics)
        outcome.state = {"model": trainer.model.state_dict()}
        return outcome


class PruneAndRetrain(Job):
    """IMP from a dense network. like: a run whose sparsity is the target."""

    start: Train
    pruning: Pruning
    like: PruneDuring | None = None

    def execute(self, context: Context) -> Outcome:
        start, recipe = context.of(self.start), self.start.recipe(context)
        model = context.network()
        model.load_state_dict(start.state["model"])
        masks = Masks.dense(model)
        trainer = recipe.trainer(context, model, KeepMasked(masks))
        # data order goes on where dense training ended
        trainer.go_on_from(recipe.epochs)
        sparsity, before = self.sparsity(context), start.record.metrics["test_accuracy"]
        distance = measures.relative_distance(model, sparsity)
        cycles, metrics = self.pruning.done(context, trainer, masks, sparsity, recipe, before)
        metrics["distance_to_pruned"] = distance
        outcome = _measured(context, trainer, recipe, None, cycles, metrics)
        ends = metrics["pruned_accuracy"], outcome.metrics["test_accuracy"]
        outcome.metrics[f"accuracy_at_{percent(MOST, 1)}_gain"] = measures.accuracy_at_gain(*ends, MOST)
        return outcome

    def sparsity(self, context: Context) -> float:
        """What the network is pruned to. Raises Unreachable where the run that it is like has pruned nothing."""
        if self.like is None:
            return self.target
        reached: float = context.of(self.like).record.cost["sparsity"]
        if not 0 < reached < 1:
            raise Unreachable(
                f"{self.like.variant} reached a sparsity of {reached:g}: nothing to compare with"
            )
        return reached


class Chosen(tuning.Chosen):
    """The trial of a method at a target whose learning rate is best over all targets, as it is."""


class BIMPInOneRun(Job):
    """BIMP as the 2022 code has it; the recipe is that of its dense part."""

    training: Tuned[Recipe]
    epochs: Count
    interval: Count

    def execute(self, context: Context) -> Outcome:
        recipe, model = self.training.chosen(context), context.network()
        shape = self.epochs, recipe.epochs, self.interval
        hook = method.PruneAt(Masks.dense(model), method.bimp_events(self.target, *shape))
        trainer = recipe.trainer(context, model, hook)
        trainer.fit(method.bimp_rates(recipe.learning_rate, *shape, len(trainer.batches)), "bimp")
        return _measured(context, trainer, recipe, self.training)


def _measured(
    context: Context,
    trainer: Trainer,
    recipe: Recipe,
    training: Tuned[Recipe] | None,
    cycles: Sequence[method.Cycle] = (),
    metrics: Mapping[str, float] | None = None,
) -> Outcome:
    """Scores and cost of the trainer's network, and how it came about.

    recipe: of its dense training; training: from what it was chosen in this run. cycles, metrics: of its pruning.
    """
    outcome = context.measured(trainer, details={"learning_rate": recipe.learning_rate})
    # in all, dense training included
    epochs, images = trainer.epochs_done, len(context.data.labels["train"])
    outcome.metrics |= {"epochs": epochs, "trained_macs": outcome.cost["dense_macs"] * images * epochs}
    outcome.metrics |= metrics or {}
    if training and training.trials:
        names = [f"{option.learning_rate:g}" for option in training.options]
        outcome.details["tuning"] = dict(zip(names, training.means(context), strict=True))
    if cycles:
        outcome.details["cycles"] = [
            {name: value for name, value in vars(cycle).items() if name != "rates"} for cycle in cycles
        ]
    outcome.details["nonzero_by_layer"] = measures.nonzero_by_layer(trainer.model)
    return outcome


# ------------------------------------------------------------------------------------------ which jobs


class Experiment(experiment.Experiment[Settings]):
    """The jobs of one cell. What several experiments need is the same job each time."""

    def __init__(self, settings: Settings, cell: Cell, data: Dataset):
        super().__init__(settings, cell, data)
        self.dense = cache(self._dense)
        try:
            self._check()
        except (ValueError, TypeError, Infeasible) as error:
            raise SettingsError(str(error)) from None

    def _check(self) -> None:
        """Raise an error if an allocation cannot reach a target in the network, or two schedules are the same one."""
        shapes = [weight.shape for weight in prunable(self.network).values()]
        sizes = [shape.numel() for shape in shapes]
        for pruning in self.settings.prunings["allocations"].values():
            if "allocations" in self.settings.experiments and pruning.allocation in ("ERK", "uniform_plus"):
                for target in self.settings.cuts("allocations"):
                    layer_counts(shapes, sizes, target, pruning.allocation)
        schedules = self.settings.schedules if "schedules" in self.settings.experiments else ()
        if {"FT", "LRW"} <= set(schedules) and self._rewinds_to_the_last_rate():
            raise ValueError(
                f"retrain_epochs = {self.settings.retrain_epochs}: must reach back beyond the last drop of the learning "
                f"rate in the {self.settings.training.epochs} epochs of training, or LRW is FT; or leave one out of schedules"
            )

    def _rewinds_to_the_last_rate(self) -> bool:
        """Whether rewinding the learning rates finds the last one only, so that LRW would be FT."""
        per_epoch = self.settings.training.per_epoch(self.data)
        try:
            rates = self.settings.training.rates(per_epoch)
        except SettingsError:
            return False  # the recipe is refused by its own name
        return len(set(rates[-self.settings.retrain_epochs * per_epoch :])) == 1

    def jobs(self, seed: int) -> Iterator[Job]:
        for name in self.settings.experiments:
            for target in self.settings.cuts(name):
                for variant, pruning in self.settings.prunings[name].items():
                    yield self.pruned(variant, target, self.dense(seed), pruning)
        if "during" in self.settings.experiments:
            yield from self.during(seed)
        if "bimp" in self.settings.experiments:
            yield from self.bimp(seed)
        if "deviations" in self.settings.experiments:
            yield from self.started_by_he(seed)

    def _dense(self, seed: int) -> Train:
        return Train(variant=DENSE, cell=self.cell, seed=seed, training=self.chosen_by_imp(seed))

    def started_by_he(self, seed: int) -> Iterator[PruneAndRetrain]:
        """The criteria on networks that start otherwise than the release's, at the same learning rate."""
        cell = Cell(**{**dict(self.cell), "options": {**self.cell.options, **HE}})
        dense = Train(variant=f"{DENSE}-he", cell=cell, seed=seed, training=self.chosen_by_imp(seed))
        for target in self.settings.cuts("deviations"):
            for variant, pruning in self.settings.prunings["allocations"].items():
                yield self.pruned(f"{variant}-he", target, dense, pruning)

    def pruned(
        self, variant: str, target: float, start: Train, pruning: Pruning, like: PruneDuring | None = None
    ) -> PruneAndRetrain:
        """A dense network, pruned and retrained."""
        identity = {"variant": variant, "cell": start.cell, "target": target, "seed": start.seed}
        return PruneAndRetrain(**identity, start=start, pruning=pruning, like=like)

    def during(self, seed: int) -> Iterator[Job]:
        """Methods that prune during training, at equal total epochs."""
        for name, options in self.settings.during.chosen.items():
            if isinstance(options, Swept):
                yield from self.swept(name, options, seed)
            else:
                yield from self.trained(name, options, seed)

    def trained(self, name: str, options: Baseline, seed: int) -> Iterator[Job]:
        """One with a target, at the learning rate that is best over all targets."""
        shared = {"cell": self.cell, "method": name, "method_options": options}
        epochs, cuts = self.settings.total_epochs, self.settings.cuts("during")
        if isinstance(options, Preparing):
            shared["pruning"], epochs = self.settings.pruning(), self.settings.training.epochs

        def trial(variant: str, recipe: Recipe, seed: int) -> tuple[Job, ...]:
            identity = {"variant": variant, "seed": seed, "training": Tuned((recipe,))}
            return tuple(PruneDuring(**identity, target=target, **shared) for target in cuts)

        training = tuned(self.settings, seed, name, self.recipes(epochs=epochs), trial)
        for number, target in enumerate(cuts):
            if training.trials and self.settings.tuning == "per_seed":
                # a trial is what the chosen learning rate gives
                choice = Tuned(tuple(jobs[number] for jobs in training.trials), training.trials)
                yield self.job(Chosen, name, seed, target, choice=choice)
            else:
                yield PruneDuring(variant=name, target=target, seed=seed, training=training, **shared)

    def swept(self, name: str, options: Swept, seed: int) -> Iterator[Job]:
        """One without a target with each of its values, and IMP at the sparsity that it reached."""
        training = self.chosen_by_imp(seed, epochs=self.settings.total_epochs)
        shared = {"cell": self.cell, "seed": seed, "method": name, "training": training}
        for value, own in options.points():
            run = PruneDuring(variant=f"{name}-{value:g}", method_options=own, **shared)
            yield run
            variant = f"{BASE}-as-{run.variant}"
            yield self.pruned(variant, 0.0, self.dense(seed), self.settings.pruning(), like=run)

    def bimp(self, seed: int) -> Iterator[Job]:
        """Budgeted IMP, which takes as many epochs in all as the methods that prune during training."""
        total, own = self.settings.total_epochs, self.settings.bimp
        linear = {"schedule": "linear", "end": 0.0, "warmup_epochs": 0}
        for share in own.shares:
            name, epochs = f"bimp-{percent(share, 1)}", round(share * total)
            shared = {"cell": self.cell, "seed": seed}
            shared["training"] = self.chosen_by_imp(seed, epochs=epochs, **linear)
            dense = Train(variant=f"{name}-{DENSE}", **shared)
            pruning = self.settings.pruning(schedule="ALLR", epochs=total - epochs, cycles=own.cycles)
            for target in self.settings.cuts("bimp"):
                if "2023" in own.readings:
                    yield self.pruned(name, target, dense, pruning)
                if "2022" in own.readings:
                    shape = {"epochs": total, "interval": own.interval}
                    yield BIMPInOneRun(variant=f"{name}-2022", target=target, **shared, **shape)

    # -------------------------------------------------------------------------------------- learning rates

    def recipes(self, **changes: Any) -> tuple[Recipe, ...]:
        """The recipe of dense training with `changes`, at each learning rate that is tried."""
        recipe = self.settings.training.changed(**changes)
        return tuple(recipe.changed(learning_rate=rate) for rate in self.settings.learning_rates) or (recipe,)

    def chosen_by_imp(self, seed: int, **changes: Any) -> Tuned[Recipe]:
        """That recipe at the learning rate of dense training after which IMP ends best.

        On average over the targets at which it is compared with methods that prune during training.
        """

        def trial(name: str, option: Recipe, seed: int) -> tuple[Job, ...]:
            recipe = self.settings.training.changed(learning_rate=option.learning_rate)
            dense = Train(variant=f"{name}-{DENSE}", cell=self.cell, seed=seed, training=Tuned((recipe,)))
            pruning = self.settings.pruning()
            return tuple(self.pruned(name, target, dense, pruning) for target in self.settings.cuts("during"))

        return tuned(self.settings, seed, "imp", self.recipes(**changes), trial)
