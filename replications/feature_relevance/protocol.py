"""The experiment: networks pruned while they train, against other criteria, other moments, and no pruning.

For each network and seed one dense training, and where wanted a longer one that says whether it had converged. Every
pruned run goes on from the dense network as it was before the first event, so runs of equal seed differ by pruning
alone; its training epochs are those of the dense network in total.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from common.core import experiment
from common.core.data import Dataset
from common.core.experiment import Cells, CellSettings, Cuts, VariantSettings
from common.core.models import Network
from common.core.models.resnet import ResNet
from common.core.pruning import channels
from common.core.pruning.counting import cost
from common.core.recipe import Recipe
from common.core.run import Cell, Context, Job, Outcome
from common.core.trainer import Hooks, Trainer
from common.settings import (
    AugmentationSettings,
    Count,
    DatasetSettings,
    SettingsError,
    Share,
    Strict,
    hint,
    validated,
)
from replications.feature_relevance import baselines, method
from replications.feature_relevance.costs import CostTable, even_share, forward_macs, official_zero_weights
from replications.feature_relevance.method import Enough, Goal, GradualPruning, Pruner

DENSE, LONG = "dense", "dense-long"
NotNegative = Annotated[int, Field(ge=0)]
Removal = Literal["physical", "masked"]
Spent = Callable[[Mapping[str, float]], float]
"""What a network costs, by the channels left in its layers."""
ALLOCATIONS = {"global": method.all_together, "per_layer": baselines.same_share}

# ------------------------------------------------------------------------------------------ settings


class Method(Strict):
    """One way of pruning."""

    criterion: Literal["relevance", "random", "l1", "taylor"] = "relevance"
    allocation: Literal["global", "per_layer"] = "global"
    """`per_layer` removes the same share of every layer, in the order of the same scores."""
    budget: Literal["channels", "macs", "cost"] = "channels"
    """What a target fixes: `channels` the share of prunable channels that goes; `macs` the MACs, which are
    those of the network whose layers have all lost that share; `cost` the share of the MACs that goes, where channels
    go on leaving until there are also `compression` times fewer parameters."""
    compression: Annotated[float, Field(gt=1)] = 2.4
    """Of the budget `cost`."""
    timing: Literal["gradual", "once", "end"] = "gradual"
    """At every event; all at the epoch `last` with the rest for fine-tuning; or all after the last epoch."""
    class_scale: bool = True
    branch_share: bool = False
    """Score the last convolution of a block by its branch alone."""
    alpha: Annotated[float, Field(ge=1)] = 2.0
    images: Literal["fixed", "augmented"] = "fixed"
    """What is scored: the same images at every event, `scoring_share` of them, the same number of each class, as they
    are; or all training images, augmented anew at every event, as in the authors' code."""
    removal: Removal | None = None
    """In place of the experiment's."""

    def scored_by(self, seed: int) -> method.Criterion:
        """The criterion, with the seed of the random one."""
        known: dict[str, method.Criterion] = {
            "relevance": method.Relevance(self.alpha, self.class_scale, self.branch_share),
            "random": baselines.Random(seed),
            "l1": baselines.L1(),
            "taylor": baselines.Taylor(),
        }
        return known[self.criterion]

    def due(self, epochs: int, every: int, last: int) -> dict[int, int]:
        """How many gradual events' worth is gone after each event, by its epoch (from 1)."""
        gradual = method.pruning_schedule(epochs, every, last)
        at_once = {"once": last, "end": epochs}
        if self.timing in at_once:
            return {at_once[self.timing]: len(gradual)}
        return {epoch: number + 1 for number, epoch in enumerate(gradual)}


HEADLINE = Method(budget="cost")
METHODS = {
    "frs": Method(),
    "frs-once": Method(timing="once"),
    "frs-end": Method(timing="end"),
    "frs-headline": HEADLINE,
    # what is other in the authors' code, or may be read in another way
    "headline-augmented": HEADLINE.model_copy(update={"images": "augmented"}),
    "headline-masked": HEADLINE.model_copy(update={"removal": "masked"}),
    "headline-branch": HEADLINE.model_copy(update={"branch_share": True}),
    "headline-unscaled": HEADLINE.model_copy(update={"class_scale": False}),
    "random": Method(criterion="random"),
    "l1": Method(criterion="l1"),
    "per-layer": Method(allocation="per_layer"),
    "frs-macs": Method(budget="macs"),
    "random-macs": Method(budget="macs", criterion="random"),
    "l1-macs": Method(budget="macs", criterion="l1"),
    "taylor-macs": Method(budget="macs", criterion="taylor"),
    "per-layer-macs": Method(budget="macs", allocation="per_layer"),
}
"""What variants are; `methods` in the settings adds others."""


