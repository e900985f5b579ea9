"""What is done once: a pre-training, a training, a level of the loop, and their controls; each leaves a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from common.core.data import Batches, Dataset
from common.core.identity import canonical, stream
from common.core.models import Network
from common.core.pruning import counting
from common.core.pruning.masks import KeepMasked, Masks
from common.core.run import Cell, Context, Job, Needed, Outcome
from common.core.trainer import Hooks, Trainer
from common.core.tuning import Tuned
from common.settings import Count, DataError, Strict
from replications.pretraining_impact import measures, method, transfer, weights
from replications.pretraining_impact.filters import Shape, filter_widths, narrow
from replications.pretraining_impact.gradual import Gradual, GradualSettings, KeepFiltersMasked
from replications.pretraining_impact.labels import PerClass, labelled, per_class_counts
from replications.pretraining_impact.training import Training

_SHAPES: dict[str, Shape] = {}
"""Counting is slow beside a training of a few iterations: what a process has counted is kept."""


def shape_of(cell: Cell, data: Dataset) -> Shape:
    """The shapes of a cell's network."""
    key = canonical([cell.architecture, cell.options, data.classes, data.image_shape])
    if key not in _SHAPES:
        _SHAPES[key] = Shape(partial(cell.build, data), data.image_shape)
    return _SHAPES[key]


class StopRule(Strict):
    """Pruning would stop after `patience` levels in a row that lose more than `tau` on validation."""

    tau: Annotated[float, Field(ge=0, lt=1)] = 0.01
    patience: Count = 1


class Pretrain(Job):
    """A network on the corpus."""

    training: Training

    def execute(self, context: Context) -> Outcome:
        model = _network(context)
        shape = shape_of(self.cell, context.data)
        trainer = self.training.fitted(context, model, context.data, "pre-training")
        macs = self.training.macs(context.data, shape.whole_cost["macs"])
        state, details = {"trunk": transfer.trunk(trainer.model)}, {"training_macs": macs}
        return context.measured(trainer, costs=shape.whole_cost, state=state, details=details)


class Start(Strict):
    """Where a network's values come from: without a pre-training and a checkpoint it starts from scratch."""

    pretrained: Pretrain | None = None
    checkpoint: transfer.Checkpoint | None = None
    digest: str | None = None
    """Of the checkpoint."""
    shuffled: bool = False

    def network(self, context: Context) -> Network:
        """The network as it enters training; those of equal seed have the same head, and from scratch the same trunk."""
        model = _network(context)
        if self.pretrained:
            trunk = context.of(self.pretrained).state["trunk"]
        elif self.checkpoint:
            trunk, digest = self.checkpoint.trunk_for(model)
            if digest != self.digest:
                raise DataError(f"checkpoint {self.checkpoint.source} has changed since the run was listed")
        else:
            return model
        seed = stream(context.run.seed, "shuffle")
        method.fine_tuned(model, trunk, torch.Generator().manual_seed(seed) if self.shuffled else None)
        return model

    def macs(self, context: Context) -> int:
        """What the pre-training has cost."""
        return context.of(self.pretrained).record.details["training_macs"] if self.pretrained else 0


class OnTarget(Job):
    """A job on the labelled part of the target data."""

    labels: Count | None
    per_class: PerClass | None

    @property
    def dataset(self) -> str:
        amount = f"{self.per_class}-per-class" if self.per_class else str(self.labels or "all")
        return f"{super().dataset}-{amount}"

    def images_of(self, data: Dataset) -> int:
        if self.per_class:
            sizes: list[int] = data.labels["train"].bincount().tolist()
            return sum(per_class_counts(sizes, self.per_class))
        return self.labels or super().images_of(data)

    def images(self, context: Context) -> Dataset:
        """The target data with as many training images as are labelled."""
        return labelled(context.data, self.labels, self.per_class, self.seed)

    def measured(
        self,
        context: Context,
        trainer: Trainer,
        macs: int,
        curve: measures.Curve | None = None,
        state: dict[str, Any] | None = None,
        cost: dict[str, Any] | None = None,
        **details: Any,
    ) -> Outcome:
        """The trainer's network as it is now.

        macs: forward MACs of all training so far. curve: of the unpruned network and the levels before, None at the
        unpruned network itself. cost: in place of that of its shape.
        """
        model, shape = trainer.model, shape_of(self.cell, context.data)
        filters = filter_widths(model)
        cost = cost or shape.cost(filters)
        outcome = context.measured(trainer, costs=cost, state=state, details=details)
        reduction = 1 - cost["nonzero_parameters"] / cost["dense_parameters"]
        curve = measures.extended(
            curve,
            {
                "reduction": reduction,
                "accuracy": outcome.metrics["test_accuracy"],
                "validation_accuracy": outcome.metrics["validation_accuracy"],
                "parameters": cost["nonzero_parameters"],
            },
        )
        trunk, whole = (transfer.trunk_size(network) for network in (model, shape.whole))
        outcome.metrics |= {"reduction": reduction, "trunk_reduction": 1 - trunk / whole}
        if self.target:
            drop = measures.accuracy_drop(curve["reduction"], curve["accuracy"], self.target)
            outcome.metrics["accuracy_drop"] = drop
        outcome.details |= {"filters": filters, "curve": curve, "training_macs": macs}
        return outcome


