"""Golden vectors of pruning from scratch: from a case's inputs to the project's functions and back."""

import contextlib
import math
import re

import torch
from golden_inputs import floor_of, only
from torch import nn
from torch.func import functional_call

from common.core.data import FixedBatches
from common.core.models import architecture
from common.core.models.mobilenet import InvertedResidual, Separable
from common.core.models.resnet import BasicBlock, Bottleneck
from common.core.trainer import Hooks, Trainer
from replications.pruning_from_scratch import bpcp, method
from replications.pruning_from_scratch.structure import (
    Layout,
    Ranking,
    keep_count,
    search,
    similarity,
    uniform_widths,
)

GATED_NORMS = {
    "vgg_conv_bn_relu": ["bn"],
    "resnet_basic": ["bn1"],
    "resnet_bottleneck": ["bn1", "bn2"],
    "mobilenet_v1_separable": ["bn2"],
    "mobilenet_v2_body": ["bn1"],
}
CHAINED = {
    "vgg_conv_bn_relu": {"conv": "0", "bn": "1"},
    "mobilenet_v2_body": {
        "conv1": "0.0", "bn1": "0.1", "conv2": "1.0", "bn2": "1.1", "conv3": "2", "bn3": "3",
    },
}  # fmt: skip


@contextlib.contextmanager
def _float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _tensors(gates):
    return [torch.tensor(layer, dtype=torch.float64) for layer in gates]


# ---------------------------------------------------------------------------------------------- networks


def _layout(inputs, name=None, options=None):
    """The layout that a case speaks of; without a number of classes or a side of images, the usual ones."""
    name = name or inputs["arch"]
    multiplier = inputs.get("output_multiplier", 1)
    options = {**(options or {}), **({} if multiplier == 1 else {"multiplier": multiplier})}
    usual = 224 if name == "resnet50" or name.startswith("mobilenet") else 32
    side = inputs.get("input_hw", usual)
    shape = (inputs.get("input_channels", 3), *(side if isinstance(side, list) else (side, side)))
    return Layout.of(name, inputs.get("num_classes", 10), shape, options)


def _expanded(layout, first):
    return layout.expanded(first / layout.widths[0])


def _numbers(cfg):
    return [item for item in cfg if item != "M"]


def _with_pools(widths, cfg):
    widths = iter(widths)
    return [item if item == "M" else next(widths) for item in cfg]


def _cfg(layout, widths):
    """Widths in the notation of the cases, which has the pools of a plain network between them."""
    pools = [item if isinstance(item, str) else 0 for item in _chain(layout)]
    return _with_pools(widths, pools or widths)


def _chain(layout):
    cfg = layout.fixed.get("cfg", architecture(layout.architecture).options.get("cfg", []))
    return cfg[:-1] if cfg and cfg[-1] == "M" else cfg


def _gate_layout(case, document):
    inputs = case["inputs"]
    layout = _expanded(_layout(inputs), inputs["expanded_inchannel"])
    gates = method.Gates(layout.build(), layout.gated, 0.5, 0.5)
    sizes = [len(layer) for layer in gates.layers()]
    return {
        "gates_per_layer": sizes,
        "total": len(gates.values),
        "initial_value": gates.values.unique().item(),
    }


def _count(case, document):
    inputs = case["inputs"]
    cost = _expanded(_layout(inputs), inputs["expanded_inchannel"]).cost(_numbers(inputs["cfg"]))
    return {"macs": cost["macs"], "params": cost["parameters"]}


def _count_by_position(case, document):
    return {"recommended": _count(case, document)}


def _check_by_position(case, document, got):
    # the official network drops a layer when two widths happen to be equal; this suite's never does
    assert got["recommended"] == case["expected"]["recommended"]


