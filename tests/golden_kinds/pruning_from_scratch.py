"""Golden vectors of pruning from scratch: from a case's inputs to the project's functions and back."""

import contextlib
import math

import torch
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

FIRST_WIDTH = {"vgg": 64, "resnet50": 64, "resnet": 16, "mobilenet": 32}
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


def _layout(name, classes, side=None, options=None):
    side = side or (224 if name == "resnet50" or name.startswith("mobilenet") else 32)
    return Layout.of(name, classes, (3, side, side), options)


def _expanded(layout, first):
    family = next(name for name in FIRST_WIDTH if layout.architecture.startswith(name))
    return layout.expanded(first / FIRST_WIDTH[family])


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
    layout = _expanded(_layout(inputs["arch"], 10), inputs["expanded_inchannel"])
    gates = method.Gates(layout.build(), layout.gated, 0.5, 0.5)
    sizes = [len(layer) for layer in gates.layers()]
    return {
        "gates_per_layer": sizes,
        "total": len(gates.values),
        "initial_value": gates.values.unique().item(),
    }


def _count(case, document):
    inputs = case["inputs"]
    multiplier = inputs["output_multiplier"]
    options = {} if multiplier == 1 else {"multiplier": multiplier}
    layout = _layout(inputs["arch"], inputs["num_classes"], inputs["input_hw"], options)
    cost = _expanded(layout, inputs["expanded_inchannel"]).cost(_numbers(inputs["cfg"]))
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
        block.load_state_dict(weights, strict=False)
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


def _renamed(name, names):
    layer, _, rest = name.rpartition(".")
    return f"{names.get(layer, layer)}.{rest}" if rest and layer else names.get(name, name)


def _module(inputs):
    shapes = {name: torch.tensor(value).shape for name, value in inputs["parameters"].items()}
    channels = len(inputs["x"][0])
    convs = [shape[0] for name, shape in shapes.items() if name.startswith("conv")]
    kind, stride = inputs["block"], inputs["stride"]
    if kind == "vgg_conv_bn_relu":
        side = len(inputs["x"][0][0])
        return Layout.of("convnet", 2, (channels, side, side), {"cfg": convs}).build().features
    if kind == "mobilenet_v1_separable":
        return Separable(channels, convs[-1], stride)
    if kind == "mobilenet_v2_body":
        return InvertedResidual(channels, convs[0], convs[-1], stride, expand=True).conv
    block = {"resnet_basic": BasicBlock, "resnet_bottleneck": Bottleneck}[kind]
    return block(channels, convs[:-1], convs[-1], convs[-1], stride, "B")


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
        model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()}, strict=False)
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
    options = {"cfg": inputs["cfg"], "norm_scale": inputs["bn"]["weight"]}
    layout = _layout("convnet", inputs["num_classes"], inputs["input_hw"], options)
    convs = [name for name, m in layout.build(device="meta").named_modules() if isinstance(m, nn.Conv2d)]
    weights = {f"{name}.weight": w for name, w in zip(convs, inputs["conv_weights"])}
    weights |= {"classifier.weight": inputs["fc_weight"], "classifier.bias": inputs["fc_bias"]}
    batches = [
        (torch.tensor(x, dtype=torch.float64), torch.tensor(y))
        for x, y in zip(inputs["batches_x"], inputs["batches_y"])
    ]
    return _learned(layout, weights, batches, inputs)


def _learn_tiny_resnet(case, document):
    inputs = case["inputs"]
    layout = _expanded(
        _layout(f"resnet{inputs['depth']}", inputs["num_classes"]), inputs["expanded_inchannel"]
    )
    size = len(inputs["batches_y"][0])
    batches = [
        (_waves(range(size * t, size * (t + 1))), torch.tensor(y)) for t, y in enumerate(inputs["batches_y"])
    ]
    return _learned(layout, inputs["parameters"], batches, inputs)


def _waves(samples):
    """The images of the case's `x_formula`."""
    n = torch.tensor(list(samples), dtype=torch.float64).view(-1, 1, 1, 1)
    c = torch.arange(3, dtype=torch.float64).view(1, -1, 1, 1)
    i = torch.arange(32, dtype=torch.float64).view(1, 1, -1, 1)
    j = torch.arange(32, dtype=torch.float64).view(1, 1, 1, -1)
    return torch.sin(0.7 * n + 1.3 * c + 0.31 * i + 0.17 * j + 0.05 * i * j).round(decimals=6)


def _select(case, document):
    inputs = case["inputs"]
    epoch, found = method.kept_epoch(inputs["val_acc"], inputs["density_nonzero"], inputs["target"])
    return {"epoch": epoch, "found_eligible": found}


# ---------------------------------------------------------------------------------------------- structures


def _mask(case, document):
    inputs = case["inputs"]
    masks = Ranking.of(_tensors(inputs["gates"])).masks(inputs["keep"], inputs["min_channels"])
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
            min_channels=inputs["min_channels"],
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
    base = _expanded(_layout(inputs["arch"], inputs["num_classes"]), inputs["base_inchannel"])
    wide = _expanded(_layout(inputs["arch"], inputs["num_classes"]), inputs["expanded_inchannel"])
    return _found(inputs, base, wide, _gates(inputs["gates"]), lambda mask: "".join(map(str, mask)))


def _search_configuration(case, document):
    inputs = case["inputs"]
    base, wide = (
        _layout("convnet", inputs["num_classes"], inputs["input_hw"], {"cfg": inputs[cfg]})
        for cfg in ("base_cfg", "expanded_cfg")
    )
    return _found(inputs, base, wide, _tensors(inputs["gates"]), list)


def _uniform(case, document):
    inputs = case["inputs"]
    layout = _expanded(_layout(inputs["arch"], inputs["num_classes"]), inputs["inchannel"])
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
    batch = inputs["batch"] * inputs["world_size"]
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
