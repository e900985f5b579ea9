"""The experiment: networks that were pre-trained or not, pruned in the same way to the same parameter reductions.

Each level of the paper's loop is a job that starts from the level before; jobs.py says what each does and measures.
README.md describes the variants.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, model_validator

from common.core import experiment, loading
from common.core.data import Dataset
from common.core.experiment import Cells, CellSettings, Cuts, VariantSettings
from common.core.pruning import masks
from common.core.run import Cell, Job
from common.core.tuning import Tuned, TuningSettings, tuned
from common.records import TRIAL
from common.settings import Count, DatasetSettings, Rate, Seeds, SettingsError, hint
from replications.pretraining_impact import method, transfer
from replications.pretraining_impact.gradual import GradualSettings
from replications.pretraining_impact.jobs import (
    Dense,
    Level,
    Pretrain,
    Small,
    Start,
    StopRule,
    WeightLevel,
    WhileTraining,
    shape_of,
)
from replications.pretraining_impact.labels import PerClass, labelled
from replications.pretraining_impact.training import Training
from replications.pretraining_impact.weights import WeightSelection, sparsities_for_reductions

Arm = Literal["fine-tuned", "scratch", "scratch-long", "fine-tuned-shuffled"]
Loop = Literal["filters", "weights", "one-shot", "gradual", "one-cycle", "small"]
ARMS: tuple[Arm, ...] = ("fine-tuned", "scratch", "scratch-long", "fine-tuned-shuffled")
LOOPS: dict[str, tuple[Loop, dict[str, str]]] = {
    "": ("filters", {}),
    "-weights": ("weights", {}),
    # deviations, each in one respect from the two above
    "-random": ("filters", {"criterion": "random"}),
    "-taylor": ("filters", {"criterion": "taylor_sq_mean"}),
    "-global": ("filters", {"criterion": "l1_mean", "context": "global"}),
    "-group": ("filters", {"score": "group"}),
    "-all-inputs": ("filters", {"inputs": "all"}),
    "-legacy-rule": ("filters", {"rule": "kth_0_4_1"}),
    "-one-shot": ("one-shot", {}),
    "-gradual": ("gradual", {}),
    "-one-cycle": ("one-cycle", {}),
    "-weights-global": ("weights", {"context": "global"}),
    "-weights-conv": ("weights", {"layers": "conv"}),
}
"""Suffix -> (how a network is pruned, what is other than the settings say in how that is chosen which goes)."""
FINE_TUNED: Arm = "fine-tuned"
SCRATCH: Arm = "scratch"
SMALL = "small-scratch"
VARIANTS: dict[str, tuple[Arm, Loop, dict[str, str]]] = {
    **{arm + suffix: (arm, *way) for arm in ARMS for suffix, way in LOOPS.items()},
    SMALL: ("scratch", "small", {}),
}
"""Variant -> (how its network starts, how it is pruned, what is other in the choice)."""
LEVEL_BY_LEVEL: tuple[Loop, ...] = ("filters", "weights")
PRETRAINED = "pre-trained"

# ------------------------------------------------------------------------------------------ settings


def _known(name: str) -> str:
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {name!r}; {hint(name, list(VARIANTS))}")
    return name


Variant = Annotated[str, AfterValidator(_known)]


class Settings(VariantSettings, TuningSettings):
    seeds: Seeds = tuple(range(8))
    cells: Cells = (CellSettings(architecture="mobilenet_t8"),)
    targets: Cuts = (0.5, 0.7, 0.8, 0.9)
    """Parameter reductions of the loop's levels: of filters the smallest fraction that reaches each, of weights as many."""
    variants: dict[Variant, Cuts | Literal["all"]] = {
        "fine-tuned": "all", "scratch": "all", "fine-tuned-weights": "all", "scratch-weights": "all",
        "scratch-long": (0.5, 0.7, 0.8), "fine-tuned-shuffled": (0.5, 0.7, 0.8), "small-scratch": (0.8,),
    }  # fmt: skip
    """Level by level, the targets are the first ones of `targets`; else any of them."""
    labels: Count | None = 200
    """Training images, stratified by class; all when neither this nor `per_class` is given."""
    per_class: PerClass | None = None
    """Training images of each class: a number, or a share of the class."""
    corpus: DatasetSettings | None = DatasetSettings(
        source="npz", path="data/glyphs/corpus.npz", validation=1000
    )
    """What the fine-tuned are pre-trained on; not needed where there is a checkpoint."""
    checkpoint: transfer.Checkpoint | None = None
    """In place of pre-training on the corpus."""
    pretraining: Training = Training(epochs=1, batch_size=64, learning_rate=0.05)
    fine_tuning: Training = Training(epochs=22, batch_size=32, learning_rate=0.05)
    """Of the fine-tuned arms on the target, before pruning."""
    scratch: Training = Training(epochs=22, batch_size=32, learning_rate=0.05)
    """Of the scratch arms on the target, before pruning."""
    learning_rates: tuple[Rate, ...] = ()
    """Tried by each arm before pruning, in place of the one that its recipe has."""
    level: Training = Training(epochs=7, batch_size=32, learning_rate=0.02)
    """After each pruning event of every arm."""
    long_factor: Count = 3
    """Epochs before pruning of scratch-long, in multiples of scratch."""
    selection: method.FilterSelection = method.FilterSelection()
    weights: WeightSelection = WeightSelection()
    gradual: GradualSettings = GradualSettings()
    stop: StopRule = StopRule()

    @model_validator(mode="after")
    def _possible(self) -> Settings:
        if list(self.targets) != sorted(self.targets):
            raise ValueError("targets must ascend")
        if self.labels and self.per_class:
            raise ValueError("labels and per_class exclude each other")
        for name, own in self.wanted.items():
            if VARIANTS[name][1] in LEVEL_BY_LEVEL and own != self.targets[: len(own)]:
                raise ValueError(
                    f"variants.{name} = {list(own)}: must be the first of the targets {list(self.targets)}"
                )
            if not set(own) <= set(self.targets):
                raise ValueError(
                    f"variants.{name} = {list(own)}: must be of the targets {list(self.targets)}"
                )
        return self


