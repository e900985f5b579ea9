"""The impact of pre-training beyond its golden vectors: glyphs, filters, transfer, listings, runs."""

import copy
import hashlib
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from fontTools.ttLib import TTFont
from project import ROOT
from torch import nn

from common.core import loading, models
from common.core.data import Batches
from common.core.pruning import channels
from common.core.pruning.masks import Masks, prunable
from common.core.trainer import Trainer
from common.reading import read_yaml
from common.settings import DatasetSettings, ExecutionSettings, Profile, SettingsError, validated
from common.stage import papers
from common.stage.scheduler import in_order
from common.stage.store import Store
from common.stage.worker import perform
from replications.pretraining_impact import (
    filters,
    gradual,
    labels,
    measures,
    method,
    protocol,
    training,
    transfer,
    weights,
)
from replications.pretraining_impact.glyphs import drawing as glyphs

DATA = DatasetSettings(train=120, validation=60, test=200)
CPU = ExecutionSettings(device="cpu", precision="float32", workers=1)
LEFT_OUT = {("digits", "PT-controls"), ("digits", "PT-small")}
"""Probes whose controls are a third of the stage; the profile of the reference results runs them."""
ENDS = ("-one-shot", "-gradual", "-one-cycle", "small-scratch")
"""Variants that lose all filters in one training, so at one target."""
FAST = {"batch_size": 60, "learning_rate": 0.05, "epochs": 1}


def settings(variants=("fine-tuned", "scratch"), **changes):
    """Settings for runs of well under a second. The corpus is other digits.

    variants: the table, or names, which then have all targets or the one at which they lose all filters.
    """
    if not isinstance(variants, dict):
        variants = {name: [0.8] if name.endswith(ENDS) else "all" for name in variants}
    given = {
        "seeds": [0],
        "cells": [{"architecture": "vgg_t8"}],
        "corpus": {"source": "digits", "train": 120, "validation": 60, "test": 300, "split_seed": 1},
        "pretraining": FAST,
        "fine_tuning": FAST,
        "scratch": FAST,
        "level": FAST,
        "labels": 60,
        "variants": variants,
        "targets": [0.5, 0.8],
    }
    return validated(protocol.Settings, given | changes, "here")


def profile(*arguments, **changes):
    return Profile(name="test", dataset=DATA, execution=CPU, paper=settings(*arguments, **changes))


def listed(*arguments, **changes):
    return in_order(papers.runs("pretraining_impact", profile(*arguments, **changes)))


def records(folder, *arguments, **changes):
    """The records of all runs, by (variant, target)."""
    store = Store(folder)
    found = {}
    for run in listed(*arguments, **changes):
        found[run.variant, run.target] = perform(run, store, CPU, True).record.content()
    assert {record["status"] for record in found.values()} == {"ok"}, found
    return found


def network(seed=0, name="vgg_t8"):
    return models.build(name, classes=10, image_shape=(1, 8, 8), seed=seed)


# ---------------------------------------------------------------------------------------- glyphs

FONTS = glyphs.font_files(["DejaVuSans", "cmr10"])


def test_glyphs_have_the_form_of_the_digits():
    images, labels = glyphs.render(105, "abcdefghij", 0, FONTS)
    assert images.shape == (105, 8, 8) and images.dtype == np.uint8
    assert images.max() == 16 and images.min() == 0
    assert np.bincount(labels).tolist() == [11] * 5 + [10] * 5
    assert (images.reshape(105, -1).std(1) > 0).all()


def test_glyphs_are_a_function_of_the_seed_alone():
    first, labels = glyphs.render(60, "abc", 3, FONTS)
    again, same = glyphs.render(60, "abc", 3, FONTS, batch=7)
    other, _ = glyphs.render(60, "abc", 4, FONTS)
    assert np.array_equal(first, again) and np.array_equal(labels, same)
    assert not np.array_equal(first, other)


@pytest.mark.slow
def test_the_corpus_is_the_same_everywhere(tmp_path, capsys):
    file = tmp_path / "glyphs.npz"
    assert glyphs.main(["--out", str(file)]) == 0, capsys.readouterr().err
    # runs are known by the file: it has the same bytes from every version of Python
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    assert found == "c3d9d02d928ba7063bccf6ce1164f92039fa7aa72e2ce8c6412be305328f6fa9"
    with np.load(file) as arrays:
        assert str(arrays["digest"]) == glyphs.DIGEST
        images, labels = (np.concatenate([arrays[f"{n}_train"], arrays[f"{n}_test"]]) for n in "xy")
        assert glyphs.digest_of(images, labels) == glyphs.DIGEST


