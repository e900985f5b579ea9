"""The adapters of the golden vectors follow a case's inputs: variants of the known cases, computed here by hand."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import test_golden
import torch
from test_golden import HERE, _module
from torch.nn import functional as F

DOUBLE = torch.float64


def _document(slug):
    return json.loads((HERE / "golden" / f"{slug}.json").read_text(encoding="utf-8"))


def _known(slug, name):
    """A copy of a known case, its document, and the adapter of its kind."""
    document = _document(slug)
    case = copy.deepcopy(next(case for case in document["cases"] if case["name"] == name))
    return case, document, _module(slug).KINDS[case["kind"]]


def _numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def _close(got, wanted, tolerance=1e-9):
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=DOUBLE), torch.as_tensor(wanted, dtype=DOUBLE), rtol=tolerance, atol=1e-10
    )


# ------------------------------------------------------------------------------------------ feature relevance


def _chain(classes, norm=True):
    """A plain network whose layers differ in kernel, stride, padding and norm from one to the next."""
    layers, channels = [], 2
    for number, (width, kernel, stride, padding) in enumerate([(3, 5, 1, 2), (4, 3, 2, 1), (5, 1, 1, 0)]):
        weight = _numbers(width, channels, kernel, kernel, seed=number)
        layers.append(
            {"type": "conv2d", "weight": weight.tolist(), "stride": stride, "padding": padding}
            | ({} if norm else {"bias": _numbers(width, seed=20 + number).tolist()})
        )
        if norm:
            values = {"weight": _numbers(width, seed=30 + number), "bias": _numbers(width, seed=40 + number)}
            values |= {"running_mean": _numbers(width, seed=50), "running_var": _numbers(width, seed=60) ** 2}
            layers.append({"type": "batchnorm2d", "eps": 1e-3} | {k: v.tolist() for k, v in values.items()})
        layers.append({"type": "relu"})
        channels = width
    layers.append({"type": "avgpool2d", "kernel": 4})
    layers.append({"type": "flatten"})
    layers.append({"type": "linear", "weight": _numbers(classes, 5, seed=70).tolist()})
    return layers


def _reference(layers, x, labels, classes, alpha, eps):
    """Logits and the mean relevance of each convolution's output, deepest first, of a plain network."""
    seen = []
    for layer in layers:
        seen.append(x)
        values = {k: torch.tensor(v, dtype=DOUBLE) for k, v in layer.items() if isinstance(v, list)}
        if layer["type"] == "conv2d":
            x = F.conv2d(x, values["weight"], values.get("bias"), layer["stride"], layer["padding"])
        elif layer["type"] == "batchnorm2d":
            scale = values["weight"] / (values["running_var"] + layer["eps"]).sqrt()
            x = (x - values["running_mean"].view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)
            x = x + values["bias"].view(1, -1, 1, 1)
        elif layer["type"] == "relu":
            x = x.clamp(min=0)
        elif layer["type"] == "avgpool2d":
            x = x.mean((2, 3), keepdim=True)
        elif layer["type"] == "flatten":
            x = x.flatten(1)
        else:
            x = x @ values["weight"].T
    logits, relevance, found = x, torch.eye(classes, dtype=DOUBLE)[labels], []
    for number, (layer, x) in reversed(list(enumerate(zip(layers, seen)))):
        if layer["type"] == "flatten":
            relevance = relevance.view(x.shape)
        elif layer["type"] == "avgpool2d":
            relevance = x * relevance / (x.mean((2, 3), keepdim=True) + eps)
        elif layer["type"] in ("conv2d", "linear"):
            weight = torch.tensor(layer["weight"], dtype=DOUBLE)
            conv = layer["type"] == "conv2d"
            if conv:
                found.append((number, relevance.mean((2, 3))))
            total = 0
            for share, sign in ((alpha, 1), (1 - alpha, -1)):
                part = sign * (sign * weight).clamp(min=eps if conv else 0)
                if not conv:
                    total = total + share * (relevance / (x @ part.T + eps)) @ part
                    continue
                stride, padding = layer["stride"], layer["padding"]
                share = share * relevance / (F.conv2d(x, part, None, stride, padding) + eps)
                lost = (x.shape[2] + 2 * padding - part.shape[2]) % stride
                total = total + F.conv_transpose2d(share, part, None, stride, padding, lost)
            relevance = x * total
    return logits, found


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("classes", "alpha", "eps"), [(3, 2, 1e-9), (5, 1.5, 1e-6)])
def test_relevance_follows_layers_classes_alpha_and_eps(norm, classes, alpha, eps):
    layers, x = _chain(classes, norm), _numbers(4, 2, 8, 8, seed=99)
    labels = [0, classes - 1, 1, 1]
    inputs = {"layers": layers, "x": x.tolist(), "labels": labels, "classes": classes}
    adapter = _module("feature_relevance").KINDS["relevance_network"]
    got = adapter({"inputs": inputs | {"alpha": alpha, "eps": eps}}, {})
    logits, found = _reference(layers, x, labels, classes, alpha, eps)
    _close(got["logits"], logits)
    assert [(site["layer"], site["part"]) for site in got["scored"]] == [(n, "conv") for n, _ in found]
    for site, (_, wanted) in zip(got["scored"], found, strict=True):
        _close(site["mean_over_positions"], wanted, 1e-6)


