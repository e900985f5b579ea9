"""`python -m benchmarks.gpu.network NAME`: the speed of one network here, as lines of JSON; the kit's second step starts it.

Each line is written when it is measured, so a process that is killed leaves those before. What cannot be measured
leaves a line that says why, and the rest goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench import BATCH, RATE, Bench, train
from benchmarks.comparisons import SPARSITY, plain_runs, usual_epoch
from common.core.pruning.counting import layer_costs
from common.core.recipe import Recipe
from common.core.run import Run
from common.core.trainer import Trainer
from common.core.tuning import Tuned
from common.settings import ExecutionSettings
from common.stage import processes
from common.stage.floors import Peaks, training_seconds
from common.stage.scheduler import execute
from common.stage.store import OutOfTime, RunCheckpoints, Store, TimeBudget
from common.stage.worker import prepare_process
from replications.imp_slr.during import DPF
from replications.imp_slr.protocol import PruneDuring

EPOCH = 50_000
"""Images of an epoch of CIFAR-10, in which seconds are told."""
ROUNDS = 3
GAIN = 2.0
"""How much faster several runs at once are expected to be than one after the other."""
UNKNOWN = 0.1
"""Seconds that an epoch is taken to last, where that of one run alone could not be measured."""
LOADERS = 4
"""Workers of the usual DataLoader."""
Rows = dict[str, dict[str, Any]]
"""What was measured, by its name."""
Way = Literal["auto", "capture", "compile", "off"]
"""How the core trains, as of `execution.compilation`."""


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    together: so many runs at once, the most first. mixed: so many, and how many of them prune while they train.
    steps: of an epoch here. seconds: in which each number of runs is measured, about. copied: bytes. matrix: its side.
    """

    networks: tuple[str, ...] = ("resnet20", "resnet56", "vgg16")
    together: tuple[int, ...] = (16, 8, 4, 2)
    mixed: tuple[int, int] = (8, 2)
    batch: int = BATCH
    steps: int = 64
    seconds: float = 1.5
    copied: int = 2**30
    matrix: int = 8192


def scale(quick: bool) -> Scale:
    """quick: a rehearsal, whose numbers say nothing."""
    return (
        Scale(("resnet8",), (2,), (2, 1), batch=16, steps=2, seconds=0.5, copied=2**20, matrix=128)
        if quick
        else Scale()
    )