@pytest.mark.slow
def test_samples_do_not_depend_on_the_processor():
    """The same samples in a process whose libraries take the machine for an older one."""
    older = {
        "NPY_DISABLE_CPU_FEATURES": " ".join(
            np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
        ),
        "ATEN_CPU_CAPABILITY": "default",
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-FMA,-FMA4",
    }
    code = (
        "from replications.pretraining_impact.glyphs import drawing as glyphs\n"
        "fonts = glyphs.font_files(['DejaVuSans', 'cmr10'])\n"
        "print(glyphs.digest_of(*glyphs.render(300, 'agW%', 7, fonts)))"
    )
    root = Path(__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | older, cwd=root, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == glyphs.digest_of(*glyphs.render(300, "agW%", 7, FONTS))


@pytest.mark.slow
def test_another_corpus_than_the_expected_one_is_not_written(tmp_path, capsys, monkeypatch):
    small = {"count": 60, "test": 20, "classes": "digits", "seed": 0}
    monkeypatch.setattr(glyphs, "DEFAULTS", small)
    file = tmp_path / "glyphs.npz"
    assert glyphs.main(["--out", str(file)]) == 1 and not file.exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and glyphs.DIGEST in error and "--other-fonts" in error
    assert glyphs.main(["--out", str(file), "--other-fonts"]) == 0 and file.exists()
    assert glyphs.main(["--out", str(file), "--seed", "1"]) == 0


def test_sines_of_whole_numbers():
    degrees = np.linspace(-15, 15, 1001)
    sine, cosine = glyphs.sines((np.radians(degrees) * 2**30).astype(np.int64))
    assert np.abs(sine / glyphs.ONE - np.sin(np.radians(degrees))).max() < 2e-5
    assert np.abs(cosine / glyphs.ONE - np.cos(np.radians(degrees))).max() < 2e-5


def test_distortions_have_the_ranges_they_say():
    maps = glyphs.distortions(2000, glyphs._Draws(0)) / glyphs.ONE
    view = np.linalg.inv(maps[:, :, :2])
    shift = -(view @ maps[:, :, 2:])[:, :, 0] * glyphs.CANVAS / glyphs.GRID
    # view = rotation @ shear @ scale
    angle, wide = np.arctan2(view[:, 1, 0], view[:, 0, 0]), np.hypot(view[:, 0, 0], view[:, 1, 0])
    high = np.linalg.det(view) / wide
    shear = (np.cos(angle) * view[:, 0, 1] + np.sin(angle) * view[:, 1, 1]) / high
    for values, low, top in (
        (np.degrees(angle), -15, 15), (wide, 0.85, 1.2), (high, 0.85, 1.2), (shear, -0.25, 0.25), (shift, -6, 6),
    ):  # fmt: skip
        slack, room = (top - low) / 1000, (top - low) / 100
        assert low - slack < values.min() < low + room and top - room < values.max() < top + slack
        assert abs(values.mean() - (low + top) / 2) < (top - low) / 40


def test_a_drawing_is_its_outline_filled():
    for character in "lO%g":
        (image,), _ = glyphs.drawings(character, FONTS[:1])
        rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
        sides = [places[-1] - places[0] + 1 for places in (rows, columns)]
        assert max(sides) == glyphs.LONGER_SIDE * glyphs.GRID // glyphs.CANVAS
        assert all(abs(places[0] + places[-1] + 1 - glyphs.GRID) <= 1 for places in (rows, columns))
        assert image.max() == glyphs.FULL
    # the ring of an O: ink, a hole, ink
    (image,), _ = glyphs.drawings("O", FONTS[:1])
    middle = image[glyphs.GRID // 2].astype(int)
    assert (np.diff(middle > 0).sum(), middle[glyphs.GRID // 2]) == (4, 0)
    with TTFont(FONTS[0]) as font:
        (x0, y0), (x1, y1) = glyphs.outline(font, "O").transpose(1, 2, 0) / (glyphs.CELL * glyphs.ONE)
    area = abs((x0 * y1 - x1 * y0).sum()) / 2
    assert image.sum() / glyphs.FULL == pytest.approx(area, rel=2e-3)


def test_an_undistorted_view_is_the_drawing_itself():
    image, _ = glyphs.drawings("g", FONTS[:1])
    same = np.array([[[glyphs.ONE, 0, 0], [0, glyphs.ONE, 0]]])
    (view,) = glyphs.views(image, np.array([0]), same)
    assert np.array_equal(view, image[0, 1::2, 1::2])
    moved = same + [[0, 0, 4 * glyphs.ONE], [0, 0, 0]]
    assert np.array_equal(glyphs.views(image, np.array([0]), moved)[0], np.roll(view, -2, 1))


def test_reduction_rounds_halves_to_the_even_sixteenth():
    ink = np.array([1, 3, 5, 31], dtype=np.uint8)[:, None, None] * np.ones((8, 16), dtype=np.uint8)
    assert glyphs.reduce(ink, 32, glyphs.ONE)[:, 0, 0].tolist() == [0, 2, 2, 16]
    assert glyphs.reduce(ink, 32, np.full((4, 1, 1), 2 * glyphs.ONE))[:, 0, 0].tolist() == [1, 3, 5, 16]
    with pytest.raises(ValueError, match="8x12 images"):
        glyphs.reduce(np.ones((8, 12), dtype=np.uint8), 4, glyphs.ONE)


def test_tex_fonts_draw_letters_and_digits_only():
    _, classes = glyphs.drawings("a<", FONTS)
    assert np.bincount(classes).tolist() == [2, 1]
    with pytest.raises(SettingsError, match="no font has the character '<'; fonts: cmr10"):
        glyphs.drawings("<", FONTS[1:])


def test_a_missing_font_is_named_with_those_found():
    with pytest.raises(SettingsError, match="font 'Arial' is missing.*found:.*DejaVuSans,"):
        glyphs.font_files(["DejaVuSans", "Arial"])


def test_the_classes_are_disjoint_from_the_targets_digits():
    default = set(glyphs.CLASSES["printable-but-digits"])
    assert len(default) == 84 and not default & set(glyphs.CLASSES["digits"])
    assert default | set(glyphs.CLASSES["digits"]) == set(glyphs.CLASSES["printable"])


@pytest.mark.slow
def test_the_written_corpus_can_be_loaded(tmp_path):
    file = str(tmp_path / "glyphs.npz")
    assert glyphs.main(["--out", file, "--count", "400", "--test", "100", "--seed", "5"]) == 0
    data = loading.load(DatasetSettings(source="npz", path=file, validation=104))
    assert data.classes == 84 and data.scale == 16
    assert {split: len(labels) for split, labels in data.labels.items()} == {
        "train": 196,
        "validation": 104,
        "test": 100,
    }
    with np.load(file) as arrays:
        assert len(str(arrays["digest"])) == 64
        assert arrays["classes"].tolist() == list(glyphs.CLASSES["printable-but-digits"])


def test_a_corpus_without_room_for_all_classes_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        glyphs.main(["--out", str(tmp_path / "g.npz"), "--count", "80", "--test", "20"])
    assert stop.value.code == 2 and "--count 80 --test 20" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- filters


def test_counts_are_of_the_original_width():
    model, original = network(), [16, 16, 32, 32, 64, 64]
    for fraction in (0.1, 0.5, 0.5, 0.57):
        channels.remove(model, method.choose(model, fraction, original, method.FilterSelection()))
        assert filters.filter_widths(model) == method.pruned_widths(original, fraction)


def test_a_global_ranking_leaves_one_filter_in_each_layer():
    model, original = network(), [16, 16, 32, 32, 64, 64]
    with torch.no_grad():
        model.get_submodule("features.0").weight.mul_(1e-3)
    keep = method.choose(model, 0.9, original, method.FilterSelection(criterion="l1_mean", context="global"))
    widths = [len(index) for index in keep.values()]
    assert widths[0] == 1 and min(widths) >= 1
    assert sum(widths) == sum(original) - method.removal_count(sum(original), 0.9)


def test_random_filters_depend_on_their_generator_alone():
    model, original = network(), [16, 16, 32, 32, 64, 64]

    def chosen(seed):
        how = method.FilterSelection(criterion="random")
        generator = torch.Generator().manual_seed(seed)
        return [i.tolist() for i in method.choose(model, 0.5, original, how, generator=generator).values()]

    assert chosen(1) == chosen(1) != chosen(2)


def test_a_criterion_says_what_it_lacks():
    with pytest.raises(ValueError, match="taylor_sq_mean.*gradient"):
        method.filter_scores("taylor_sq_mean", torch.ones(2, 3))
    with pytest.raises(ValueError, match="movement_mean.*initial"):
        method.filter_scores("movement_mean", torch.ones(2, 3))
    with pytest.raises(ValueError, match="unknown criterion"):
        method.filter_scores("l3", torch.ones(2, 3))


def test_all_names_of_criteria_and_counts_have_a_rule():
    criteria = method.NEEDS_WEIGHT | method.NEEDS_GRADIENT | method.NEEDS_INITIAL
    assert set(criteria) == set(get_args(method.FilterCriterion))
    assert set(method.COUNT_RULES) == set(get_args(method.CountRule))


def test_a_target_beyond_every_structure_is_named():
    shape = filters.Shape(
        partial(models.build, "vgg_t8", classes=10, image_shape=(1, 8, 8)), image_shape=(1, 8, 8)
    )
    with pytest.raises(SettingsError, match=r"target 0.9999.*more than 0.99"):
        method.fractions_for_reductions(shape.parameters, [16, 16, 32, 32, 64, 64], [0.5, 0.9999])


def test_a_legacy_rule_that_empties_a_layer_is_refused():
    with pytest.raises(SettingsError, match="gt_sorted_2019.*all 10 filters"):
        method.pruned_widths([64, 10], 0.95, "gt_sorted_2019")


def gradual_fit(removal="at_events", checkpoints=None, **options):
    """A network pruned to 60 % of its filters while it trains, in double precision."""
    data = loading.load(DATA)
    batches = Batches(data, "train", 40, seed=0, shuffle=True, dtype=torch.float64)
    model = network().double()
    masks = [gradual.KeepFiltersMasked("after_step")] if removal == "at_end" else []
    events = gradual.schedule_events("agp", 12, 0.6, (0.2, 0.8), 2)
    hook = gradual.Gradual(model, events, method.FilterSelection(**options), masks=(masks or [None])[0])
    trainer = Trainer(
        model, batches, nesterov=True, weight_decay=5e-4, hooks=[hook, *masks], checkpoints=checkpoints
    )
    trainer.fit([0.05] * 12)
    hook.finish(model)
    return model, hook


def test_masking_while_training_equals_removing():
    x = torch.randn(8, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (removed, log), (masked, _) = gradual_fit(), gradual_fit("at_end")
    assert (
        filters.filter_widths(masked)
        == filters.filter_widths(removed)
        == method.pruned_widths([16, 16, 32, 32, 64, 64], 0.6)
    )
    assert log.log[0] == (0, [16, 16, 32, 32, 64, 64]) and len(log.log) > 3
    torch.testing.assert_close(masked.eval()(x), removed.eval()(x), rtol=1e-8, atol=1e-8)


class Interrupted:
    """Keeps the state after `epochs` epochs; with `resume` hands it back."""

    def __init__(self, epochs):
        self.epochs, self.saved, self.resume = epochs, None, False

    def load(self, fit):
        return self.saved if self.resume else None

    def offer(self, fit, state, finished):
        if not self.resume and not finished and (found := state())["epochs_of_fit"] == self.epochs:
            self.saved = copy.deepcopy(found)


@pytest.mark.parametrize("removal", ["at_events", "at_end"])
def test_gradual_pruning_resumes_where_it_was(removal):
    kept = Interrupted(2)
    whole, _ = gradual_fit(removal, kept)
    kept.resume = True
    resumed, hook = gradual_fit(removal, kept)
    assert hook.log[-1][1] == filters.filter_widths(whole)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)


def test_the_last_event_is_at_the_end_of_the_window_and_exact():
    events = gradual.schedule_events("one_cycle", 100, 0.57, (0.0, 1.0), 30)
    assert list(events) == [30, 60, 90, 100] and events[100] == 0.57
    assert list(events.values()) == sorted(events.values())
    assert gradual.event_steps(0, 100, 30, final=False) == [30, 60, 90]


# ---------------------------------------------------------------------------------------- single weights


def pruned_weights(context, levels=(0.5, 0.8), layers="conv+linear"):
    """The masks of each level, of networks that are not trained in between."""
    model, kept = network(), []
    masks = Masks.dense(model, layers)
    weights.prune_and_retrain(
        model,
        masks,
        levels,
        weights.WeightSelection(context=context, layers=layers),
        lambda sparsity: kept.append((sparsity, dict(masks.kept))),
    )
    for name, mask in masks.kept.items():
        assert torch.equal(model.get_parameter(name) != 0, mask), name
    return kept


@pytest.mark.parametrize("context", ["local", "global"])
def test_the_smallest_weights_go_level_by_level(context):
    values = {name: value.abs() for name, value in network().named_parameters()}
    (_, before), (_, after) = levels = pruned_weights(context)
    assert [sparsity for sparsity, _ in levels] == [0.5, 0.8]
    for sparsity, kept in levels:
        left, size = (sum(count(mask) for mask in kept.values()) for count in (torch.sum, torch.numel))
        assert abs(1 - int(left) / size - sparsity) < 1e-3
        shares = [1 - float(mask.float().mean()) for mask in kept.values() if mask.numel() > 500]
        assert (max(shares) - min(shares) < 0.01) == (context == "local"), shares
        # one ranking: no weight that goes is larger than one that stays; in each layer, if they are ranked there
        for names in [list(kept)] if context == "global" else [[name] for name in kept]:
            gone, stays = (torch.cat([values[n][kept[n] == keep] for n in names]) for keep in (False, True))
            assert gone.max() <= stays.min()
    assert all(not (after[name] & ~mask).any() for name, mask in before.items())


def test_linear_layers_may_stay_whole():
    ((_, kept),) = pruned_weights("global", [0.8], "conv")
    assert kept and not any("classifier" in name for name in kept)


def test_a_reduction_of_the_parameters_is_a_larger_share_of_the_weights():
    assert weights.sparsities_for_reductions(1000, 800, [0.4, 0.7]) == [0.5, 0.875]
    with pytest.raises(SettingsError, match=r"target 0.8: only 0.8000 of the parameters"):
        weights.sparsities_for_reductions(1000, 800, [0.4, 0.8])


def test_the_share_needed_lies_between_the_last_level_and_the_whole():
    curve = {"accuracy": [0.95, 0.93, 0.9], "parameters": [1000, 500, 90]}
    needed = partial(measures.share_needed, curve, floor=0.1)
    assert needed(0.96) == 1 and needed(0.95) == pytest.approx(1)
    assert needed(0.93) == pytest.approx(0.5) and 0.5 < needed(0.935) < 1
    assert needed(0.9) == needed(0.5) == 0.1


# ---------------------------------------------------------------------------------------- transfer


def test_a_checkpoint_may_have_other_names(tmp_path):
    donor = network(seed=7)
    state = {f"module.{number}": value for number, value in enumerate(donor.state_dict().values())}
    torch.save({"state_dict": state}, tmp_path / "net.pt")
    read, digest = transfer.read_checkpoint(str(tmp_path / "net.pt"))
    model = network(seed=8)
    # names end differently here, so the batch counters are not recognised and must not be there
    counters = [
        number for number, key in enumerate(donor.state_dict()) if key.endswith("num_batches_tracked")
    ]
    read = {key: value for number, (key, value) in enumerate(read.items()) if number not in counters}
    tensors = transfer.trunk_from_checkpoint(model, read, 10, "net.pt")
    model.load_state_dict(tensors, strict=False)
    assert torch.equal(model.features[0].weight, donor.features[0].weight)
    assert not torch.equal(model.classifier.weight, donor.classifier.weight)
    assert len(digest) == 64


def test_torchvisions_names_and_order_fit():
    from torchvision.models import mobilenet_v2

    donor = mobilenet_v2().state_dict()
    model = models.build("mobilenet_v2", classes=10, image_shape=(3, 224, 224), device="meta")
    tensors = transfer.trunk_from_checkpoint(model, donor, 1000, "torchvision")
    assert all(torch.equal(donor[name], value) for name, value in tensors.items()) and len(tensors) == 260


def test_wrong_checkpoints_are_named(tmp_path):
    file = tmp_path / "net.pt"
    with pytest.raises(SettingsError, match="net.pt: cannot be read"):
        transfer.read_checkpoint(str(file))
    file.write_bytes(b"no tensors")
    with pytest.raises(SettingsError, match="net.pt: not a file of tensors"):
        transfer.read_checkpoint(str(file))
    torch.save([1, 2], file)
    with pytest.raises(SettingsError, match="net.pt: a table of tensors by name is needed, found list"):
        transfer.read_checkpoint(str(file))
    with pytest.raises(SettingsError, match="no weights called 'Nonsense'"):
        transfer.read_checkpoint("torchvision:Nonsense")
    state = network().state_dict()
    with pytest.raises(
        SettingsError, match=r"another architecture: its features.3.weight is \[16, 16, 3, 3\] where"
    ):
        transfer.trunk_from_checkpoint(network(name="mobilenet_t8"), state, 10, "x")
    with pytest.raises(SettingsError, match="its head classifier.weight has 10 classes, expected 1000"):
        transfer.trunk_from_checkpoint(network(), state, 1000, "x")
    with pytest.raises(SettingsError, match="leave no head"):
        transfer.trunk_from_checkpoint(network(), transfer.trunk(network()), 10, "x")


def test_shuffling_keeps_values_and_loses_places():
    trunk = transfer.trunk(network(3))
    mixed = transfer.shuffled(trunk, torch.Generator().manual_seed(0))
    for name, value in trunk.items():
        assert mixed[name].shape == value.shape
        torch.testing.assert_close(mixed[name].flatten().sort().values, value.flatten().sort().values)
    assert not torch.equal(mixed["features.0.weight"], trunk["features.0.weight"])


# ---------------------------------------------------------------------------------------- settings and plans


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cells": [{"architecture": "vgg_t9"}]}, r"here.cells\[0\].architecture.*did you mean 'vgg_t8'"),
        ({"cells": []}, r"here.cells.*at least 1"),
        ({"targets": [0.8, 0.5], "variants": {"scratch": "all"}}, "must ascend"),
        ({"targets": [0.5, 1.2]}, "less than 1"),
        ({"targets": [0.0, 0.5]}, "above 0"),
        (
            {"variants": {"small-scratch": [0.7]}},
            r"small-scratch = \[0.7\]: must be of the targets \[0.5, 0.8\]",
        ),
        (
            {"variants": {"scratch": [0.8]}},
            r"scratch = \[0.8\]: must be the first of the targets \[0.5, 0.8\]",
        ),
        ({"variants": {"scratch-random": [0.8]}}, "scratch-random = .*must be the first of the targets"),
        ({"variants": {"scratch-weights": [0.8]}}, "scratch-weights = .*must be the first of the targets"),
        ({"weights": {"context": "layer"}}, "here.weights.context"),
        ({"variants": {"finetuned": "all"}}, "unknown variant 'finetuned'.*did you mean 'fine-tuned'"),
        ({"per_class": 3}, "labels and per_class exclude each other"),
        ({"selection": {"criterion": "l1"}}, "here.selection.criterion"),
        ({"gradual": {"begin": 0.5, "finish": 0.4}}, "begin 0.5 must lie before finish 0.4"),
        ({"scratch": FAST | {"warmup_epochs": 1}}, "warmup_epochs must be fewer than the 1 epochs"),
        ({"scratch": FAST | {"schedule": "multistep"}}, "here.scratch.schedule"),
        ({"level": FAST | {"one_cycle": True}}, "one_cycle needs optimizer adam"),
        ({"tuning_seeds": [0, 7]}, "no seed in common"),
    ],
)
def test_wrong_settings_are_one_clear_line(changes, message):
    with pytest.raises(SettingsError, match=message) as error:
        settings(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": 500}, "500 images are asked for"),
        ({"labels": None, "per_class": 90}, "per_class = 90: class 0 has 12"),
        ({"targets": [0.8, 0.9999]}, r"pretraining_impact.cells\[0\] \(vgg_t8\): target 0.9999"),
        (
            {"cells": [{"architecture": "vgg_t8", "options": {"depth": 3}}]},
            "option 'depth' of .*'vgg_t8': unknown",
        ),
        (
            {"cells": [{"architecture": "vgg_t8", "options": {"head": "max"}}]},
            r"option 'head' of 'vgg_t8' = 'max': should be",
        ),
        (
            {
                "cells": [{"architecture": "mobilenet_t8"}],
                "variants": {"scratch-weights-conv": "all"},
                "targets": [0.5, 0.9],
            },
            r"\(mobilenet_t8\): target 0.9: only 0.8955 of the parameters",
        ),
        ({"checkpoint": {"source": "nowhere.pt"}}, "nowhere.pt: cannot be read"),
        ({"corpus": None}, "corpus: needed where there is no checkpoint"),
        (
            {"cells": [{"architecture": "vgg_t8"}, {"architecture": "vgg_t8", "settings": {"labels": 0}}]},
            r"cells\[1\].settings.labels = 0",
        ),
    ],
)
def test_what_cannot_work_is_said_before_training(changes, message):
    with pytest.raises(SettingsError, match=message):
        listed(**changes)


def test_a_corpus_of_other_images_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        f"x_{split}": rng.integers(0, 255, (90, 8, 8, 3), dtype=np.uint8) for split in ("train", "test")
    }
    labels = np.arange(90) % 3
    np.savez(tmp_path / "colour.npz", **arrays, y_train=labels, y_test=labels)
    corpus = {"source": "npz", "path": str(tmp_path / "colour.npz"), "validation": 30}
    with pytest.raises(
        SettingsError, match=r"colour.npz with images \[3, 8, 8\] does not fit: features.0.weight"
    ):
        listed(corpus=corpus)
    assert listed(["scratch"], corpus=corpus)