@pytest.mark.parametrize("first", [0, 1, 3, None])
@pytest.mark.parametrize("floor", [{}, {"min_channels": 2}])
def test_the_pipeline_follows_the_first_prunable_convolution_and_the_floor(first, floor):
    case, document, adapter = _known("feature_relevance", "pipeline_vgg")
    widths = [len(layer["weight"]) for layer in case["inputs"]["layers"] if layer["type"] == "conv2d"]
    prunable = widths[first or 0 :][::-1]
    case["inputs"] |= {"first_prunable_conv": first, "channels_per_event": 4, **floor}
    got = adapter(case, document)
    gone = [set() for _ in prunable]
    for event in got["events"]:
        assert [len(scores) for scores in event["scores_deepest_first"]] == prunable
        order = sorted(
            (score, channel, layer)
            for layer, scores in enumerate(event["scores_deepest_first"])
            for channel, score in enumerate(scores)
        )
        wanted = []
        for _, channel, layer in order:
            room = prunable[layer] - len(gone[layer]) > floor.get("min_channels", 0)
            if len(wanted) < 4 and channel not in gone[layer] and room:
                wanted.append([layer, channel])
                gone[layer].add(channel)
        assert event["selected_in_order"] == wanted


@pytest.mark.parametrize("kind", ["conv", "conv_first_of_block", "linear"])
def test_a_mask_may_leave_nothing_and_kernels_need_not_be_square(kind):
    shape = [3, 2] if kind == "linear" else [3, 2, 1, 5]
    inputs = {"kind": kind, "shape": shape, "pruned_inputs": [0, 1], "pruned_outputs": [0, 1]}
    got = _module("feature_relevance").KINDS["weight_mask"]({"inputs": inputs}, {})
    last = [1, 1] if kind == "conv_first_of_block" else [0, 0]
    assert got["mask_out_by_in"] == [[0, 0], [0, 0], last]
    assert got["bias_mask"] == ([0, 0, 1] if kind == "linear" else None)
    assert got["zeros"] == (2 if sum(last) else 3) * 2 * math.prod(shape[2:])


def test_selection_keeps_the_floor_of_a_case():
    adapter = _module("feature_relevance").KINDS["select_channels"]
    inputs = {"scores_deepest_first": [[0.1, 0.2, 0.3], [0.4, 0.5]], "already_pruned": [[0], []], "x": 9}
    assert adapter({"inputs": inputs}, {})["pruned_after"] == [[0, 1, 2], [0, 1]]
    got = adapter({"inputs": inputs | {"min_channels": 1}}, {})
    assert got["pruned_after"] == [[0, 1], [0]]


def test_cost_follows_hidden_units_and_protected_convolutions():
    case, document, adapter = _known("feature_relevance", "cost_vgg16_dense")
    case["inputs"] |= {"hidden": [100], "classes": 7, "first_prunable_conv": 0}
    case["inputs"]["pruned_per_layer_deepest_first"] = [0] * 12 + [1]
    got = adapter(case, document)
    convolutions = 14977728 - 512 * 512 - 512 * 10
    assert got["dense_weights"] == convolutions + 512 * 100 + 100 * 7
    assert got["kept_weights"] == got["dense_weights"] - 27 - 64 * 9


