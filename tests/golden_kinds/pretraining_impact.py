"""Golden vectors of `pretraining_impact`: each kind translated to a call of the project's own functions."""

import math
import re
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from golden_inputs import floor_of, only
from scipy import stats
from torch import nn

from common.core import models
from common.core.pruning import channels
from common.statistics import inference
from replications.pretraining_impact import (
    filters,
    gradual,
    labels,
    measures,
    method,
    training,
    transfer,
)
from replications.pretraining_impact.glyphs import drawing

ARCHITECTURES = {
    "vgg16_bn_32px_gap": ("vgg16", (3, 32, 32)),
    "vgg_t8": ("vgg_t8", (1, 8, 8)),
    "mobilenet_v1_32px_stem_stride1": ("mobilenet_v1_cifar", (3, 32, 32)),
    "mobilenet_t8": ("mobilenet_t8", (1, 8, 8)),
}


def _shape_of(architecture, classes, image_shape, **options):
    build = partial(models.build, architecture, classes=classes, image_shape=image_shape, **options)
    return filters.Shape(build, image_shape)


def _shape(name, inputs):
    """The network `name` for a case's classes (10 where it has none) and input (the usual one, likewise)."""
    architecture, usual = ARCHITECTURES.get(name, (name, None))
    return _shape_of(architecture, inputs.get("classes", 10), tuple(inputs.get("input", usual)))


def _tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def filter_scores_conv(case, document):
    inputs = case["inputs"]
    weight, gradient, initial = (
        None if inputs.get(k) is None else _tensor(inputs[k]) for k in ("weight", "grad", "initial_weight")
    )
    scores = {c: method.filter_scores(c, weight, gradient, initial) for c in case["expected"]["scores"]}
    return {
        "scores": {name: values.tolist() for name, values in scores.items()},
        "ascending_rank_l1": method.filter_scores("l1_sum", weight).argsort(stable=True).tolist(),
    }


def scores_of_weight(case, document):
    weight = _tensor(case["inputs"]["weight"])
    return {criterion: method.filter_scores(criterion, weight).tolist() for criterion in case["expected"]}


def granularities(case, document):
    weight = _tensor(case["inputs"]["weight"])
    return {name: method.granular_scores(weight, name).tolist() for name in case["expected"]}


def _removal_counts(case, rules, floor=0):
    """Rows of a table: n, f and what each rule removes, of which `floor` filters are left."""
    rows = [row[:2] for row in case["expected"]["rows"]]
    counts = [[method.removal_count(n, f, rule) for rule in rules] for n, f in rows]
    return {
        "rows": [[*row, *(min(c, max(0, row[0] - floor)) for c in found)] for row, found in zip(rows, counts)]
    }


def exact_counts(case, document):
    inputs = case["inputs"]
    columns = inputs.get("columns", ["n", "f", "remove_floor", "remove_round"])
    return _removal_counts(case, [name.removeprefix("remove_") for name in columns[2:]], floor_of(inputs, 1))


def legacy_threshold_counts(case, document):
    return _removal_counts(case, [name.removeprefix("exact_") for name in case["inputs"]["columns"][2:]])


def _one_filter_stays(inputs):
    """The floor of every selection in the project."""
    only({"floor": floor_of(inputs, 1)}, "floor", 1)


def ties(case, document):
    _one_filter_stays(case["inputs"])
    scores = _tensor(case["inputs"]["scores"])
    counts = [method.removal_count(len(scores), f) for f in case["inputs"]["fractions"]]
    return {"keep": [method.kept(scores, count).tolist() for count in counts]}


def global_selection(case, document):
    _one_filter_stays(case["inputs"])
    scores = [_tensor(s) for s in case["inputs"]["scores_per_layer"]]
    total = sum(map(len, scores))
    counts = {str(f): method.removal_count(total, f) for f in case["inputs"]["fractions"]}
    return {
        "keep": {f: [k.tolist() for k in method.kept_globally(scores, count)] for f, count in counts.items()}
    }


def _schedule(key):
    """`name|options|range` as (name, numbers by name)."""
    name, *parts = key.split("|")
    pairs = (item.split("=") for part in parts for item in part.split(",") if item)
    numbers = {k.replace("n_steps", "steps"): float(v) for k, v in pairs}
    if "steps" in numbers:
        numbers["steps"] = int(numbers["steps"])
    return name, numbers


def schedule_functions(case, document):
    found = {}
    for key in case["expected"]:
        name, numbers = _schedule(key)
        found[key] = [gradual.level(name, p, **numbers) for p in case["inputs"]["positions"]]
    return found


