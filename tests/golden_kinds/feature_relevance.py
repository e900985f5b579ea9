"""Golden vectors of `feature_relevance`: each kind translated to a call of the project's own functions."""

import contextlib
import dataclasses
import functools
import math

import torch
from golden_inputs import floor_of, only
from torch import nn

from common.core import schedules
from common.core.data import FixedBatches
from common.core.models import ChannelGroup, build
from common.core.models.chain import ConvNet
from common.core.models.network import BatchNorm2d, Conv2d, Linear
from common.core.models.resnet import BasicBlock, Bottleneck, ResNet
from common.core.pruning import channels
from common.core.pruning.counting import layer_costs
from replications.feature_relevance import baselines, costs, method, relevance, removal


def _tensor(values):
    """A float64 tensor; null stands for NaN."""
    return torch.tensor(_filled(values), dtype=torch.float64)


def _filled(values):
    if isinstance(values, list):
        return [_filled(value) for value in values]
    return math.nan if values is None else values


def _with_eps(kind):
    """The adapter `kind`, with the case's `eps` in every denominator."""

    @functools.wraps(kind)
    def adapter(case, document):
        with _eps(case["inputs"].get("eps", relevance.EPS)):
            return kind(case, document)

    return adapter


@contextlib.contextmanager
def _eps(value):
    before = relevance.EPS, method.EPS
    relevance.EPS = method.EPS = value
    try:
        yield
    finally:
        relevance.EPS, method.EPS = before


def _weighted(inputs, rule, *layout):
    x, weight, of_output = (_tensor(inputs[key]) for key in ("x", "weight", "relevance_out"))
    found = rule(x, weight, of_output, *layout, alpha=inputs.get("alpha", 2))
    totals = {"total_in": found.sum().item(), "total_out": of_output.sum().item()}
    return {
        "relevance_in": found.tolist(),
        "channel_mean": found.flatten(2).mean(2).tolist() if found.ndim > 2 else [],
    } | totals


@_with_eps
def relprop_linear(case, document):
    return _weighted(case["inputs"], relevance.linear)


@_with_eps
def relprop_conv2d(case, document):
    inputs = case["inputs"]
    layout = (_sides(inputs.get(key, default)) for key, default in (("stride", 1), ("padding", 0)))
    return _weighted(inputs, relevance.conv2d, *layout)


def _sides(value):
    return tuple(value) if isinstance(value, list) else (value, value)


@_with_eps
def relprop_maxpool2d(case, document):
    inputs = case["inputs"]
    only(inputs, "stride", inputs["kernel"])
    found = relevance.max_pool2d(_tensor(inputs["x"]), _tensor(inputs["relevance_out"]), inputs["kernel"])
    return {"relevance_in": found.tolist()}


@_with_eps
def relprop_avgpool2d(case, document):
    inputs = case["inputs"]
    x = _tensor(inputs["x"])
    kernel = _sides(inputs.get("kernel", list(x.shape[2:])))
    if _sides(inputs.get("stride", kernel)) != kernel:
        only(inputs, "stride", inputs["kernel"])
    found = relevance.avg_pool2d(x, _tensor(inputs["relevance_out"]), kernel)
    return {"relevance_in": found.tolist()}


@_with_eps
def relprop_residual_add(case, document):
    terms = (_tensor(case["inputs"][key]) for key in ("branch", "skip", "relevance_out"))
    branch, skip = relevance.residual_add(*terms)
    return {"relevance_branch": branch.tolist(), "relevance_skip": skip.tolist()}


# ------------------------------------------------------------------------------------------ networks


def _network(inputs):
    """The project's network with the layers of a case, and the place in the case of each scored layer."""
    layers = inputs["layers"]
    residual = any(layer["type"] in BLOCKS for layer in layers)
    model, places = (_resnet if residual else _chain)(layers)
    return model.double().eval(), places


BLOCKS = {"basic_block": BasicBlock, "bottleneck": Bottleneck}


def _chain(layers):
    """Everything before the flattening is `features`, everything behind it `classifier`."""
    last = max(i for i, layer in enumerate(layers) if layer["type"] not in ("flatten", "linear", "relu"))
    flat = next(i for i in range(last + 1, len(layers)) if layers[i]["type"] in ("flatten", "linear"))
    parts = {"features": range(flat), "classifier": range(flat, len(layers))}
    model, places = ConvNet(1, (1, 1, 1), None, cfg=[1], head="flatten"), {}
    for part, numbers in parts.items():
        numbers = [i for i in numbers if layers[i]["type"] != "flatten"]
        setattr(model, part, nn.Sequential(*(_layer(layers[i]) for i in numbers)))
        for place, i in enumerate(numbers):
            if layers[i]["type"] in ("conv2d", "linear"):
                places[f"{part}.{place}"] = {"layer": i, "part": layers[i]["type"].removesuffix("2d")}
    # the logits' own layer is not scored
    places.popitem()
    return model, places


