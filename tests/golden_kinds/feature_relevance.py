"""Golden vectors of `feature_relevance`: each kind translated to a call of the project's own functions."""

import math

import torch
from torch import nn

from common.core import schedules
from common.core.data import FixedBatches
from common.core.models import ChannelGroup, build
from common.core.models.chain import ConvNet
from common.core.models.resnet import BasicBlock, Bottleneck, ResNet
from common.core.pruning import channels
from common.core.pruning.counting import layer_costs
from replications.feature_relevance import gradual, method, relevance


def _tensor(values):
    """A float64 tensor; null stands for NaN."""
    filled = [[math.nan if v is None else v for v in row] if isinstance(row, list) else row for row in values]
    return torch.tensor(filled, dtype=torch.float64)


def _weighted(inputs, rule, *layout):
    x, weight, of_output = (_tensor(inputs[key]) for key in ("x", "weight", "relevance_out"))
    found = rule(x, weight, of_output, *layout, alpha=inputs["alpha"])
    totals = {"total_in": found.sum().item(), "total_out": of_output.sum().item()}
    return {
        "relevance_in": found.tolist(),
        "channel_mean": found.flatten(2).mean(2).tolist() if found.ndim > 2 else [],
    } | totals


def relprop_linear(case, document):
    return _weighted(case["inputs"], relevance.linear)


def relprop_conv2d(case, document):
    return _weighted(case["inputs"], relevance.conv2d, case["inputs"]["stride"], case["inputs"]["padding"])


def relprop_maxpool2d(case, document):
    inputs = case["inputs"]
    found = relevance.max_pool2d(_tensor(inputs["x"]), _tensor(inputs["relevance_out"]), inputs["kernel"])
    return {"relevance_in": found.tolist()}


def relprop_avgpool2d(case, document):
    inputs = case["inputs"]
    found = relevance.avg_pool2d(
        _tensor(inputs["x"]), _tensor(inputs["relevance_out"]), (inputs["kernel"],) * 2
    )
    return {"relevance_in": found.tolist()}


def relprop_residual_add(case, document):
    terms = (_tensor(case["inputs"][key]) for key in ("branch", "skip", "relevance_out"))
    branch, skip = relevance.residual_add(*terms)
    return {"relevance_branch": branch.tolist(), "relevance_skip": skip.tolist()}


# ------------------------------------------------------------------------------------------ networks


def _network(inputs):
    """The project's network with the layers of a case."""
    layers, image_shape = inputs["layers"], torch.tensor(inputs["x"]).shape[1:]
    residual = any(layer["type"] in ("basic_block", "bottleneck") for layer in layers)
    model, names = (_resnet if residual else _chain)(layers, inputs["classes"], image_shape)
    model = model.double().eval()
    for name, layer in names.items():
        _fill(model.get_submodule(name), layer)
    return model


def _chain(layers, classes, image_shape):
    cfg, hidden, features, linears = [], [], [], []
    for layer in layers:
        if layer["type"] == "conv2d":
            cfg += ["S"] * (layer["stride"] == 2) + [len(layer["weight"])]
        elif layer["type"] == "maxpool2d":
            cfg.append("M")
        elif layer["type"] == "linear":
            hidden.append(len(layer["weight"]))
            linears.append(layer)
        if layer["type"] in ("conv2d", "batchnorm2d", "relu", "maxpool2d") and not linears:
            features.append(layer)
    convolutions = [layer for layer in features if layer["type"] == "conv2d"]
    options = {
        "kernel": len(convolutions[0]["weight"][0][0]),
        "padding": [layer["padding"] for layer in convolutions],
    }
    model = ConvNet(
        classes, image_shape, None, cfg=cfg, hidden=hidden[:-1], head="flatten", dropout=0.0, **options
    )
    names = {f"features.{i}": layer for i, layer in enumerate(features)}
    return model, names | {f"classifier.{3 * i}": layer for i, layer in enumerate(linears)}