def schedule_windows(case, document):
    found = {}
    for key in case["expected"]:
        name, numbers = _schedule(key)
        begin, finish = numbers.pop("from"), numbers.pop("to")
        found[key] = [
            gradual.windowed(name, t, begin, finish, **numbers) for t in case["inputs"]["train_fraction"]
        ]
    return found


def agp_2019_event_log(case, document):
    inputs = case["inputs"]
    end, final = inputs["ending_step"], inputs["final_percent"]
    events = gradual.event_steps(0, end, inputs["span"], final=False)
    per_epoch = inputs["train_steps_per_epoch"] + inputs["valid_steps_per_epoch"]
    rule = inputs.get("rule", "gt_sorted_2019")
    ends = [min((epoch + 1) * per_epoch, end) for epoch in range(inputs["epochs"])]
    last = gradual.level("agp", events[-1] / end, 0.0, final)
    return {
        "percent_after_epoch": [gradual.level("agp", step / end, 0.0, final) for step in ends],
        "event_steps_first_last": [events[0], events[-1]],
        "percent_at_last_event": last,
        "kept_filters": [n - method.removal_count(n, last / 100, rule) for n in inputs["widths"]],
    }


def r_star(case, document):
    inputs = case["inputs"]

    reference = inputs.get("absolute_reference")

    def along(accuracy, mode, reference):
        return [
            measures.largest_reduction(inputs["reduction"], accuracy, t, mode, reference)
            for t in inputs["taus"]
        ]

    return {
        name: {
            mode: along(accuracy, mode.removesuffix("_absolute"), reference if "_absolute" in mode else None)
            for mode in case["expected"][name]
        }
        for name, accuracy in inputs["accuracy"].items()
    }


def stopping_rule(case, document):
    inputs = case["inputs"]
    return {
        name: [measures.stopping_level(accuracy, inputs["tau"], patience) for patience in inputs["patience"]]
        for name, accuracy in inputs["accuracy"].items()
    }


def curve_area(case, document):
    inputs = case["inputs"]
    means = [measures.mean_accuracy(inputs["reduction"], inputs["acc"], r) for r in inputs["r_max"]]
    return {"mean_accuracy": means, "normalised": [mean / inputs["acc"][0] for mean in means]}


def iso_accuracy_parameters(case, document):
    inputs = case["inputs"]
    found = {
        arm: [measures.iso_parameters(inputs["params"], inputs[f"acc_{arm}"], a) for a in inputs["levels"]]
        for arm in ("ft", "scratch")
    }
    pairs = zip(found["ft"], found["scratch"])
    return found | {"ratio": [None if None in (ft, sc) else ft / sc for ft, sc in pairs]}


def glyph_to_8x8(case, document):
    # decimals become whole numbers over a common denominator, so that halves are halves
    image = [[Fraction(str(value)) for value in row] for row in case["inputs"]["image"]]
    gain = Fraction(str(case["inputs"]["gain"]))
    full = math.lcm(*(value.denominator for row in image for value in row))
    ink = np.array([[int(value * full) for value in row] for row in image], dtype=object)
    found = drawing.reduce(ink, full, gain.numerator, gain.denominator)
    return {"image8": (found / drawing.LEVELS).tolist()}


def transfer_keys(case, document):
    copied, fresh = transfer.trunk_keys(case["inputs"]["state_keys"], case["inputs"]["head_prefix"])
    return {"copied": copied, "fresh": fresh}


def one_cycle_training_policy(case, document):
    inputs = case["inputs"]
    pairs = [training.one_cycle_policy(t, inputs["lr_max"]) for t in inputs["train_fraction"]]
    return {"lr": [lr for lr, _ in pairs], "momentum": [momentum for _, momentum in pairs]}


def counts(case, document):
    inputs = case["inputs"]
    _one_filter_stays(inputs)
    shape = _shape(inputs["architecture"], inputs)
    original = shape.filters
    rows = []
    for fraction in inputs["fractions"]:
        keep = method.pruned_widths(original, fraction, inputs.get("rule", "floor"))
        cost = shape.cost(keep)
        reduction = 1 - cost["parameters"] / cost["dense_parameters"]
        rows.append(
            {
                "f": fraction,
                "keep": keep,
                "params": cost["parameters"],
                "macs": cost["macs"],
                "reduction": reduction,
            }
        )
    return {"rows": rows}


