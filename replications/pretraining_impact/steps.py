"""What one run does: pre-train, train, prune and train on, and measure."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from common.core import models, schedules
from common.core.data import Batches, Dataset
from common.core.identity import stream
from common.core.models import Network
from common.core.pruning import channels, counting
from common.core.run import Context, Needed, Outcome, Run
from common.core.trainer import Hooks, Trainer
from common.settings import DataError
from replications.pretraining_impact import measures, method, transfer
from replications.pretraining_impact.filters import (
    FilterSelection,
    Gradual,
    KeepFiltersMasked,
    OneCycleMomentum,
    choose,
    filter_widths,
    narrow,
    schedule_events,
)

TAUS = {"1": 0.01, "2": 0.02}
"""Tolerated losses of R*, by name: in points of accuracy."""
AREA = 0.9
"""The area under the accuracy curve reaches up to this reduction."""


def frozen(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Options of a network as a hashable value."""
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(options.items()))


@dataclass(frozen=True)
class Shape:
    """All that determines a network's shapes, apart from its widths."""

    architecture: str
    options: tuple[tuple[str, Any], ...]
    classes: int
    image_shape: tuple[int, int, int]

    def build(self, filters: Sequence[int] | None = None, **how: Any) -> Network:
        """A new network with so many filters in its convolutions; units of hidden linear layers stay."""
        widths = None
        if filters is not None:
            widths = [*filters, *self.network().widths[len(filters) :]]
        return models.build(
            self.architecture,
            classes=self.classes,
            image_shape=self.image_shape,
            widths=widths,
            **how,
            **dict(self.options),
        )

    @functools.lru_cache(maxsize=4096)
    def network(self, filters: tuple[int, ...] | None = None) -> Network:
        """Shapes only, for counting; not to be changed."""
        return self.build(filters, device="meta")

    def parameters(self, filters: Sequence[int]) -> int:
        """Trainable parameters."""
        return sum(p.numel() for p in self.network(tuple(filters)).parameters())

    @functools.lru_cache(maxsize=4096)
    def cost(self, filters: tuple[int, ...] | None = None) -> dict[str, Any]:
        """Cost of a network without zeros, beside the unpruned one; see common.core.pruning.counting."""
        dense = self.cost() if filters is not None else None
        return counting.cost(self.network(filters), self.image_shape, dense)


def labelled(data: Dataset, labels: int | None, per_class: int | float | None, seed: int) -> Dataset:
    """The data with fewer training images, chosen by `seed`.

    labels: how many, stratified. per_class: how many, or which share, of each class. Raises DataError when
    there are not as many.
    """
    if labels is not None:
        return data.with_train_size(labels, seed)
    if per_class is None:
        return data
    found = data.labels["train"]
    order = torch.randperm(
        len(found), generator=torch.Generator().manual_seed(stream(seed, "per-class", data.name))
    )
    order = order.to(found.device)
    by_class = [order[found[order] == c] for c in range(data.classes)]
    counts = method.per_class_counts([len(index) for index in by_class], per_class)
    for c, (index, count) in enumerate(zip(by_class, counts)):
        if not 0 < count <= len(index):
            raise DataError(f"per_class = {per_class}: class {c} has {len(index)} training images")
    kept = torch.cat([index[:count] for index, count in zip(by_class, counts)]).sort().values
    return replace(
        data,
        images=data.images | {"train": data.images["train"][kept]},
        labels=data.labels | {"train": found[kept]},
    )


def perform(run: Run, context: Context) -> Outcome:
    """Do what the run's settings call its `step`. Raises Diverged, DataError."""
    job = _Job(run, context)
    steps = {"pretrain": _pretrain, "dense": _dense, "choose": _choose, "level": _level, "gradual": _gradual}
    return {**steps, "small": _small}[run.settings["step"]](job)


