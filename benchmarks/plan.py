"""Which comparisons there are; knows them by name, so that the command line answers without loading torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """A function of `benchmarks.comparisons` with its arguments and its threads on a CPU. quick: part of a quick run."""

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    quick: bool = True


_RESNET, _VGG = {"architecture": "resnet20"}, {"architecture": "vgg16"}

COMPARISONS: dict[str, Comparison] = {
    "loops-resnet20": Comparison(
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
    "loops-vgg16": Comparison(
        "loops",
        {**_VGG, "steps": 2, "rounds": 4, "over_plain": 2.3, "over_loader": 2.4, "rate": 275},
        threads=2,
        quick=False,
    ),
    "bare-step-resnet20": Comparison("bare_step", {**_RESNET, "steps": 6, "rounds": 7}),
    "bare-step-vgg16": Comparison("bare_step", {**_VGG, "steps": 2, "rounds": 4}, quick=False),
    "methods-resnet20": Comparison("methods", {**_RESNET, "steps": 2, "rounds": 21}),
    "methods-vgg16": Comparison("methods", {**_VGG, "steps": 1, "rounds": 7}, quick=False),
    "relevance-resnet20": Comparison("relevance", {**_RESNET, "steps": 10, "rounds": 4}),
    "seeds-together": Comparison("seeds", {**_RESNET, "steps": 16, "rounds": 3}, threads=2, quick=False),
    "shrunken-resnet20": Comparison("shrunken", {**_RESNET, "steps": 2, "rounds": 9}),
    "shrunken-vgg16": Comparison("shrunken", {**_VGG, "steps": 1, "rounds": 6}, quick=False),
    "memory-resnet20": Comparison("peak_memory", _RESNET),
    "memory-vgg16": Comparison("peak_memory", _VGG, quick=False),
    "growth-images": Comparison(
        "growth_with_images", {**_RESNET, "sizes": (2, 4, 8), "rounds": 5}, quick=False
    ),
    "growth-width": Comparison(
        "growth_with_width", {**_RESNET, "stems": (8, 16, 32), "steps": 2, "rounds": 5}, quick=False
    ),
    "growth-seeds": Comparison(
        "growth_with_seeds",
        {"architecture": "resnet8", "counts": (2, 4, 8), "steps": 4, "rounds": 3},
        threads=2,
        quick=False,
    ),
}


def perform(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """One comparison, in this process. options: the fields of `benchmarks.bench.Bench`."""
    comparison = COMPARISONS[name]
    function = getattr(importlib.import_module("benchmarks.comparisons"), comparison.function)
    return function(importlib.import_module("benchmarks.bench").Bench(**options), **comparison.arguments)


def environment(options: Mapping[str, Any]) -> dict[str, Any]:
    """Machine, libraries and data; see `Bench.environment`. Raises SettingsError for data or a device not there."""
    bench = importlib.import_module("benchmarks.bench").Bench(**options)
    bench.dataset(1)
    return bench.environment()