class Settings(VariantSettings):
    """Settings of the paper; the defaults are those of the 8x8 digits, without their augmentation."""

    cells: Cells = (
        CellSettings(
            architecture="resnet14",
            options={"stem": 8},
            settings={"variants": {"frs-headline": (0.56,)}},
        ),
        CellSettings(
            architecture="vgg_mini",
            options={"dropout": 0.0},
            settings={
                "units_per_event": 1,
                "variants": {
                    "frs-macs": (0.6,),
                    "random-macs": (0.6,),
                    "l1-macs": (0.6,),
                    "per-layer-macs": (0.6,),
                },
            },
        ),
    )
    targets: Cuts = (0.46,)
    variants: dict[str, Cuts | Literal["all"]] = {"frs": "all", "frs-once": "all"}
    """Beside the dense network, which is run in any case."""
    methods: dict[str, Method] = {}
    """More methods that `variants` may name, or other meanings of those that there are."""
    training: Recipe = Recipe(epochs=40, batch_size=64, learning_rate=0.1, weight_decay=5e-4)
    long_factor: Annotated[int, Field(ge=2)] | None = None
    """Epochs of the dense network `dense-long`, in multiples of those of all others. Default: it is not run."""
    augmentation: AugmentationSettings | None = None
    """Of training images, in place of the data set's own; scoring sees them as they are."""
    every: Count = 4
    """n: epochs between two events."""
    last: Count = 30
    """N1: no gradual event later than after this epoch; when the variants `once` prune."""
    units_per_event: NotNegative = 0
    """Hidden units that every event removes from each hidden layer of a plain network."""
    min_channels_per_layer: NotNegative | None = None
    """Default: 0 in residual networks, 1 in plain ones."""
    protected: tuple[str, ...] | None = None
    """Names of layers that are never pruned. Default: the first two convolutions of a plain network."""
    scoring_share: Share = 0.25
    """Share of the training images, the same number of each class, that relevance is computed on."""
    removal: Removal = "physical"
    """Take channels out of the network while it trains, or multiply masks into its weights."""

    @field_validator("methods")
    @classmethod
    def _dense_is_taken(cls, value: dict[str, Method]) -> dict[str, Method]:
        for name in (DENSE, LONG):
            if name in value:
                raise ValueError(f"{name!r} is the name of a network that is not pruned")
        return value

    @model_validator(mode="after")
    def _possible(self) -> Settings:
        if not self.every <= self.last <= self.training.epochs:
            raise ValueError(
                f"every {self.every} <= last {self.last} <= training.epochs {self.training.epochs} must hold"
            )
        for name in self.variants:
            if name not in self.known:
                raise ValueError(f"variants: {name!r}: {hint(name, list(self.known))}")
        return self

    @property
    def known(self) -> dict[str, Method]:
        """All methods by name."""
        return METHODS | self.methods


# ------------------------------------------------------------------------------------------ jobs


class Train(Job):
    """The network that nothing is taken from, kept as it was where pruned ones part from it."""

    training: Recipe
    partings: tuple[Count, ...] = ()
    """Epochs after which it is kept."""

    def execute(self, context: Context) -> Outcome:
        snapshots = _Snapshots(self.partings)
        trainer = self.training.trainer(context, context.network(), snapshots)
        trainer.fit(self.training.rates(len(trainer.batches)))
        return context.measured(trainer, state={"snapshots": snapshots.taken, "history": trainer.history})


