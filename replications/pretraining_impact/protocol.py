"""The runs: networks that were pre-trained or not, pruned in the same way to the same parameter reductions.

Each level of an iterative loop is a run that starts from the level before. README.md describes the variants;
what a run does is in steps.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from common.core import models
from common.core.data import Dataset
from common.core.loading import load
from common.core.run import Context, Outcome, Run
from common.settings import (
    Count,
    DatasetSettings,
    PaperSettings,
    Profile,
    Rate,
    Seeds,
    SettingsError,
    Share,
    Strict,
    Targets,
    hint,
)
from replications.pretraining_impact import method, steps, transfer
from replications.pretraining_impact.filters import FilterSelection, filter_widths, fractions_for_reductions

PAPER = "pretraining_impact"
ARMS = ("fine-tuned", "scratch", "scratch-long", "fine-tuned-shuffled")
LOOPS = {
    "": "iterative",
    "-random": "iterative",
    "-one-shot": "one-shot",
    "-gradual": "gradual",
    "-one-cycle": "one-cycle",
}
SMALL = "small-scratch"
VARIANTS = {arm + suffix: (arm, loop) for arm in ARMS for suffix, loop in LOOPS.items()} | {
    SMALL: ("scratch", "small")
}
"""Variant -> (how its network starts, how it is pruned)."""


class Training(Strict):
    """How a phase is trained. `sgd`: Nesterov momentum .9, cosine rate. `adam`: AdamW, one-cycle policy."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    batch_size: Count
    learning_rates: Annotated[tuple[Rate, ...], Field(min_length=1)]
    """Peak rate; of several the one with the best validation accuracy is taken."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    """Of `sgd`; `adam` has the warm-up of its policy."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Of convolution and linear weights; batch norms and biases have none."""


class Pretraining(Training):
    """Training on the corpus."""

    epochs: Count


def _known_variants(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"unknown variant {name!r}; {hint(name, list(VARIANTS))}")
    return names


class LabelBudget(Strict):
    """One amount of labelled target data, and what is run on it."""

    labels: Count | None = None
    """Training images, stratified by class; all when neither this nor `per_class` is given."""
    per_class: Count | Annotated[float, Field(gt=0, lt=1)] | None = None
    """Training images of each class: a number, or a share of the class."""
    epochs: Count
    """Training before pruning."""
    level_epochs: Count
    """Training after each pruning event."""
    variants: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_known_variants)]

    @model_validator(mode="after")
    def _one_amount(self) -> LabelBudget:
        if self.labels and self.per_class:
            raise ValueError("labels and per_class exclude each other")
        return self

    @property
    def amount(self) -> str:
        """What data-set names say of it."""
        return f"{self.per_class}-per-class" if self.per_class else str(self.labels or "all")


class GradualSettings(Strict):
    """Pruning while training."""

    schedule: Literal["agp", "cos", "lin"] = "agp"
    """Of the `-gradual` variants; the `-one-cycle` ones follow the one-cycle curve over all of training."""
    begin: Annotated[float, Field(ge=0, lt=1)] = 0.2
    finish: Share = 0.8
    """First and last moment of pruning as shares of training."""
    span: Count = 20
    """Steps between events."""
    removal: Literal["at_events", "at_end"] = "at_events"
    """Remove filters for good at each event, or mask them until the end of training."""
    masks: Literal["after_step", "before_forward"] = "after_step"
    """When masked weights are set to zero again (`at_end` only)."""

    @model_validator(mode="after")
    def _window(self) -> GradualSettings:
        if self.begin >= self.finish:
            raise ValueError(f"begin {self.begin:g} must lie before finish {self.finish:g}")
        return self


class Checkpoint(Strict):
    """A trained network that takes the place of the pre-training."""

    source: Annotated[str, Field(min_length=1)]
    """A file of torch.save, or `torchvision:<weights>`."""
    classes: Count = 1000
    """Classes of its head."""


class StopRule(Strict):
    """Pruning would stop after `patience` levels in a row that lose more than `tau` on validation."""

    tau: Annotated[float, Field(ge=0, lt=1)] = 0.01
    patience: Count = 1


def _ascending(values: tuple[float, ...]) -> tuple[float, ...]:
    if list(values) != sorted(values) or values[0] <= 0:
        raise ValueError("must ascend from above 0")
    return values


_CONTROLS = ("fine-tuned", "scratch", "scratch-long", "fine-tuned-shuffled", SMALL)
_LOOPS = tuple(arm + suffix for suffix in ("-random", "-one-shot") for arm in ARMS[:2])