def _block(case, document):
    inputs = case["inputs"]
    kind, names = inputs["block"], CHAINED.get(inputs["block"], {})
    with _float64():
        block = _module(inputs)
        given = inputs["parameters"] | inputs.get("running_stats", {})
        weights = {_renamed(name, names): torch.tensor(value) for name, value in given.items()}
        _load(block, weights)
        _set_norms(block, inputs.get("bn", {}), given)
        block.train(inputs["mode"] == "train")
        gates = method.Gates(block, [_renamed(norm, names) for norm in GATED_NORMS[kind]], 0.0, 0.0)
        gates.values.data = torch.cat(_tensors(inputs["gates"].values()))
        output = functional_call(block, gates.weights(None), (torch.tensor(inputs["x"]),))
        (output * torch.tensor(inputs["readout"])).sum().backward()
    grads = gates.layers(gates.values.grad)
    back = {new: old for old, new in names.items()}
    running = {_renamed(n, back): b.tolist() for n, b in block.named_buffers() if "running" in n}
    return {
        "output": output.tolist(),
        "gate_grad": {key: grad.tolist() for key, grad in zip(inputs["gates"], grads)},
        "running_stats_after": running,
    }


def _load(model, weights):
    """Load the values that a case gives; it may leave out others, but none that it has is lost."""
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, f"the network has no {', '.join(unknown)}"


def _set_norms(model, bn, given):
    """Give the batch norms what a case says of all of them, but for what it says of single ones."""
    single = {name.rpartition(".")[2] for name in given if "running" in name or "bn" in name}
    entries = {"weight": "weight", "bias": "bias"}
    entries |= {f"running_{moment}": f"running_{moment}_start" for moment in ("mean", "var")}
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps, norm.momentum = bn.get("eps", norm.eps), bn.get("momentum", norm.momentum)
            for entry, key in entries.items():
                if key in bn and entry not in single:
                    getattr(norm, entry).data[:] = torch.tensor(bn[key], dtype=norm.weight.dtype)


def _renamed(name, names):
    layer, _, rest = name.rpartition(".")
    return f"{names.get(layer, layer)}.{rest}" if rest and layer else names.get(name, name)


def _module(inputs):
    shapes = {name: torch.tensor(value).shape for name, value in inputs["parameters"].items()}
    channels = len(inputs["x"][0])
    kernels = [shape for name, shape in shapes.items() if name.startswith("conv")]
    convs = [shape[0] for shape in kernels]
    kind, stride = inputs["block"], inputs.get("stride", 1)
    if kind == "vgg_conv_bn_relu":
        only(inputs, "stride", 1, 2)
        options = {"cfg": ["S"] * (stride == 2) + convs, "kernel": kernels[0][2]}
        return Layout.of("convnet", 2, torch.tensor(inputs["x"]).shape[1:], options).build().features
    if kind == "mobilenet_v1_separable":
        return Separable(channels, convs[-1], stride)
    if kind == "mobilenet_v2_body":
        return InvertedResidual(channels, convs[0], convs[-1], stride, expand=True).conv
    projected = inputs.get("projection_shortcut", "shortcut.0.weight" in shapes)
    block = {"resnet_basic": BasicBlock, "resnet_bottleneck": Bottleneck}[kind]
    made = block(channels, convs[:-1], convs[-1], convs[-1], stride, "B" if projected else "A")
    if projected and isinstance(made.shortcut, nn.Identity):
        # the project projects only where shapes differ
        convolution = nn.Conv2d(channels, convs[-1], 1, stride, bias=False)
        made.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(convs[-1]))
    return made


# ---------------------------------------------------------------------------------------------- gates


def _regulariser(case, document):
    inputs = case["inputs"]
    layers = _tensors(inputs["gates"])
    values = torch.cat(layers).requires_grad_()
    value = method.regulariser(values, inputs["lambda_"], inputs["target"])
    value.backward()
    return {
        "value": value.item(),
        "mean_abs": values.abs().mean().item(),
        "density_nonzero": method.density(values.detach()),
        "grad": [part.tolist() for part in values.grad.split([len(layer) for layer in layers])],
    }


class _OneEach:
    """One batch an epoch, so that the history has a row for each step."""

    def __init__(self, batches):
        self._batches = batches

    def __len__(self):
        return 1

    def epoch(self, number):
        return [self._batches[number]]


class _Gradients(Hooks):
    """Keeps the gates before each step and their gradients."""

    def __init__(self, gates):
        self.gates, self.before, self.gradients = gates, [], []

    def gradients_ready(self, trainer):
        self.before.append(self.gates.values.detach().clone())
        self.gradients.append(self.gates.values.grad.clone())


