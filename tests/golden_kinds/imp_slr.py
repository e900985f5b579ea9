"""Golden vectors of imp_slr: from a case's inputs to the project's functions and back."""

import itertools
import math

import pytest
import torch
from golden_inputs import only
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from common.core import schedules
from common.core.data import FixedBatches
from common.core.models import build
from common.core.pruning import masks as pruning
from common.core.pruning.counting import LayerCost, cost
from common.core.trainer import Hooks, Trainer
from replications.imp_slr import baselines, measures, method

TUNABLE = ("constant", "stepped", "cosine", "linear", "linear_min")


# ------------------------------------------------------------------------------------------ learning rates


def _dense_lr(case, document):
    inputs = case["inputs"]
    name, rate, *rest = inputs["schedule"]
    function, names = {
        "Constant": (schedules.constant, ()),
        "StepLR": (schedules.step, ("step_epochs", "gamma")),
        "MultiStepLR": (schedules.multistep, ("milestones", "gamma")),
        "ExponentialLR": (schedules.exponential, ("gamma",)),
        "Linear": (schedules.linear, ("end",)),
        "Cosine": (schedules.cosine, ("end",)),
    }[name]
    length = (inputs["epochs"], inputs["iterations_per_epoch"])
    return {
        "lr": function(rate, *length, **dict(zip(names, rest)), warmup_epochs=inputs.get("warmup_epochs", 0))
    }


def _retrain_lr(case, document):
    inputs = case["inputs"]
    per_epoch = inputs["iterations_per_epoch"]
    rates = document["fixtures"]["lr_history"][inputs["lr_history_ref"]]
    history = method.History(rates, warmup=inputs.get("dense_warmup_epochs", 0) * per_epoch)
    kind, length = inputs["schedule"], inputs["retrain_epochs"] * per_epoch
    got = {"eta_max": history.eta_max, "eta_min": history.eta_min}
    options = {}
    if kind == "ALLR":
        start = method.adaptive_start(
            history.eta_max,
            inputs["rel_norm_drop"],
            inputs["prune_fraction"],
            inputs["retrain_epochs"],
            inputs["dense_epochs"],
        )
        options = {"start": start}
        got |= {"eta_start": start}
    elif kind in TUNABLE:
        share = inputs.get("warmup_fraction", method.WARMUP_SHARE)
        options = {"start": inputs["init"], "warmup_share": share}
    rates = method.retraining_rates(kind, history, length, **options)
    warmup = 0 if kind in ("FT", "LRW") else int(options.get("warmup_share", method.WARMUP_SHARE) * length)
    return got | {"lr": rates, "lr_fixed": rates, "warmup_iterations": warmup}


def _check_retrain_lr(case, document, got):
    expected = dict(case["expected"])
    # where the record of the authors' code leaks a warm-up value, the intended schedule is the one
    # implemented
    expected["lr"] = expected.get("lr_fixed", expected["lr"])
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, abs=case["tolerance"]["abs"], rel=0), key


def _legacy_retrain_lr(case, document):
    inputs = case["inputs"]
    history = method.History.of_epochs(inputs["lr_per_epoch"], inputs["iterations_per_epoch"])
    kind, epochs, start = inputs["schedule"], inputs["retrain_epochs"], inputs.get("init")
    if kind == "ALLR":
        last = inputs["phase"] == inputs["n_phases"]
        fraction = method.cycle_fraction(inputs["goal"], inputs["n_phases"])
        shares = (inputs["rel_norm_drop"], fraction, epochs, inputs["dense_epochs"])
        start = method.adaptive_start(history.eta_max, *shares) if last else history.eta_max
    length = epochs * inputs["iterations_per_epoch"]
    return {"lr": method.retraining_rates(kind, history, length, start=start)}