def _resnet(layers):
    """Stem, blocks (of any kind) in one stage, average pooling, linear layer."""
    numbers = [i for i, layer in enumerate(layers) if layer["type"] in BLOCKS]
    model = ResNet(1, (1, 1, 1), None, block=BLOCKS[layers[numbers[0]]["type"]], blocks=[1], stem=1)
    model.conv1, model.bn1, model.maxpool = nn.Identity(), nn.Identity(), nn.Identity()
    slots = {"conv2d": "conv1", "batchnorm2d": "bn1", "maxpool2d": "maxpool"}
    for layer in layers[: numbers[0]]:
        if layer["type"] != "relu":
            setattr(model, slots[layer["type"]], _layer(layer))
    behind = [layer["type"] for layer in layers[numbers[-1] + 1 :]]
    assert behind in (["avgpool2d", "flatten", "linear"], ["avgpool2d", "linear"]), behind
    model.linear = _layer(layers[-1])
    blocks, places = [], {}
    for place, i in enumerate(numbers):
        blocks.append(_block(layers[i]))
        for part in layers[i]:
            if part.startswith("conv"):
                places[f"layer1.{place}.{part}"] = {"layer": i, "part": part}
    model.layer1 = nn.Sequential(*blocks)
    return model, places


def _block(layer):
    kind = BLOCKS[layer["type"]]
    convolutions = [layer[f"conv{i}"]["weight"] for i in range(1, len(kind.kernels) + 1)]
    inputs, (*inner, outputs) = len(convolutions[0][0]), map(len, convolutions)
    block = kind(inputs, inner, outputs, outputs, 1, "B")
    for part in layer:
        if part.startswith(("conv", "bn")):
            setattr(block, part, _layer(layer[part]))
    shortcut = layer.get("shortcut") or {}
    block.shortcut = nn.Sequential(*map(_layer, shortcut.values())) if shortcut else nn.Identity()
    return block


def _layer(layer):
    """The project's layer for an entry of a case, with its values."""
    kind, weight = layer["type"], layer.get("weight")
    if kind == "relu":
        return nn.ReLU()
    if kind == "maxpool2d":
        return nn.MaxPool2d(layer["kernel"], layer.get("stride"))
    if kind == "avgpool2d":
        # the only one that networks have: over the whole map
        return nn.AdaptiveAvgPool2d(1)
    bias = "bias" in layer
    if kind == "linear":
        made = Linear(len(weight[0]), len(weight), bias=bias)
    elif kind == "batchnorm2d":
        made = BatchNorm2d(len(weight))
        made.eps = layer.get("eps", made.eps)
    elif kind == "conv2d":
        outputs, inputs, *kernel = torch.tensor(weight).shape
        layout = (_sides(layer.get(key, default)) for key, default in (("stride", 1), ("padding", 0)))
        made = Conv2d(inputs, outputs, tuple(kernel), *layout, bias=bias)
    else:
        raise AssertionError(f"no layer for type {kind!r}")
    made.double()
    with torch.no_grad():
        for entry in ("weight", "bias", "running_mean", "running_var"):
            if entry in layer:
                getattr(made, entry).copy_(_tensor(layer[entry]))
    return made


@_with_eps
def relevance_network(case, document):
    inputs = case["inputs"]
    images, labels = _tensor(inputs["x"]), torch.tensor(inputs["labels"])
    model, places = _network(inputs)
    options = {"branch_share": inputs.get("branch_share", False)}
    logits, found = relevance.relevances(model, images, labels, inputs.get("alpha", 2), **options)
    scored = [
        {**places[name], "mean_over_positions": values.tolist()}
        for name, values in found.items()
        if name in places
    ]
    return {"logits": logits.tolist(), "scored": scored}


# --------------------------------------------------------------------------------------- scores and selection


def class_scale(case, document):
    accuracy = method.class_accuracy(_tensor(case["inputs"]["confusion_matrix"]))
    return {"class_accuracy": accuracy.tolist(), "scale": method.class_scale(accuracy).tolist()}


