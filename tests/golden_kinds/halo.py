"""Golden vectors of HALO: from a case's inputs to the project's functions and back."""

import torch
from golden_inputs import only
from torch import nn

from common.core.data import FixedBatches
from common.core.failures import Diverged
from common.core.models import ARCHITECTURES, build
from common.core.pruning.counting import layer_costs
from common.core.pruning.masks import prunable
from common.core.trainer import Hooks, Trainer
from common.settings import ROOT
from common.stage.papers import load
from replications.halo import measures, method

CIFAR, MNIST = "conv", "conv+linear"
# names of the modes in the authors' scripts
MODES = {"slope": "halo", "ws": "sws"}


def _tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def _fill(tensors, flat):
    flat = _tensor(flat).flatten()
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors]).tolist()


def _halo(weights, inputs, lambdas):
    training = method.LambdaTraining([])
    halo = method.HALO(weights, inputs["xi"], inputs["psi"], training, *_target(inputs))
    _fill(halo.lambdas, lambdas)
    return halo


def _sws(weights, inputs):
    training = method.LambdaTraining([], init=inputs["lambda_"])
    return method.SWS(weights, inputs["xi"], inputs["psi"], training)


def _modules(inputs, order=()):
    """The layers that a case's names (`conv1_weight`, `fc2_bias`, ...) speak of, each under its own name.

    In the order of the case, those that `order` names before the others. A name that begins with conv is a
    convolution's, every other a linear layer's.
    """
    names = [name.rpartition("_")[0] for name in (*order, *inputs) if name.endswith(("_weight", "_bias"))]
    return {
        name: (_convolution if name.startswith("conv") else _linear)(
            inputs[f"{name}_weight"], inputs.get(f"{name}_bias")
        )
        for name in dict.fromkeys(names)
    }


def _measured(penalty):
    found = {"total": penalty.value().item(), "grad_weights": _flat(penalty.weight_gradients())}
    if isinstance(penalty, (method.HALO, method.SWS)):
        of_weights, of_lambdas = (term.item() for term in penalty.terms())
        derivatives = _flat(penalty.gradients()[1])
        found |= {"weight_term": of_weights, "lambda_term": of_lambdas, "grad_lambdas": derivatives}
    return found


def halo_penalty(case, document):
    inputs = case["inputs"]
    return _measured(_halo([_tensor(inputs["weights"])], inputs, inputs["lambdas"]))


def halo_penalty_non_finite(case, document):
    inputs = case["inputs"]
    try:
        _halo([_tensor(inputs["weights"])], inputs, inputs["lambdas"]).statistics()
    except Diverged:
        return {"loss_is_finite": False}
    return {"loss_is_finite": True}


def l1_penalty(case, document):
    inputs = case["inputs"]
    weights = [_tensor(inputs["weights"])]
    options = inputs.get("psi", 0.0), inputs.get("lambda_init", 1.0)
    return _measured(method.L1(weights, inputs["xi"], *options))


def sws_penalty(case, document):
    found = _measured(_sws([_tensor(case["inputs"]["weights"])], case["inputs"]))
    return found | {"grad_lambda": found["grad_lambdas"][0]}


def mcp_penalty(case, document):
    inputs = case["inputs"]
    mcp = method.MCP([_tensor(inputs["weights"])], inputs["xi"], inputs["psi"])
    return _measured(mcp) | {"per_weight": _flat(mcp.values()), "knot": inputs["xi"] * inputs["psi"]}


def _linear(weight, bias=None):
    weight = _tensor(weight)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=torch.float64)
    _fill([layer.weight.data], weight.tolist())
    if bias is not None:
        _fill([layer.bias.data], bias)
    return layer


def _convolution(weight, bias=None):
    """A layer that holds the given values; a penalty does not ask for their shape."""
    values = _tensor(weight).flatten()
    layer = nn.Conv2d(1, len(values), 1, bias=bias is not None, dtype=torch.float64)
    _fill([layer.weight.data], values.tolist())
    if bias is not None:
        _fill([layer.bias.data], bias)
    return layer