def _legacy_bimp(case, document):
    inputs = case["inputs"]
    shape = (inputs["n_epochs"], inputs["budget"], inputs["interval"])
    warmup = inputs.get("warm", method.WARMUP_SHARE)
    return {
        "pruning_epochs": method.bimp_events(inputs["goal"], *shape),
        "lr": method.bimp_rates(inputs["lr"], *shape, inputs["ipe"], warmup),
    }


# ------------------------------------------------------------------------------------------ cycles and
# selection


def _cycles(case, document):
    inputs = case["inputs"]
    goal, cycles = inputs["goal_sparsity"], inputs["n_cycles"]
    return {
        "fraction": method.cycle_fraction(goal, cycles),
        "cumulative_sparsity": method.cumulative_sparsities(goal, cycles),
        "epochs": method.cycle_epochs(
            cycles, each=inputs.get("epochs_per_cycle"), split=inputs.get("epochs_to_split")
        ),
        "surviving": method.surviving(inputs["n_weights"], goal, cycles),
    }


def _cycles_20pct(case, document):
    return {"n_cycles": method.cycles_needed(case["inputs"]["goal_sparsity"], case["inputs"]["per_cycle"])}


def _select(case, document):
    inputs = case["inputs"]
    layers = document["fixtures"]["layers"][inputs["layers_ref"]]
    weights = {str(i): _tensor(layer["w"]).view(layer["shape"]) for i, layer in enumerate(layers)}
    kept, steps = None, []
    try:
        for amount in inputs["amounts"]:
            kept = pruning.select(weights, amount, kept, inputs["criterion"])
            steps.append(kept)
    except pruning.Infeasible:
        return {"error": "infeasible"}
    return {
        "masks_per_cycle": [[_digits(mask) for mask in step.values()] for step in steps],
        "kept_per_cycle": [[int(mask.sum()) for mask in step.values()] for step in steps],
    }


def _select_ties(case, document):
    weights = {str(i): _tensor(layer) for i, layer in enumerate(case["inputs"]["layers"])}
    kept = pruning.select(weights, case["inputs"]["amount"], None, case["inputs"].get("criterion", "global"))
    return {"pruned": (~torch.cat(list(kept.values()))).nonzero().flatten().tolist()}


def _check_select_ties(case, document, got):
    expected, pruned = case["expected"], set(got["pruned"])
    assert len(pruned) == expected["n_pruned"]
    assert set(expected["must_prune"]) <= pruned
    assert not set(expected["must_keep"]) & pruned
    assert len(set(expected["tie_group"]) & pruned) == expected["n_from_tie_group"]


def _uniform_plus_infeasible(case, document):
    shapes = [layer["shape"] for layer in case["inputs"]["layers"]]
    try:
        return {"counts": pruning.uniform_plus_counts(shapes, case["inputs"]["amount"])}
    except pruning.Infeasible:
        return {"error": "infeasible"}