def _learned(layout, weights, batches, inputs):
    with _float64():
        model = layout.build()
        _load(model, {name: torch.tensor(value) for name, value in weights.items()})
        _set_norms(model, inputs.get("bn", {}), weights)
        gates = method.Gates(model, layout.gated, inputs["lambda_"], inputs["target"])
        watch = _Gradients(gates)
        trainer = Trainer(model, _OneEach(batches), hooks=[gates, watch], optimizer=gates.optimizer())
        trainer.fit([inputs["lr"]] * len(batches))
        steps = [
            {
                "ce": row["train_loss"],
                "reg": method.regulariser(before, inputs["lambda_"], inputs["target"]).item(),
                "grad": [part.tolist() for part in gates.layers(gradient)],
                "gates_after": [part.tolist() for part in gates.layers(after)],
                "mean_after": after.abs().mean().item(),
                "density_after": method.density(after),
                "correct": round(row["train_accuracy"] * len(labels)),
            }
            for row, before, gradient, after, (_, labels) in zip(
                trainer.history, watch.before, watch.gradients, gates.epochs, batches
            )
        ]
    zero_at = [
        next((i for i, e in enumerate(gates.epochs) if e[n] == 0), math.inf) for n in range(len(gates.values))
    ]
    norms = [model.get_submodule(name) for name in layout.gated]
    return {
        "steps": steps,
        "running_mean_final": [norm.running_mean.tolist() for norm in norms],
        "running_var_final": [norm.running_var.tolist() for norm in norms],
        "first_step_at_exact_zero": [
            [None if step == math.inf else int(step) for step in part.tolist()]
            for part in gates.layers(torch.tensor(zero_at))
        ],
    }


def _learn(case, document):
    inputs = case["inputs"]
    first = torch.tensor(inputs["conv_weights"][0]).shape
    options = {"cfg": inputs["cfg"], "kernel": first[2]}
    layout = _layout({"input_channels": first[1], **inputs}, "convnet", options)
    convs = [name for name, m in layout.build(device="meta").named_modules() if isinstance(m, nn.Conv2d)]
    weights = {f"{name}.weight": w for name, w in zip(convs, inputs["conv_weights"], strict=True)}
    weights["classifier.weight"] = inputs["fc_weight"]
    weights["classifier.bias"] = inputs.get("fc_bias") or [0.0] * len(inputs["fc_weight"])
    batches = [
        (torch.tensor(x, dtype=torch.float64), torch.tensor(y))
        for x, y in zip(inputs["batches_x"], inputs["batches_y"])
    ]
    return _learned(layout, weights, batches, inputs)


def _learn_tiny_resnet(case, document):
    inputs = case["inputs"]
    channels = len(inputs["parameters"]["conv1.weight"][0])
    layout = _layout({"input_channels": channels, **inputs}, f"resnet{inputs['depth']}")
    layout = _expanded(layout, inputs["expanded_inchannel"])
    batches, drawn = [], 0
    for labels in inputs["batches_y"]:
        samples = range(drawn, drawn + len(labels))
        batches.append((_waves(inputs["x_formula"], samples, layout.image_shape), torch.tensor(labels)))
        drawn += len(labels)
    return _learned(layout, inputs["parameters"], batches, inputs)


def _waves(formula, samples, shape):
    """Images by a case's `x_formula`: round(sin(a sum of products of numbers, n, c, i and j), decimals)."""
    terms, decimals = re.search(r"round\(sin\(([^()]*)\), *(\d+)\)", formula).groups()
    sizes = {"n": samples, "c": range(shape[0]), "i": range(shape[1]), "j": range(shape[2])}
    axes = [torch.tensor(list(values), dtype=torch.float64) for values in sizes.values()]
    known, phase = dict(zip(sizes, torch.meshgrid(*axes, indexing="ij"))), 0.0
    for term in terms.split("+"):
        factors = [known[f] if f in known else float(f) for f in map(str.strip, term.split("*"))]
        phase = phase + math.prod(factors)
    return torch.sin(phase).round(decimals=int(decimals))