class _Job:
    """A run with what its steps share."""

    def __init__(self, run: Run, context: Context):
        self.run, self.context, self.settings = run, context, run.settings
        data = context.dataset(run.settings["data"])
        self.data = labelled(data, run.settings.get("labels"), run.settings.get("per_class"), run.seed)
        options = frozen(run.settings["options"])
        self.shape = Shape(run.architecture, options, self.data.classes, self.data.image_shape)

    def needed(self, number: int) -> Needed:
        return self.context.needs[number]

    def network(self) -> Network:
        """A fresh network; those of equal seed have the same head, and from scratch the same trunk."""
        return self.shape.build(seed=stream(self.run.seed, "initial"))

    def started(self, pretrained: int) -> Network:
        """The network as it enters training; pretrained: number of that run among the needed ones."""
        model = self.network()
        if self.settings["start"] == "fresh":
            return model
        if checkpoint := self.settings.get("checkpoint"):
            state, digest = transfer.read_checkpoint(checkpoint["source"])
            if digest != checkpoint["digest"]:
                raise DataError(f"checkpoint {checkpoint['source']} has changed since the run was listed")
            tensors = transfer.trunk_from_checkpoint(
                model, state, checkpoint["classes"], checkpoint["source"]
            )
        else:
            tensors = self.needed(pretrained).state["trunk"]
        if self.settings["start"] == "shuffled":
            tensors = transfer.shuffled(
                tensors, torch.Generator().manual_seed(stream(self.run.seed, "shuffle"))
            )
        model.load_state_dict(tensors, strict=False)
        return model

    def resumed(self) -> tuple[Network, Network | None]:
        """The network that the first needed run left, and the one that it started from if that was kept."""
        state = self.needed(0).state

        def network(key: str) -> Network:
            model = self.network()
            narrow(model, state["filters"])
            model.load_state_dict(state[key])
            self.context.compute.place(model)
            return model

        return network("model"), network("initial") if state["initial"] is not None else None

    def generator(self) -> torch.Generator:
        """Of random filters."""
        return torch.Generator().manual_seed(stream(self.run.seed, "filters", self.settings["fraction"]))

    def train(
        self, model: nn.Module, phase: str, hooks: Sequence[Hooks] = (), rate: float | None = None
    ) -> Trainer:
        """Train as the run's `training` says; rate: in place of its learning rate."""
        recipe = self.settings["training"]
        # each phase has its own order of the data; runs of equal seed are paired in it
        order = stream(self.run.seed, "order", phase)
        batches = Batches(self.data, "train", recipe["batch_size"], seed=order, shuffle=True, augment=True)
        rate = recipe["learning_rates"][0] if rate is None else rate
        total = recipe["epochs"] * len(batches)
        if recipe["optimizer"] == "adam":
            rates = [method.one_cycle_policy(t / total, rate)[0] for t in range(total)]
            hooks = [*hooks, OneCycleMomentum(total)]
            optimizer = _adam(self.context.compute.place(model), recipe["weight_decay"])
        else:
            rates = schedules.cosine(
                rate, recipe["epochs"], len(batches), warmup_epochs=recipe["warmup_epochs"]
            )
            optimizer = None
        trainer = Trainer(
            model,
            batches,
            nesterov=True,
            weight_decay=recipe["weight_decay"],
            decays=_decays,
            hooks=hooks,
            optimizer=optimizer,
            seed=order,
            compute=self.context.compute,
            checkpoints=self.context.checkpoints and self.context.checkpoints(),
        )
        trainer.fit(rates, phase)
        return trainer

    def training_macs(self, per_image: float) -> int:
        """Forward MACs of the run's training."""
        return round(self.settings["training"]["epochs"] * len(self.data.labels["train"]) * per_image)

    def measured(
        self, trainer: Trainer, macs: int, curve: Mapping[str, list] | None = None, **details: Any
    ) -> Outcome:
        """The trainer's network on validation and test.

        macs: forward MACs of all training so far. curve: of the unpruned network and the levels before, None
        at the unpruned network itself.
        """
        model = trainer.model
        scores = self.context.scores(trainer, self.data)
        cost = self.shape.cost(tuple(filter_widths(model)))
        head = transfer.head_prefix(model)
        trunks = [
            sum(p.numel() for name, p in network.named_parameters() if not name.startswith(head))
            for network in (model, self.shape.network())
        ]
        point = {
            "reduction": 1 - cost["parameters"] / cost["dense_parameters"],
            "accuracy": scores["test_accuracy"],
            "validation_accuracy": scores["validation_accuracy"],
            "parameters": cost["parameters"],
        }
        curve = {key: [*(curve[key] if curve else ()), value] for key, value in point.items()}
        metrics = scores | {"reduction": point["reduction"], "trunk_reduction": 1 - trunks[0] / trunks[1]}
        if self.run.target:
            metrics["accuracy_drop"] = measures.accuracy_drop(
                curve["reduction"], curve["accuracy"], self.run.target
            )
        details |= {"filters": filter_widths(model), "curve": curve, "training_macs": macs}
        return Outcome(metrics, cost, trainer.history, None, details)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1