def test_the_listed_runs_share_work():
    variants = (
        "fine-tuned",
        "scratch",
        "scratch-long",
        "fine-tuned-shuffled",
        "small-scratch",
        "fine-tuned-random",
        "fine-tuned-weights",
    )
    runs = listed(variants)
    names = [(run.variant, run.target) for run in runs]
    assert len(set(names)) == len(names) == len({run.settings_hash for run in runs})
    assert names.count(("pre-trained", 0.0)) == 1
    assert ("fine-tuned-random", 0.0) not in names and ("fine-tuned-random", 0.8) in names
    jobs = {name: run.job for name, run in zip(names, runs)}
    assert jobs["fine-tuned", 0.8].start == jobs["fine-tuned", 0.5]
    assert jobs["fine-tuned-weights", 0.5].start == jobs["fine-tuned", 0.0]
    for name in ("fine-tuned", "scratch", "fine-tuned-weights"):
        assert jobs[name, 0.8].reference == jobs["scratch", 0.0] and jobs[name, 0.5].reference is None
    assert jobs["fine-tuned-random", 0.5].start == jobs["fine-tuned", 0.0]
    assert jobs["small-scratch", 0.8].pruned == jobs["fine-tuned", 0.8]
    longer = [jobs[name, 0.0].training.options[0].epochs for name in ("scratch-long", "scratch")]
    assert longer == [3, 1]