class Dense(OnTarget):
    """An arm's network before pruning."""

    start: Start
    training: Tuned[Training]
    keep_initial: bool
    """Keep the values at the start, for criteria that look back."""

    def execute(self, context: Context) -> Outcome:
        recipe = self.training.chosen(context)
        if done := self.tried(context, recipe):
            record = done.record
            return Outcome(record.metrics, record.cost, [], done.state, record.details)
        model, images = self.start.network(context), self.images(context)
        initial = _copied(model, context) if self.keep_initial else None
        trainer = recipe.fitted(context, model, images, "target")
        shape = shape_of(self.cell, images)
        macs = self.start.macs(context) + recipe.macs(images, shape.whole_cost["macs"])
        state = _state(trainer.model, initial)
        return self.measured(context, trainer, macs, state=state, learning_rate=recipe.learning_rate)

    def tried(self, context: Context, recipe: Training) -> Needed | None:
        """The trial that was this very training, where tuning is done with each seed."""
        trials = dict(zip(self.training.options, self.training.trials)).get(recipe, ())
        return next((context.of(trial) for trial in trials if trial.seed == self.seed), None)


class OneLevel(OnTarget):
    """One level of a loop: what the level before left is pruned, and trains on. One shot is a level by itself."""

    training: Training
    stop: StopRule | None = None
    """At the last level, which measures the whole curve."""
    reference: Dense | None = None
    """The unpruned network from scratch, to whose accuracy the whole curve is held."""

    def retrained(
        self, context: Context, model: nn.Module, images: Dataset, hooks: Sequence[Hooks] = ()
    ) -> tuple[Trainer, float]:
        """The trainer at the end of the level, and the validation accuracy right after pruning."""
        phase = f"level {self.target:g}"
        trainer = self.training.phase(context, model, images, phase, hooks)
        raw = trainer.evaluate(Batches(images, "validation"))["accuracy"]
        trainer.fit(self.training.rates(len(trainer.batches)), phase)
        return trainer, raw

    def completed(self, context: Context, outcome: Outcome, raw: float) -> Outcome:
        """With what is measured of a level."""
        curve, floor = outcome.details["curve"], 1 - self.target
        outcome.metrics["raw_validation_accuracy"] = raw
        if self.stop:
            outcome.metrics |= measures.along(curve, floor, self.stop.tau, self.stop.patience)
        if self.reference:
            unpruned = context.of(self.reference).record.metrics["test_accuracy"]
            wanted = unpruned - measures.TAUS["1"]
            outcome.metrics["share_needed"] = measures.share_needed(curve, wanted, floor)
        return outcome


class Level(OneLevel):
    """A level that removes filters. fraction: of those of each layer, to meet the target."""

    fraction: float
    selection: method.FilterSelection
    start: Dense | Level

    def execute(self, context: Context) -> Outcome:
        start, images = context.of(self.start), self.images(context)
        before, shape = start.record.details, shape_of(self.cell, images)
        model = _restored(context, start.state["filters"], start.state["model"])
        initial = start.state["initial"] and _restored(
            context, start.state["filters"], start.state["initial"]
        )
        # this job is the level alone, because each leaves a record
        ((trainer, raw),) = method.prune_and_retrain(
            model,
            [self.fraction],
            shape.filters,
            self.selection,
            lambda _: self.retrained(context, model, images),
            batches=Batches(images, "train"),
            initial=initial,
            generator=_for_random_filters(self.seed, self.fraction),
        )
        each = shape.cost(filter_widths(model))["macs"]
        outcome = self.measured(
            context,
            trainer,
            before["training_macs"] + self.training.macs(images, each),
            before["curve"],
            _state(model, initial),
            fraction=self.fraction,
            learning_rate=before["learning_rate"],
        )
        return self.completed(context, outcome, raw)