def halo_penalty_network(case, document):
    inputs = case["inputs"]
    # a batch norm, which no case lists, carries no lambda either
    model = nn.ModuleDict(_modules(inputs, inputs.get("order", ())) | {"bn": nn.BatchNorm2d(1)})
    halo = _halo(method.penalised(model, CIFAR), inputs, inputs["lambdas_flat"])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for parameter, gradient in zip(halo.tensors, halo.weight_gradients(), strict=True):
        parameter.grad += gradient
    found = _measured(halo) | {"number_of_lambdas": sum(part.numel() for part in halo.lambdas)}
    for name, parameter in model.named_parameters():
        name = name.replace(".", "_")
        if inputs.get(name) is not None:
            found[f"grad_{name}"] = parameter.grad.view(_tensor(inputs[name]).shape).tolist()
    return found


def _mnist_weights(inputs):
    return method.penalised(nn.ModuleDict(_modules(inputs)), MNIST)


def halo_penalty_mnist(case, document):
    inputs = case["inputs"]
    halo = _halo(_mnist_weights(inputs), inputs, inputs["lambdas_flat"])
    names = [name.replace(".", "_") for name, _ in nn.ModuleDict(_modules(inputs)).named_parameters()]
    by_tensor = {
        f"grad_{name}": _flat([gradient])
        for name, gradient in zip(names, halo.weight_gradients(), strict=True)
    }
    return _measured(halo) | by_tensor


def l1_penalty_mnist(case, document):
    inputs = case["inputs"]
    options = {"lambda_init": inputs.get("lambda_init", 1.0)}
    found = _measured(method.L1(_mnist_weights(inputs), inputs["xi"], **options))
    return found | {"grad_flat": found["grad_weights"]}


def sws_penalty_mnist(case, document):
    found = _measured(_sws(_mnist_weights(case["inputs"]), case["inputs"]))
    return found | {"grad_flat": found["grad_weights"], "grad_lambda": found["grad_lambdas"][0]}


def lambda_star(case, document):
    inputs = case["inputs"]
    sizes, decay = _tensor(inputs["abs_weights"]), inputs["weight_decay_on_lambda"]
    found, penalty = method.stationary_lambda(sizes, inputs["xi"], inputs["psi"], decay)
    return {"lambda_star": found.tolist(), "profiled_penalty": penalty.tolist()}


# ---------------------------------------------------------------------------------------------- training


class Recorder(Hooks):
    """The weights and lambdas after every step; a given gradient in place of that of the data."""

    def __init__(self, tensor, penalty, gradients):
        self.tensor, self.penalty, self.gradients = tensor, penalty, gradients
        self.rows = []

    def loss(self, trainer):
        return (self.tensor * self.gradients[trainer.iteration]).sum()

    def stepped(self, trainer):
        lambdas = getattr(self.penalty, "lambdas", [])
        self.rows.append((self.tensor.detach().flatten().tolist(), _flat(lambdas) if lambdas else None))


class Unmoved(nn.Module):
    """Holds the weights of a trajectory; its output does not depend on them."""

    def __init__(self, weights):
        super().__init__()
        self.weight = nn.Parameter(_tensor(weights))

    def forward(self, images):
        return torch.zeros(len(images), 2, dtype=torch.float64)


def _trajectory(inputs, penalty_of, rates, gradients):
    model = Unmoved(inputs["weights0"])
    penalty = penalty_of([model.weight])
    recorder = Recorder(model.weight, penalty, gradients)
    batches = FixedBatches([(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))] * len(rates))
    only(inputs, "nesterov", False)
    options = {"momentum": inputs["momentum"], "weight_decay": inputs["weight_decay"]}
    Trainer(model, batches, hooks=[penalty, recorder], **options).fit(rates)
    return recorder.rows


def _target(inputs):
    only(inputs, "lambda_norm_mode", "L1", "L2")
    return inputs.get("lambda_sum_target", 0.0), inputs.get("lambda_norm_mode", "L1")


def _training(inputs, rates, **more):
    return method.LambdaTraining(rates, inputs["momentum"], inputs["weight_decay"], **more)


def _after_steps(rows):
    return {
        "weights_after_step": [weights for weights, _ in rows],
        "lambdas_after_step": [row[1] for row in rows],
    }


def _trajectory_halo(inputs, rates, lambda_rates, gradients):
    def halo(weights):
        training = _training(inputs, lambda_rates)
        made = method.HALO(weights, inputs["xi"], inputs["psi"], training, *_target(inputs))
        _fill(made.lambdas, inputs["lambdas0"])
        return made

    return _trajectory(inputs, halo, rates, gradients)