def _select(case, document):
    inputs = case["inputs"]
    epoch, found = method.kept_epoch(inputs["val_acc"], inputs["density_nonzero"], inputs["target"])
    return {"epoch": epoch, "found_eligible": found}


# ---------------------------------------------------------------------------------------------- structures


def _mask(case, document):
    inputs = case["inputs"]
    masks = Ranking.of(_tensors(inputs["gates"])).masks(inputs["keep"], floor_of(inputs, 1))
    return {"masks": [mask.int().tolist() for mask in masks], "channels": [int(mask.sum()) for mask in masks]}


def _round_half_even(case, document):
    inputs = case["inputs"]
    return {"keep": [keep_count(n, rho) for n, rho in zip(inputs["N"], inputs["rho"])]}


def _gates(given):
    """Gates as a case writes them down: fractions, a constant, or the numbers of a linear congruential
    generator.
    """
    if "numerators" in given:
        return [
            torch.tensor(layer, dtype=torch.float64) / given["denominator"] for layer in given["numerators"]
        ]
    if "constant" in given:
        return [torch.full((n,), given["constant"], dtype=torch.float64) for n in given["layer_lengths"]]
    state, layers = given["seed"], []
    for length, scale in zip(given["layer_lengths"], given["layer_scale"]):
        drawn = []
        for _ in range(length):
            state = (1103515245 * state + 12345) % 2147483648
            drawn.append(state / 2147483648 * scale)
        layers.append(torch.tensor(drawn, dtype=torch.float64))
    return layers


def _found(inputs, base, wide, gates, mask_form):
    """Both return rules of the search, in the words of the cases."""
    found = {
        rule: search(
            Ranking.of(gates),
            wide.spends("macs"),
            base.cost()["macs"],
            inputs["target_ratio"],
            iterations=inputs["max_iter"],
            tolerance=inputs["eps"],
            min_channels=floor_of(inputs, 1),
            returned=rule,
        )
        for rule in ("last", "best")
    }
    last = found["last"].candidate
    return {
        "full_macs": base.cost()["macs"],
        "converged": found["last"].status == "converged",
        "iterations": len(found["last"].tried),
        "trace": [
            {
                "rho": tried.dropped,
                "keep": tried.keep,
                "macs": tried.cost,
                "actual_ratio": tried.reduction,
                "cfg": _cfg(wide, tried.widths),
            }
            for tried in found["last"].tried
        ],
        "last": {
            "cfg": _cfg(wide, last.widths),
            "macs": last.cost,
            "params": wide.cost(last.widths)["parameters"],
            "actual_ratio": last.reduction,
            "kept_per_layer": list(last.widths),
            "masks": [mask_form(mask.int().tolist()) for mask in found["last"].masks],
        },
        "best_iteration": found["best"].chosen,
        "best_cfg": _cfg(wide, found["best"].candidate.widths),
    }


def _search(case, document):
    inputs = case["inputs"]
    base, wide = (_expanded(_layout(inputs), inputs[f"{which}_inchannel"]) for which in ("base", "expanded"))
    return _found(inputs, base, wide, _gates(inputs["gates"]), lambda mask: "".join(map(str, mask)))


def _search_configuration(case, document):
    inputs = case["inputs"]
    base, wide = (_layout(inputs, "convnet", {"cfg": inputs[cfg]}) for cfg in ("base_cfg", "expanded_cfg"))
    return _found(inputs, base, wide, _tensors(inputs["gates"]), list)


def _uniform(case, document):
    inputs = case["inputs"]
    only({"floor": floor_of(inputs, 1)}, "floor", 1)
    layout = _expanded(_layout(inputs), inputs["inchannel"])
    found = uniform_widths(layout.widths, layout.spends("macs"), inputs["target_ratio"])
    return {
        "cfg": _cfg(layout, found.widths),
        "macs": found.cost,
        "full_macs": layout.cost()["macs"],
        "reachable": found.reachable,
    }


def _structure_correlation(case, document):
    return {"matrix": similarity(case["inputs"]["structures"]).tolist()}