def counts_full_size(case, document):
    """A name tells a network's form: `vgg16_bn_biased_10cls_224_gap_head`; only 1000 classes are its own."""
    found = {}
    for name in case["expected"]:
        architecture, form, classes, side, head = re.fullmatch(
            r"(vgg16|mobilenet_v1)_?(\w*?)_(\d+)cls_(\d+)_?(\w*)", name
        ).groups()
        classes = 1000 if classes == "1000" else case["inputs"].get("classes_small", int(classes))
        options = {}
        if architecture == "vgg16":
            options = {"batch_norm": form.startswith("bn"), "conv_bias": True}
            if head == "fc_head":
                options |= {"hidden": (4096, 4096), "head": "flatten"}
        cost = _shape_of(architecture, classes, (3, int(side), int(side)), **options).whole_cost
        found[name] = [cost["parameters"], cost["macs"]]
    return found


def counts_vgg16_bn_fc_head_pruned(case, document):
    options = {"conv_bias": True, "hidden": (4096, 4096), "head": "flatten"}
    shape, folded = (
        _shape_of("vgg16", case["inputs"]["classes"], (3, 224, 224), **options, **extra)
        for extra in ({}, {"batch_norm": False})
    )
    keep = method.pruned_widths(shape.filters, case["inputs"]["f"])
    networks = [shape.whole, shape.network(keep)]
    whole = [sum(p.numel() for p in m.parameters()) for m in networks]
    features = [sum(p.numel() for p in m.features.parameters()) for m in networks]
    return {
        "keep": keep,
        "params_before": whole[0],
        "params_after": whole[1],
        "params_after_bn_folding": folded.parameters(keep),
        "conv_part_before": features[0],
        "conv_part_after": features[1],
        "reduction_total": 1 - whole[1] / whole[0],
        "reduction_conv_part": 1 - features[1] / features[0],
    }


def counts_author_notebooks(case, document):
    found = []
    for net in case["inputs"]["nets"]:
        options = {"cfg": tuple(net["conv"]), "hidden": tuple(net["fc"][:-1]), "batch_norm": net["bn"]}
        options |= {"kernel": net.get("kernel", 5), "conv_bias": True}
        shape = tuple(net.get("input", (3, 32, 32)))
        cost = _shape_of("convnet", net["fc"][-1], shape, **options).whole_cost
        found.append(cost["parameters"])
    return {"params": found}


def counts_mobilenet_v2_hidden_only(case, document):
    shape = _shape_of("mobilenet_v2", case["inputs"]["classes"], (3, 224, 224))
    original = shape.filters
    fractions = case["inputs"]["fractions"]
    return {"params": [shape.parameters(method.pruned_widths(original, f)) for f in fractions]}


def fraction_for_target(case, document):
    targets, found = case["inputs"]["targets"], {}
    for name in case["expected"]:
        shape = _shape(name, case["inputs"])
        original = shape.filters
        fractions = method.fractions_for_reductions(shape.parameters, original, targets)
        left = [shape.parameters(method.pruned_widths(original, f)) for f in fractions]
        whole = shape.parameters(original)
        found[name] = {str(t): [f, p, 1 - p / whole] for t, f, p in zip(targets, fractions, left)}
    return found


def _loaded(model, state):
    model.double().load_state_dict({name: _tensor(values) for name, values in state.items()}, strict=False)
    return model.eval()


def _lists(tensors):
    return [tensor.tolist() for tensor in tensors]