def _adam(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """As the library of the first author's later code sets it up; its momentum follows OneCycleMomentum."""
    matrices = [p for n, p in model.named_parameters() if _decays(n, p)]
    vectors = [p for n, p in model.named_parameters() if not _decays(n, p)]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.95, 0.99), eps=1e-5, weight_decay=weight_decay)


def _state(model: nn.Module, initial: nn.Module | None) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "initial": initial.state_dict() if initial is not None else None,
        "filters": filter_widths(model),
    }


def _copy(model: nn.Module, into: nn.Module) -> nn.Module:
    into.load_state_dict(model.state_dict())
    return into


def _pretrain(job: _Job) -> Outcome:
    trainer = job.train(job.network(), "pre-training")
    cost = job.shape.cost()
    details = {"training_macs": job.training_macs(cost["macs"])}
    scores = job.context.scores(trainer, job.data)
    return Outcome(scores, cost, trainer.history, {"trunk": transfer.trunk(trainer.model)}, details)


def _dense(job: _Job) -> Outcome:
    model = job.started(0)
    initial = _copy(model, job.network()) if job.settings["keep_initial"] else None
    trainer = job.train(model, "target")
    macs = sum(need.record.details["training_macs"] for need in job.context.needs)
    macs += job.training_macs(job.shape.cost()["macs"])
    outcome = job.measured(trainer, macs, learning_rate=job.settings["training"]["learning_rates"][0])
    outcome.state = _state(trainer.model, initial)
    return outcome


def _choose(job: _Job) -> Outcome:
    best = max(job.context.needs, key=lambda need: need.record.metrics["validation_accuracy"])
    return Outcome(best.record.metrics, best.record.cost, [], best.state, best.record.details)


def _level(job: _Job) -> Outcome:
    before = job.needed(0).record.details
    model, initial = job.resumed()
    selection = FilterSelection.model_validate(job.settings["selection"])
    if selection.criterion in method.NEEDS_GRADIENT:
        _leave_gradient(model, Batches(job.data, "train"))
    original = filter_widths(job.shape.network())
    keep = choose(
        model, job.settings["fraction"], original, selection, initial=initial, generator=job.generator()
    )
    for network in (model, initial):
        if network is not None:
            channels.remove(network, keep)
    validation = Batches(job.data, "validation")
    raw = Trainer(model, validation, compute=job.context.compute).evaluate(validation)
    trainer = job.train(model, f"level {job.run.target:g}")
    macs = before["training_macs"] + job.training_macs(job.shape.cost(tuple(filter_widths(model)))["macs"])
    details = {"fraction": job.settings["fraction"], "learning_rate": before["learning_rate"]}
    outcome = job.measured(trainer, macs, before["curve"], **details)
    outcome.metrics["raw_validation_accuracy"] = raw["accuracy"]
    curve = outcome.details["curve"]
    if stop := job.settings.get("stop"):
        outcome.metrics |= _along(curve, **stop)
    if len(job.context.needs) > 1:
        outcome.metrics |= _against_scratch(curve, job.needed(1).record.details["curve"])
    outcome.state = _state(model, initial)
    return outcome