def trajectory_halo(case, document):
    inputs = case["inputs"]
    rates = inputs["lr_weights_per_step"], inputs["lr_lambda_per_step"]
    return _after_steps(_trajectory_halo(inputs, *rates, _tensor(inputs["data_gradients"])))


def trajectory_halo_no_data_gradient(case, document):
    inputs = case["inputs"]
    steps = inputs["n_steps"]
    rates = [inputs["lr_weights"]] * steps, [inputs["lr_lambda"]] * steps
    none = torch.zeros(steps, *_tensor(inputs["weights0"]).shape, dtype=torch.float64)
    rows = _trajectory_halo(inputs, *rates, none)
    recorded = [rows[step] for step in inputs["recorded_steps_zero_based"]]
    return {"weights": [weights for weights, _ in recorded], "lambdas": [lambdas for _, lambdas in recorded]}


def trajectory_sws(case, document):
    inputs = case["inputs"]
    training = _training(inputs, inputs["lr_lambda_per_step"], init=inputs["lambda0"])
    gradients = _tensor(inputs["data_gradients"])
    rows = _trajectory(
        inputs,
        lambda weights: method.SWS(weights, inputs["xi"], inputs["psi"], training),
        inputs["lr_weights_per_step"],
        gradients,
    )
    return _after_steps(rows) | {"lambda_after_step": [lambdas[0] for _, lambdas in rows]}


def trajectory_l1(case, document):
    inputs = case["inputs"]
    rows = _trajectory(
        inputs,
        lambda weights: method.L1(
            weights, inputs["xi"], inputs.get("psi", 0.0), inputs.get("lambda_init", 1.0)
        ),
        inputs["lr_weights_per_step"],
        _tensor(inputs["data_gradients"]),
    )
    return _after_steps(rows)


def trajectory_mcp(case, document):
    inputs = case["inputs"]
    rows = _trajectory(
        inputs,
        lambda weights: method.MCP(weights, inputs["xi"], inputs["psi"]),
        inputs["lr_weights_per_step"],
        _tensor(inputs["data_gradients"]),
    )
    return _after_steps(rows)


