"""The experiment: networks pruned while they train, against other criteria, other moments, and no pruning.

For each network and seed one dense training. Every pruned run goes on from the dense network as it was before
the first event, so runs of equal seed differ by pruning alone; its training epochs are those of the dense
network in total.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from common.core import models, schedules
from common.core.data import Batches, Dataset
from common.core.failures import Unreachable
from common.core.identity import stream
from common.core.loading import load
from common.core.models import Network
from common.core.models.resnet import ResNet
from common.core.pruning import channels
from common.core.pruning.counting import cost
from common.core.run import Context, Outcome, Run
from common.core.trainer import Hooks, Trainer
from common.settings import (
    AugmentationSettings,
    CellSettings,
    Count,
    PaperSettings,
    Profile,
    Rate,
    SettingsError,
    Share,
    Strict,
    Targets,
    hint,
)
from replications.feature_relevance import method
from replications.feature_relevance.gradual import (
    Enough,
    GradualPruning,
    Pruner,
    Scoring,
    forward_macs,
    until_at_most,
    until_channels,
)

PAPER = "feature_relevance"
DENSE = "dense"
# relevance keeps what every layer put out: large images come in smaller batches
SCORING_BATCH, SCORING_PIXELS = 500, 500 * 32 * 32
_TRAINING = {"epochs", "batch_size", "learning_rate", "milestones", "momentum", "weight_decay"}


class Variant(Strict):
    """One way of pruning."""

    criterion: method.ChannelCriterion = "relevance"
    allocation: method.ChannelAllocation = "global"
    """`per_layer` removes the same share of every layer, in the order of the same scores."""
    budget: method.BudgetUnit = "channels"
    """What a target fixes: `channels` the share of prunable channels that goes; `macs` the MACs, which are
    those of the network whose layers have all lost that share."""
    timing: Literal["gradual", "once", "end"] = "gradual"
    """At every event; all at the epoch `last` with the rest for fine-tuning; or all after the last epoch."""
    class_scale: bool = True
    branch_share: bool = False
    """Score the last convolution of a block by its branch alone."""
    alpha: Annotated[float, Field(ge=1)] = 2.0


class ArchitectureCell(CellSettings):
    """A network, and what is run on it. Data of its own bring their own augmentation."""

    name: str
    """As in common.core.models."""
    options: dict[str, Any] = {}
    """Of the network's class."""
    runs: dict[str, Targets]
    """Targets by variant; the dense network is run in any case."""
    units_per_event: Annotated[int, Field(ge=0)] = 0
    """Hidden units that every event removes from each hidden layer of a plain network."""
    min_channels_per_layer: Annotated[int, Field(ge=0)] | None = None
    """Default: 0 in residual networks, 1 in plain ones."""
    protected: tuple[str, ...] | None = None
    """Names of layers that are never pruned. Default: the first two convolutions of a plain network."""
    every: Count | None = None
    """In place of the `every` of all networks."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            models.architecture(name)
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return name

    @field_validator("runs")
    @classmethod
    def _positive(cls, runs: dict[str, Targets]) -> dict[str, Targets]:
        for variant, targets in runs.items():
            if min(targets) <= 0:
                raise ValueError(
                    f"{variant}: a target must lie above 0; the dense network is run in any case"
                )
        return runs


VARIANTS = {
    "frs": Variant(),
    "frs-once": Variant(timing="once"),
    "frs-end": Variant(timing="end"),
    "frs-unscaled": Variant(class_scale=False),
    "random": Variant(criterion="random"),
    "l1": Variant(criterion="l1"),
    "per-layer": Variant(allocation="per_layer"),
    "frs-macs": Variant(budget="macs"),
    "random-macs": Variant(budget="macs", criterion="random"),
    "l1-macs": Variant(budget="macs", criterion="l1"),
    "taylor-macs": Variant(budget="macs", criterion="taylor"),
    "per-layer-macs": Variant(budget="macs", allocation="per_layer"),
}
"""Variants by name, which `variants` in the settings adds to."""

ARCHITECTURES = (
    ArchitectureCell(
        name="resnet14", options={"stem": 8}, runs={"frs": (0.46,), "frs-once": (0.46,), "frs-end": (0.46,)}
    ),
    ArchitectureCell(
        name="vgg_mini",
        options={"dropout": 0.0},
        units_per_event=1,
        runs={
            "frs": (0.46,),
            "frs-once": (0.46,),
            "frs-end": (0.46,),
            "frs-macs": (0.46, 0.7),
            "random-macs": (0.46, 0.7),
            "l1-macs": (0.7,),
            "per-layer-macs": (0.7,),
        },
    ),
)


class Settings(PaperSettings):
    """Settings of the paper; the defaults are those of the 8x8 digits."""

    architectures: Annotated[tuple[ArchitectureCell, ...], Field(min_length=1)] = ARCHITECTURES
    variants: dict[str, Variant] = {}
    """More variants that `runs` may name, or other meanings of those that there are."""
    epochs: Count = 40
    every: Count = 4
    """n: epochs between two events."""
    last: Count = 30
    """N1: no gradual event later than after this epoch; when the variants `once` prune."""
    batch_size: Count = 64
    learning_rate: Rate = 0.1
    milestones: tuple[Share, ...] = (0.5, 0.75)
    """Shares of training at which the learning rate drops to a tenth."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Of all parameters."""
    augmentation: AugmentationSettings = AugmentationSettings(crop_padding=1)
    """Of training images; scoring sees them as they are."""
    scoring_share: Share = 0.25
    """Share of the training images, the same number of each class, that relevance is computed on."""
    removal: Literal["physical", "masked"] = "physical"
    """Take channels out of the network while it trains, or multiply masks into its weights."""

    @field_validator("architectures")
    @classmethod
    def _named_once(cls, value: tuple[ArchitectureCell, ...]) -> tuple[ArchitectureCell, ...]:
        names = {(architecture.name, architecture.data and architecture.data.name) for architecture in value}
        if len(names) < len(value):
            raise ValueError("must not repeat a name on the same data")
        return value

    @field_validator("variants")
    @classmethod
    def _dense_is_taken(cls, value: dict[str, Variant]) -> dict[str, Variant]:
        if DENSE in value:
            raise ValueError(f"{DENSE!r} is the name of the network that is not pruned")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        for architecture in self.architectures:
            every = architecture.every or self.every
            if not every <= self.last <= self.epochs:
                raise ValueError(f"every {every} <= last {self.last} <= epochs {self.epochs} must hold")
            for name in architecture.runs:
                if name not in self.known:
                    raise ValueError(f"runs of {architecture.name}: {name!r}: {hint(name, list(self.known))}")
        return self

    @property
    def known(self) -> dict[str, Variant]:
        """All variants by name."""
        return VARIANTS | self.variants