class Settings(PaperSettings):
    """Settings of the replication; the defaults are the embedded profile."""

    seeds: Seeds = tuple(range(8))
    architectures: Annotated[tuple[str, ...], Field(min_length=1)] = ("vgg_t8", "mobilenet_t8")
    options: dict[str, dict[str, Any]] = {}
    """Options of networks by architecture, see common.core.models."""
    data: DatasetSettings | None = None
    """What the networks are trained on and pruned for, in place of the profile's data set."""
    corpus: DatasetSettings | None = DatasetSettings(
        source="npz", path="data/glyphs/corpus.npz", validation=1000
    )
    """What the fine-tuned are pre-trained on; not needed where every architecture has a checkpoint."""
    checkpoints: dict[str, Checkpoint] = {}
    """By architecture, in place of pre-training on the corpus."""
    pretraining: Pretraining = Pretraining(epochs=1, batch_size=64, learning_rates=(0.05,))
    fine_tuning: Training = Training(batch_size=32, learning_rates=(0.05,))
    """Of the fine-tuned arms on the target, before pruning; the budget gives the epochs."""
    scratch: Training = Training(batch_size=32, learning_rates=(0.05,))
    """Of the scratch arms on the target, before pruning; the budget gives the epochs."""
    level: Training = Training(batch_size=32, learning_rates=(0.02,))
    """After each pruning event of every arm; the budget gives the epochs."""
    budgets: Annotated[tuple[LabelBudget, ...], Field(min_length=1)] = (
        LabelBudget(labels=200, epochs=22, level_epochs=7, variants=_CONTROLS + _LOOPS),
        LabelBudget(labels=600, epochs=8, level_epochs=3, variants=ARMS[:2]),
    )
    targets: Annotated[Targets, AfterValidator(_ascending)] = (0.5, 0.7, 0.8, 0.9)
    """Parameter reductions of the iterative loop, each met by the smallest sufficient filter fraction."""
    control_target: float = 0.8
    """The target of the controls and other loops; only fine-tuned and scratch go beyond."""
    control_architectures: tuple[str, ...] = ("mobilenet_t8",)
    """Architectures on which a budget's variants other than fine-tuned, scratch and scratch-long are run."""
    long_factor: Count = 3
    """Epochs before pruning of scratch-long, in multiples of scratch."""
    selection: FilterSelection = FilterSelection()
    gradual: GradualSettings = GradualSettings()
    stop: StopRule = StopRule()

    @field_validator("architectures", "options", "checkpoints")
    @classmethod
    def _known_architectures(cls, value: Any) -> Any:
        for name in value:
            try:
                models.architecture(name)
            except SettingsError as error:
                raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        missing = [name for name in self.architectures if name not in self.checkpoints]
        if self.corpus is None and missing:
            raise ValueError(f"corpus: needed for {', '.join(missing)}, which have no checkpoint")
        if self.control_target not in self.targets:
            raise ValueError(
                f"control_target {self.control_target:g} must be one of the targets {list(self.targets)}"
            )
        if len(self.pretraining.learning_rates) > 1 or len(self.level.learning_rates) > 1:
            raise ValueError(
                "pretraining and level take one learning rate; fine_tuning and scratch may choose"
            )
        phases: list[tuple[Training, int]] = [(self.pretraining, self.pretraining.epochs)]
        phases += [(t, b.epochs) for t in (self.fine_tuning, self.scratch) for b in self.budgets]
        phases += [(self.level, budget.level_epochs) for budget in self.budgets]
        for training, epochs in phases:
            if training.warmup_epochs >= epochs:
                raise ValueError(f"a warm-up of {training.warmup_epochs} epochs does not fit into {epochs}")
        for kind in ("options", "checkpoints", "control_architectures"):
            for name in getattr(self, kind):
                if name not in self.architectures:
                    raise ValueError(
                        f"{kind}: {name!r} is not among the architectures {list(self.architectures)}"
                    )
        amounts = [budget.amount for budget in self.budgets]
        if len(set(amounts)) < len(amounts):
            raise ValueError(f"two budgets have the same amount of labels: {', '.join(amounts)}")
        return self

    @property
    def pretrained_on(self) -> DatasetSettings:
        """The corpus, which an architecture without a checkpoint must have."""
        if self.corpus is None:
            raise SettingsError("corpus: needed for an architecture that has no checkpoint")
        return self.corpus