# ------------------------------------------------------------------------------------------ which jobs


class Experiment(experiment.Experiment[Settings]):
    """The jobs of one cell. What several jobs start from is the same job each time."""

    def __init__(self, settings: Settings, cell: Cell, data: Dataset):
        super().__init__(settings, cell, data)
        labelled(data, settings.labels, settings.per_class, seed=0)
        shape = shape_of(cell, data)
        try:
            filters = shape.filters
        except ValueError as error:
            raise SettingsError(str(error)) from None
        self.shape, self.filters = shape, filters
        self._fractions: dict[str, dict[float, float]] = {}
        self.fractions(settings.selection.rule)
        self.digest = settings.checkpoint and settings.checkpoint.trunk_for(shape.whole)[1]

    @cached_property
    def corpus(self) -> Cell:
        """Where the pre-training is done. Raises SettingsError where a trunk of there does not fit here."""
        corpus = self.settings.corpus
        if corpus is None:
            raise SettingsError("corpus: needed where there is no checkpoint")
        cell = Cell(architecture=self.cell.architecture, options=self.cell.options, data=corpus)
        data = loading.load(corpus)
        networks = (shape_of(*place).whole for place in ((self.cell, self.data), (cell, data)))
        for (name, wanted), (_, found) in zip(*(transfer.trunk(network).items() for network in networks)):
            if wanted.shape != found.shape:
                raise SettingsError(
                    f"corpus {corpus.origin} with images {list(data.image_shape)} does not fit: {name} is "
                    f"{list(found.shape)} there, {list(wanted.shape)} on the target data"
                )
        return cell

    def fractions(self, rule: str) -> dict[float, float]:
        """The share of its filters that every layer loses under a rule of counting, by target."""
        if rule not in self._fractions:
            targets = self.settings.targets
            found = method.fractions_for_reductions(self.shape.parameters, self.filters, targets, rule)
            self._fractions[rule] = dict(zip(targets, found))
        return self._fractions[rule]

    def jobs(self, seed: int) -> Iterator[Job]:
        ways = {
            "filters": self.levels,
            "weights": self.levels,
            "one-shot": self.one_shot,
            "gradual": self.while_training,
            "one-cycle": self.while_training,
            "small": self.small,
        }
        for name, targets in self.settings.wanted.items():
            arm, loop, _ = VARIANTS[name]
            yield self.dense(arm, seed)
            for target in targets:
                yield ways[loop](name, target, seed)

    def identity(self, name: str, target: float, seed: int) -> dict[str, Any]:
        """What all jobs on the target data have."""
        return {
            "variant": name, "cell": self.cell, "target": target, "seed": seed,
            "labels": self.settings.labels, "per_class": self.settings.per_class,
        }  # fmt: skip

    def start(self, arm: Arm, seed: int) -> Start:
        """How an arm's network starts."""
        if arm.startswith(SCRATCH):
            return Start()
        shuffled = arm == "fine-tuned-shuffled"
        if self.settings.checkpoint:
            return Start(checkpoint=self.settings.checkpoint, digest=self.digest, shuffled=shuffled)
        # a seed that is there for tuning alone has no run of the experiment
        name = PRETRAINED if seed in self.settings.seeds else f"{TRIAL}{PRETRAINED}"
        training = self.settings.pretraining
        return Start(
            pretrained=Pretrain(variant=name, cell=self.corpus, seed=seed, training=training),
            shuffled=shuffled,
        )

    def recipe(self, arm: Arm, after: float | None = None) -> Training:
        """Of an arm's training before pruning; after: and of as many epochs more as the loop has up to a target."""
        recipe = self.settings.scratch if arm.startswith(SCRATCH) else self.settings.fine_tuning
        epochs = recipe.epochs * (self.settings.long_factor if arm == "scratch-long" else 1)
        return recipe.changed(epochs=epochs + (0 if after is None else self.epochs_of_levels(after)))

    def epochs_of_levels(self, target: float) -> int:
        """What the loop spends on all levels up to a target."""
        return self.settings.level.epochs * (self.settings.targets.index(target) + 1)

    def dense(self, arm: Arm, seed: int) -> Dense:
        """The unpruned network of an arm."""

        def trained(name: str, seed: int, training: Tuned[Training]) -> Dense:
            keep = self.settings.selection.criterion in method.NEEDS_INITIAL
            start = self.start(arm, seed)
            return Dense(**self.identity(name, 0.0, seed), start=start, training=training, keep_initial=keep)

        recipe = self.recipe(arm)
        options = [recipe.changed(learning_rate=rate) for rate in self.settings.learning_rates] or [recipe]
        choice = tuned(
            self.settings,
            seed,
            arm,
            options,
            lambda name, option, seed: trained(name, seed, Tuned((option,))),
        )
        return trained(arm, seed, choice)

    def pruned(self, name: str, target: float, seed: int) -> dict[str, Any]:
        """What jobs that prune have."""
        _, loop, changes = VARIANTS[name]
        identity = self.identity(name, target, seed)
        if loop == "weights":
            how = self.settings.weights.model_copy(update=changes)
            prunable = sum(weight.numel() for weight in masks.prunable(self.network, how.layers).values())
            (sparsity,) = sparsities_for_reductions(self.shape.parameters(self.filters), prunable, [target])
            return identity | {"sparsity": sparsity, "selection": how}
        selection = self.settings.selection.model_copy(update=changes)
        return identity | {"fraction": self.fractions(selection.rule)[target], "selection": selection}

    def levels(self, name: str, target: float, seed: int) -> Level | WeightLevel:
        """The level of the loop that meets a target, from the one before."""
        settings, number = self.settings, self.settings.targets.index(target)
        arm, loop, _ = VARIANTS[name]
        last = target == settings.targets[-1]
        given = self.pruned(name, target, seed) | {
            "training": settings.level,
            "start": self.levels(name, settings.targets[number - 1], seed)
            if number
            else self.dense(arm, seed),
            "stop": settings.stop if last else None,
            "reference": self.dense(SCRATCH, seed) if last and SCRATCH in settings.wanted else None,
        }
        return WeightLevel(**given) if loop == "weights" else Level(**given)

    def one_shot(self, name: str, target: float, seed: int) -> Level:
        """All filters at once, then what the loop spends on all levels up to here."""
        training = self.settings.level.changed(epochs=self.epochs_of_levels(target))
        start = self.dense(VARIANTS[name][0], seed)
        return Level(**self.pruned(name, target, seed), training=training, start=start)

    def while_training(self, name: str, target: float, seed: int) -> WhileTraining:
        """Pruning during one training as long as the loop up to here."""
        arm, loop, _ = VARIANTS[name]
        gradual = self.settings.gradual
        if loop == "one-cycle":
            gradual = gradual.model_copy(update={"schedule": "one_cycle", "begin": 0.0, "finish": 1.0})
        return WhileTraining(
            **self.pruned(name, target, seed),
            training=self.recipe(arm, target),
            start=self.start(arm, seed),
            reference=self.dense(arm, seed),
            gradual=gradual,
        )

    def small(self, name: str, target: float, seed: int) -> Small:
        """The pruned fine-tuned network's shape with new values, trained as long as the loop up to here."""
        return Small(
            **self.identity(name, target, seed),
            training=self.recipe("scratch", target),
            reference=self.dense("scratch", seed),
            pruned=self.levels(FINE_TUNED, target, seed),
        )