# ---------------------------------------------------------------------------------------------- the runs


def runs(profile: Profile) -> list[Run]:
    """Every run of the experiment.

    Raises SettingsError for a network that the method does not know, and for targets that cannot be met.
    """
    loaded = functools.cache(load)
    listed = []
    for number, architecture in enumerate(profile.paper.architectures):
        changes = architecture.settings | {"architectures": [architecture.model_dump()]}
        settings: Settings = profile.paper.changed(changes, f"{PAPER}.architectures[{number}].settings")
        augmented = profile.dataset.model_copy(update={"augmentation": settings.augmentation})
        source = architecture.data or augmented
        data = loaded(source)
        model = _shape_of(architecture, data)
        every = architecture.every or settings.every
        common = {"data": source.model_dump(mode="json"), "options": architecture.options}
        common |= settings.model_dump(mode="json", include=_TRAINING)
        own = settings.model_dump(mode="json", include={"last", "scoring_share", "removal"}) | {
            "every": every,
            "units_per_event": architecture.units_per_event,
            "min_channels_per_layer": _least_channels(architecture, model),
            "protected": _protected(architecture, model),
        }
        # pruned runs part from the dense one at their first event
        parting = {"gradual": every, "once": settings.last, "end": settings.epochs}
        starts = sorted({parting[settings.known[name].timing] for name in architecture.runs})
        wanted = []
        for name, targets in architecture.runs.items():
            full = {**common, **own, "method": settings.known[name].model_dump(mode="json")}
            for target in targets:
                event_goals(model, data.image_shape, target, full)
                wanted.append((name, target, full))
        cell = (source.name, architecture.name)
        for seed in settings.seeds:
            dense = Run(PAPER, DENSE, *cell, 0.0, seed, {**common, "snapshots": starts})
            listed += [dense, *(Run(PAPER, name, *cell, t, seed, full, (dense,)) for name, t, full in wanted)]
    return listed