# ---------------------------------------------------------------------------------------- the runs


def runs(profile: Profile) -> list[Run]:
    """Every run of the experiment.

    Raises SettingsError for what cannot work: a target that no structure meets, more labels than there are, a
    checkpoint of another network.
    """
    settings: Settings = profile.paper
    data = load(settings.data or profile.dataset)
    listed: list[Run] = []
    for budget in settings.budgets:
        steps.labelled(data, budget.labels, budget.per_class, seed=0)
    for architecture in settings.architectures:
        fixed = _Fixed.of(profile, architecture, data)
        for seed in settings.seeds:
            for budget in settings.budgets:
                listed += _BudgetRuns(profile, architecture, budget, seed, fixed).runs()
    return listed


@dataclass(frozen=True)
class _Fixed:
    """What all runs of an architecture share: filter fractions by target, its options, its checkpoint."""

    fractions: dict[float, float]
    options: dict[str, Any]
    checkpoint: dict[str, Any] | None

    @classmethod
    def of(cls, profile: Profile, architecture: str, data: Dataset) -> _Fixed:
        settings: Settings = profile.paper
        options = settings.options.get(architecture, {})
        shape = steps.Shape(architecture, steps.frozen(options), data.classes, data.image_shape)
        try:
            original = filter_widths(shape.network())
        except ValueError as error:
            raise SettingsError(f"architecture {architecture}: {error}") from None
        fractions = fractions_for_reductions(
            shape.parameters, original, settings.targets, settings.selection.rule
        )
        checkpoint = settings.checkpoints.get(architecture)
        found = None
        if not checkpoint and any(
            name.startswith("fine-tuned") for b in settings.budgets for name in b.variants
        ):
            _check_corpus(settings.pretrained_on, shape)
        if checkpoint:
            state, digest = transfer.read_checkpoint(checkpoint.source)
            transfer.trunk_from_checkpoint(shape.network(), state, checkpoint.classes, checkpoint.source)
            found = {**checkpoint.model_dump(), "digest": digest}
        return cls(dict(zip(settings.targets, fractions)), options, found)


def _check_corpus(corpus: DatasetSettings, shape: steps.Shape) -> None:
    """Raises SettingsError where a trunk that is trained on the corpus does not fit the target data."""
    data = load(corpus)
    other = replace(shape, classes=data.classes, image_shape=data.image_shape)
    trunks = (transfer.trunk(network.network()).items() for network in (shape, other))
    for (name, wanted), (_, found) in zip(*trunks):
        if wanted.shape != found.shape:
            raise SettingsError(
                f"corpus {corpus.origin} with images {list(data.image_shape)} does not fit: {name} of "
                f"{shape.architecture} is {list(found.shape)} there, {list(wanted.shape)} on the target data"
            )


def _place(data: DatasetSettings) -> str:
    return Path(data.path).stem if data.path else data.source