class TinyNetwork(nn.Module):
    """The network that the cases of `tiny_network` describe."""

    def __init__(self, init):
        super().__init__()
        shapes = {name: torch.tensor(values).shape for name, values in init.items()}

        def convolution(name, stride):
            outputs, inputs, *kernel = shapes[f"{name}_weight"]
            padding = tuple(side // 2 for side in kernel)
            bias = f"{name}_bias" in init
            return nn.Conv2d(inputs, outputs, tuple(kernel), stride, padding, bias=bias)

        self.conv1, self.bn = convolution("conv1", 1), nn.BatchNorm2d(*shapes["bn_weight"])
        self.conv2 = convolution("conv2", 2)
        self.fc = nn.Linear(*reversed(shapes["fc_weight"]), bias="fc_bias" in init)
        self.double()
        values = {_dotted(name): _tensor(value) for name, value in init.items()}
        unknown = self.load_state_dict(values, strict=False).unexpected_keys
        assert not unknown, f"init has {unknown}"

    def forward(self, images):
        hidden = self.conv2(self.bn(self.conv1(images)).relu()).relu()
        return self.fc(hidden.mean((2, 3)))


def _dotted(name):
    return name.replace("_", ".", 1)


class OneBatchAnEpoch:
    """Batch t in epoch t, so that the trainer's history holds the loss of every step."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return 1

    def epoch(self, number):
        return [self.batches[number]]


class StepRecorder(Hooks):
    """The penalty that each step meets, and the state that it leaves."""

    def __init__(self, penalty):
        self.penalty, self.values, self.states = penalty, [], []

    def gradients_ready(self, trainer):
        self.values.append(self.penalty.value().item() if self.penalty else 0.0)

    def stepped(self, trainer):
        state = {n.replace(".", "_"): p.tolist() for n, p in trainer.model.named_parameters()}
        if hasattr(self.penalty, "lambdas"):
            state["lambdas"] = _flat(self.penalty.lambdas)
        self.states.append(state)


def tiny_network(case, document):
    inputs = case["inputs"]
    while (name := inputs.get("same_inputs_as")) is not None:
        origin = next(c for c in document["cases"] if c["name"] == name)
        inputs = origin["inputs"] | {key: value for key, value in inputs.items() if key != "same_inputs_as"}
    steps = [(_tensor(x), torch.tensor(y)) for x, y in zip(inputs["x"], inputs["y"])]
    mode, model = MODES.get(inputs["mode"], inputs["mode"]), TinyNetwork(inputs["init"])
    drops = method.milestone_drops(len(steps), inputs["schedule"])
    trains_lambdas, init = mode in ("halo", "sws"), inputs.get("lambda_init", 1.0)
    rates, lambda_rates = method.learning_rates(
        drops, inputs["lr0"], inputs["gamma"], trains_lambdas, _coupling(case)
    )
    training = _training(inputs, lambda_rates, init=init) if trains_lambdas else None
    common = method.penalised(model, CIFAR), inputs["xi"], inputs["psi"]
    penalty = {
        "halo": lambda: method.HALO(*common, training, *_target(inputs)),
        "sws": lambda: method.SWS(*common, training),
        "l1": lambda: method.L1(*common, init),
        "mcp": lambda: method.MCP(*common),
        "no_penalty": lambda: None,
        "none": lambda: None,
    }[mode]()
    recorder = StepRecorder(penalty)
    hooks = [recorder, penalty] if penalty else [recorder]
    options = {"momentum": inputs["momentum"], "weight_decay": inputs["weight_decay"]}
    trainer = Trainer(model, OneBatchAnEpoch(steps), hooks=hooks, **options)
    trainer.fit(rates)
    return {
        "total_loss_per_step": [row["train_loss"] + v for row, v in zip(trainer.history, recorder.values)],
        "lr_weights": rates,
        "lr_lambda": lambda_rates,
        "state_after_step": [recorder.states[step] for step in inputs["recorded_steps_zero_based"]],
    }


# ---------------------------------------------------------------------------------------------- schedules


def _coupling(case):
    """Which of the two readings of the schedule a case is about: its inputs' word, else its own words."""
    words = case["name"], case.get("checks", "")
    return case["inputs"].get("coupling", "intended" if any("intended" in w for w in words) else "official")


def _rates(case, drops, at, by_step=False):
    inputs, coupling = case["inputs"], _coupling(case)
    trains_lambdas = MODES.get(inputs["mode"], inputs["mode"]) in ("halo", "sws")
    rates, lambda_rates = method.learning_rates(
        drops, inputs["lr0"], inputs["gamma"], trains_lambdas, coupling, by_step
    )
    return {"lr_weights": [rates[i] for i in at], "lr_lambda": [lambda_rates and lambda_rates[i] for i in at]}


def lr_schedule(case, document):
    inputs = case["inputs"]
    return _rates(case, method.milestone_drops(inputs["epochs"], inputs["schedule"]), inputs["at_epochs"])


def lr_schedule_mnist(case, document):
    updates = case["inputs"]["updates"]
    return _rates(case, method.step_drops(updates, case["inputs"]["stepsize"]), range(updates), by_step=True)


def psi_schedule(case, document):
    inputs = case["inputs"]
    every = inputs["reg_scheduler"] if inputs["reg_scheduler"] > 0 else None
    return {
        "psi_used_per_epoch": method.psi_schedule(inputs["psi0"], inputs["gamma"], every, inputs["epochs"])
    }


# ---------------------------------------------------------------------------------------- masks and counts


def _layers(inputs):
    layers = list(inputs["conv_layers"])
    if "linear" in inputs.get("prunable", ""):
        layers.append(inputs["linear_last_layer"])
    return {str(number): _tensor(layer, torch.float32) for number, layer in enumerate(layers)}


def mask(case, document):
    weights = _layers(case["inputs"])
    found = method.cut(weights, case["inputs"]["percent"])
    return {
        "masks": [part.int().tolist() for part in found.kept.values()],
        "threshold": found.threshold,
        "sorted_index": found.index,
        "kept_per_layer": [int(part.sum()) for part in found.kept.values()],
        "pruned": found.pruned,
        "pruned_ratio": found.pruned / sum(w.numel() for w in weights.values()),
        "layer_fully_pruned": bool(found.emptied),
    }


def mask_error(case, document):
    try:
        mask(case, document)
    except ValueError:
        return {"raises": True}
    return {"raises": False}


def mask_rounds(case, document):
    weights, pruned, each = _layers(case["inputs"]), [], {}
    for number, percent in enumerate(case["inputs"]["percents"], 1):
        found = method.cut(weights, percent)
        pruned.append(found.pruned)
        weights = {name: weight * found.kept[name] for name, weight in weights.items()}
        each[f"masks_after_round_{number}"] = [part.int().tolist() for part in found.kept.values()]
        each[f"threshold_round_{number}"] = found.threshold
    return {"pruned_after_round": pruned} | each


def count_near_zero(case, document):
    parameters = [_tensor(case["inputs"]["params"], torch.float32)]
    return {"counts": measures.near_zero(parameters, case["inputs"]["taus"])}


def fixed_threshold_prune(case, document):
    weights = {"weight": _tensor(case["inputs"]["weights"], torch.float32)}
    return {"mask": method.fixed_threshold(weights, case["inputs"]["tau"])["weight"].int().tolist()}


def _known_as(name):
    """The project's name: without what it takes for granted (batch norm, CIFAR's form, the last width)."""
    for wanted in (name, name.removesuffix("_bn"), name.removesuffix("_cifar"), name.removesuffix("_100")):
        if wanted in ARCHITECTURES:
            return wanted
    return name


def _paper_s_own(name, classes, shape):
    """The network as profile `paper` has it, or as it is where that does not have it; shapes only."""
    cells = load("halo", ROOT / "params.yaml", "paper").paper.cells
    options = next((cell.options for cell in cells if cell.architecture == name), {})
    return build(name, classes=classes, image_shape=shape, device="meta", **options)


def architecture(case, document):
    inputs = case["inputs"]
    # the first number of the shape is that of the images
    name, shape = inputs["architecture"], inputs["input_shape"][-3:]
    model = _paper_s_own(_known_as(name), inputs["classes"], shape)
    layers = MNIST if name.startswith("lenet") else CIFAR
    costs = layer_costs(model, shape)
    sizes = [weight.numel() for weight in prunable(model, layers).values()]
    total, everything = sum(sizes), sum(p.numel() for p in model.parameters())
    at_percent = {}
    for percent in inputs["percents"]:
        # one more than the index, because the weight at the threshold goes as well
        pruned, official = (method.cut_index(total, total, percent, single) + 1 for single in (False, True))
        at_percent[str(percent)] = {
            "pruned": pruned,
            "pruned_official_float32": official,
            "kept_prunable": total - pruned,
            "prunable_sparsity": pruned / total,
            "total_params_kept": everything - pruned,
            "total_sparsity": pruned / everything,
        }
    return {
        "layers_prunable": len(sizes),
        "prunable_weights": total,
        "lambdas": sum(p.numel() for p in method.penalised(model, layers)),
        "total_params": everything,
        "conv_macs": sum(layer.macs for layer in costs if layer.kind == "conv"),
        "linear_macs": sum(layer.macs for layer in costs if layer.kind == "linear"),
        "per_layer_prunable": sizes,
        "at_percent": at_percent,
    }


def energy(case, document):
    features = measures.features(_tensor(case["inputs"]["conv_output_nchw"]), "corner")
    shares = measures.energy(features)
    asked = [name for name in case["expected"] if name.startswith("rank_")]
    ranks = {name: measures.directions(shares, int(name.removeprefix("rank_")) / 100) for name in asked}
    return {
        "features": features.tolist(),
        "energy": shares.tolist(),
        "cumulative": shares.cumsum(0).tolist(),
    } | ranks


KINDS = {
    "halo_penalty": halo_penalty,
    "halo_penalty_network": halo_penalty_network,
    "halo_penalty_mnist": halo_penalty_mnist,
    "halo_penalty_non_finite": halo_penalty_non_finite,
    "l1_penalty": l1_penalty,
    "l1_penalty_mnist": l1_penalty_mnist,
    "sws_penalty": sws_penalty,
    "sws_penalty_mnist": sws_penalty_mnist,
    "mcp_penalty": mcp_penalty,
    "lambda_star": lambda_star,
    "trajectory_halo": trajectory_halo,
    "trajectory_halo_no_data_gradient": trajectory_halo_no_data_gradient,
    "trajectory_sws": trajectory_sws,
    "trajectory_l1": trajectory_l1,
    "trajectory_mcp": trajectory_mcp,
    "tiny_network": tiny_network,
    "lr_schedule": lr_schedule,
    "lr_schedule_mnist": lr_schedule_mnist,
    "psi_schedule": psi_schedule,
    "mask": mask,
    "mask_error": mask_error,
    "mask_rounds": mask_rounds,
    "count_near_zero": count_near_zero,
    "fixed_threshold_prune": fixed_threshold_prune,
    "architecture": architecture,
    "energy": energy,
}