def _shape_of(architecture: ArchitectureCell, data: Dataset) -> Network:
    """The network without values. Raises SettingsError when it is none that the method knows."""
    where = f"{PAPER}.architectures: {architecture.name}"
    try:
        model = models.build(
            architecture.name,
            classes=data.classes,
            image_shape=data.image_shape,
            device="meta",
            **architecture.options,
        )
    except ValueError as error:
        raise SettingsError(f"{where}: {error}") from None
    if not isinstance(model, method.KNOWN):
        raise SettingsError(f"{where}: relevance is only defined for plain and residual networks")
    if architecture.units_per_event and not method.prunable_layers(model, ())[1]:
        raise SettingsError(
            f"{where}.units_per_event = {architecture.units_per_event}: it has no hidden linear layer"
        )
    return model


def _protected(architecture: ArchitectureCell, model: Network) -> list[str]:
    """The layers that no run of this network prunes, in the network's order."""
    if architecture.protected is None:
        return method.protected_layers(model)
    where = f"{PAPER}.architectures: {architecture.name}.protected"
    known = [group.name for group in channels.groups_of(model)]
    for name in architecture.protected:
        if name not in known:
            raise SettingsError(f"{where} = {name!r}: {hint(name, known)}")
    layers, units = method.prunable_layers(model, architecture.protected)
    if not layers:
        raise SettingsError(f"{where} names every convolution, so none is left to prune")
    if architecture.units_per_event and not units:
        raise SettingsError(
            f"{where} names every hidden linear layer: units_per_event must be 0, not "
            f"{architecture.units_per_event}"
        )
    return [name for name in known if name in architecture.protected]


def _least_channels(architecture: ArchitectureCell, model: Network) -> int:
    residual, wanted = isinstance(model, ResNet), architecture.min_channels_per_layer
    if wanted is None:
        return 0 if residual else 1
    if wanted == 0 and not residual:
        raise SettingsError(
            f"{PAPER}.architectures: {architecture.name} has no path around a layer: "
            "min_channels_per_layer must be 1 or more"
        )
    return wanted


@dataclasses.dataclass(frozen=True)
class EventGoals:
    """What each event must reach, and how many hidden units it takes from each layer, by epoch (from 1)."""

    events: dict[int, Enough]
    units: dict[int, int]