def test_a_deviation_is_one_change():
    names = [name for name in protocol.LOOPS if protocol.LOOPS[name][1]]
    runs = listed(["scratch", "scratch-weights", *(f"scratch{name}" for name in names)])
    chosen = {run.variant: run.job.selection.model_dump() for run in runs if run.target == 0.8}
    for name in names:
        loop, changes = protocol.LOOPS[name]
        usual = chosen["scratch-weights" if loop == "weights" else "scratch"]
        assert chosen[f"scratch{name}"] == usual | changes != usual
    fractions = {
        run.variant: run.job.fraction for run in runs if run.target == 0.8 and "weights" not in run.variant
    }
    others = {name for name, fraction in fractions.items() if fraction != fractions["scratch"]}
    assert others == {"scratch-legacy-rule"}


@pytest.mark.parametrize("name", ["digits", "digits-decided", "digits-deviations"])
def test_a_profile_runs_what_its_claims_read(name):
    """And, but for the way there and the ledger's common ground, nothing else; `digits` leaves out the controls of probes."""
    paper = papers.load("pretraining_impact", ROOT / "params.yaml", name).paper
    cells = [paper.changed(cell.settings, "here").wanted for cell in paper.cells]
    wanted = {variant: targets for cell in cells for variant, targets in cell.items()}
    claims = read_yaml(ROOT / "replications/pretraining_impact/claims.yaml")["claims"]
    needed = {}
    for claim in claims:
        if ("deviation" in claim) == (name == "digits-deviations") and (name, claim["id"]) not in LEFT_OUT:
            for side in ("treatment", "control"):
                for entry in claim[side] if isinstance(claim[side], list) else [claim[side]]:
                    for part in (entry, entry.get("minus", entry)):
                        targets = [part["target"]] if "target" in part else claim["targets"]
                        needed.setdefault(part["variant"], set()).update(targets)
    assert needed.keys() == wanted.keys() <= protocol.VARIANTS.keys()
    ground = ("fine-tuned", "scratch", "fine-tuned-weights", "scratch-weights")
    for variant, targets in needed.items():
        assert targets <= {0.0, *wanted[variant]}, variant
        assert max(targets) == max(wanted[variant]) or name == "digits-deviations" and variant in ground, (
            variant
        )


