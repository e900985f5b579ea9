"""How one run of the IMP paper is executed: dense training, prune and retrain, or pruning during training."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from common.core.data import Batches, Dataset
from common.core.failures import Diverged, Unreachable
from common.core.identity import stream
from common.core.models import build
from common.core.pruning.counting import cost
from common.core.pruning.masks import KeepMasked, Masks, prunable, squared_norm
from common.core.run import Context, Outcome, Run
from common.core.trainer import Hooks, Trainer
from common.records import Record
from replications.imp_slr import baselines, method
from replications.imp_slr.settings import RETRAINED, DenseSchedule, percent


def execute(run: Run, context: Context) -> Outcome:
    """Train and measure one run. Raises RunFailed."""
    data = context.dataset(run.settings["data"])
    steps = {
        "dense": _execute_dense,
        "imp": _execute_imp,
        "during": _execute_during,
        "bimp2022": _execute_bimp2022,
    }
    try:
        return steps[run.settings["step"]](run, context, data)
    except Diverged as reason:
        if not run.settings.get("tuning"):
            raise
        # a rate at which training diverges is a bad rate, not a reason to give up the search
        rate = _chosen_rate(run, context)[0] if run.settings["step"] != "imp" else _dense_rate(context)
        details = {"learning_rate": rate, "diverged": str(reason)}
        return Outcome(
            {"validation_accuracy": 0.0, "test_accuracy": None, "test_loss": None}, {}, details=details
        )


def _execute_dense(run: Run, context: Context, data: Dataset) -> Outcome:
    rate, details = _chosen_rate(run, context)
    model = _network(run, context, data)
    trainer = _trainer(run, context, model, data)
    trainer.fit(_dense_rates(run.settings, rate, len(trainer.batches)), phase="dense")
    outcome = _outcome(run, context, trainer, data, run.settings["epochs"], details)
    outcome.state = {"model": trainer.model.state_dict()}
    return outcome


def _execute_imp(run: Run, context: Context, data: Dataset) -> Outcome:
    settings, dense = run.settings, context.needs[0]
    if dense.record.details.get("diverged"):
        raise Diverged(dense.record.details["diverged"])
    model = _network(run, context, data)
    model.load_state_dict(dense.state["model"])
    masks = Masks.dense(model)
    trainer = _trainer(run, context, model, data, KeepMasked(masks))
    # data order goes on where dense training ended
    trainer.go_on_from(dense.record.settings["epochs"])
    rate = _dense_rate(context)
    sparsity = context.needs[1].record.cost["sparsity"] if settings.get("matched") else run.target
    if not 0 < sparsity < 1:
        raise Unreachable(
            f"{context.needs[1].record.variant} reached a sparsity of {sparsity:g}: nothing to compare with"
        )
    distance, before = _relative_distance(model, sparsity), dense.record.metrics["test_accuracy"]
    more, details = _prune_and_retrain(
        run, trainer, data, masks, sparsity, dense.record.settings, rate, before
    )
    metrics = {"distance_to_pruned": distance, **more}
    total = dense.record.settings["epochs"] + sum(cycle["epochs"] for cycle in details["cycles"])
    outcome = _outcome(run, context, trainer, data, total, {"learning_rate": rate, **details}, metrics)
    outcome.metrics |= _gain_shares(settings, outcome.metrics, [need.record for need in context.needs[1:]])
    return outcome


def _execute_during(run: Run, context: Context, data: Dataset) -> Outcome:
    settings = run.settings
    rate, details = _chosen_rate(run, context)
    model = _network(run, context, data)
    hook = _method(run, model, per_epoch=-(-len(data.labels["train"]) // settings["batch_size"]))
    own = settings["method_options"]
    changed = {key: own[key] for key in ("momentum", "weight_decay") if key in own}
    if settings["method"] == "str":
        changed["weight_decay"] = settings["swept"]
    retrained = settings["method"] in RETRAINED
    hooks = [hook, KeepMasked(hook.masks)] if retrained else [hook]
    trainer = _trainer(run, context, model, data, *hooks, decays=hook.decays, **changed)
    trainer.fit(_dense_rates(settings, rate, len(trainer.batches)), phase=settings["method"])
    hook.finish(trainer)
    total = settings["epochs"]
    metrics: dict[str, Any] = {}
    if retrained:
        trainer.fresh_optimizer(momentum=settings["momentum"], weight_decay=settings["weight_decay"])
        before = trainer.evaluate(Batches(data, "test"))["accuracy"]
        metrics, more = _prune_and_retrain(run, trainer, data, hook.masks, run.target, settings, rate, before)
        details, total = details | more, total + settings["retrain_epochs"]
    return _outcome(run, context, trainer, data, total, details, metrics)


def _execute_bimp2022(run: Run, context: Context, data: Dataset) -> Outcome:
    settings = run.settings
    rate, details = _chosen_rate(run, context)
    model = _network(run, context, data)
    shape = (settings["total"], settings["epochs"], settings["interval"])
    hook = method.PruneAt(Masks.dense(model), method.bimp_events(run.target, *shape))
    trainer = _trainer(run, context, model, data, hook)
    trainer.fit(method.bimp_rates(rate, *shape, len(trainer.batches)), phase="bimp")
    return _outcome(run, context, trainer, data, settings["total"], details)


def _network(run: Run, context: Context, data: Dataset) -> nn.Module:
    """The freshly initialised network; equal for equal seeds."""
    widths, options = run.settings["widths"], run.settings["options"]
    shape = {"classes": data.classes, "image_shape": data.image_shape, "widths": widths}
    return context.compute.place(build(run.architecture, seed=stream(run.seed, "init"), **shape, **options))


def _trainer(
    run: Run, context: Context, model: nn.Module, data: Dataset, *hooks: Hooks, **changed: Any
) -> Trainer:
    options = {key: run.settings[key] for key in ("momentum", "nesterov", "weight_decay")} | changed
    return context.trainer(model, data, run.settings["batch_size"], hooks, **options)


def _dense_rates(settings: Mapping[str, Any], rate: float, per_epoch: int) -> list[float]:
    return DenseSchedule.model_validate(settings["schedule"]).rates(rate, settings["epochs"], per_epoch)


def _chosen_rate(run: Run, context: Context) -> tuple[float, dict[str, Any]]:
    """The learning rate with the best mean validation accuracy in the tuning runs, the smallest of equals."""
    rates = run.settings["learning_rates"]
    if len(rates) == 1:
        return rates[0], {"learning_rate": rates[0]}
    found = defaultdict(list)
    for need in context.needs:
        found[need.record.details["learning_rate"]].append(need.record.metrics["validation_accuracy"])
    means = {rate: sum(values) / len(values) for rate, values in found.items()}
    best = min(means, key=lambda rate: (-means[rate], rate))
    return best, {"learning_rate": best, "tuning": {f"{rate:g}": means[rate] for rate in sorted(means)}}


def _dense_rate(context: Context) -> float:
    """The learning rate of the dense network that a run starts from."""
    return context.needs[0].record.details["learning_rate"]


def _prune_and_retrain(
    run: Run,
    trainer: Trainer,
    data: Dataset,
    masks: Masks,
    sparsity: float,
    dense: Mapping[str, Any],
    rate: float,
    accuracy: float,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """IMP from the trainer's network; returns metrics and details.

    dense: settings of the dense training; rate: its learning rate; accuracy: on test, before pruning.
    """
    settings, common = run.settings, run.settings["retraining"]
    cycles, epochs = settings.get("cycles", 1), settings["retrain_epochs"]
    share = {"split": epochs} if common["cycle_epochs"] == "split" else {"each": epochs}
    warmup = dense["schedule"]["warmup_epochs"] * len(trainer.batches)
    retraining = method.Retraining(
        settings["kind"],
        method.History(_dense_rates(dense, rate, len(trainer.batches)), warmup),
        dense["epochs"],
        initial=settings.get("initial"),
        warmup_share=settings.get("warmup_share", method.WARMUP_SHARE),
        adaptive_from=cycles - 1 if common["adaptive"] == "2022" else 0,
        reset_momentum=common["reset_momentum"],
        recalibrate=common["recalibrate"],
    )
    test, pruned = Batches(data, "test"), []
    done = method.prune_and_retrain(
        trainer,
        masks,
        sparsity,
        method.cycle_epochs(cycles, **share),
        retraining,
        settings.get("allocation", "global"),
        torch.Generator().manual_seed(stream(run.seed, "random-pruning")),
        lambda _, cycle: pruned.append(trainer.evaluate(test)["accuracy"]),
    )
    metrics = {
        "pruned_accuracy": pruned[0],
        "pruning_stability": method.pruning_stability(accuracy, pruned[0]),
        "norm_drop": done[0].norm_drop,
        "prunable_norm_drop": done[0].prunable_norm_drop,
    }
    names = ("fraction", "epochs", "norm_drop", "prunable_norm_drop", "start")
    return metrics, {"cycles": [{name: getattr(cycle, name) for name in names} for cycle in done]}


def _relative_distance(model: nn.Module, sparsity: float) -> float:
    return method.distance_to_pruned(model, sparsity) / math.sqrt(squared_norm(prunable(model).values()))


def _gain_shares(
    settings: Mapping[str, Any], own: Mapping[str, Any], others: Sequence[Record]
) -> dict[str, float | None]:
    """How much of this run's gain by retraining the shorter ones reach, and how long 90 % of it takes.

    Nothing if there are no shorter ones; None where this run gained nothing.
    """
    shorter = [record for record in others if record.settings["step"] == "imp"]
    if not shorter:
        return {}
    lengths = [record.settings["retrain_epochs"] for record in shorter]
    gains = [record.metrics["test_accuracy"] - own["pruned_accuracy"] for record in shorter]
    longest = own["test_accuracy"] - own["pruned_accuracy"]
    found = {
        f"gain_share_{percent(length, settings['epochs'])}": gain / longest if longest > 0 else None
        for length, gain in zip(lengths, gains)
    }
    epochs = method.saturation_epochs([*lengths, settings["retrain_epochs"]], [*gains, longest])
    return found | {"saturation_share": None if epochs is None else epochs / settings["epochs"]}


def _method(run: Run, model: nn.Module, per_epoch: int) -> baselines.DuringTraining:
    """The hook of a method that prunes during training."""
    settings, own, name = run.settings, run.settings["method_options"], run.settings["method"]
    epochs, decay = settings["epochs"], settings["weight_decay"]
    if name == "gmp":
        return baselines.GMP(model, run.target, epochs, own["interval"], own["recovering"], own["allocation"])
    if name == "dpf":
        return baselines.DPF(model, run.target, epochs, own["interval"])
    if name == "gsm":
        return baselines.GSM(model, run.target, own["rank_over"])
    if name == "lc":
        growth = baselines.lc_weight_decays(own["weight_decay"], epochs) if own["growing"] else None
        return baselines.LC(model, run.target, own["weight_decay"], own["rank_over"], growth)
    if name == "dnw":
        return baselines.DNW(model, run.target)
    if name == "str":
        return baselines.STR(model, own["initial"])
    if name == "cs":
        numbers = (settings["swept"], own["beta_final"], own["penalty"], epochs * per_epoch, decay)
        return baselines.CS(model, *numbers, own["double_decay"])
    return baselines.DST(model, settings["swept"], decay, own["double_decay"])


def _outcome(
    run: Run,
    context: Context,
    trainer: Trainer,
    data: Dataset,
    epochs: int,
    details: dict[str, Any],
    metrics: dict[str, Any] | None = None,
) -> Outcome:
    """Scores and cost of the trainer's network. epochs: trained in all, dense training included."""
    counted = cost(trainer.model, data.image_shape)
    images = len(data.labels["train"])
    scores = context.scores(trainer, data) | {
        "epochs": epochs,
        "trained_macs": counted["dense_macs"] * images * epochs,
    }
    layers = {name: int(weight.detach().count_nonzero()) for name, weight in prunable(trainer.model).items()}
    return Outcome(
        scores | (metrics or {}), counted, trainer.history, details=details | {"nonzero_by_layer": layers}
    )