@torch.no_grad()
def surgery_conv_bn_pool_flatten(case, document):
    inputs, p = case["inputs"], case["inputs"]["params"]
    widths = [len(p["conv1"]), len(p["conv2"])]
    x = _tensor(inputs["x"])
    names = {"features.0": "1", "features.4": "2"}
    state = {f"{conv}.weight": p[f"conv{n}"] for conv, n in names.items()}
    state |= {f"{conv}.bias": p[f"b{n}"] for conv, n in names.items() if f"b{n}" in p}
    entries = {"weight": "g", "bias": "be", "running_mean": "m", "running_var": "v"}
    norms = {"features.1": "1", "features.5": "2"}
    state |= {f"{norm}.{entry}": p[key + n] for norm, n in norms.items() for entry, key in entries.items()}
    state |= {"classifier.weight": p["fc"], "classifier.bias": p["fb"]}

    def network():
        model = models.build(
            "convnet", classes=len(p["fc"]), image_shape=x.shape[1:], cfg=[widths[0], "M", widths[1]],
            conv_bias="b1" in p, head="flatten", kernel=len(p["conv1"][0][0]),
        )  # fmt: skip
        return _loaded(model, state)

    dense, compact, masked, half = (network() for _ in range(4))
    keep = method.choose(dense, inputs["f"], widths, method.FilterSelection())
    on_all = method.choose(dense, inputs["f"], widths, method.FilterSelection(inputs="all"))
    first, second = dense.features[0].weight, dense.features[4].weight
    channels.remove(compact, keep)
    gradual.apply_masks(channels.masks(masked, keep), dict(masked.named_parameters()))
    torch.testing.assert_close(masked(x), compact(x))
    for conv in names:
        masks = channels.masks(half, {conv: keep[conv]})
        own = {name: masks[name] for name in (f"{conv}.weight", f"{conv}.bias") if name in masks}
        gradual.apply_masks(own, dict(half.named_parameters()))
    columns = channels.masks(dense, keep)["classifier.weight"][0]
    return {
        "keep1": keep["features.0"].tolist(),
        "keep2": keep["features.4"].tolist(),
        "keep2_if_scored_on_all_inputs": on_all["features.4"].tolist(),
        "scores1": method.filter_scores("l1_sum", first).tolist(),
        "scores2_on_surviving_inputs": method.filter_scores("l1_sum", second[:, keep["features.0"]]).tolist(),
        "fc_columns": torch.nonzero(columns)[:, 0].tolist(),
        "output_dense": dense(x).tolist(),
        "output_compact": compact(x).tolist(),
        "output_masked_conv_bias_only": half(x).tolist(),
    }


@torch.no_grad()
def surgery_depthwise(case, document):
    inputs = case["inputs"]
    weights, norms, x = inputs["weights"], inputs["bn"], _tensor(inputs["x"])
    widths = [len(weights["stem"]), len(weights["pw"])]
    names = {"conv1": "stem", "blocks.0.conv1": "dw", "blocks.0.conv2": "pw", "linear": "fc"}
    state = {f"{name}.weight": weights[key] for name, key in names.items()}
    if "fc_bias" in weights:
        state["linear.bias"] = weights["fc_bias"]
    for norm, key in {"bn1": "bn_stem", "blocks.0.bn1": "bn_dw", "blocks.0.bn2": "bn_pw"}.items():
        entries = ("weight", "bias", "running_mean", "running_var")
        state |= {f"{norm}.{entry}": values for entry, values in zip(entries, norms[key])}

    def network():
        model = models.build(
            "mobilenet_v1", classes=len(weights["fc"]), image_shape=x.shape[1:],
            default=widths, strides=[inputs.get("stride", 2)], stem_stride=inputs.get("stem_stride", 1),
        )  # fmt: skip
        model.linear = nn.Linear(widths[-1], len(weights["fc"]), bias="fc_bias" in weights)
        return _loaded(model, state)

    dense, compact = network(), network()
    by_producer, by_group = (
        method.choose(dense, inputs["f"], widths, method.FilterSelection(criterion="l1_mean", score=score))
        for score in ("producer", "group")
    )
    channels.remove(compact, by_producer)
    return {
        "keep_channels_producer_score": by_producer["conv1"].tolist(),
        "keep_channels_group_score": by_group["conv1"].tolist(),
        "producer_scores": method.filter_scores("l1_mean", dense.conv1.weight).tolist(),
        "group_scores": method.group_scores(dense, dense.channel_groups()[0]).tolist(),
        "keep_pointwise": by_producer["blocks.0.conv2"].tolist(),
        "output_dense": dense(x).tolist(),
        "output_compact": compact(x).tolist(),
        "params_dense": sum(p.numel() for p in dense.parameters()),
        "params_compact": sum(p.numel() for p in compact.parameters()),
    }


def masked_sgd(case, document):
    inputs, found = case["inputs"], {}
    for policy in ("after_step", "before_forward"):
        model = nn.Module()
        model.w = nn.Parameter(_tensor(inputs["weight"]))
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=inputs.get("lr", 0.1),
            momentum=inputs.get("momentum", 0.9),
            weight_decay=inputs.get("weight_decay", 5e-4),
            nesterov=inputs.get("nesterov", False),
        )
        trainer = SimpleNamespace(model=model, optimizer=optimizer)
        hook = gradual.KeepFiltersMasked(policy, {"w": _tensor(inputs["mask"])})
        seen = []
        for gradient in inputs["grads"]:
            hook.weights(trainer)
            model.w.grad = _tensor(gradient)
            optimizer.step()
            hook.stepped(trainer)
            seen.append(model.w.detach().tolist())
        found[policy] = seen
        if policy == "after_step":
            found["momentum_after_last"] = optimizer.state[model.w]["momentum_buffer"].tolist()
    return found