ALL_AT_ONCE = ("scratch-one-shot", "scratch-gradual", "small-scratch")


def test_controls_train_as_long_as_the_loop():
    runs = listed(ALL_AT_ONCE, targets=[0.5, 0.8, 0.9])
    epochs = {
        (run.variant, run.target): run.job.training.epochs for run in runs if run.variant in ALL_AT_ONCE
    }
    assert epochs == {("scratch-one-shot", 0.8): 2, ("scratch-gradual", 0.8): 3, ("small-scratch", 0.8): 3}


def test_a_cell_may_have_settings_of_its_own():
    other = {
        "labels": 70,
        "level": {"epochs": 2},
        "variants": {"fine-tuned": None, "scratch-one-shot": [0.8]},
    }
    cells = [{"architecture": "vgg_t8"}, {"architecture": "vgg_t8", "settings": other}]
    runs = listed(cells=cells)
    assert {run.variant for run in runs if run.dataset == "digits-70"} == {"scratch", "scratch-one-shot"}
    levels = {
        (run.dataset, run.job.training.epochs) for run in runs if run.variant == "scratch" and run.target
    }
    assert levels == {("digits-60", 1), ("digits-70", 2)}


def test_other_data_may_take_the_place_of_the_profiles():
    data = {"source": "digits", "train": 70, "split_seed": 9}
    run = listed(["scratch"], cells=[{"architecture": "vgg_t8", "data": data}])[0]
    assert run.settings["data"]["train"] == 70 and run.dataset == "digits-60"