def _resnet(layers, classes, image_shape):
    blocks = [layer for layer in layers if layer["type"] in ("basic_block", "bottleneck")]
    kind = BasicBlock if blocks[0]["type"] == "basic_block" else Bottleneck
    model = ResNet(classes, image_shape, None, block=kind, blocks=[len(blocks)], stem=1)
    stem, norm, linear = layers[0], layers[1], layers[-1]
    model.conv1, model.bn1 = _conv(stem), nn.BatchNorm2d(len(stem["weight"]))
    model.linear = nn.Linear(len(linear["weight"][0]), classes)
    names = {"conv1": stem, "bn1": norm, "linear": linear}
    channels_in, built = len(stem["weight"]), []
    for i, case in enumerate(blocks):
        convs = [case[f"conv{k}"] for k in range(1, len(kind.kernels) + 1)]
        *inner, outputs = [len(conv["weight"]) for conv in convs]
        stride = max(conv["stride"] for conv in convs)
        built.append(kind(channels_in, inner, outputs, outputs, stride, "B"))
        for key, layer in case.items():
            if key.startswith(("conv", "bn")):
                names[f"layer1.{i}.{key}"] = layer
        if case["shortcut"]:
            names |= {
                f"layer1.{i}.shortcut.0": case["shortcut"]["conv"],
                f"layer1.{i}.shortcut.1": case["shortcut"]["bn"],
            }
        channels_in = outputs
    model.layer1 = nn.Sequential(*built)
    return model, names


def _conv(layer):
    weight = torch.tensor(layer["weight"])
    return nn.Conv2d(
        weight.shape[1], weight.shape[0], weight.shape[2], layer["stride"], layer["padding"], bias=False
    )


@torch.no_grad()
def _fill(module, layer):
    for entry in ("weight", "bias", "running_mean", "running_var"):
        if entry in layer:
            getattr(module, entry).copy_(_tensor(layer[entry]))
    if "eps" in layer:
        module.eps = layer["eps"]


def relevance_network(case, document):
    inputs = case["inputs"]
    images, labels = _tensor(inputs["x"]), torch.tensor(inputs["labels"])
    logits, found = relevance.relevances(_network(inputs), images, labels, inputs["alpha"])
    return {"logits": logits.tolist(), "scored": _in_the_case_s_terms(found, case["expected"]["scored"])}


def _in_the_case_s_terms(found, expected):
    """Scored layers in order, without the last linear layer, shortcuts, and a residual network's stem."""
    names = [name for name in found if ".shortcut." not in name][1:]
    return [
        {**site, "mean_over_positions": found[name].tolist()}
        for name, site in zip(names, expected, strict=True)
    ]


# --------------------------------------------------------------------------------------- scores and selection


def class_scale(case, document):
    accuracy = method.class_accuracy(_tensor(case["inputs"]["confusion_matrix"]))
    return {"class_accuracy": accuracy.tolist(), "scale": method.class_scale(accuracy).tolist()}


def channel_scores(case, document):
    inputs = case["inputs"]
    labels = torch.tensor(inputs["labels"])
    counts = torch.bincount(labels, minlength=inputs["classes"]) + inputs["extra_count_per_class"]
    layers = [_tensor(layer) for layer in inputs["mean_over_positions"]]
    sums = [method.class_sums(layer, labels, inputs["classes"]) for layer in layers]
    return {"scores": [method.channel_scores(s, counts, _tensor(inputs["scale"])).tolist() for s in sums]}


def _after(removed, chosen):
    return [sorted([*gone, *(c for layer, c in chosen if layer == i)]) for i, gone in enumerate(removed)]


def select_channels(case, document):
    inputs = case["inputs"]
    scores, removed = [_tensor(layer) for layer in inputs["scores_deepest_first"]], inputs["already_pruned"]
    chosen = method.select(scores, removed, gradual.until_channels(inputs["x"]))
    return {"selected_in_order": [list(pair) for pair in chosen], "pruned_after": _after(removed, chosen)}


def select_units(case, document):
    inputs = case["inputs"]
    removed = [inputs["already_pruned"]]
    chosen = method.select([_tensor(inputs["scores"])], removed, gradual.until_channels(inputs["count"]))
    return {"selected_in_order": [unit for _, unit in chosen], "pruned_after": _after(removed, chosen)[0]}


# -------------------------------------------------------------------------------------- schedule, masks, cost


