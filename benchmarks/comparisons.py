"""The comparisons. Each gets a `Bench` and returns what was measured as JSON values (see `bench.result`)."""

from __future__ import annotations

import contextlib
import io
import re
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.bench import RATE, Bench, random_images, result, train
from benchmarks.isolation import Apart, alone
from benchmarks.loops import TensorBatches, bare, usual
from benchmarks.measuring import Finding, Growth
from common.core.data import Dataset
from common.core.models import Network
from common.core.pruning import channels
from common.core.pruning.counting import cost, layer_costs
from common.core.pruning.masks import KeepMasked, Masks
from common.core.run import Cell, Run
from common.core.trainer import Trainer
from common.settings import DatasetSettings, ExecutionSettings
from common.stage.floors import CARDS, training_seconds
from common.stage.scheduler import execute
from common.stage.store import Store
from replications.feature_relevance.method import Relevance, prunable_layers, scoring_batches
from replications.halo.method import HALO, LambdaTraining, penalised
from replications.pruning_from_scratch.jobs import Dense
from replications.pruning_from_scratch.method import Gates, Training

SPARSITY = 0.9
KEPT_CHANNELS = 0.5
SCORING_SHARE = 0.1
LINEAR = 1.1
"""Growth counts as linear up to this exponent."""


# ------------------------------------------------------------------------------------------ the core


def loops(
    bench: Bench,
    architecture: str,
    steps: int,
    rounds: int,
    over_plain: float,
    over_loader: float,
    rate: float,
    compiled: bool = False,
) -> dict[str, Any]:
    """The core against the usual loops, each in a process of its own: the core's as a stage's workers are, the others' as
    Python starts them, with as many threads as this one. The goals hold for two CPU cores; over_*: ratios, rate:
    images/s. compiled: on a CPU that has a compiler, the core is also measured with `compilation: compile`."""
    steps, threads = bench.steps(steps), torch.get_num_threads()
    loaders = {f"DataLoader + PIL, {workers} workers": (usual_epoch, bench, workers) for workers in (0, 2)}
    cores = {"core": (core_epoch, bench)}
    if compiled and not bench.on_gpu and shutil.which("g++"):
        cores["core, compiled"] = core_epoch, replace(bench, compilation="compile")
    sides = {**loaders, "plain tensor loop": (usual_epoch, bench, None), **cores}
    with contextlib.ExitStack() as stack:
        epochs = {
            side: stack.enter_context(
                Apart(make, of, architecture, steps, *own, threads=threads, tuned=make is core_epoch)
            )
            for side, (make, of, *own) in sides.items()
        }
        measured = bench.measure(epochs, rounds, steps * bench.batch)
    best = min(loaders, key=lambda side: np.median(measured.wall[side]))
    goals = [{}, {}, {}] if bench.on_gpu else [{"at_least": goal} for goal in (over_loader, over_plain, rate)]
    findings = []
    for core in cores:
        label, wall = f"{architecture}: {core}", measured.wall[core]
        findings += [
            Finding.of(f"{label} over {best}", "speed", measured.ratios(best, core, "wall"), **goals[0]),
            Finding.of(
                f"{label} over a plain tensor loop",
                "speed",
                measured.ratios("plain tensor loop", core, "wall"),
                **goals[1],
            ),
            Finding.of(label, "throughput", measured.images / wall, **goals[2]),
        ]
    if bench.on_gpu:
        data = bench.dataset(1)
        network = bench.network(architecture, data)
        layers = layer_costs(network, data.image_shape)
        floor = training_seconds(layers, CARDS["h200"]) * measured.images
        findings.append(
            Finding.of(f"{architecture}: core, of an H200's floor", "share", floor / measured.wall["core"])
        )
    what = (
        f"{architecture}, batch {bench.batch}, crops and flips on all sides: the core ({bench.precision}, channels last) against "
        "float32 loops in contiguous tensors"
    )
    return result(what, measured, "wall", findings)


def usual_epoch(bench: Bench, architecture: str, steps: int, workers: int | None) -> Callable[[], None]:
    """An epoch of the usual loop, over a DataLoader with so many workers, or over tensors in memory (None)."""
    data = bench.dataset(steps)
    model = bench.network(architecture, data).to(bench.compute.device)
    if workers is None:
        return usual(model, TensorBatches(data, bench.batch))
    from benchmarks.pil import loader

    return usual(model, loader(data, bench.batch, workers, bench.on_gpu))