def test_the_defaults_have_eight_seeds_and_every_claimed_variant():
    defaults = protocol.Settings()
    assert len(defaults.seeds) == 8
    assert {"fine-tuned", "scratch", "scratch-long", "fine-tuned-shuffled", "small-scratch"} <= set(
        defaults.variants
    )


# ---------------------------------------------------------------------------------------- runs


def test_arms_differ_in_their_trunk_alone(tmp_path):
    store = Store(tmp_path)
    starts = {}

    class Stop(BaseException):  # an exception would be the run's own failure
        pass

    def caught(recipe, context, model, *rest, **options):
        starts[context.run.variant] = copy.deepcopy(model.state_dict())
        raise Stop

    for run in listed(("fine-tuned", "scratch", "fine-tuned-shuffled")):
        if run.variant == "pre-trained":
            perform(run, store, CPU, True)
            trunk = store.state(run)["trunk"]
        elif run.target == 0:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
                patch.setattr(training.Training, "fitted", caught)
                perform(run, store, CPU, True)
    for name, value in trunk.items():
        assert torch.equal(starts["fine-tuned"][name], value)
    for head in ("classifier.weight", "classifier.bias"):
        assert torch.equal(starts["fine-tuned"][head], starts["scratch"][head])
        assert torch.equal(starts["fine-tuned"][head], starts["fine-tuned-shuffled"][head])
    conv = "features.3.weight"
    assert not torch.equal(starts["scratch"][conv], starts["fine-tuned"][conv])
    assert not torch.equal(starts["fine-tuned-shuffled"][conv], starts["fine-tuned"][conv])