@_with_eps
def channel_scores(case, document):
    inputs = case["inputs"]
    labels = torch.tensor(inputs["labels"])
    counts = torch.bincount(labels, minlength=inputs["classes"])
    counts = counts + torch.tensor(inputs.get("extra_count_per_class", 0))
    layers = [_tensor(layer) for layer in inputs["mean_over_positions"]]
    sums = [method.class_sums(layer, labels, inputs["classes"]) for layer in layers]
    return {"scores": [method.channel_scores(s, counts, _tensor(inputs["scale"])).tolist() for s in sums]}


def _after(removed, chosen):
    return [sorted([*gone, *(c for layer, c in chosen if layer == i)]) for i, gone in enumerate(removed)]


def select_channels(case, document):
    inputs = case["inputs"]
    scores, removed = [_tensor(layer) for layer in inputs["scores_deepest_first"]], inputs["already_pruned"]
    enough = method.until_channels(inputs["x"])
    chosen = method.select(scores, removed, enough, floor_of(inputs, 0))
    return {"selected_in_order": [list(pair) for pair in chosen], "pruned_after": _after(removed, chosen)}


def select_units(case, document):
    inputs = case["inputs"]
    removed = [inputs["already_pruned"]]
    enough = method.until_channels(inputs["count"])
    chosen = method.select([_tensor(inputs["scores"])], removed, enough, floor_of(inputs, 0))
    return {"selected_in_order": [unit for _, unit in chosen], "pruned_after": _after(removed, chosen)[0]}


# -------------------------------------------------------------------------------------- schedule, masks, cost


def pruning_schedule(case, document):
    inputs = case["inputs"]
    events = method.pruning_schedule(inputs["epochs"], inputs["n"], inputs["N1"])
    removed = [min(inputs["x"] * (i + 1), inputs["prunable_channels"]) for i in range(len(events))]
    fraction = (removed[-1] if removed else 0) / inputs["prunable_channels"]
    found = {"prune_after_epoch_1based": events, "events": len(events), "removed_after_event": removed}
    return found | {"final_fraction_of_channels": fraction}


def learning_rate(case, document):
    inputs = case["inputs"]
    options = {"epochs": inputs["epochs"], "per_epoch": 1, "gamma": inputs.get("gamma", 0.1)}
    if inputs.get("every"):
        rates = schedules.step(inputs["base"], step_epochs=inputs["every"], **options)
    else:
        rates = schedules.multistep(inputs["base"], milestones=inputs["milestones"], **options)
    return {"lr": [rates[epoch] for epoch in inputs["probe_epochs_0based"]]}


def weight_mask(case, document):
    inputs = case["inputs"]
    kind, shape = inputs["kind"], inputs["shape"]
    only(inputs, "kind", "linear", "conv", "conv_first_of_block")
    before, own = inputs["pruned_inputs"], inputs["pruned_outputs"]
    bias = inputs.get("bias", kind == "linear")
    layer = (
        nn.Linear(shape[1], shape[0], bias=bias)
        if kind == "linear"
        else nn.Conv2d(shape[1], shape[0], tuple(shape[2:]), bias=bias)
    )
    model = nn.ModuleDict({"before": nn.Linear(1, shape[1]), "layer": layer})
    consumers = () if kind == "conv_first_of_block" else ("layer",)
    groups = [ChannelGroup("before", consumers=consumers, minimum=0), ChannelGroup("layer", minimum=0)]
    kept = method.kept({"before": shape[1], "layer": shape[0]}, {"before": before, "layer": own})
    masks = channels.masks(model, kept, groups)
    mask, bias = masks["layer.weight"], masks.get("layer.bias")
    return {
        "mask_out_by_in": mask.flatten(2).all(2).int().tolist() if mask.ndim > 2 else mask.int().tolist(),
        "bias_mask": None if bias is None else bias.int().tolist(),
        "zeros": int((~mask).sum()),
    }


def _protected(inputs, model):
    """The convolutions before a case's first prunable one, which is counted from 0 (null: it is the first)."""
    if "first_prunable_conv" not in inputs:
        return None
    names = [group.name for group in channels.groups_of(model)]
    convolutions = [name for name in names if isinstance(model.get_submodule(name), nn.Conv2d)]
    return convolutions[: inputs["first_prunable_conv"] or 0]