def core_epoch(bench: Bench, architecture: str, steps: int) -> Callable[[], None]:
    """An epoch of the core."""
    data = bench.dataset(steps)
    trainer = bench.trainer(bench.network(architecture, data), data)
    return lambda: train(trainer)


def bare_step(bench: Bench, architecture: str, steps: int, rounds: int) -> dict[str, Any]:
    """The core with data, hooks and bookkeeping against its bare step."""
    steps = bench.steps(steps)
    data = bench.dataset(steps)
    core, twin = (bench.trainer(bench.network(architecture, data), data) for _ in range(2))
    sides = {"bare step": bare(twin, steps), "core": lambda: train(core)}
    measured = bench.measure(sides, rounds, steps * bench.batch)
    shares = measured.ratios("bare step", "core", bench.clock)
    finding = Finding.of(f"{architecture}: core, of its bare step", "share", shares, at_least=0.95)
    what = f"{architecture}: an epoch of the core against as many steps on one fixed batch"
    return result(what, measured, bench.clock, [finding])


# ------------------------------------------------------------------------------------------ methods


class StepsOfHALO(HALO):
    """HALO without the statistics that it logs each epoch: an epoch here has a few steps in place of hundreds."""

    def epoch_ended(self, trainer: Trainer, epoch: int) -> None:
        pass


def methods(bench: Bench, architecture: str, steps: int, rounds: int) -> dict[str, Any]:
    """What masks, the HALO penalty and gates add to the core's training."""
    steps = bench.steps(steps)
    data = bench.dataset(steps)

    def network() -> Network:
        return bench.compute.place(bench.network(architecture, data))

    def masked() -> Trainer:
        model = network()
        masks = Masks.dense(model)
        masks.prune(model, SPARSITY)
        masks.apply(model)
        return bench.trainer(model, data, hooks=KeepMasked(masks))

    def penalised_by_halo() -> Trainer:
        model = network()
        training = LambdaTraining(rates=[RATE] * steps)
        return bench.trainer(
            model, data, hooks=StepsOfHALO(penalised(model, "conv"), xi=1e-6, psi=1e-4, training=training)
        )

    def gated() -> Trainer:
        model = network()
        norms = [group.norm for group in model.channel_groups() if group.norm]
        gates = Gates(model, norms, weight=0.5, level=0.5)
        return bench.trainer(model, data, hooks=gates, optimizer=gates.optimizer())

    trainers = {
        "no method": bench.trainer(network(), data),
        "masks": masked(),
        "HALO penalty": penalised_by_halo(),
        "gates": gated(),
    }
    sides = {name: lambda trainer=trainer: train(trainer) for name, trainer in trainers.items()}
    measured = bench.measure(sides, rounds, steps * bench.batch)
    goals = {"masks": {"at_most": 1.01}, "HALO penalty": {"at_most": 1.03}, "gates": {}}
    findings = [
        Finding.of(
            f"{architecture}: {name}",
            "overhead" if goal else "cost",
            measured.ratios(name, "no method", bench.clock),
            **goal,
        )
        for name, goal in goals.items()
    ]
    what = (
        f"{architecture}: time of training with masks ({SPARSITY:.0%} of the weights), with the HALO penalty on "
        "convolutions (without its statistics of an epoch), and of learning gates on frozen weights; over plain training"
    )
    return result(what, measured, bench.clock, findings)


def relevance(bench: Bench, architecture: str, steps: int, rounds: int) -> dict[str, Any]:
    """The scores of one pruning event against an epoch of training."""
    steps = bench.steps(steps)
    data = bench.dataset(steps)
    core = bench.trainer(bench.network(architecture, data), data)
    batches = scoring_batches(data, SCORING_SHARE)
    names = [group.name for groups in prunable_layers(core.model) for group in groups]
    sides = {
        "epoch": lambda: train(core),
        "relevance scores": lambda: Relevance().scores(core.model, names, batches),
    }
    measured = bench.measure(sides, rounds, steps * bench.batch)
    label = f"{architecture}: relevance scores of {SCORING_SHARE:.0%} of the images"
    finding = Finding.of(label, "cost", measured.ratios("relevance scores", "epoch", bench.clock))
    what = f"{architecture}: scores for one pruning event (float32) over one epoch of training ({bench.precision})"
    return result(what, measured, bench.clock, [finding], scored_images=len(batches.labels))