class Prune(Job):
    """A network that goes on from the dense one with its first event."""

    dense: Train
    training: Recipe
    """That of the dense network."""
    method: Method
    every: Count
    last: Count
    units_per_event: NotNegative
    min_channels_per_layer: NotNegative
    protected: tuple[str, ...]
    scoring_share: Share
    removal: Removal

    def execute(self, context: Context) -> Outcome:
        model = context.network()
        table = CostTable(model, context.data.image_shape)
        if self.method.images == "augmented":
            batches = method.augmented_batches(context.data, self.seed)
        else:
            batches = method.scoring_batches(context.data, self.scoring_share)
        pruner = Pruner(
            model,
            batches,
            self.method.scored_by(self.seed),
            ALLOCATIONS[self.method.allocation],
            self.min_channels_per_layer,
            self.protected,
        )
        goals = self.goals(model, table)
        hook = GradualPruning(pruner, goals, physical=self.removal == "physical")
        trainer = self.training.trainer(context, model, hook)
        start, dense = min(goals), context.of(self.dense).state
        trainer.go_on_from(start, dense["history"][:start], **dense["snapshots"][str(start)])
        hook.prune(trainer, start)
        per_epoch = len(trainer.batches)
        trainer.fit(self.training.rates(per_epoch)[start * per_epoch :])
        return self.measured(context, trainer, hook, table, len(batches.labels))

    def goals(self, model: Network, table: CostTable) -> dict[int, Goal]:
        """What each event on a network of full width must reach, by epoch (from 1).

        Raises SettingsError when an event would take no channel, or more than there are.
        """
        prunable = method.prunable_layers(model, self.protected)
        layers, units = ([group.name for group in groups] for groups in prunable)
        due = self.method.due(self.training.epochs, self.every, self.last)
        events = max(due.values())
        for name in units:
            if table.widths[name] <= events * self.units_per_event:
                raise SettingsError(
                    f"units_per_event = {self.units_per_event}: {events} events leave none of "
                    f"{table.widths[name]} units"
                )
        parts = {epoch: gone - before for (epoch, gone), before in zip(due.items(), [0, *due.values()])}
        if self.method.budget == "channels":
            enough = self._equal_counts(table, layers, parts)
        else:
            enough = self._equal_costs(table, layers, units, due)
        return {epoch: Goal(enough[epoch], part * self.units_per_event) for epoch, part in parts.items()}

    def _equal_counts(self, table: CostTable, layers: list[str], parts: dict[int, int]) -> dict[int, Enough]:
        """As many channels for each gradual event; `parts` says how many of them an event stands for."""
        events = sum(parts.values())
        widths = [table.widths[name] for name in layers]
        each = round(self.target * sum(widths) / events)
        most = sum(max(0, width - self.min_channels_per_layer) for width in widths)
        if not 0 < each * events <= most:
            raise SettingsError(
                f"a target of {self.target:g} takes {each} channels at each of {events} events; it must be at "
                f"least 1, and {most} of {sum(widths)} channels can go in all"
            )
        return {epoch: method.until_channels(part * each) for epoch, part in parts.items()}

    def _equal_costs(
        self, table: CostTable, layers: list[str], units: list[str], due: dict[int, int]
    ) -> dict[int, Enough]:
        """At each event down to what the network costs whose layers have all lost the share that is due."""
        events = max(due.values())

        def hidden(gone: int) -> dict[str, float]:
            return {name: table.widths[name] - gone * self.units_per_event for name in units}

        def share(spent: Spent, most: float) -> float:
            return even_share(lambda part: spent(table.even(layers, part) | hidden(events)), most)

        costs: dict[str, tuple[Spent, float]] = {"MACs": (table.macs, self.target)}
        if self.method.budget == "cost":
            costs = {
                "MACs": (table.macs, share(table.macs, (1 - self.target) * table.macs())),
                "parameters": (
                    table.parameters,
                    share(table.parameters, table.parameters() / self.method.compression),
                ),
            }
        found: dict[int, Enough] = {}
        for epoch, gone in due.items():
            bounds = []
            for name, (spent, even) in costs.items():
                most = spent(table.even(layers, even * gone / events) | hidden(gone))
                self._check_reachable(table, layers, hidden(gone), name, spent, most)
                bounds.append(method.until_at_most(spent, most))
            found[epoch] = method.until_all(bounds)
        return found

    def _check_reachable(
        self,
        table: CostTable,
        layers: list[str],
        hidden: dict[str, float],
        name: str,
        spent: Spent,
        most: float,
    ) -> None:
        """Raise SettingsError where the narrowest network costs more than `most`."""
        least = self.min_channels_per_layer
        narrowest = spent({layer: min(least, table.widths[layer]) for layer in layers} | hidden)
        if narrowest > most:
            raise SettingsError(
                f"a target of {self.target:g} allows {most:.0f} {name}; the narrowest network with {least} "
                f"channels a layer has {narrowest:.0f}"
            )

    def measured(
        self, context: Context, trainer: Trainer, hook: GradualPruning, table: CostTable, images: int
    ) -> Outcome:
        """Scores, cost and what the events did. images: how many were scored at each event."""
        narrow, pruner = trainer.model, hook.pruner
        if self.removal == "masked":
            narrow = copy.deepcopy(narrow)
            channels.remove(narrow, pruner.kept)
        shape, epochs = context.data.image_shape, self.training.epochs
        full = self.cell.build(context.data, device="meta")
        costs = cost(narrow, shape, dense=cost(full, shape))
        zeros = official_zero_weights(full, table, pruner.removed)
        passes = pruner.criterion.passes * len(hook.log) * images
        gone = [len(pruner.removed[name]) for name in pruner.layers]
        outcome = context.measured(trainer, costs=costs, details={"events": hook.log})
        # in units of training the dense network; training an image costs three forward passes
        scoring = passes / (3 * epochs * len(context.data.labels["train"]))
        training = sum(forward_macs(hook.log, table, epochs)) / (epochs * costs["dense_macs"])
        outcome.metrics |= {
            "channels_removed": sum(gone) / sum(table.widths[name] for name in pruner.layers),
            "weight_compression": costs["dense_weights"] / costs["weights"],
            "macs_reduction": 1 - costs["macs"] / costs["dense_macs"],
            "official_prune_rate": zeros / costs["dense_weights"],
            "scoring_cost": scoring,
            "training_cost": training,
            "total_cost": training + scoring,
        }
        return outcome