class WeightLevel(OneLevel):
    """A level that masks single weights. sparsity: of those that may be pruned, to meet the target."""

    sparsity: float
    selection: weights.WeightSelection
    start: Dense | WeightLevel

    def execute(self, context: Context) -> Outcome:
        start, images = context.of(self.start), self.images(context)
        before, shape = start.record.details, shape_of(self.cell, images)
        model = _restored(context, start.state["filters"], start.state["model"])
        # what the level before has set to zero is smallest, and goes again
        masks = Masks.dense(model, self.selection.layers)
        ((trainer, raw),) = weights.prune_and_retrain(
            model,
            masks,
            [self.sparsity],
            self.selection,
            lambda _: self.retrained(context, model, images, [KeepMasked(masks)]),
        )
        # zeros are multiplied like other weights
        macs = self.training.macs(images, shape.whole_cost["macs"])
        outcome = self.measured(
            context,
            trainer,
            before["training_macs"] + macs,
            before["curve"],
            _state(model, None),
            counting.cost(model, images.image_shape, shape.whole_cost),
            sparsity=self.sparsity,
            learning_rate=before["learning_rate"],
        )
        return self.completed(context, outcome, raw)


class WhileTraining(OnTarget):
    """Filters are removed during one training as long as the loop. fraction: of those of each layer."""

    fraction: float
    selection: method.FilterSelection
    training: Training
    start: Start
    reference: Dense
    """The unpruned network, whose learning rate is taken."""
    gradual: GradualSettings

    def execute(self, context: Context) -> Outcome:
        reference, images = context.of(self.reference).record.details, self.images(context)
        model, shape, how = self.start.network(context), shape_of(self.cell, images), self.gradual
        recipe = self.training.changed(learning_rate=reference["learning_rate"])
        total = recipe.epochs * recipe.per_epoch(images)
        looks_back = self.selection.criterion in method.NEEDS_INITIAL
        masks = KeepFiltersMasked(how.masks) if how.removal == "at_end" else None
        pruning = Gradual(
            model,
            how.events(total, self.fraction),
            self.selection,
            initial=_copied(model, context) if looks_back else None,
            generator=_for_random_filters(self.seed, self.fraction),
            masks=masks,
        )
        hooks = [pruning] if masks is None else [pruning, masks]
        trainer = recipe.fitted(context, model, images, "target", hooks)
        pruning.finish(model)
        each = pruning.mean(total, lambda filters: shape.cost(filters)["macs"])
        macs = self.start.macs(context) + recipe.macs(images, each)
        return self.measured(
            context, trainer, macs, measures.begun(reference["curve"]), fraction=self.fraction
        )


class Small(OnTarget):
    """The shape of a pruned network with new values."""

    reference: Dense
    """The unpruned network from scratch, whose learning rate is taken."""
    pruned: Level
    training: Training

    def execute(self, context: Context) -> Outcome:
        reference, images = context.of(self.reference).record.details, self.images(context)
        filters, shape = context.of(self.pruned).record.details["filters"], shape_of(self.cell, images)
        recipe = self.training.changed(learning_rate=reference["learning_rate"])
        model = _network(context, widths=shape.widths(filters))
        trainer = recipe.fitted(context, model, images, "target")
        macs = recipe.macs(images, shape.cost(filters)["macs"])
        return self.measured(context, trainer, macs, measures.begun(reference["curve"]))


Start.model_rebuild()
Level.model_rebuild()
WeightLevel.model_rebuild()


def _for_random_filters(seed: int, fraction: float) -> torch.Generator:
    return torch.Generator().manual_seed(stream(seed, "filters", fraction))


def _network(context: Context, **options: Any) -> Network:
    return context.network(seed=stream(context.run.seed, "initial"), **options)


def _copied(model: Network, context: Context) -> Network:
    copy = _network(context)
    copy.load_state_dict(model.state_dict())
    return copy


def _restored(context: Context, filters: Sequence[int], values: Mapping[str, Any]) -> Network:
    """A network of so many filters with these values."""
    model = _network(context)
    narrow(model, filters)
    model.load_state_dict(values)
    return context.compute.place(model)


def _state(model: nn.Module, initial: Network | None) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "initial": None if initial is None else initial.state_dict(),
        "filters": filter_widths(model),
    }