def shrunken(bench: Bench, architecture: str, steps: int, rounds: int) -> dict[str, Any]:
    """Training behind masks against training without the masked channels."""
    steps = bench.steps(steps)
    data = bench.dataset(steps)
    whole, small = (bench.compute.place(bench.network(architecture, data)) for _ in range(2))
    keep = {
        group.name: range(round(KEPT_CHANNELS * width))
        for group, width in zip(whole.channel_groups(), whole.widths)
    }
    masks = Masks(channels.masks(whole, keep, norms=False))
    masks.apply(whole)
    channels.remove(small, keep)
    trainers = {
        "masked": bench.trainer(whole, data, hooks=KeepMasked(masks)),
        "shrunken": bench.trainer(small, data),
    }
    sides = {name: lambda trainer=trainer: train(trainer) for name, trainer in trainers.items()}
    measured = bench.measure(sides, rounds, steps * bench.batch)
    speed = measured.ratios("masked", "shrunken", bench.clock)
    finding = Finding.of(f"{architecture}: shrunken over masked, half the channels", "speed", speed)
    macs = [cost(model, data.image_shape)["macs"] for model in (whole, small)]
    what = f"{architecture}: half of the channels of every group masked against removed"
    return result(what, measured, bench.clock, [finding], macs_ratio=macs[0] / macs[1])


# ------------------------------------------------------------------------------------------ stages


def plain_runs(bench: Bench, data: Dataset, folder: Path, architecture: str) -> Callable[[int, int], Run]:
    """A function that makes a plain training run on these images, of a seed and so many epochs; the images are written
    into the folder."""
    file = folder / "images.npz"
    arrays = {}
    for letter, tensors in (("x", data.images), ("y", data.labels)):
        parts = {split: tensor.cpu().numpy() for split, tensor in tensors.items()}
        arrays[f"{letter}_train"] = np.concatenate([parts["train"], parts["validation"]])
        arrays[f"{letter}_test"] = parts["test"][: bench.batch]
    np.savez(file, **arrays)
    images = DatasetSettings(source="npz", path=str(file), validation=bench.batch)
    cell = Cell(architecture=architecture, data=images)

    def run(seed: int, epochs: int) -> Run:
        training = Training(epochs=epochs, batch_size=bench.batch, learning_rate=RATE, weight_decay=1e-4)
        return Dense(variant="dense", cell=cell, seed=seed, training=training).run

    return run


def _stage(bench: Bench, data: Dataset, folder: Path, architecture: str, epochs: int) -> Callable[..., None]:
    """A function that executes a fresh stage of plain training runs, one a seed."""
    run = plain_runs(bench, data, folder, architecture)

    def stage(seeds: int, **execution: int) -> None:
        with TemporaryDirectory() as results, contextlib.redirect_stderr(io.StringIO()):
            entries = execute(
                [run(seed, epochs) for seed in range(seeds)],
                Store(Path(results)),
                ExecutionSettings(device=bench.device, precision=bench.precision, **execution),
                "benchmark",
            )
        failed = [entry.record.reason for entry in entries if entry.record.status != "ok"]
        if failed:
            raise RuntimeError(f"a run of the benchmark failed: {failed[0]}")

    return stage


def seeds(bench: Bench, architecture: str, steps: int, rounds: int) -> dict[str, Any]:
    """Several seeds at once against one after the other, each way with the whole machine."""
    steps = bench.steps(steps)
    data = bench.dataset(steps)
    count, epochs = (8, 4) if bench.on_gpu else (2, 1)
    one_by_one, together = ({"threads": 2, "workers": 1}, {"threads": 1, "workers": count})
    with TemporaryDirectory() as folder:
        stage = _stage(bench, data, Path(folder), architecture, epochs)
        sides = {
            "one by one": lambda: stage(count, **one_by_one),
            "together": lambda: stage(count, **together),
        }
        measured = bench.measure(sides, rounds, count * epochs * steps * bench.batch)
    goal = {"at_least": 1.5} if bench.on_gpu else {}
    speed = measured.ratios("one by one", "together", "wall")
    finding = Finding.of(f"{architecture}: {count} seeds together over one by one", "speed", speed, **goal)
    what = (
        f"{architecture}: a stage of {count} seeds, start of its processes included: together "
        + ("on one GPU" if bench.on_gpu else "in single-threaded processes")
        + " against one after the other"
        + ("" if bench.on_gpu else " with two threads")
    )
    return result(what, measured, "wall", [finding])