@pytest.mark.slow
def test_every_variant_leaves_its_record(tmp_path):
    suffixes = protocol.LOOPS.keys() - {""}
    variants = ["fine-tuned", "scratch", "small-scratch", *(f"fine-tuned{suffix}" for suffix in suffixes)]
    found = records(tmp_path, variants, gradual={"span": 1})
    found = {key: record for key, record in found.items() if "weights" not in key[0]}
    dense, last, scratch = found["fine-tuned", 0.0], found["fine-tuned", 0.8], found["scratch", 0.8]
    parameters = dense["cost"]["parameters"]
    for (variant, target), record in found.items():
        assert 0 <= record["metrics"]["test_accuracy"] <= 1
        if target:
            cost = record["cost"]
            assert cost["dense_parameters"] == parameters
            assert cost["parameters"] == cost["nonzero_parameters"]
            assert record["metrics"]["reduction"] == pytest.approx(1 - cost["parameters"] / parameters)
            if variant != "fine-tuned-global":  # as many filters, of which the smaller ones may go
                assert cost["parameters"] <= (1 - target) * parameters
                assert record["metrics"]["trunk_reduction"] > record["metrics"]["reduction"]
    assert found["small-scratch", 0.8]["details"]["filters"] == last["details"]["filters"]
    curve = last["details"]["curve"]
    assert curve["accuracy"] == [found["fine-tuned", t]["metrics"]["test_accuracy"] for t in (0.0, 0.5, 0.8)]
    drop = measures.accuracy_drop(curve["reduction"], curve["accuracy"], 0.8)
    assert last["metrics"]["accuracy_drop"] == pytest.approx(drop)
    assert 0 <= last["metrics"]["r_star_1"] <= last["metrics"]["r_star_2"] <= curve["reduction"][-1]
    wanted = found["scratch", 0.0]["metrics"]["test_accuracy"] - 0.01
    assert last["metrics"]["share_needed"] == measures.share_needed(curve, wanted, 1 - 0.8)
    assert scratch["metrics"]["share_needed"] == scratch["metrics"]["share_needed_own"]
    assert "share_needed" not in found["fine-tuned", 0.5]["metrics"]
    assert "r_star_1" in scratch["metrics"] and "r_star_1" not in found["fine-tuned", 0.5]["metrics"]
    # training costs: pre-training counts for the fine-tuned network, pruning while training makes it cheaper
    macs = {key: record["details"]["training_macs"] for key, record in found.items()}
    assert macs["fine-tuned", 0.0] == macs["pre-trained", 0.0] + macs["scratch", 0.0]
    longer = macs["pre-trained", 0.0] + 3 * macs["scratch", 0.0]
    assert macs["fine-tuned", 0.5] < macs["fine-tuned-gradual", 0.8] < longer


@pytest.mark.parametrize("changes", [{}, {"context": "local"}])
def test_single_weights_go_and_stay_away(tmp_path, changes):
    runs = listed(["scratch", "scratch-weights"], weights=changes, level=FAST | {"epochs": 3})
    store = Store(tmp_path)
    found, states = {}, {}
    for run in runs:
        found[run.variant, run.target] = perform(run, store, CPU, True).record.content()
        states[run.variant, run.target] = store.state(run)
    dense = found["scratch", 0.0]
    parameters, previous = dense["cost"]["parameters"], None
    for target in (0.5, 0.8):
        record, state = found["scratch-weights", target], states["scratch-weights", target]
        cost, filters = record["cost"], found["scratch", target]
        assert cost["parameters"] == cost["dense_parameters"] == parameters
        assert cost["nonzero_parameters"] == pytest.approx((1 - target) * parameters, abs=6)
        assert record["metrics"]["reduction"] == 1 - cost["nonzero_parameters"] / parameters
        assert record["details"]["curve"]["parameters"][-1] == cost["nonzero_parameters"]
        assert cost["sparse_macs"] < cost["macs"] == dense["cost"]["macs"]
        assert record["details"]["training_macs"] > filters["details"]["training_macs"]
        # what is gone at one level is gone at the next
        zeros = {name: state["model"][name] == 0 for name in prunable(network())}
        assert sum(int(zero.sum()) for zero in zeros.values()) == parameters - cost["nonzero_parameters"]
        assert previous is None or all(zeros[name][gone].all() for name, gone in previous.items())
        previous = zeros
        # the first level's training has moved what stays
        assert any(
            not torch.equal(state["model"][n][~z], states["scratch", 0.0]["model"][n][~z])
            for n, z in zeros.items()
        )
    last = found["scratch-weights", 0.8]["metrics"]
    assert last["share_needed"] == last["share_needed_own"] and 0.2 - 1e-9 <= last["share_needed"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "selection",
    [
        {"criterion": "movement_mean"},
        {"criterion": "taylor_sq_mean", "inputs": "all"},
        {"criterion": "l1_mean", "context": "global"},
        {"criterion": "l1_mean", "score": "group", "rule": "quantile_2021"},
    ],
)
def test_filters_can_be_chosen_otherwise(tmp_path, selection):
    found = records(tmp_path, ["scratch", "scratch-gradual"], selection=selection, gradual={"span": 1})
    plain = records(tmp_path / "plain", ["scratch"])
    assert found["scratch", 0.0]["metrics"] == plain["scratch", 0.0]["metrics"]
    assert found["scratch", 0.8]["metrics"] != plain["scratch", 0.8]["metrics"]


