"""Which benchmarks there are; knows them by name, so that the command line answers without loading torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """A function of `benchmarks.comparisons` with its arguments and its threads on a CPU. quick: part of a quick run."""

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    quick: bool = True


_RESNET, _VGG = {"architecture": "resnet20"}, {"architecture": "vgg16"}

BENCHMARKS: dict[str, Benchmark] = {
    "loops-resnet20": Benchmark(
        "loops",
        {
            **_RESNET,
            "steps": 4,
            "rounds": 12,
            "over_plain": 2.3,
            "over_loader": 2.4,
            "rate": 1400,
            "compiled": True,
        },
        threads=2,
    ),
    "loops-vgg16": Benchmark(
        "loops",
        {**_VGG, "steps": 2, "rounds": 4, "over_plain": 2.3, "over_loader": 2.4, "rate": 275},
        threads=2,
        quick=False,
    ),
    "bare-step-resnet20": Benchmark("bare_step", {**_RESNET, "steps": 6, "rounds": 7}),
    "bare-step-vgg16": Benchmark("bare_step", {**_VGG, "steps": 2, "rounds": 4}, quick=False),
    "methods-resnet20": Benchmark("methods", {**_RESNET, "steps": 2, "rounds": 21}),
    "methods-vgg16": Benchmark("methods", {**_VGG, "steps": 1, "rounds": 7}, quick=False),
    "relevance-resnet20": Benchmark("relevance", {**_RESNET, "steps": 10, "rounds": 4}),
    "seeds-together": Benchmark("seeds", {**_RESNET, "steps": 16, "rounds": 3}, threads=2, quick=False),
    "shrunken-resnet20": Benchmark("shrunken", {**_RESNET, "steps": 2, "rounds": 9}),
    "shrunken-vgg16": Benchmark("shrunken", {**_VGG, "steps": 1, "rounds": 6}, quick=False),
    "memory-resnet20": Benchmark("peak_memory", _RESNET),
    "memory-vgg16": Benchmark("peak_memory", _VGG, quick=False),
    "growth-images": Benchmark(
        "growth_with_images", {**_RESNET, "sizes": (2, 4, 8), "rounds": 5}, quick=False
    ),
    "growth-width": Benchmark(
        "growth_with_width", {**_RESNET, "stems": (8, 16, 32), "steps": 2, "rounds": 5}, quick=False
    ),
    "growth-seeds": Benchmark(
        "growth_with_seeds",
        {"architecture": "resnet8", "counts": (2, 4, 8), "steps": 4, "rounds": 3},
        threads=2,
        quick=False,
    ),
}


def perform(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """One benchmark, in this process. options: the fields of `benchmarks.bench.Bench`."""
    benchmark = BENCHMARKS[name]
    function = getattr(importlib.import_module("benchmarks.comparisons"), benchmark.function)
    return function(importlib.import_module("benchmarks.bench").Bench(**options), **benchmark.arguments)


def environment(options: Mapping[str, Any]) -> dict[str, Any]:
    """Machine, libraries and data; see `Bench.environment`. Raises SettingsError for data or a device not there."""
    bench = importlib.import_module("benchmarks.bench").Bench(**options)
    bench.dataset(1)
    return bench.environment()