def event_goals(
    model: Network, image_shape: tuple[int, ...], target: float, settings: Mapping[str, Any]
) -> EventGoals:
    """The events of a run with these settings on a full-width network.

    Raises SettingsError when an event would take no channel, or more than there are.
    """
    variant, least = Variant.model_validate(settings["method"]), settings["min_channels_per_layer"]
    table = method.CostTable(model, image_shape)
    prunable = method.prunable_layers(model, settings["protected"])
    layers, units = ([group.name for group in groups] for groups in prunable)
    gradual = method.pruning_schedule(settings["epochs"], settings["every"], settings["last"])
    # how many events' worth is gone after each event; a single one takes what all gradual ones take together
    done = {epoch: i + 1 for i, epoch in enumerate(gradual)}
    if variant.timing != "gradual":
        done = {settings["last"] if variant.timing == "once" else settings["epochs"]: len(gradual)}
    parts = {epoch: events - before for (epoch, events), before in zip(done.items(), [0, *done.values()])}
    for name in units:
        if table.widths[name] <= len(gradual) * settings["units_per_event"]:
            raise SettingsError(
                f"{PAPER}: units_per_event = {settings['units_per_event']}: {len(gradual)} events leave "
                f"none of {table.widths[name]} units"
            )
    taken_units = {epoch: part * settings["units_per_event"] for epoch, part in parts.items()}
    if variant.budget == "channels":
        widths = [table.widths[name] for name in layers]
        each = round(target * sum(widths) / len(gradual))
        most = sum(max(0, width - least) for width in widths)
        if not 0 < each * len(gradual) <= most:
            raise SettingsError(
                f"{PAPER}: a target of {target:g} takes {each} channels at each of {len(gradual)} events; "
                f"it must be at least 1, and {most} of {sum(widths)} channels can go in all"
            )
        return EventGoals({epoch: until_channels(part * each) for epoch, part in parts.items()}, taken_units)
    goals = {}
    for epoch, events in done.items():
        hidden = {name: table.widths[name] - events * settings["units_per_event"] for name in units}
        most = table.macs(table.even(layers, target * events / len(gradual)) | hidden)
        narrowest = table.macs({name: min(least, table.widths[name]) for name in layers} | hidden)
        if narrowest > most:
            raise SettingsError(
                f"{PAPER}: a target of {target:g} allows {most:.0f} MACs; the narrowest network with "
                f"{least} channels a layer has {narrowest:.0f}"
            )
        goals[epoch] = until_at_most(table.macs, most)
    return EventGoals(goals, taken_units)


# ---------------------------------------------------------------------------------------------- executing


def execute(run: Run, context: Context) -> Outcome:
    """Train and measure one run. Raises Diverged when training diverges or scores are not finite."""
    job = _Job(run, context)
    return job.dense() if run.variant == DENSE else job.pruned()