class Network:
    """One network, measured. ends: `time.monotonic()` at which measuring is to end."""

    def __init__(self, name: str, bench: Bench, size: Scale, ends: float):
        self.name, self.bench, self.size, self.ends = name, bench, size, ends
        self.peaks: Peaks | None = None
        self._core: tuple[str, Trainer] | None = None
        self._epochs: dict[str, float] = {}

    def way(self, compilation: Way) -> Bench:
        """The same, trained in another way."""
        return replace(self.bench, compilation=compilation)

    def core(self, bench: Bench) -> Trainer:
        """The core, as it trains one run; the last one is kept."""
        if self._core is None or self._core[0] != bench.compilation:
            self._core = None  # its memory is not that of the next one
            data = bench.dataset(self.size.steps)
            self._core = bench.compilation, bench.trainer(bench.network(self.name, data), data)
        return self._core[1]

    def card(self) -> dict[str, Any]:
        """Copies and products of matrices, and the floor that follows from them."""
        device = self.bench.compute.device
        source = torch.ones(self.size.copied, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        side = self.size.matrix
        factor = torch.randn(side, side, device=device).bfloat16()
        product = torch.empty_like(factor)
        copying = self._seconds(lambda: target.copy_(source))
        multiplying = self._seconds(lambda: torch.mm(factor, factor, out=product))
        self.peaks = Peaks(flops=2 * side**3 / multiplying, bytes=2 * self.size.copied / copying)
        floor = self._floor(self.peaks)
        return {"copy": self.peaks.bytes, "bfloat16": self.peaks.flops, "us_step": _micro(floor)}

    def _floor(self, peaks: Peaks) -> float:
        """Seconds that a step takes at least."""
        data = self.bench.dataset(1)
        layers = layer_costs(self.bench.network(self.name, data), data.image_shape)
        return training_seconds(layers, peaks) * self.size.batch

    def _seconds(self, call: Callable[[], Any], calls: int = 10, rows: int = 2) -> float:
        """Of one call, in the best of so many rows of calls."""
        taken = []
        for _ in range(rows):
            self._wait()
            begun = time.perf_counter()
            for _ in range(calls):
                call()
            self._wait()
            taken.append((time.perf_counter() - begun) / calls)
        return min(taken)

    def _wait(self) -> None:
        if self.bench.on_gpu:
            torch.cuda.synchronize()

    def _of_floor(self, seconds: float, batches: int) -> dict[str, Any]:
        """Time of a step of one run, of an epoch, and share of the floor."""
        step = seconds / batches
        found = {
            "us_step": _micro(step),
            "seconds_epoch": round(step * math.ceil(EPOCH / self.size.batch), 4),
        }
        if self.peaks:
            found["share"] = round(self._floor(self.peaks) / step, 4)
        return found

    def alone(self, bench: Bench) -> dict[str, Any]:
        """One run: the median of some epochs, after one in which the pass is captured, and peak memory."""
        core = self.core(bench)
        if self.bench.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        train(core)
        taken = [self._seconds(lambda: train(core), calls=1, rows=1) for _ in range(ROUNDS)]
        self._epochs[bench.compilation] = epoch = statistics.median(taken)
        return self._of_floor(epoch, self.size.steps) | self._peak_memory()

    def _peak_memory(self) -> dict[str, int]:
        return {"peak_bytes": torch.cuda.max_memory_allocated()} if self.bench.on_gpu else {}

    def loader(self) -> dict[str, Any]:
        """The usual loop over a DataLoader with PIL, in float32: the median of some epochs."""
        epoch = usual_epoch(self.bench, self.name, self.size.steps, LOADERS)
        epoch()
        taken = [self._seconds(epoch, calls=1, rows=1) for _ in range(ROUNDS)]
        return self._of_floor(statistics.median(taken), self.size.steps)

    def host(self) -> dict[str, Any]:
        """What the host computes for a step, over an epoch: processor time, so without what it waits for the GPU."""
        core = self.core(self.bench)
        begun = time.process_time()
        train(core)
        return {"us_step": _micro((time.process_time() - begun) / self.size.steps)}

    def kernels(self, bench: Bench) -> dict[str, Any]:
        """How many kernels a step has, how long the GPU is busy with them, and which take the longest."""
        core = self.core(bench)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            train(core)
            self._wait()
        taken, count = Counter[str](), Counter[str]()
        for event in seen.events():
            # copies and marks in the program are no kernels
            if event.device_type == DeviceType.CUDA and not event.name.startswith(
                ("Mem", "Optimizer.", "## ")
            ):
                taken[event.name] += event.time_range.elapsed_us()
                count[event.name] += 1
        steps = self.size.steps
        longest = [
            {"kernel": name[:110], "per_step": round(count[name] / steps, 2), "us_step": round(us / steps, 2)}
            for name, us in taken.most_common(12)
        ]
        return {
            "per_step": round(sum(count.values()) / steps, 1),
            "us_step": round(sum(taken.values()) / steps, 1),
            "longest": longest,
        }

    def together(self, counts: Sequence[int], way: Way = "auto", pruning: int = 0) -> Rows:
        """Several runs at once, as a stage executes them; fewer and fewer, since some end before others.

        counts: how many, falling. pruning: how many of them are trained by DPF, which looks at all weights every 16
        steps. Measured is between two ends, after each run has ended an epoch. Raises RuntimeError where a run fails or
        there was no time.
        """
        self._core = None
        gc.collect()
        if self.bench.on_gpu:
            torch.cuda.empty_cache()
        execution = ExecutionSettings(
            device=self.bench.device,
            precision=self.bench.precision,
            compilation=way,
            deterministic=False,
            workers=counts[0],
        )
        with TemporaryDirectory() as name:
            folder = Path(name)
            data = self.bench.dataset(self.size.steps)
            run = plain_runs(self.bench, data, folder, self.name)
            lengths = self._lengths(counts, way)
            listed = [run(seed, epochs) for seed, epochs in enumerate(lengths)]
            listed[:pruning] = map(self._pruning, listed[:pruning], lengths)
            budget = TimeBudget(time.time() + self.ends - time.monotonic())
            store, failed = Marking(folder, execution), list[str | None]()
            try:
                execute(listed, store, execution, self.name, lambda e: failed.append(e.record.reason), budget)
            except OutOfTime:
                pass
            if reasons := [reason for reason in failed if reason]:
                raise RuntimeError(f"{len(reasons)} of {counts[0]} runs failed: {reasons[0]}")
            marks = store.marks()
        times = [[when for when, _ in ends] for ends in marks]
        # the most at any time, so of all of them
        peak = {"peak_bytes": int(max((most for ends in marks for _, most in ends), default=0))}
        found: Rows = {}
        for runs in counts:
            what = crowd(runs, way, pruning)
            try:
                window, epochs = in_common(times, runs, of=counts[0])
            except RuntimeError as error:
                found[what] = {"failed": str(error)}
                continue
            row = self._of_floor(window, round(epochs * self.size.steps))
            found[what] = {"runs": runs, **row, "window_seconds": round(window, 2)}
        if self.bench.on_gpu:
            next(iter(found.values())).update(peak)
        return found

    def _lengths(self, counts: Sequence[int], way: Way) -> list[int]:
        """Epochs of each run, so that each number of them trains for about as long, by what one run alone has taken."""
        lengths, epochs, alone = list[int](), 1, self._epochs.get(way, UNKNOWN)
        for runs, fewer in zip(counts, (*counts[1:], 0)):
            epochs += max(2, math.ceil(self.size.seconds * GAIN / (runs * alone)))
            lengths += [epochs] * (runs - fewer)
        return lengths

    def _pruning(self, run: Run, epochs: int) -> Run:
        """The same run with weights that are pruned while they are trained."""
        batch = self.size.batch
        recipe = Recipe(epochs=epochs, batch_size=batch, learning_rate=RATE, schedule="constant")
        where = {"cell": run.job.cell, "seed": run.seed, "target": SPARSITY}
        return PruneDuring(
            variant="dpf", method="dpf", method_options=DPF(), training=Tuned((recipe,)), **where
        ).run


class Marking(Store):
    """A store in which each run notes when it ended an epoch, and keeps no state; also from another process."""

    def checkpoints(self, run: Run, budget: TimeBudget | None = None) -> RunCheckpoints:
        return _MarkingRun(self.folder / f"{run.seed}.marks", budget)

    def marks(self) -> list[list[tuple[float, float]]]:
        """Of each run that has ended an epoch, when it did (`time.monotonic()`), and most bytes of its process on a GPU."""
        files = [file.read_text().splitlines() for file in self.folder.glob("*.marks")]
        return [[(float(when), float(most)) for when, most in map(str.split, lines)] for lines in files]


class _MarkingRun(RunCheckpoints):
    def of_next_trainer(self) -> Any:
        return _Marks(self._folder, self._budget)


@dataclass(frozen=True)
class _Marks:
    file: Path
    budget: TimeBudget

    def load(self, fit: int) -> None:
        return None

    def offer(self, fit: int, state: Callable[[], dict[str, Any]], finished: bool) -> None:
        with self.file.open("a") as marks:
            marks.write(f"{time.monotonic()} {torch.cuda.max_memory_allocated()}\n")
        if self.budget.spent:
            raise OutOfTime


def crowd(runs: int, way: Way, pruning: int) -> str:
    """What several runs at once are called."""
    return f"{'mixed' if pruning else 'together'}-{runs}" + (f"-{way}" if way != "auto" else "")


def in_common(marks: Sequence[Sequence[float]], runs: int, of: int) -> tuple[float, float]:
    """Seconds in which so many runs trained at once, the last ones `of` those that began, and the epochs that they did in these.

    marks: when each run ended an epoch. Raises RuntimeError where there were none, or not an epoch of each.
    """
    if len(marks) == of:
        by_end = sorted(marks, key=lambda ends: ends[-1])
        gone, there = by_end[: of - runs], by_end[of - runs :]
        begun = max([ends[0] for ends in marks] + [ends[-1] for ends in gone])
        ended = there[0][-1]
        epochs = sum(float(np.diff(np.interp([begun, ended], ends, range(len(ends))))[0]) for ends in there)
        if ended > begun and epochs >= runs:
            return ended - begun, epochs
    raise RuntimeError(f"{runs} runs had no time to train an epoch at once")


def _micro(seconds: float) -> float:
    return round(1e6 * seconds, 2)


def measure(network: Network, add: Callable[[dict[str, Any]], object]) -> None:
    """Measure everything, as far as the time goes, and add a row of each, what matters most first."""
    bench, size = network.bench, network.size

    def attempt(names: Sequence[str], part: Callable[[], Rows]) -> None:
        begun, failed = time.monotonic(), "no time was left"
        found: Rows = {}
        if begun < network.ends:
            try:
                found = part()
            except Exception as error:  # whatever it is, the rest can be measured
                traceback.print_exception(error)
                failed = f"{type(error).__name__}: {error}".split("\n")[0]
        seconds = round(time.monotonic() - begun, 1)
        for name in names:
            add({"what": name, **found.get(name, {"failed": failed}), "took_seconds": seconds})

    def one(what: str, part: Callable[[], dict[str, Any]]) -> None:
        attempt([what], lambda: {what: part()})

    def several(counts: Sequence[int], way: Way = "auto", pruning: int = 0) -> None:
        names = [crowd(runs, way, pruning) for runs in counts]
        attempt(names, lambda: network.together(counts, way, pruning))

    one("card", network.card)
    one("alone", lambda: network.alone(bench))
    one("host", network.host)
    if bench.on_gpu:
        one("kernels", lambda: network.kernels(bench))
    several(size.together)
    if bench.on_gpu:
        cudnn = network.way("capture")
        one("alone-capture", lambda: network.alone(cudnn))
        one("kernels-capture", lambda: network.kernels(cudnn))
    one("eager", lambda: network.alone(network.way("off")))
    one("loader", network.loader)
    runs, pruning = size.mixed
    several((runs,), pruning=pruning)
    if bench.on_gpu:
        several(size.together, "capture")
        one("alone-compile", lambda: network.alone(network.way("compile")))  # compiles for half a minute


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.network")
    parser.add_argument("name")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    ends = time.monotonic() + options.seconds
    prepare_process(ExecutionSettings(threads=1, deterministic=False))
    size = scale(options.quick)
    bench = Bench(None, options.device, "bfloat16", options.quick, batch=size.batch)

    def add(row: dict[str, Any]) -> None:
        with options.rows.open("a") as rows:
            rows.write(json.dumps(row) + "\n")
        print(json.dumps({key: value for key, value in row.items() if key != "longest"}), flush=True)

    measure(Network(options.name, bench, size, ends), add)
    return 0


if __name__ == "__main__":
    processes.set_environment()
    sys.exit(main())