# ---------------------------------------------------------------------------------------------- training


def _budget_epochs(case, document):
    inputs = case["inputs"]
    epochs = [method.budget_epochs(inputs["base_epochs"], p) for p in inputs["target_ratio"]]
    return {"epochs": epochs, "milestones": [method.milestones(count) for count in epochs]}


def _lr_multistep(case, document):
    inputs = case["inputs"]
    drops = [milestone / inputs["epochs"] for milestone in inputs["milestones"]]
    rates = method.learning_rates("multistep", inputs["lr"], inputs["epochs"], 1, drops=drops)
    return {"lr": [rates[epoch] for epoch in inputs["at"]]}


def _lr_cosine(case, document):
    inputs = case["inputs"]
    batch = inputs["batch"] * inputs.get("world_size", 1)
    rates = method.learning_rates("cosine", inputs["lr"], inputs["epochs"], 1, batch_size=batch)
    return {"lr": [rates[epoch] for epoch in inputs["at"]]}


class _Constant(nn.Module):
    """A network whose outputs are its parameters."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x):
        return self.logits


def _label_smoothing(case, document):
    inputs = case["inputs"]
    with _float64():
        labels = torch.tensor(inputs["labels"])
        batches = FixedBatches([(torch.zeros(len(labels)), labels)])
        trainer = Trainer(_Constant(torch.tensor(inputs["logits"])), batches, label_smoothing=inputs["eps"])
        trainer.fit([0.0])
    return {"loss": trainer.history[0]["train_loss"]}


# ---------------------------------------------------------------------------------------------- blocks and channels


def _bpcp_alpha_gradient(case, document):
    inputs = case["inputs"]
    alpha = torch.tensor(inputs["alpha"], dtype=torch.float64, requires_grad=True)
    bpcp.sampled(alpha, torch.full_like(alpha, 0.5)).backward(
        torch.tensor(inputs["grad_gate"], dtype=torch.float64)
    )
    return {
        "prob": bpcp.probability(alpha).tolist(),
        "alpha_grad": alpha.grad.tolist(),
        "test_gate": bpcp.kept(alpha).int().tolist(),
    }


def _bpcp_l1(case, document):
    gates = torch.tensor(case["inputs"]["gate"], dtype=torch.float64, requires_grad=True)
    value = bpcp.penalty(gates, case["inputs"]["gamma"])
    value.backward()
    return {"value": value.item(), "grad_gate": gates.grad.tolist()}


def _bpcp_channel_selection(case, document):
    inputs = case["inputs"]
    joined = {members[0]: members for members in inputs["groups"]}
    alone = set(inputs["importance"]) - {name for members in inputs["groups"] for name in members}
    groups = joined | {name: [name] for name in inputs["importance"] if name in alone}
    scores = {
        name: [torch.tensor(inputs["importance"][member], dtype=torch.float64) for member in members]
        for name, members in groups.items()
    }
    order = bpcp.removal_order(scores, inputs["num_to_prune"])
    return {
        "removal_order": [list(entry) for entry in order],
        "removed_per_layer": {
            member: [channel for name, channel in order if name == group]
            for group, members in groups.items()
            for member in members
        },
    }


KINDS = {
    "bpcp_alpha_gradient": _bpcp_alpha_gradient,
    "bpcp_l1": _bpcp_l1,
    "bpcp_channel_selection": _bpcp_channel_selection,
    "gate_layout": _gate_layout,
    "count": _count,
    "count_mobilenet_v2_coincidence": _count_by_position,
    "block": _block,
    "regulariser": _regulariser,
    "learn": _learn,
    "learn_tiny_resnet": _learn_tiny_resnet,
    "select": _select,
    "mask": _mask,
    "round_half_even": _round_half_even,
    "search": _search,
    "search_configuration": _search_configuration,
    "uniform": _uniform,
    "structure_correlation": _structure_correlation,
    "budget_epochs": _budget_epochs,
    "lr_multistep": _lr_multistep,
    "lr_cosine": _lr_cosine,
    "label_smoothing": _label_smoothing,
}
CHECKS = {"count_mobilenet_v2_coincidence": _check_by_position}
