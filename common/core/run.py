"""A run: what determines it, what it executes with and what it leaves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypedDict, Unpack

import torch
from torch import nn

from common.core import loading
from common.core.compute import Compute
from common.core.data import Batches, Dataset
from common.core.identity import digest
from common.core.trainer import Checkpoints, Decays, Hooks, Trainer
from common.records import Record
from common.settings import DatasetSettings


@dataclass(frozen=True, eq=False)
class Run:
    """One (variant, dataset, architecture, target, seed) of a paper, trained to its end.

    settings: everything else that determines the run, as JSON values; its entry `data` (a dump of DatasetSettings, or
    a list of them) names what the run reads. needs: runs whose record and state this one starts from.
    code: files and folders of the project, relative to it, whose code the run executes beside the core and its paper.
    """

    paper: str
    variant: str
    dataset: str
    architecture: str
    target: float
    seed: int
    settings: Mapping[str, Any]
    needs: tuple[Run, ...] = ()
    code: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that name the run."""
        names = ("paper", "variant", "dataset", "architecture", "target", "seed")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def settings_hash(self) -> str:
        """Digest of the identity, the settings and all that is needed, 64 hexadecimal characters."""
        needs = [need.settings_hash for need in self.needs]
        return digest({**self.identity, "settings": self.settings, "needs": needs})

    def __str__(self) -> str:
        return f"{self.paper}/{self.variant} {self.architecture} target {self.target:g} seed {self.seed}"


@dataclass
class Outcome:
    """What `execute` returns for a run.

    metrics: measured values (at least test_accuracy in [0, 1] and test_loss). cost: the result of
    `common.core.pruning.counting.cost`. curves: one row per epoch. state: tensors and plain values for runs that need
    this one. details: other JSON facts (layer widths, chosen settings).
    """

    metrics: dict[str, Any]
    cost: dict[str, Any]
    curves: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Any] | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Needed:
    """A finished run that another one starts from: its record and what it kept for others."""

    record: Record
    state: dict[str, Any] = field(default_factory=dict)


class TrainerOptions(TypedDict, total=False):
    """What a paper says of its optimiser and loss; see Trainer."""

    momentum: float
    nesterov: bool
    weight_decay: float
    decays: Decays | None
    label_smoothing: float
    optimizer: torch.optim.Optimizer | None


@dataclass(frozen=True)
class Context:
    """What a run gets to execute with.

    needs: the finished runs that `run.needs` lists, in that order. checkpoints: makes the place in which the run's next
    trainer keeps its state.
    """

    run: Run
    compute: Compute
    needs: tuple[Needed, ...]
    checkpoints: Callable[[], Checkpoints] | None = None

    def dataset(self, settings: DatasetSettings | Mapping[str, Any]) -> Dataset:
        """The data set on this run's device; loaded once per process."""
        if not isinstance(settings, DatasetSettings):
            settings = DatasetSettings.model_validate(settings)
        return _dataset(settings, self.compute.device)

    def trainer(
        self,
        model: nn.Module,
        data: Dataset,
        batch_size: int,
        hooks: Hooks | Sequence[Hooks] = (),
        **options: Unpack[TrainerOptions],
    ) -> Trainer:
        """A Trainer on the shuffled, augmented training split, measured on validation each epoch.

        Order and augmentation depend on the run's seed alone, so runs of equal seed are paired. options: as for
        Trainer.
        """
        seed = self.run.seed
        batches = Batches(data, "train", batch_size, seed=seed, shuffle=True, augment=True)
        return Trainer(
            model,
            batches,
            hooks=hooks,
            validation=Batches(data, "validation"),
            seed=seed,
            compute=self.compute,
            checkpoints=self.checkpoints and self.checkpoints(),
            **options,
        )

    def scores(self, trainer: Trainer, data: Dataset) -> dict[str, float]:
        """test_accuracy, test_loss, validation_accuracy and validation_loss of the trainer's network as it is now."""
        found: dict[str, float] = {}
        for split in ("validation", "test"):
            scores = trainer.evaluate(Batches(data, split))
            found |= {f"{split}_{name}": value for name, value in scores.items()}
        return found


@functools.lru_cache(maxsize=8)
def _dataset(settings: DatasetSettings, device: torch.device) -> Dataset:
    return loading.load(settings).to(device)