def _leave_gradient(model: nn.Module, batches: Batches) -> None:
    """Put the gradient of the mean loss over `batches` into the parameters; nothing else changes."""
    model.eval()
    model.zero_grad(set_to_none=True)
    for images, labels in batches.epoch(0):
        (cross_entropy(model(images), labels, reduction="sum") / len(batches.labels)).backward()


def _along(curve: Mapping[str, list], tau: float, patience: int) -> dict[str, float]:
    """What needs the whole curve."""
    reduction, accuracy = curve["reduction"], curve["accuracy"]
    mean = measures.mean_accuracy(reduction, accuracy, AREA)
    stopped = measures.stopping_level(curve["validation_accuracy"], tau, patience)
    found = {"mean_accuracy": mean, "mean_drop": accuracy[0] - mean, "stopping_reduction": reduction[stopped]}
    return found | {
        f"r_star_{n}": measures.largest_reduction(reduction, accuracy, t) for n, t in TAUS.items()
    }


def _against_scratch(curve: Mapping[str, list], scratch: Mapping[str, list]) -> dict[str, float | None]:
    """What needs both arms' curves: R* below the unpruned scratch network, and parameters at its accuracy."""
    reduction, accuracy, parameters = curve["reduction"], curve["accuracy"], curve["parameters"]
    reference = scratch["accuracy"][0]
    found: dict[str, float | None] = {
        f"r_star_absolute_{n}": measures.largest_reduction(reduction, accuracy, tau, reference=reference)
        for n, tau in TAUS.items()
    }
    enough = measures.iso_parameters(parameters, accuracy, reference)
    # a network that is worse than the scratch one before any pruning needs all it has
    found["iso_share"] = 1.0 if enough is None else enough / parameters[0]
    ours, theirs = (
        measures.iso_parameters(c["parameters"], c["accuracy"], reference - TAUS["1"])
        for c in (curve, scratch)
    )
    return found | {"iso_ratio": None if ours is None or theirs is None else ours / theirs}


def _gradual(job: _Job) -> Outcome:
    reference = job.needed(0).record.details
    model = job.started(1)
    selection = FilterSelection.model_validate(job.settings["selection"])
    initial = None
    if selection.criterion in method.NEEDS_INITIAL:
        initial = job.context.compute.place(_copy(model, job.network()))
    recipe, gradual = job.settings["training"], job.settings["gradual"]
    total = recipe["epochs"] * -(-len(job.data.labels["train"]) // recipe["batch_size"])
    window = (gradual["begin"], gradual["finish"])
    events = schedule_events(gradual["schedule"], total, job.settings["fraction"], window, gradual["span"])
    masks = KeepFiltersMasked(gradual["masks"]) if gradual["removal"] == "at_end" else None
    pruning = Gradual(model, events, selection, initial=initial, generator=job.generator(), masks=masks)
    hooks = [pruning] if masks is None else [pruning, masks]
    trainer = job.train(model, "target", hooks, reference["learning_rate"])
    pruning.finish(model)
    macs = sum(need.record.details["training_macs"] for need in job.context.needs[1:])
    macs += job.training_macs(_macs_while_pruning(job, pruning, total))
    curve = {key: values[:1] for key, values in reference["curve"].items()}
    return job.measured(trainer, macs, curve, fraction=job.settings["fraction"])


def _macs_while_pruning(job: _Job, pruning: Gradual, total: int) -> float:
    """Mean MACs of an image over `total` steps in which the network becomes narrower."""
    ends = [done for done, _ in pruning.log[1:]] + [total]
    spent = [(end - begin) * job.shape.cost(tuple(w))["macs"] for (begin, w), end in zip(pruning.log, ends)]
    return sum(spent) / total


def _small(job: _Job) -> Outcome:
    dense, pruned = (need.record.details for need in job.context.needs)
    model = job.shape.build(pruned["filters"], seed=stream(job.run.seed, "initial"))
    trainer = job.train(model, "target", rate=dense["learning_rate"])
    curve = {key: values[:1] for key, values in dense["curve"].items()}
    return job.measured(trainer, job.training_macs(job.shape.cost(tuple(pruned["filters"]))["macs"]), curve)