# ------------------------------------------------------------------------------------------ HALO


def test_penalised_layers_are_those_that_a_case_names():
    names = {"conv1": (4, True), "conv2": (3, False), "conv7": (5, True)}
    inputs = {"xi": 0.03, "psi": 0.002, "linear_weight": [[1.0, -2.0]], "linear_bias": [0.5]}
    order = []
    for seed, (name, (size, bias)) in enumerate(names.items()):
        inputs[f"{name}_weight"] = _numbers(size, seed=seed).tolist()
        order.append(f"{name}_weight")
        if bias:
            inputs[f"{name}_bias"] = _numbers(size, seed=10 + seed).tolist()
            order.append(f"{name}_bias")
    weights = np.concatenate([inputs[name] for name in order])
    lambdas = 0.5 + np.arange(len(weights)) / 10
    inputs |= {"order": order, "lambdas_flat": lambdas.tolist()}
    got = _module("halo").KINDS["halo_penalty_network"]({"inputs": inputs}, {})
    assert got["number_of_lambdas"] == len(weights)
    assert got["total"] == pytest.approx((0.03 * np.abs(weights) / lambdas**2 + 0.002 * lambdas).sum())
    _close(np.concatenate([got[f"grad_{name}"] for name in order]), 0.03 * np.sign(weights) / lambdas**2)
    assert got["grad_linear_weight"] == [[0.0, 0.0]] and got["grad_linear_bias"] == [0.0]


@pytest.mark.parametrize("layers", [1, 3])
def test_every_linear_layer_of_a_case_is_penalised(layers):
    shapes = [(4, 3), (2, 4), (5, 2)][:layers]
    inputs = {"xi": 0.03, "psi": 0.002}
    for number, shape in enumerate(shapes, 1):
        inputs[f"fc{number}_weight"] = _numbers(*shape, seed=number).tolist()
        inputs[f"fc{number}_bias"] = _numbers(shape[0], seed=10 + number).tolist()
    values = [np.ravel(v) for k, v in inputs.items() if k.startswith("fc")]
    lambdas = 0.5 + np.arange(sum(map(len, values))) / 10
    got = _module("halo").KINDS["halo_penalty_mnist"](
        {"inputs": {**inputs, "lambdas_flat": lambdas.tolist()}}, {}
    )
    flat = np.concatenate(values)
    assert got["total"] == pytest.approx((0.03 * np.abs(flat) / lambdas**2 + 0.002 * lambdas).sum())
    assert got[f"grad_fc{layers}_bias"] == pytest.approx(
        (0.03 * np.sign(flat) / lambdas**2)[-shapes[-1][0] :]
    )