class _Snapshots(Hooks):
    """Keeps model and optimiser as they are at the end of given epochs (from 1)."""

    def __init__(self, epochs: tuple[int, ...]):
        self.epochs = epochs
        self.taken: dict[str, dict[str, Any]] = {}

    def epoch_ended(self, trainer: Trainer, epoch: int) -> None:
        if (number := trainer.epochs_done + 1) in self.epochs:
            states = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
            self.taken[str(number)] = copy.deepcopy(states)

    def state(self) -> dict[str, Any]:
        return self.taken

    def load_state(self, trainer: Trainer, state: dict[str, Any]) -> None:
        self.taken = state


# ------------------------------------------------------------------------------------------ which jobs


class Experiment(experiment.Experiment[Settings]):
    """The jobs of one cell."""

    def __init__(self, settings: Settings, cell: Cell, data: Dataset):
        if settings.augmentation is not None:
            changed = cell.data.model_dump() | {"augmentation": settings.augmentation}
            cell = cell.model_copy(update={"data": validated(DatasetSettings, changed, "augmentation")})
        super().__init__(settings, cell, data)
        if not isinstance(self.network, method.KNOWN):
            raise SettingsError("relevance is only defined for plain and residual networks")
        self.table = CostTable(self.network, data.image_shape)
        self.protected, self.least = self._protected(), self._least()

    def _protected(self) -> tuple[str, ...]:
        """The layers that no run prunes, in the network's order."""
        wanted, units_per_event = self.settings.protected, self.settings.units_per_event
        if units_per_event and not method.prunable_layers(self.network, ())[1]:
            raise SettingsError(f"units_per_event = {units_per_event}: it has no hidden linear layer")
        if wanted is None:
            return tuple(method.protected_layers(self.network))
        known = [group.name for group in channels.groups_of(self.network)]
        for name in wanted:
            if name not in known:
                raise SettingsError(f"protected = {name!r}: {hint(name, known)}")
        layers, units = method.prunable_layers(self.network, wanted)
        if not layers:
            raise SettingsError("protected names every convolution, so none is left to prune")
        if units_per_event and not units:
            raise SettingsError(
                f"protected names every hidden linear layer: units_per_event must be 0, not {units_per_event}"
            )
        return tuple(name for name in known if name in wanted)

    def _least(self) -> int:
        """Channels that every layer keeps."""
        residual, wanted = isinstance(self.network, ResNet), self.settings.min_channels_per_layer
        if wanted is None:
            return 0 if residual else 1
        if wanted == 0 and not residual:
            raise SettingsError(
                "it has no path around a layer: min_channels_per_layer must be 1 or more, not 0"
            )
        return wanted

    def jobs(self, seed: int) -> Iterator[Job]:
        own, wanted = self.settings, self.settings.wanted
        shared = {"cell": self.cell, "seed": seed, "training": own.training}
        first = {min(own.known[name].due(own.training.epochs, own.every, own.last)) for name in wanted}
        dense = Train(variant=DENSE, partings=tuple(sorted(first)), **shared)
        yield dense
        if own.long_factor is not None:
            longer = own.training.changed(epochs=own.long_factor * own.training.epochs)
            yield Train(variant=LONG, **shared | {"training": longer})
        for name, targets in wanted.items():
            for target in targets:
                job = Prune(
                    variant=name,
                    target=target,
                    dense=dense,
                    method=own.known[name],
                    every=own.every,
                    last=own.last,
                    units_per_event=own.units_per_event,
                    min_channels_per_layer=self.least,
                    protected=self.protected,
                    scoring_share=own.scoring_share,
                    removal=own.known[name].removal or own.removal,
                    **shared,
                )
                job.goals(self.network, self.table)
                yield job
