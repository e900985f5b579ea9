"""What all comparisons share: data, networks, trainers, and how much of each is measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import Clock, Finding, Measured, measure
from common.core import loading
from common.core.compute import Compute
from common.core.data import SPLITS, Batches, Dataset
from common.core.models import Network, build
from common.core.trainer import Trainer
from common.settings import AugmentationSettings, DatasetSettings

BATCH = 128
CLASSES = 10
AUGMENTATION = AugmentationSettings(crop_padding=4, flip=True)
RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4
_GPU_STEPS, _QUICK_GPU_STEPS = 64, 16


@dataclass(frozen=True)
class Bench:
    """The options of a benchmark.

    data: source and path of DatasetSettings; None for random images of CIFAR's shape. quick: fewer rounds and steps.
    batch: images of a batch. compilation: of the core, as in ExecutionSettings.
    """

    data: Mapping[str, str] | None
    device: str
    precision: str
    quick: bool
    batch: int = BATCH
    compilation: str = "auto"

    @cached_property
    def compute(self) -> Compute:
        """How the core trains here. Raises SettingsError."""
        return Compute.choose(self.device, self.precision, self.compilation)

    @property
    def on_gpu(self) -> bool:
        return self.compute.device.type == "cuda"

    @property
    def clock(self) -> Clock:
        """By which single-threaded work is compared: CPU time is not disturbed by other processes."""
        return "wall" if self.on_gpu else "cpu"

    def steps(self, on_cpu: int) -> int:
        """Iterations of one side in a round."""
        if self.on_gpu:
            return _QUICK_GPU_STEPS if self.quick else _GPU_STEPS
        return max(1, on_cpu // 2) if self.quick else on_cpu

    def measure(self, sides: Mapping[str, Any], rounds: int, images: int | None = None) -> Measured:
        """`measuring.measure`, with a third of the rounds when quick."""
        wait = torch.cuda.synchronize if self.on_gpu else lambda: None
        # a GPU pass is captured in the first steps, and a CPU's memory is laid out in the first round
        return measure(sides, max(3, rounds // 3) if self.quick else rounds, images, synchronise=wait)

    def dataset(self, steps: int) -> Dataset:
        """Training images for `steps` full batches, augmented as usual for CIFAR, on the device. Raises DataError."""
        if self.data is None:
            found = random_images(steps * self.batch, self.batch)
        else:
            settings = DatasetSettings(
                **self.data, train=steps * self.batch, validation=self.batch, augmentation=AUGMENTATION
            )
            found = loading.load(settings)
        return found.to(self.compute.device)

    def network(self, architecture: str, data: Dataset, **options: Any) -> Network:
        """A network in its initial state; always the same."""
        return build(architecture, classes=data.classes, image_shape=data.image_shape, **options)

    def environment(self) -> dict[str, Any]:
        """The machine and the libraries, as far as they bear on speed, and what is trained on."""
        set_by_user = ("OMP_WAIT_", "GOMP_", "GLIBC_", "MALLOC_", "KMP_", "LD_PRELOAD", "PYTORCH_")
        return {
            "device": torch.cuda.get_device_name(self.compute.device) if self.on_gpu else "CPU",
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "precision_of_the_core": self.precision,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": importlib.metadata.version("torchvision"),
            "variables": {key: value for key, value in os.environ.items() if key.startswith(set_by_user)},
            "data": "random images of CIFAR's shape" if self.data is None else _described(self.data),
            "quick": self.quick,
        }

    def trainer(self, model: Network, data: Dataset, **options: Any) -> Trainer:
        """The core, on the shuffled and augmented training images. options: as for Trainer."""
        batches = Batches(data, "train", self.batch, shuffle=True, augment=True)
        return Trainer(
            model,
            batches,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            compute=self.compute,
            **options,
        )


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _described(data: Mapping[str, str]) -> str:
    """The data's source, with the name of its file alone."""
    return f"{data['source']} {Path(data['path']).name}" if "path" in data else data["source"]


def train(trainer: Trainer) -> None:
    """One epoch."""
    trainer.fit([RATE] * len(trainer.batches))


def random_images(count: int, others: int = BATCH) -> Dataset:
    """`count` images of CIFAR's shape with random pixels and labels, and `others` each to validate and test."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (count + 2 * others, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(len(pixels)) % CLASSES
    cuts = np.split(np.arange(len(pixels)), [count, count + others])
    parts = dict(zip(SPLITS, cuts, strict=True))
    return loading.make_dataset("random", parts, pixels, labels, CLASSES, 255.0, AUGMENTATION)


def result(
    what: str, measured: Measured, clock: Clock, findings: list[Finding], **notes: Any
) -> dict[str, Any]:
    """One comparison as JSON values. clock: that the ratios are taken by. notes: other facts."""
    return {
        "what": what,
        "clock": clock,
        "rounds": len(next(iter(measured.wall.values()))),
        "images_per_round": measured.images,
        "sides": measured.sides(),
        "findings": [finding.plain() for finding in findings],
        **notes,
    }