class _Job:
    """One run with its network."""

    def __init__(self, run: Run, context: Context):
        self.run, self.context, self.settings = run, context, run.settings
        self.data = context.dataset(run.settings["data"])
        self.model = self._build(seed=stream(run.seed, "init"))

    def _build(self, **options: Any) -> Network:
        return models.build(
            self.run.architecture,
            classes=self.data.classes,
            image_shape=self.data.image_shape,
            **options,
            **self.settings["options"],
        )

    def trainer(self, hooks: Hooks) -> Trainer:
        """A trainer of the run's network."""
        options = {name: self.settings[name] for name in ("momentum", "weight_decay")}
        return self.context.trainer(self.model, self.data, self.settings["batch_size"], hooks, **options)

    def rates(self, trainer: Trainer) -> list[float]:
        """The learning rates of all epochs."""
        epochs = self.settings["epochs"]
        milestones = [share * epochs for share in self.settings["milestones"]]
        return schedules.multistep(self.settings["learning_rate"], epochs, len(trainer.batches), milestones)

    def dense(self) -> Outcome:
        """The network that nothing is taken from."""
        snapshots = _Snapshots(self.settings["snapshots"])
        trainer = self.trainer(snapshots)
        trainer.fit(self.rates(trainer))
        scores, costs = self.context.scores(trainer, self.data), cost(trainer.model, self.data.image_shape)
        state = {"snapshots": snapshots.taken, "history": trainer.history}
        return Outcome(scores, costs, trainer.history, state)

    def pruned(self) -> Outcome:
        """The network that loses channels."""
        settings, variant = self.settings, Variant.model_validate(self.settings["method"])
        goals = event_goals(self.model, self.data.image_shape, self.run.target, settings)
        table = method.CostTable(self.model, self.data.image_shape)
        batches = scoring_batches(self.data, settings["scoring_share"])
        pruner = Pruner(self.model, self.scoring(variant), batches, settings["protected"])
        hook = GradualPruning(pruner, goals.events, goals.units, physical=settings["removal"] == "physical")
        trainer = self.trainer(hook)
        start = min(goals.events)
        _go_on(trainer, self.context.needs[0].state, start)
        hook.prune(trainer, start)
        trainer.fit(self.rates(trainer)[start * len(trainer.batches) :])
        return self.measured(trainer, hook, table, variant, len(batches.labels))

    def scoring(self, variant: Variant) -> Scoring:
        """How channels are scored and compared."""
        return Scoring(
            criterion=variant.criterion,
            allocation=variant.allocation,
            alpha=variant.alpha,
            class_scale=variant.class_scale,
            branch_share=variant.branch_share,
            minimum=self.settings["min_channels_per_layer"],
            seed=self.run.seed,
        )

    def measured(
        self, trainer: Trainer, hook: GradualPruning, table: method.CostTable, variant: Variant, images: int
    ) -> Outcome:
        """Scores, cost and what the events did. images: how many were scored at each event."""
        narrow = trainer.model
        if self.settings["removal"] == "masked":
            narrow = copy.deepcopy(narrow)
            channels.remove(narrow, hook.pruner.kept)
        shape, epochs = self.data.image_shape, self.settings["epochs"]
        costs = cost(narrow, shape, dense=cost(self._build(device="meta"), shape))
        zeros = method.official_zero_weights(self._build(device="meta"), table, hook.pruner.removed)
        passes = method.SCORING_PASSES[variant.criterion] * len(hook.log) * images
        gone = [len(hook.pruner.removed[name]) for name in hook.pruner.layers]
        metrics = self.context.scores(trainer, self.data) | {
            "channels_removed": sum(gone) / sum(table.widths[name] for name in hook.pruner.layers),
            "weight_compression": costs["dense_weights"] / costs["weights"],
            "macs_reduction": 1 - costs["macs"] / costs["dense_macs"],
            "official_prune_rate": zeros / costs["dense_weights"],
            # forward passes of the dense network over one image; training an image costs three
            "scoring_cost": passes / (3 * epochs * len(self.data.labels["train"])),
            "training_cost": sum(forward_macs(hook.log, table, epochs)) / (epochs * costs["dense_macs"]),
        }
        return Outcome(metrics, costs, trainer.history, details={"events": hook.log})


class _Snapshots(Hooks):
    """Keeps model and optimiser as they are at the end of given epochs (from 1)."""

    def __init__(self, epochs: list[int]):
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


def _go_on(trainer: Trainer, dense: Mapping[str, Any], epoch: int) -> None:
    """Take up the dense training as it was after `epoch`."""
    snapshot = dense["snapshots"][str(epoch)]
    trainer.go_on_from(epoch, dense["history"][:epoch], **snapshot)


def scoring_batches(data: Dataset, share: float) -> Batches:
    """The training images that are scored: about `share` of them, as many of each class, always the same.

    Raises Unreachable when that is less than one image of each class.
    """
    labels = data.labels["train"].cpu()
    sizes = torch.bincount(labels, minlength=data.classes)
    each = min(int(share * len(labels) / data.classes), int(sizes.min()))
    if not each:
        raise Unreachable(f"scoring_share = {share:g} of {len(labels)} images is less than one of each class")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(stream(0, "scoring images")))
    index = torch.cat([order[labels[order] == label][:each] for label in range(data.classes)]).sort().values
    index = index.to(data.labels["train"].device)
    images, kept = data.images["train"][index], data.labels["train"][index]
    chosen = dataclasses.replace(data, images={"train": images}, labels={"train": kept})
    _, height, width = data.image_shape
    return Batches(chosen, "train", min(SCORING_BATCH, max(1, SCORING_PIXELS // (height * width))))