def difference_in_differences(case, document):
    inputs = case["inputs"]
    drops = {
        arm: np.array(
            [[measures.accuracy_drop(inputs[f"reduction_{arm}"], a, r) for r in inputs["r"]] for a in curves]
        )
        for arm, curves in (("ft", inputs["acc_ft"]), ("scratch", inputs["acc_scratch"]))
    }
    per_seed = inference.differences(drops["scratch"], drops["ft"])
    margin = inputs["tost_margin"]
    return {
        "per_seed": per_seed.tolist(),
        "stats": {str(r): _tested(values, margin) for r, values in zip(inputs["r"], per_seed.T)},
    }


def _tested(values, margin):
    """The tests of one column of differences."""
    student = inference.Student(values)
    greater, less = (student.p(0.0, alternative) for alternative in ("greater", "less"))
    return {
        "mean": student.mean,
        "sd": student.sd,
        "t": stats.ttest_1samp(values, 0).statistic,
        "p_two_sided": 2 * min(greater, less),
        "p_greater": greater,
        "ci95": student.ends(0.025),
        "tost_p": max(student.p(-margin, "greater"), student.p(margin, "less")),
        "wilcoxon_exact_p_greater": inference.wilcoxon(values, 0.0, "greater"),
    }


def split_counts(case, document):
    """`train30` beside `test30` is a number of images of each class, `train80` alone a share in percent."""
    sizes, found = case["inputs"]["class_sizes"], {}
    for name in case["expected"]:
        part, amount = re.fullmatch(r"(train|test)(\d+)", name).groups()
        each = f"test{amount}" in case["expected"]
        train = labels.per_class_counts(sizes, int(amount) if each else int(amount) / 100)
        rest = [size - count for size, count in zip(sizes, train)]
        found[name] = train if part == "train" else rest
    return found


@torch.no_grad()
def iterative_trajectory(case, document):
    inputs = case["inputs"]
    weights = [_tensor(w) for w in inputs["weights"]]
    widths = [len(w) for w in weights]
    model = models.build(
        "convnet", classes=1, image_shape=(weights[0].shape[1], 8, 8), cfg=widths, batch_norm=False,
        kernel=weights[0].shape[2],
    ).double()  # fmt: skip
    names = [group.name for group in filters.filter_groups(model)]
    for name, weight in zip(names, weights):
        model.get_submodule(name).weight.copy_(weight)
    alive = [torch.arange(weights[0].shape[1]), *(torch.arange(n) for n in widths)]
    history = []
    for fraction, deltas in zip(inputs["fractions"], inputs["deltas"]):
        keep = method.choose(model, fraction, widths, method.FilterSelection())
        channels.remove(model, keep)
        alive[1:] = [index[keep[name]] for index, name in zip(alive[1:], names)]
        history.append(_lists(alive[1:]))
        for inside, outside, name, delta in zip(alive, alive[1:], names, deltas):
            model.get_submodule(name).weight += _tensor(delta)[outside][:, inside]
    return {"alive_after_each": history}


KINDS = {
    "counts": counts,
    "counts_full_size": counts_full_size,
    "counts_vgg16_bn_fc_head_pruned": counts_vgg16_bn_fc_head_pruned,
    "counts_author_notebooks": counts_author_notebooks,
    "counts_mobilenet_v2_hidden_only": counts_mobilenet_v2_hidden_only,
    "fraction_for_target": fraction_for_target,
    "surgery_conv_bn_pool_flatten": surgery_conv_bn_pool_flatten,
    "surgery_depthwise": surgery_depthwise,
    "masked_sgd": masked_sgd,
    "difference_in_differences": difference_in_differences,
    "split_counts": split_counts,
    "iterative_trajectory": iterative_trajectory,
    "filter_scores_conv": filter_scores_conv,
    "filter_scores_depthwise": scores_of_weight,
    "row_scores_linear": scores_of_weight,
    "granularities": granularities,
    "exact_counts": exact_counts,
    "legacy_threshold_counts": legacy_threshold_counts,
    "ties": ties,
    "global_selection": global_selection,
    "schedule_functions": schedule_functions,
    "schedule_windows": schedule_windows,
    "agp_2019_event_log": agp_2019_event_log,
    "r_star": r_star,
    "stopping_rule": stopping_rule,
    "curve_area": curve_area,
    "iso_accuracy_parameters": iso_accuracy_parameters,
    "glyph_to_8x8": glyph_to_8x8,
    "transfer_keys": transfer_keys,
    "one_cycle_training_policy": one_cycle_training_policy,
}