def pruning_schedule(case, document):
    inputs = case["inputs"]
    events = method.pruning_schedule(inputs["epochs"], inputs["n"], inputs["N1"])
    removed = [min(inputs["x"] * (i + 1), inputs["prunable_channels"]) for i in range(len(events))]
    fraction = removed[-1] / inputs["prunable_channels"]
    found = {"prune_after_epoch_1based": events, "events": len(events), "removed_after_event": removed}
    return found | {"final_fraction_of_channels": fraction}


def learning_rate(case, document):
    inputs = case["inputs"]
    options = {"epochs": inputs["epochs"], "per_epoch": 1, "gamma": inputs["gamma"]}
    if inputs["every"]:
        rates = schedules.step(inputs["base"], step_epochs=inputs["every"], **options)
    else:
        rates = schedules.multistep(inputs["base"], milestones=inputs["milestones"], **options)
    return {"lr": [rates[epoch] for epoch in inputs["probe_epochs_0based"]]}


def weight_mask(case, document):
    inputs = case["inputs"]
    shape, before, own = inputs["shape"], inputs["pruned_inputs"], inputs["pruned_outputs"]
    layer = (
        nn.Linear(shape[1], shape[0])
        if inputs["kind"] == "linear"
        else nn.Conv2d(shape[1], shape[0], shape[2], bias=False)
    )
    model = nn.ModuleDict({"before": nn.Linear(1, shape[1]), "layer": layer})
    consumers = () if inputs["kind"] == "conv_first_of_block" else ("layer",)
    groups = [ChannelGroup("before", consumers=consumers), ChannelGroup("layer")]
    kept = method.kept({"before": shape[1], "layer": shape[0]}, {"before": before, "layer": own})
    masks = channels.masks(model, kept, groups)
    mask, bias = masks["layer.weight"], masks.get("layer.bias")
    return {
        "mask_out_by_in": mask.flatten(2).all(2).int().tolist() if mask.ndim > 2 else mask.int().tolist(),
        "bias_mask": None if bias is None else bias.int().tolist(),
        "zeros": int((~mask).sum()),
    }


def pruned_cost(case, document):
    inputs = case["inputs"]
    shape = inputs["input"]
    # the plain network of this paper has a hidden layer, other papers' do not
    options = {"hidden": [512]} if inputs["arch"].startswith("vgg") else {}
    model = build(inputs["arch"], classes=inputs["classes"], image_shape=shape, device="meta", **options)
    layers, units = method.prunable_layers(model)
    counts = dict(
        zip([group.name for group in layers], inputs["pruned_per_layer_deepest_first"], strict=True)
    )
    counts |= {group.name: inputs.get("pruned_hidden_units", 0) for group in units}
    table = method.CostTable(model, shape)
    left = {name: table.widths[name] - count for name, count in counts.items()}
    removed = {name: list(range(count)) for name, count in counts.items()}
    zeros = method.official_zero_weights(model, table, removed)
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
    options = {"momentum": inputs["momentum"], "weight_decay": inputs["weight_decay"]}
    optimizer = torch.optim.SGD(model.parameters(), lr=inputs["lr"], **options)
    masks, found = gradual.ForwardMasks(), []
    for step, gradient in enumerate(inputs["gradients"]):
        if step == inputs["mask_set_before_step"]:
            masks.set(model, {"weight": torch.tensor(inputs["mask"]).bool()})
        optimizer.zero_grad()
        torch.func.functional_call(model, masks.weights(model), (_tensor(gradient),)).backward()
        optimizer.step()
        found.append((masks.weights(model).get("weight", model.weight)).tolist())
    return {"effective_weight_after_step": found}


def gradual_pipeline(case, document):
    inputs = case["inputs"]
    images, labels = _tensor(inputs["x"]), torch.tensor(inputs["labels"])
    model = _network(inputs)
    pruner = gradual.Pruner(model, gradual.Scoring(), FixedBatches([(images, labels)]))
    masks, events = gradual.ForwardMasks(), []
    for _ in range(inputs["events"]):
        enough = gradual.until_channels(inputs["channels_per_event"])
        event = pruner.event(model, enough, inputs["hidden_units_per_event"])
        masks.set(model, channels.masks(model, pruner.kept, norms=False))
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