@pytest.mark.parametrize("mode", ["l1", "none"])
def test_the_tiny_network_has_the_shapes_of_its_values(mode):
    """Two input channels, seven classes, other widths and kernels, a bias more and one less."""
    shapes = {"conv1_weight": (3, 2, 5, 5), "bn_weight": (3,), "bn_bias": (3,), "conv2_weight": (4, 3, 1, 1)}
    shapes |= {"conv2_bias": (4,), "fc_weight": (7, 4), "fc_bias": (7,)}
    values = {name: _numbers(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    x, y = _numbers(3, 5, 2, 6, 6, seed=50), torch.arange(15).view(3, 5) % 7
    inputs = {"init": {n: v.tolist() for n, v in values.items()}, "x": x.tolist(), "y": y.tolist()}
    inputs |= {
        "lr0": 0.05,
        "momentum": 0.8,
        "weight_decay": 1e-3,
        "gamma": 0.5,
        "schedule": [1],
        "mode": mode,
    }
    inputs |= {"xi": 0.02, "psi": 0.0, "lambda_init": 0.5, "recorded_steps_zero_based": [2]}
    got = _module("halo").KINDS["tiny_network"]({"name": "tiny", "inputs": inputs}, {"cases": []})
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    optimizer = torch.optim.SGD(leaves.values(), lr=0.05, momentum=0.8, weight_decay=1e-3)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.05 if step < 1 else 0.025
        v = leaves
        hidden = F.conv2d(x[step], v["conv1_weight"], padding=2)
        hidden = F.batch_norm(hidden, None, None, v["bn_weight"], v["bn_bias"], training=True).relu()
        hidden = F.conv2d(hidden, v["conv2_weight"], v["conv2_bias"], stride=2).relu().mean((2, 3))
        loss = F.cross_entropy(hidden @ v["fc_weight"].T + v["fc_bias"], y[step])
        if mode == "l1":
            loss = loss + 0.02 / 0.25 * sum(v[n].abs().sum() for n in v if n.startswith("conv"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert got["total_loss_per_step"][step] == pytest.approx(loss.item())
    for name, value in leaves.items():
        _close(got["state_after_step"][0][name], value.detach())


def test_every_round_of_masks_is_told():
    case, document, adapter = _known("halo", "mask_two_rounds")
    case["inputs"]["percents"] = [0.2, 0.3, 0.4]
    got, left = adapter(case, document), np.concatenate(case["inputs"]["conv_layers"]).astype(np.float32)
    for number, percent in enumerate(case["inputs"]["percents"], 1):
        place = int((left == 0).sum()) + int((left != 0).sum() * percent)
        threshold = np.sort(np.abs(left))[place]
        left[np.abs(left) <= threshold] = 0
        assert got[f"threshold_round_{number}"] == pytest.approx(threshold)
        assert sum(got[f"masks_after_round_{number}"], []) == (left != 0).astype(int).tolist()


@pytest.mark.parametrize(
    ("where", "found"),
    [("name", "intended"), ("checks", "intended"), ("inputs", "intended"), (None, "official")],
)
def test_the_reading_of_a_schedule(where, found):
    inputs = {"mode": "halo", "epochs": 4, "lr0": 1.0, "gamma": 0.1, "schedule": [2], "at_epochs": [3]}
    case = {"name": "schedule", "checks": "rates", "inputs": inputs}
    if where == "inputs":
        inputs["coupling"] = "intended"
    elif where:
        case[where] = "the intended schedule"
    got = _module("halo").KINDS["lr_schedule"](case, {})
    assert got["lr_lambda"] == pytest.approx([0.1 if found == "intended" else 0.01])


# ------------------------------------------------------------------------------------------ IMP


def test_architectures_have_the_classes_of_the_case():
    case, document, adapter = _known("imp_slr", "arch/ResNet56")
    wanted = case["expected"]
    for change in ({"classes": 100}, {}):
        case["inputs"] |= change
        if not change:
            del case["inputs"]["classes"]
            document["fixtures"]["arch"]["ResNet56"]["layers"][-1][1] = [100, 64]
        got = adapter(case, document)
        assert got["n_params"] == wanted["n_params"] + 90 * 65
        assert got["n_prunable"] == wanted["n_prunable"] + 90 * 64
        assert got["macs"] == wanted["macs"] + 90 * 64


@pytest.mark.parametrize("bias", [True, False])
def test_norms_of_any_number_of_rows(bias):
    sizes = {"conv_w": 30, "conv_b": 5, "bn_w": 5, "bn_b": 5, "fc_w": 28, "fc_b": 4}
    if not bias:
        del sizes["conv_b"]
    inputs = {name: _numbers(size, seed=i).tolist() for i, (name, size) in enumerate(sizes.items())}
    got = _module("imp_slr").KINDS["norm_drop"]({"inputs": {**inputs, "sparsity": 0.5}}, {})
    whole = sum(np.square(values).sum() for values in inputs.values())
    prunable = np.sort(np.square(np.concatenate([inputs["conv_w"], inputs["fc_w"]])))
    gone = prunable[: len(prunable) // 2].sum()
    assert got["sq_norm_before"] == pytest.approx(whole, rel=1e-5)
    assert got["sq_norm_after"] == pytest.approx(whole - gone, rel=1e-5)
    assert got["rel_norm_drop_prunable_only"] == pytest.approx(math.sqrt(gone / prunable.sum()), rel=1e-5)


def test_a_perceptron_has_the_layers_of_its_data():
    shapes, data = [(4, 3), (6, 4), (5, 6)], {"batches": []}
    for number, shape in enumerate(shapes, 1):
        data[f"W{number}"] = _numbers(*shape, seed=number).tolist()
        data[f"b{number}"] = _numbers(shape[0], seed=10 + number).tolist()
    x, y = _numbers(7, 3, seed=5), torch.arange(7) % 5
    data["batches"].append({"x": x.tolist(), "y": y.tolist()})
    case = {"inputs": {"goal": 0.5, "data_ref": "deep"}}
    got = _module("imp_slr").KINDS["dnw_forward_backward"](case, {"fixtures": {"mlp_data": {"deep": data}}})
    weights = [torch.tensor(data[f"W{n}"], dtype=DOUBLE) for n in (1, 2, 3)]
    flat = torch.cat([w.abs().flatten() for w in weights])
    threshold = flat.sort().values[int(0.5 * len(flat)) - 1]
    masked = [(w * (w.abs() > threshold)).requires_grad_() for w in weights]
    for n, weight in enumerate(masked, 1):
        x = x @ weight.T + torch.tensor(data[f"b{n}"], dtype=DOUBLE)
        x = x.relu() if n < 3 else x
    loss = F.cross_entropy(x, y)
    loss.backward()
    assert got["loss"] == pytest.approx(loss.item())
    for n, weight in enumerate(masked, 1):
        _close(got[f"W{n}"], weight.detach())
        _close(got[f"gW{n}"], weight.grad)


# ------------------------------------------------------------------------------------------ pre-training


@pytest.mark.parametrize(("name", "features"), [("counts_vgg_t8", 64), ("counts_mobilenet_t8", 64)])
def test_counts_follow_classes_and_input(name, features):
    case, document, adapter = _known("pretraining_impact", name)
    case["inputs"] |= {"classes": 37, "input": [3, 8, 8], "fractions": [0.0]}
    got, wanted = adapter(case, document)["rows"][0], case["expected"]["rows"][0]
    # the first convolution has two more input channels, the last layer 27 more rows
    assert got["params"] == wanted["params"] + 2 * 9 * 16 + 27 * (features + 1)
    assert got["macs"] == wanted["macs"] + 2 * 9 * 16 * 64 + 27 * features
    aims, document, adapter = _known("pretraining_impact", "fraction_for_target")
    aims["expected"] = {name.removeprefix("counts_"): None}
    aims["inputs"] |= {"classes": 37, "targets": [0.5]}
    fraction, left, reduction = adapter(aims, document)[name.removeprefix("counts_")]["0.5"]
    assert left / (1 - reduction) == pytest.approx(wanted["params"] + 27 * (features + 1))


def test_full_size_networks_have_the_small_number_of_classes():
    case, document, adapter = _known("pretraining_impact", "counts_full_size")
    few = "vgg16_nobn_10cls_224_gap_head"
    parameters, macs = case["expected"][few]
    case["inputs"]["classes_small"] = 37
    case["expected"] = {few.replace("10cls", "37cls"): None, few: None, "mobilenet_v1_1000cls_224": None}
    got = adapter(case, document)
    for name in list(case["expected"])[:2]:
        assert got[name] == [parameters + 27 * 513, macs + 27 * 512]
    assert got["mobilenet_v1_1000cls_224"] == [4231976, 568740352]


def test_masked_steps_follow_rate_momentum_and_decay():
    weight, mask, gradients = (
        np.array([1.0, -2.0, 0.5]),
        np.array([1, 0, 1]),
        [[0.3, 0.2, -0.1], [1.0, 1.0, 1.0]],
    )
    inputs = {"weight": weight.tolist(), "mask": mask.tolist(), "grads": gradients, "nesterov": False}
    inputs |= {"lr": 0.5, "momentum": 0.25, "weight_decay": 0.1}
    got = _module("pretraining_impact").KINDS["masked_sgd"]({"inputs": inputs}, {})
    momentum = np.zeros(3)
    for step, gradient in enumerate(gradients):
        momentum = 0.25 * momentum + np.array(gradient) + 0.1 * weight
        weight, momentum = (weight - 0.5 * momentum) * mask, momentum * mask
        assert got["after_step"][step] == pytest.approx(weight.tolist())


def test_parts_and_floors_follow_their_names():
    kinds = _module("pretraining_impact").KINDS
    names = ("train20", "test20", "train60")
    got = kinds["split_counts"]({"inputs": {"class_sizes": [33, 45]}, "expected": dict.fromkeys(names)}, {})
    assert got == {"train20": [20, 20], "test20": [13, 25], "train60": [19, 27]}
    case = {"inputs": {"min_keep": 3}, "expected": {"rows": [[8, 0.9], [8, 0.5], [2, 0.9]]}}
    assert [row[2] for row in kinds["exact_counts"](case, {})["rows"]] == [5, 4, 0]
    with pytest.raises(AssertionError, match="floor = 2"):
        kinds["ties"]({"inputs": {"scores": [0.1], "fractions": [0.5], "min_keep": 2}}, {})


def test_glyphs_of_decimals_round_exact_halves_to_the_even_sixteenth():
    case = {"inputs": {"image": [[0.05] * 8, *[[0.15] * 8] * 7], "gain": 0.625}}
    # 0.05 * 0.625 = 0.5 / 16, 0.15 * 0.625 = 1.5 / 16
    got = _module("pretraining_impact").KINDS["glyph_to_8x8"](case, {})["image8"]
    assert got == [[0.0] * 8, *[[0.125] * 8] * 7]


# ------------------------------------------------------------------------------------------ pruning from scratch


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_block_may_project_where_shapes_do_not_ask_for_it(mode):
    width, bn = 3, {"eps": 0.01, "momentum": 0.3, "running_mean_start": 0.5, "running_var_start": 2.0}
    shapes = {"conv1.weight": (width, width, 3, 3), "bn1.weight": (width,), "bn1.bias": (width,)}
    shapes |= {name.replace("1", "2"): shape for name, shape in shapes.items()}
    shapes |= {
        "shortcut.0.weight": (width, width, 1, 1),
        "shortcut.1.weight": (width,),
        "shortcut.1.bias": (width,),
    }
    values = {name: _numbers(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    x, readout = _numbers(2, width, 5, 4, seed=30), _numbers(2, width, 5, 4, seed=31)
    inputs = {"block": "resnet_basic", "stride": 1, "projection_shortcut": True, "mode": mode, "bn": bn}
    inputs |= {"x": x.tolist(), "readout": readout.tolist(), "gates": {"gates": [0.2, 0.7, 1.0]}}
    inputs["parameters"] = {name: value.tolist() for name, value in values.items()}
    got = _module("pruning_from_scratch").KINDS["block"]({"inputs": inputs}, {})
    gates = torch.tensor([0.2, 0.7, 1.0], dtype=DOUBLE, requires_grad=True)
    moments = {}

    def norm(y, name):
        mean, var = torch.full((width,), 0.5, dtype=DOUBLE), torch.full((width,), 2.0, dtype=DOUBLE)
        moments[name] = (mean, var)
        affine = values[f"{name}.weight"], values[f"{name}.bias"]
        return F.batch_norm(y, mean, var, *affine, mode == "train", 0.3, 0.01)

    hidden = (norm(F.conv2d(x, values["conv1.weight"], padding=1), "bn1") * gates.view(1, -1, 1, 1)).relu()
    hidden = norm(F.conv2d(hidden, values["conv2.weight"], padding=1), "bn2")
    output = (hidden + norm(F.conv2d(x, values["shortcut.0.weight"]), "shortcut.1")).relu()
    (output * readout).sum().backward()
    _close(got["output"], output.detach())
    _close(got["gate_grad"]["gates"], gates.grad)
    for name, (mean, var) in moments.items():
        _close(got["running_stats_after"][f"{name}.running_mean"], mean)
        _close(got["running_stats_after"][f"{name}.running_var"], var)


def test_learning_follows_channels_kernels_classes_and_norms():
    bn = {"weight": 0.8, "bias": 0.1, "eps": 0.01, "momentum": 0.4}
    kernels = [_numbers(3, 1, 5, 5, seed=1), _numbers(2, 3, 5, 5, seed=2)]
    head, x, y = _numbers(6, 2, seed=3), _numbers(2, 4, 1, 4, 4, seed=4), [[5, 1, 0, 2], [3, 3, 4, 1]]
    inputs = {"cfg": [3, "M", 2], "num_classes": 6, "input_hw": 4, "lr": 0.05, "lambda_": 0.3, "target": 0.4}
    inputs |= {"conv_weights": [k.tolist() for k in kernels], "fc_weight": head.tolist(), "bn": bn}
    inputs |= {"batches_x": x.tolist(), "batches_y": y}
    got = _module("pruning_from_scratch").KINDS["learn"]({"inputs": inputs}, {})
    gates = [torch.ones(3, dtype=DOUBLE, requires_grad=True), torch.ones(2, dtype=DOUBLE, requires_grad=True)]
    optimizer = torch.optim.Adam(gates, lr=0.05)
    for step, (images, labels) in enumerate(zip(x, torch.tensor(y))):
        hidden = images
        for number, (kernel, gate) in enumerate(zip(kernels, gates)):
            hidden = F.conv2d(hidden, kernel, padding=2)
            scale, shift = torch.full_like(gate, 0.8).detach(), torch.full_like(gate, 0.1).detach()
            hidden = F.batch_norm(hidden, None, None, scale, shift, training=True, eps=0.01)
            hidden = (hidden * gate.view(1, -1, 1, 1)).relu()
            hidden = F.max_pool2d(hidden, 2) if number == 0 else hidden
        cross = F.cross_entropy(hidden.mean((2, 3)) @ head.T, labels)
        term = 0.3 * (torch.cat(gates).abs().mean() - 0.4) ** 2
        optimizer.zero_grad()
        (cross + term).backward()
        assert got["steps"][step]["ce"] == pytest.approx(cross.item())
        assert got["steps"][step]["reg"] == pytest.approx(term.item())
        for mine, gate in zip(got["steps"][step]["grad"], gates):
            _close(mine, gate.grad)
        optimizer.step()
        for gate in gates:
            gate.data.clamp_(0, 1)


def test_layouts_follow_classes_images_and_first_widths():
    kinds = _module("pruning_from_scratch").KINDS
    inputs = {"arch": "vgg19", "expanded_inchannel": 48, "num_classes": 7, "input_hw": 64}
    got = kinds["gate_layout"]({"inputs": inputs}, {})
    widths = [48, 48, 96, 96, *[192] * 4, *[384] * 8]
    assert got["gates_per_layer"] == widths
    case = {
        "inputs": {"arch": "vgg19", "inchannel": 48, "target_ratio": 0.5, "num_classes": 7, "input_hw": 64}
    }
    # each pool halves the side; the last one averages what is left
    sides = [64, 64, 32, 32, *[16] * 4, *[8] * 4, *[4] * 4]
    macs = sum(9 * a * b * s * s for a, b, s in zip([3, *widths], widths, sides))
    got = kinds["uniform"](case, {})["full_macs"]
    assert got - macs in (384 * 7, 384 * 7 * 4)


def test_images_are_those_of_the_formula():
    waves = _module("pruning_from_scratch")._waves
    formula = "n from 0; x[n,c,i,j]=round(sin(0.2*n+1.1*c+0.5*i*j+0.25*j+2),3)"
    got = waves(formula, range(2, 4), (2, 3, 2))
    assert got.shape == (2, 2, 3, 2)
    for n, c, i, j in itertools.product(range(2), range(2), range(3), range(2)):
        wanted = round(math.sin(0.2 * (n + 2) + 1.1 * c + 0.5 * i * j + 0.25 * j + 2), 3)
        assert got[n, c, i, j].item() == pytest.approx(wanted, abs=1e-12)


def test_values_that_no_layer_takes_are_not_lost():
    case, document, adapter = _known("pruning_from_scratch", "block_basic_identity")
    case["inputs"]["parameters"]["conv9.weight"] = [[[[1.0]]]]
    with pytest.raises((AssertionError, RuntimeError)):
        adapter(case, document)


def test_nothing_but_an_optional_case_is_skipped():
    unknown = {"name": "new", "kind": "unheard_of", "inputs": {}, "expected": {}, "tolerance": 0}
    document = {"slug": "halo", "cases": [unknown]}
    with pytest.raises(pytest.fail.Exception, match="unknown kind 'unheard_of' of halo"):
        test_golden.test_case(document, unknown)
    with pytest.raises(pytest.skip.Exception, match="optional: no data"):
        test_golden.test_case(document, unknown | {"optional": "no data"})