def _allocation(case, document):
    inputs = case["inputs"]
    layers = document["fixtures"]["arch"][inputs["arch_ref"]]["layers"]
    shapes = [shape for _, shape, _ in layers]
    sizes = [math.prod(shape) for shape in shapes]
    pruned = pruning.layer_counts(shapes, sizes, inputs["amount"], inputs["criterion"])
    kept = [size - count for size, count in zip(sizes, pruned)]
    costs = [
        LayerCost(name, "conv", tuple(shape), macs // size, left)
        for (name, shape, macs), size, left in zip(layers, sizes, kept)
    ]
    dense, sparse = sum(c.macs for c in costs), sum(c.sparse_macs for c in costs)
    return {"kept": kept, "kept_total": sum(kept), "theoretical_speedup": dense / sparse}


def _check_allocation(case, document, got):
    expected, tolerance = case["expected"], case["tolerance"]
    assert len(got["kept"]) == len(expected["kept"])
    assert all(abs(a - b) <= tolerance["kept_abs"] for a, b in zip(got["kept"], expected["kept"]))
    assert abs(got["kept_total"] - expected["kept_total"]) <= tolerance["kept_abs"] * len(got["kept"])
    assert got["theoretical_speedup"] == pytest.approx(
        expected["theoretical_speedup"], rel=tolerance["speedup_rel"]
    )


ARCHITECTURES = {
    "ResNet56": ("resnet56", {"shortcut": "A"}),
    "WideResNet": ("wide_resnet28_10", {}),
    "VGG16": ("vgg16", {"conv_bias": True}),
    "Simple": ("mlp", {"hidden": [512]}),
    "SimpleCNN": (
        "convnet",
        {
            "cfg": [32, 64, "M"],
            "hidden": [128],
            "padding": 0,
            "batch_norm": False,
            "conv_bias": True,
            "head": "flatten",
        },
    ),
}
"""Networks that the project knows by another name, or with other options."""


def _classes(inputs, document):
    """As a case says, or the rows of the last layer in the fixture that it refers to."""
    if "classes" in inputs:
        return inputs["classes"]
    _, shape, _ = document["fixtures"]["arch"][inputs["arch_ref"]]["layers"][-1]
    return shape[0]


def _arch(case, document):
    inputs = case["inputs"]
    name, options = ARCHITECTURES.get(inputs["arch"], (inputs["arch"].lower(), {}))
    classes = _classes(inputs, document)
    model = build(name, classes=classes, image_shape=inputs["input"], device="meta", **options)
    chosen = pruning.prunable(model).values()
    return {
        # the authors' rule: it differs from the exact count for the unpadded SimpleCNN
        "macs": cost(model, inputs["input"], convention="same_padding")["macs"],
        "n_params": sum(p.numel() for p in model.parameters()),
        "n_prunable": sum(w.numel() for w in chosen),
        "n_prunable_tensors": len(chosen),
    }


def _layer(layer):
    if layer["type"] == "bn":
        return nn.BatchNorm2d(layer["ch"])
    only(layer, "type", "conv", "linear")
    bias = layer.get("bias", False)
    if layer["type"] == "conv":
        numbers = (layer["in"], layer["out"], layer["k"], layer.get("stride", 1), layer.get("padding", 0))
        module = nn.Conv2d(*numbers, groups=layer.get("groups", 1), bias=bias)
    else:
        module = nn.Linear(layer["in"], layer["out"], bias=bias)
    size = module.weight.numel()
    module.weight.data = (torch.arange(size) < layer.get("nnz", size)).float().view_as(module.weight)
    if module.bias is not None:
        nn.init.ones_(module.bias)
    return module


def _flops(case, document):
    inputs = case["inputs"]
    modules = []
    for layer in inputs["layers"]:
        if layer["type"] == "linear" and not any(isinstance(m, nn.Flatten) for m in modules):
            modules += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        modules.append(_layer(layer))
    model, got = nn.Sequential(*modules), {}
    for name, convention in (("official", "same_padding"), ("exact", "conv_linear")):
        counted = cost(model, inputs["input"], convention=convention)
        got[name] = {
            "macs": counted["macs"],
            "macs_nonzero": counted["sparse_macs"],
            "speedup": counted["theoretical_speedup"],
        }
    return got | {
        "n_params": counted["parameters"],
        "n_nonzero": counted["nonzero_parameters"],
        "sparsity_all_parameters": counted["sparsity_all"],
        "sparsity_prunable": counted["sparsity"],
    }


NORM_DROP = ("conv_w", "conv_b", "bn_w", "bn_b", "fc_w", "fc_b")


def _norm_drop(case, document):
    inputs = case["inputs"]
    # a case gives flat values: the lengths of its biases say how many rows a weight has
    values = {name: _tensor(inputs[name]).flatten() for name in NORM_DROP if inputs.get(name) is not None}
    outputs, classes = len(values["bn_w"]), len(values["fc_b"])
    each, features = (len(values[n]) // rows for n, rows in (("conv_w", outputs), ("fc_w", classes)))
    model = nn.Sequential(
        nn.Conv2d(1, outputs, (1, each), bias="conv_b" in values),
        nn.BatchNorm2d(outputs),
        nn.Linear(features, classes),
    ).double()
    for parameter, value in zip(model.parameters(), values.values(), strict=True):
        parameter.data = value.view_as(parameter)
    distance = measures.distance_to_pruned(model, inputs["sparsity"])
    chosen = pruning.Masks.dense(model)
    weights = chosen.weights(model).values()
    before, prunable_before = (
        pruning.squared_norm(method.norm_parameters(model)),
        pruning.squared_norm(weights),
    )
    chosen.prune(model, inputs["sparsity"])
    chosen.apply(model)
    after, prunable_after = pruning.squared_norm(method.norm_parameters(model)), pruning.squared_norm(weights)
    return {
        "sq_norm_before": before,
        "sq_norm_after": after,
        "rel_norm_drop": pruning.norm_drop(before, after),
        "rel_norm_drop_prunable_only": pruning.norm_drop(prunable_before, prunable_after),
        "distance_to_pruned": distance,
        "rel_distance_to_pruned": distance / math.sqrt(prunable_before),
    }


# ------------------------------------------------------------------------------------------ training


def _tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def _digits(mask):
    return "".join(str(int(value)) for value in mask.flatten())


def _mlp(case, document):
    """The network of a case, linear layers with ReLU between them, and its batches."""
    data = document["fixtures"]["mlp_data"][case["inputs"]["data_ref"]]
    layers = []
    while f"W{len(layers) // 2 + 1}" in data:
        outputs, inputs = _tensor(data[f"W{len(layers) // 2 + 1}"]).shape
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).double()
    for name, parameter in _named(model).items():
        parameter.data = _tensor(data[name])
    return model, FixedBatches([(_tensor(b["x"]), torch.tensor(b["y"])) for b in data["batches"]])


def _named(model):
    """The parameters by the names of the cases: W1, b1, W2, ..."""
    names = (f"{kind}{number}" for number in itertools.count(1) for kind in "Wb")
    return dict(zip(names, model.parameters()))


def _numbered(name, tensors):
    """`name`1, `name`2, ... for the tensors, as lists."""
    return {f"{name}{number}": tensor.tolist() for number, tensor in enumerate(tensors, 1)}


def _trainer(case, document, model, batches, *hooks):
    inputs = case["inputs"]
    decay = inputs["weight_decay"]
    options = {"momentum": inputs["momentum"], "nesterov": inputs.get("nesterov", decay > 0)}
    return Trainer(model, batches, weight_decay=decay, hooks=hooks, **options)


def _parameters(model):
    return {name: parameter.detach().tolist() for name, parameter in _named(model).items()}


def _masks(masks):
    return {f"M{number}": _digits(mask) for number, mask in enumerate(masks.kept.values(), 1)}


class _Recorder(Hooks):
    """Keeps what `look` returns after each step, or each epoch."""

    def __init__(self, look):
        self.look, self.steps, self.epochs = look, [], []

    def stepped(self, trainer):
        self.steps.append({"it": len(self.steps) + 1, **self.look(trainer)})

    def epoch_ended(self, trainer, epoch):
        self.epochs.append({"epoch": epoch + 1, **self.look(trainer)})

    def at(self, wanted):
        return [self.steps[entry["it"] - 1] for entry in wanted]


def _recorder_of(hook):
    """Keeps parameters and masks; the vectors write no mask before the first is chosen."""
    none_yet = hook.masks.kept

    def look(trainer):
        masks = _masks(hook.masks)
        if hook.masks.kept is none_yet:
            masks = dict.fromkeys(masks)
        return _parameters(trainer.model) | masks

    return _Recorder(look)


def _imp_trajectory(case, document):
    inputs = case["inputs"]
    model, batches = _mlp(case, document)
    masks = pruning.Masks.dense(model)
    recorder = _Recorder(lambda trainer: _parameters(trainer.model))
    trainer = _trainer(case, document, model, batches, pruning.KeepMasked(masks), recorder)
    epochs = method.cycle_epochs(
        inputs["n_phases"], each=inputs.get("epochs_per_phase"), split=inputs.get("epochs_to_split")
    )
    retraining = method.Retraining(
        inputs["schedule"], method.History(inputs["lr_history"]), inputs["orig_epochs"]
    )
    after = []
    cycles = method.prune_and_retrain(
        trainer,
        masks,
        inputs["goal"],
        epochs,
        retraining,
        inputs.get("criterion", "global"),
        pruned=lambda *_: after.append(list(_masks(masks).values())),
    )
    return {
        "rel_norm_drop": [cycle.norm_drop for cycle in cycles],
        "masks": after,
        "lr": [rate for cycle in cycles for rate in cycle.rates],
        "iterations": recorder.at(case["expected"]["iterations"]),
        "final": _parameters(model),
    }


def _gmp_trajectory(case, document):
    inputs = case["inputs"]
    model, batches = _mlp(case, document)
    recovering = inputs.get("allow_recovering", True)
    gmp = baselines.GMP(model, inputs["goal"], inputs["n_epochs"], inputs["interval"], recovering)
    recorder = _recorder_of(gmp)
    trainer = _trainer(case, document, model, batches, gmp, recorder)
    trainer.fit([inputs["lr"]] * inputs["n_epochs"] * len(batches))
    gmp.finish(trainer)
    events = baselines.gmp_events(inputs["goal"], inputs["n_epochs"], inputs["interval"])
    return {"pruning_epochs": events, "epochs": recorder.epochs, "final": _parameters(model)}


def _dpf_trajectory(case, document):
    inputs = case["inputs"]
    model, batches = _mlp(case, document)
    dpf = baselines.DPF(model, inputs["goal"], inputs["n_epochs"], inputs["interval"])
    recorder = _recorder_of(dpf)
    trainer = _trainer(case, document, model, batches, dpf, recorder)
    trainer.fit([inputs["lr"]] * inputs["n_epochs"] * len(batches))
    dpf.finish(trainer)
    iterations = recorder.at(case["expected"]["iterations"])
    events = baselines.gmp_events(inputs["goal"], inputs["n_epochs"], inputs["interval"])
    return {"pruning_epochs": events, "iterations": iterations, "final": _parameters(model)}


def _gmp_schedule(case, document):
    events = baselines.gmp_events(
        case["inputs"]["goal"], case["inputs"]["n_epochs"], case["inputs"]["interval"]
    )
    return {"schedule": events, "relative_steps": method.relative_steps(events)}


class _Gradients(Hooks):
    """Keeps the gradients as they are when its turn comes."""

    def gradients_ready(self, trainer):
        self.seen = {name: p.grad.tolist() for name, p in _named(trainer.model).items()}


def _one_step(case, document, make):
    model, batches = _mlp(case, document)
    first = FixedBatches(list(batches.epoch(0))[:1])
    hook, before, after = make(model), _Gradients(), _Gradients()
    trainer = _trainer(case, document, model, first, before, hook, after)
    trainer.fit([case["inputs"]["lr"]])
    return {
        "k": hook.places,
        "grad_before": before.seen,
        "grad_after": after.seen,
        "params_after": _parameters(model),
    }


def _gsm_step(case, document):
    return _one_step(case, document, lambda model: baselines.GSM(model, case["inputs"]["goal"]))


def _lc_step(case, document):
    inputs = case["inputs"]
    return _one_step(
        case, document, lambda model: baselines.LC(model, inputs["goal"], inputs["weight_decay"])
    )


def _legacy_lc_weight_decay(case, document):
    schedule = baselines.lc_weight_decays(case["inputs"]["weight_decay"], case["inputs"]["epochs"])
    return {"schedule": list(schedule.items())}


def _forward_backward(case, document, make, iteration=0):
    """Loss and gradients of the first batch, with the weights and the loss term of a method."""
    model, batches = _mlp(case, document)
    hook = make(model)
    trainer = Trainer(model, batches, hooks=hook)
    trainer.iteration = iteration
    images, labels = next(iter(batches.epoch(0)))
    effective = hook.weights(trainer)
    cross = cross_entropy(functional_call(model, effective, (images,)), labels)
    term = hook.loss(trainer)
    loss = cross if term is None else cross + term
    loss.backward()
    gradients = [weight.grad for weight in hook.masks.weights(model).values()]
    found = {"ce": cross.item(), "loss": loss.item()} | _numbered("gW", gradients)
    return hook, found | _numbered("W", effective.values())


def _dnw(case, document):
    return _forward_backward(case, document, lambda model: baselines.DNW(model, case["inputs"]["goal"]))[1]


def _own(inputs, name, tensors):
    """What a case says of a method's own tensors: `name`1, `name`2, ..."""
    return [inputs[f"{name}{number}"] for number, _ in enumerate(tensors, 1)]


def _with(hook, tensors, values):
    """The hook after its own tensors have been set to a case's values."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data = _tensor(value)
    return hook


def _str(case, document):
    inputs = case["inputs"]

    def make(model):
        hook = baselines.STR(model, inputs["s_initial"])
        return _with(hook, hook.thresholds, inputs["s"])

    hook, got = _forward_backward(case, document, make)
    return got | {"gs": [s.grad.item() for s in hook.thresholds]}


def _cs(case, document):
    inputs = case["inputs"]

    def make(model):
        numbers = (
            inputs["s_initial"],
            inputs["beta_final"],
            inputs["penalty"],
            inputs["T"],
            inputs["weight_decay"],
        )
        hook = baselines.CS(model, *numbers)
        return _with(hook, hook.mask_parameters, _own(inputs, "m", hook.mask_parameters))

    hook, got = _forward_backward(case, document, make, inputs["it"])
    numbers = {"beta": hook.beta(inputs["it"]), "scale": hook.scale}
    return got | numbers | _numbered("gm", [m.grad for m in hook.mask_parameters])


def _dst(case, document):
    inputs = case["inputs"]

    def make(model):
        hook = baselines.DST(model, inputs["penalty"], inputs["weight_decay"])
        return _with(hook, hook.thresholds, _own(inputs, "t", hook.thresholds))

    hook, got = _forward_backward(case, document, make)
    gradients = _numbered("gt", [t.grad for t in hook.thresholds])
    return got | gradients | _numbered("t", hook.thresholds)


KINDS = {
    "dense_lr": _dense_lr,
    "retrain_lr": _retrain_lr,
    "legacy_retrain_lr": _legacy_retrain_lr,
    "cycles": _cycles,
    "cycles_20pct": _cycles_20pct,
    "select": _select,
    "select_ties": _select_ties,
    "uniform_plus_infeasible": _uniform_plus_infeasible,
    "allocation": _allocation,
    "arch": _arch,
    "flops": _flops,
    "norm_drop": _norm_drop,
    "imp_trajectory": _imp_trajectory,
    "gmp_trajectory": _gmp_trajectory,
    "dpf_trajectory": _dpf_trajectory,
    "gmp_schedule": _gmp_schedule,
    "gsm_step": _gsm_step,
    "lc_step": _lc_step,
    "dnw_forward_backward": _dnw,
    "str_forward_backward": _str,
    "cs_forward_backward": _cs,
    "dst_forward_backward": _dst,
    "legacy_bimp": _legacy_bimp,
    "legacy_lc_weight_decay": _legacy_lc_weight_decay,
}

CHECKS = {"retrain_lr": _check_retrain_lr, "select_ties": _check_select_ties, "allocation": _check_allocation}