@dataclass(frozen=True)
class _BudgetRuns:
    """The runs of one architecture, label budget and seed."""

    profile: Profile
    architecture: str
    budget: LabelBudget
    seed: int
    fixed: _Fixed

    @property
    def settings(self) -> Settings:
        return self.profile.paper

    def runs(self) -> Iterator[Run]:
        """All runs of the budget's variants."""
        for variant in self.budget.variants:
            arm, loop = VARIANTS[variant]
            if variant not in ARMS[:3] and self.architecture not in self.settings.control_architectures:
                continue
            if loop == "iterative":
                most = 1.0 if variant in ARMS[:2] else self.settings.control_target
                yield self.dense(arm)
                yield from (self.level(variant, target) for target in self.settings.targets if target <= most)
            else:
                yield {"one-shot": self.one_shot, "small": self.small}.get(loop, self.while_training)(variant)

    def run(self, variant: str, target: float, step: str, needs: Sequence[Run], **settings: Any) -> Run:
        source = self.settings.data or self.profile.dataset
        shared = {
            "step": step,
            "data": source.model_dump(mode="json"),
            "labels": self.budget.labels,
            "per_class": self.budget.per_class,
            "options": self.fixed.options,
        }
        name = f"{_place(source)}-{self.budget.amount}"
        return Run(
            PAPER, variant, name, self.architecture, target, self.seed, shared | settings, tuple(needs)
        )

    def pretrained(self) -> Run:
        corpus = self.settings.pretrained_on
        settings = {
            "step": "pretrain",
            "data": corpus.model_dump(mode="json"),
            "training": self.settings.pretraining.model_dump(),
            "options": self.fixed.options,
        }
        return Run(PAPER, "pre-trained", _place(corpus), self.architecture, 0.0, self.seed, settings)

    def start(self, arm: str) -> tuple[dict[str, Any], list[Run]]:
        """Where a network's values come from: settings, and the run that is needed."""
        if arm.startswith("scratch"):
            return {"start": "fresh"}, []
        settings = {"start": "shuffled" if arm.endswith("shuffled") else "transfer"}
        if self.fixed.checkpoint:
            return settings | {"checkpoint": self.fixed.checkpoint}, []
        return settings, [self.pretrained()]

    def training(self, arm: str, epochs: int) -> dict[str, Any]:
        recipe = self.settings.scratch if arm.startswith("scratch") else self.settings.fine_tuning
        return recipe.model_dump() | {"epochs": epochs}

    def epochs(self, arm: str) -> int:
        """Epochs before pruning."""
        return self.budget.epochs * (self.settings.long_factor if arm == "scratch-long" else 1)

    def epochs_of_levels(self, target: float) -> int:
        """What the iterative loop spends on all levels up to `target`."""
        return self.budget.level_epochs * (self.settings.targets.index(target) + 1)

    def dense(self, arm: str) -> Run:
        """The unpruned network; with several learning rates the best of as many runs."""
        settings, needs = self.start(arm)
        settings |= {"keep_initial": self.settings.selection.criterion in method.NEEDS_INITIAL}
        training = self.training(arm, self.epochs(arm))
        rates = training["learning_rates"]
        if len(rates) == 1:
            return self.run(arm, 0.0, "dense", needs, training=training, **settings)
        tried = [
            self.run(
                f"{arm}-rate-{r:g}",
                0.0,
                "dense",
                needs,
                training=training | {"learning_rates": (r,)},
                **settings,
            )
            for r in rates
        ]
        return self.run(arm, 0.0, "choose", tried)

    def pruned(self, variant: str, target: float, step: str, needs: Sequence[Run], **settings: Any) -> Run:
        selection = self.settings.selection.model_dump()
        if variant.endswith("-random"):
            selection["criterion"] = "random"
        return self.run(
            variant,
            target,
            step,
            needs,
            fraction=self.fixed.fractions[target],
            selection=selection,
            **settings,
        )

    def level(self, variant: str, target: float) -> Run:
        """One level of the iterative loop, from the level before."""
        targets = self.settings.targets
        number = targets.index(target)
        needs = [self.level(variant, targets[number - 1]) if number else self.dense(VARIANTS[variant][0])]
        settings: dict[str, Any] = {"number": number}
        if target == targets[-1]:
            settings["stop"] = self.settings.stop.model_dump()
            if variant == "fine-tuned" and "scratch" in self.budget.variants:
                needs.append(self.level("scratch", target))
        training = self.settings.level.model_dump() | {"epochs": self.budget.level_epochs}
        return self.pruned(variant, target, "level", needs, training=training, **settings)

    def one_shot(self, variant: str) -> Run:
        """All filters at once, then what the loop spends on all levels up to here."""
        target = self.settings.control_target
        training = self.settings.level.model_dump() | {"epochs": self.epochs_of_levels(target)}
        needs = [self.dense(VARIANTS[variant][0])]
        return self.pruned(variant, target, "level", needs, training=training, number=0)

    def while_training(self, variant: str) -> Run:
        """Pruning during one training as long as the loop; the arm's dense network is its reference."""
        arm, loop = VARIANTS[variant]
        target = self.settings.control_target
        settings, needs = self.start(arm)
        gradual = self.settings.gradual.model_dump()
        if loop == "one-cycle":
            gradual |= {"schedule": "one_cycle", "begin": 0.0, "finish": 1.0}
        training = self.training(arm, self.epochs(arm) + self.epochs_of_levels(target))
        needs = [self.dense(arm), *needs]
        return self.pruned(variant, target, "gradual", needs, training=training, gradual=gradual, **settings)

    def small(self, variant: str) -> Run:
        """The pruned fine-tuned network's shape with new values, trained as long as the loop up to here."""
        target = self.settings.control_target
        training = self.training("scratch", self.epochs("scratch") + self.epochs_of_levels(target))
        needs = [self.dense("scratch"), self.level("fine-tuned", target)]
        return self.run(variant, target, "small", needs, training=training)


def execute(run: Run, context: Context) -> Outcome:
    """Train and measure one run."""
    return steps.perform(run, context)