@pytest.mark.slow
def test_gradual_pruning_may_mask_until_the_end(tmp_path):
    ways = [{"removal": "at_events"}, {"removal": "at_end"}, {"removal": "at_end", "masks": "before_forward"}]
    found = [
        records(tmp_path / str(number), ["scratch-gradual"], gradual={"span": 1, "schedule": "lin", **way})
        for number, way in enumerate(ways)
    ]
    kept = [record["scratch-gradual", 0.8]["details"]["filters"] for record in found]
    assert kept[0] == kept[1] == kept[2]
    losses = [record["scratch-gradual", 0.8]["metrics"]["test_loss"] for record in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
def test_the_learning_rate_is_chosen_on_validation(tmp_path):
    rates = {"learning_rates": [1e-6, 0.05], "gradual": {"span": 1}}
    found = records(tmp_path, ["scratch", "scratch-gradual"], **rates)
    tried = {rate: found[f"tuning-scratch-{number}", 0.0] for number, rate in enumerate((1e-6, 0.05))}
    assert {record["seed"] for record in tried.values()} == {1000}
    best = max(tried, key=lambda rate: tried[rate]["metrics"]["validation_accuracy"])
    assert found["scratch", 0.0]["details"]["learning_rate"] == best
    # with each seed for itself, the chosen trial is the training and is not repeated
    each = records(tmp_path / "each", ["scratch", "scratch-gradual"], tuning="per_seed", **rates)
    trials = [each[f"tuning-scratch-{number}", 0.0] for number in range(2)]
    same = max(trials, key=lambda record: record["metrics"]["validation_accuracy"])
    assert same["seed"] == 0 and each["scratch", 0.0]["metrics"] == same["metrics"]
    assert each["scratch", 0.0]["details"] == same["details"]


def test_a_learning_rate_that_diverges_loses(tmp_path):
    store = Store(tmp_path)
    rates = {"learning_rates": [0.05, 1e30], "scratch": FAST | {"epochs": 3}}
    entries = [perform(run, store, CPU, True) for run in listed(["scratch"], **rates)]
    failed = [entry.record for entry in entries if entry.record.status == "failed"]
    assert [record.variant for record in failed] == ["tuning-scratch-1"] and failed[0].failure == "diverged"


def test_a_checkpoint_takes_the_place_of_the_pretraining(tmp_path):
    donor = models.build("vgg_t8", classes=26, image_shape=(1, 8, 8), seed=5)
    torch.save(donor.state_dict(), tmp_path / "net.pt")
    checkpoint = {"source": str(tmp_path / "net.pt"), "classes": 26}
    found = records(tmp_path / "runs", ["fine-tuned"], checkpoint=checkpoint, corpus=None)
    assert ("pre-trained", 0.0) not in found and ("fine-tuned", 0.8) in found
    with pytest.raises(SettingsError, match="has 26 classes, expected 1000"):
        listed(["fine-tuned"], checkpoint=checkpoint | {"classes": 1000})


def test_the_adam_recipe_follows_the_one_cycle_policy(tmp_path):
    adam = FAST | {"optimizer": "adam", "learning_rate": 1e-3, "weight_decay": 0.01, "one_cycle": True}
    found = records(tmp_path, ["scratch"], scratch=adam, level=adam)
    assert math.isfinite(found["scratch", 0.8]["metrics"]["test_loss"])
    rates = training.Training(**adam).rates(4)
    assert rates == pytest.approx([training.one_cycle_policy(t / 4, 1e-3)[0] for t in range(4)])
    model = nn.Linear(2, 2)
    trainer = Trainer(model, [0] * 4, optimizer=torch.optim.AdamW(model.parameters(), betas=(0.95, 0.99)))
    hook = training.OneCycleMomentum(4)
    seen = []
    for trainer.iteration in range(4):
        hook.gradients_ready(trainer)
        seen.append(trainer.optimizer.param_groups[0]["betas"][0])
    assert seen == pytest.approx([training.one_cycle_policy(t / 4, 1.0)[1] for t in range(4)])


def test_labels_per_class_are_balanced_and_seeded():
    data = loading.load(DATA)
    few = labels.labelled(data, None, 3, seed=1)
    assert few.labels["train"].bincount().tolist() == [3] * 10
    again, other = (labels.labelled(data, None, 3, seed=seed).images["train"] for seed in (1, 2))
    assert torch.equal(few.images["train"], again) and not torch.equal(few.images["train"], other)
    half = labels.labelled(data, None, 0.5, seed=1).labels["train"].bincount()
    assert half.tolist() == [n // 2 for n in data.labels["train"].bincount().tolist()]