def pruned_cost(case, document):
    inputs = case["inputs"]
    shape = inputs["input"]
    # the plain network of this paper has a hidden layer, other papers' do not
    options = {"hidden": inputs.get("hidden", [512])} if inputs["arch"].startswith("vgg") else {}
    model = build(inputs["arch"], classes=inputs["classes"], image_shape=shape, device="meta", **options)
    layers, units = method.prunable_layers(model, _protected(inputs, model))
    counts = dict(
        zip([group.name for group in layers], inputs["pruned_per_layer_deepest_first"], strict=True)
    )
    counts |= {group.name: inputs.get("pruned_hidden_units", 0) for group in units}
    table = costs.CostTable(model, shape)
    left = {name: table.widths[name] - count for name, count in counts.items()}
    removed = {name: list(range(count)) for name, count in counts.items()}
    zeros = costs.official_zero_weights(model, table, removed)
    dense, weights, dense_macs, macs = table.weights(), table.weights(left), table.macs(), table.macs(left)
    return {
        "dense_weights": dense,
        "kept_weights": weights,
        "dense_macs": dense_macs,
        "kept_macs": macs,
        "compression": dense / weights,
        "macs_reduction_percent": 100 * (1 - macs / dense_macs),
        "zero_weights_in_official_masks": zeros,
        "official_prune_rate_percent": 100 * zeros / dense,
    }


# ------------------------------------------------------------------------------------------ training


class _Recorded(nn.Module):
    """A weight whose loss has a given gradient."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, gradient):
        return (self.weight * gradient).sum()


def masked_sgd(case, document):
    inputs = case["inputs"]
    model = _Recorded(_tensor(inputs["weight"]))
    options = {key: inputs[key] for key in ("momentum", "weight_decay", "nesterov") if key in inputs}
    optimizer = torch.optim.SGD(model.parameters(), lr=inputs["lr"], **options)
    masks, found = removal.ForwardMasks(), []
    for step, gradient in enumerate(inputs["gradients"]):
        if step == inputs["mask_set_before_step"]:
            masks.set(model, {"weight": torch.tensor(inputs["mask"]).bool()})
        optimizer.zero_grad()
        torch.func.functional_call(model, masks.weights(model), (_tensor(gradient),)).backward()
        optimizer.step()
        found.append((masks.weights(model).get("weight", model.weight)).tolist())
    return {"effective_weight_after_step": found}


@_with_eps
def gradual_pipeline(case, document):
    inputs = case["inputs"]
    images, labels = _tensor(inputs["x"]), torch.tensor(inputs["labels"])
    model, _ = _network(inputs)
    options = {key: inputs[key] for key in ("alpha", "branch_share") if key in inputs}
    allocations = {"global": method.all_together, "per_layer": baselines.same_share}
    pruner = method.Pruner(
        model,
        FixedBatches([(images, labels)]),
        method.Relevance(**options),
        allocations[inputs.get("allocation", "global")],
        floor_of(inputs, 0),
        _protected(inputs, model),
    )
    # a mask may empty a layer, which removal must not
    groups = [dataclasses.replace(group, minimum=0) for group in channels.groups_of(model)]
    masks, events = removal.ForwardMasks(), []
    for _ in range(inputs["events"]):
        enough = method.until_channels(inputs["channels_per_event"])
        event = pruner.event(model, method.Goal(enough, inputs.get("hidden_units_per_event", 0)))
        masks.set(model, channels.masks(model, pruner.kept, groups, norms=False))
        accuracy = event.scored.notes["class_accuracy"]
        found = {
            "class_accuracy": accuracy,
            "scale": method.class_scale(_tensor(accuracy)).tolist(),
            "scores_deepest_first": [event.scored.scores[name].tolist() for name in pruner.layers],
            "selected_in_order": [list(pair) for pair in event.channels],
            "nonzero_weights_after": sum(c.nonzero for c in layer_costs(model, images.shape[1:])),
            "logits_after": model(images).tolist(),
        }
        if pruner.units:
            found["hidden_unit_scores"] = event.scored.scores[pruner.units[0]].tolist()
            found["selected_units_in_order"] = [unit for _, unit in event.units]
        events.append(found)
    return {"events": events}


KINDS = {
    "relprop_linear": relprop_linear,
    "relprop_conv2d": relprop_conv2d,
    "relprop_maxpool2d": relprop_maxpool2d,
    "relprop_avgpool2d": relprop_avgpool2d,
    "relprop_residual_add": relprop_residual_add,
    "relevance_network": relevance_network,
    "class_scale": class_scale,
    "channel_scores": channel_scores,
    "select_channels": select_channels,
    "select_units": select_units,
    "pruning_schedule": pruning_schedule,
    "learning_rate": learning_rate,
    "weight_mask": weight_mask,
    "pruned_cost": pruned_cost,
    "masked_sgd": masked_sgd,
    "gradual_pipeline": gradual_pipeline,
}