# ------------------------------------------------------------------------------------------ memory and growth


def peak_memory(bench: Bench, architecture: str) -> dict[str, Any]:
    """The most memory that training takes beyond the loaded libraries: the core against the plain loop."""
    bench.compute  # noqa: B018 - a device that is not there is an error of this process, not of its children
    peaks = {
        side: alone(peak_of, side, bench, architecture, threads=1, tuned=side == "core")
        for side in ("plain tensor loop", "core")
    }
    ratio = peaks["core"] / peaks["plain tensor loop"]
    finding = Finding(
        f"{architecture}: core over a plain tensor loop", "memory", ratio, (ratio, ratio), at_most=1.0
    )
    what = f"{architecture}, batch {bench.batch}: peak memory of training" + (
        "" if bench.on_gpu else " beyond the libraries"
    )
    return {"what": what, "peak_bytes": peaks, "findings": [finding.plain()]}


def peak_of(side: str, bench: Bench, architecture: str) -> int:
    """Peak memory in bytes of two epochs of three batches; to be called in a process of its own."""
    data = random_images(3 * bench.batch, bench.batch).to(bench.compute.device)
    before = 0 if bench.on_gpu else _peak()
    if side == "core":
        core = bench.trainer(bench.network(architecture, data), data)
        epoch = lambda: train(core)
    else:
        epoch = usual(
            bench.network(architecture, data).to(bench.compute.device), TensorBatches(data, bench.batch)
        )
    for _ in range(2):
        epoch()
    return (torch.cuda.max_memory_allocated() if bench.on_gpu else _peak()) - before


def _peak() -> int:
    """The most memory that this process has had at once, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage on Linux also counts what the process that started this one had
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def growth_with_images(
    bench: Bench, architecture: str, sizes: tuple[int, ...], rounds: int
) -> dict[str, Any]:
    """Time of an epoch against the number of images. sizes: in steps."""
    steps = [bench.steps(size) * (size // sizes[0] if bench.on_gpu else 1) for size in sizes]
    trainers = {}
    for count in steps:
        data = bench.dataset(count)
        trainers[count * bench.batch] = bench.trainer(bench.network(architecture, data), data)
    what = f"{architecture}: seconds of an epoch by the number of images"
    return _growth(bench, what, f"{architecture}: time by images", trainers, rounds)


def growth_with_width(
    bench: Bench, architecture: str, stems: tuple[int, ...], steps: int, rounds: int
) -> dict[str, Any]:
    """Time of an epoch against the MACs of networks of several widths."""
    data = bench.dataset(bench.steps(steps))
    trainers = {}
    for stem in stems:
        model = bench.network(architecture, data, stem=stem)
        trainers[cost(model, data.image_shape)["macs"]] = bench.trainer(model, data)
    what = f"{architecture} with stems of {', '.join(map(str, stems))} channels: seconds of an epoch by MACs of an image"
    return _growth(bench, what, f"{architecture}: time by MACs, as width grows", trainers, rounds)


def _growth(bench: Bench, what: str, label: str, trainers: dict[int, Trainer], rounds: int) -> dict[str, Any]:
    sides = {str(size): lambda trainer=trainer: train(trainer) for size, trainer in trainers.items()}
    return _grown(bench, what, label, sides, rounds, bench.clock)


def growth_with_seeds(
    bench: Bench, architecture: str, counts: tuple[int, ...], steps: int, rounds: int
) -> dict[str, Any]:
    """Time of a stage against the number of its seeds."""
    data = bench.dataset(bench.steps(steps))
    with TemporaryDirectory() as folder:
        stage = _stage(bench, data, Path(folder), architecture, epochs=1)
        sides = {str(count): lambda count=count: stage(count) for count in counts}
        what = f"{architecture}: seconds of a stage by the number of seeds, start of its processes included"
        return _grown(bench, what, f"{architecture}: time by seeds", sides, rounds, "wall")


def _grown(bench: Bench, what: str, label: str, sides: dict, rounds: int, clock: Any) -> dict[str, Any]:
    measured = bench.measure(sides, rounds)
    times = getattr(measured, clock)
    grown = Growth.fit([float(size) for size in sides], [times[size] for size in sides])
    finding = Finding.of(label, "growth", grown.exponents, at_most=LINEAR)
    line = {"seconds_per_unit": grown.slope, "seconds_at_zero": grown.intercept}
    return result(what, measured, clock, [finding], line=line)
