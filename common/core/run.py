"""A run: the job that determines it, what it executes with and what it leaves."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, TypedDict, Unpack

import torch
from pydantic import Field, model_serializer
from pydantic_core import to_jsonable_python
from torch import Tensor, nn

from common.core import loading, models
from common.core.compute import Compute
from common.core.data import Batches, Dataset
from common.core.identity import digest, stream
from common.core.models import ArchitectureName, Network, own_code
from common.core.pruning.counting import cost
from common.core.trainer import Checkpoints, Decays, Hooks, Trainer
from common.records import Identity, Record
from common.settings import DatasetSettings, Part, SettingsError, Strict, parts


@dataclass(frozen=True, eq=False)
class Run:
    """One (variant, dataset, architecture, target, seed) of a paper, trained to its end.

    settings: everything else that determines the run, as JSON values; its entry `data` (a dump of DatasetSettings, or
    a list of them) names what the run reads. needs: runs whose record and state this one starts from.
    job: what it is derived from, and what executes it. code: files and folders of the project, relative to it, whose
    code the run executes beside the core and its paper.
    """

    paper: str
    variant: str
    dataset: str
    architecture: str
    target: float
    seed: int
    settings: Mapping[str, Any]
    job: Job
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
        return Identity(**self.identity).name


class Cell(Strict):
    """Where a job trains: a network by its name and options, and the images that it sees."""

    architecture: ArchitectureName
    options: dict[str, Any] = {}
    """Of `common.core.models.build`: those of the network's class, and how it is initialised."""
    data: DatasetSettings

    def build(self, data: Dataset, **more: Any) -> Network:
        """A fresh network for images of `data`; more: further options of `build`. Raises SettingsError, ValueError."""
        options = {**self.options, **more}
        return models.build(self.architecture, classes=data.classes, image_shape=data.image_shape, **options)

    def check(self, data: Dataset, batch: int) -> None:
        """Raise SettingsError where a fresh network cannot be trained on `batch` images of `data`."""
        images = torch.zeros(batch, *data.image_shape)
        try:
            # not of shapes alone, for which torch would load its compiler: that takes longer than these few images
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                self.build(data).train()(images)
        except SettingsError:
            raise
        except Exception as error:  # a network of any kind raises whatever its layers do
            told = " ".join(str(error).split())
            raise SettingsError(f"cannot be trained on images of {tuple(images.shape)}: {told}") from None


class Job(Strict):
    """What a paper has done once: its fields are all that determines it, and `execute` does it.

    A paper derives its jobs and adds typed fields. A job that starts from others holds them in fields of their own, one by
    one, in tuples or in value objects such as `common.core.tuning.Tuned`; `Context.of` has what they left.

    variant, target, seed: as of the run and its record.
    """

    paper: ClassVar[str]
    """The paper whose job it is: the folder of its module."""
    variant: str
    cell: Cell
    target: Annotated[float, Field(ge=0)] = 0.0
    seed: int

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.paper = cls.__module__.split(".")[-2:][0]

    def execute(self, context: Context) -> Outcome:
        """Train and measure. Raises RunFailed."""
        raise NotImplementedError

    @property
    def dataset(self) -> str:
        """What the record calls the data."""
        return self.cell.data.name

    @property
    def code(self) -> tuple[str, ...]:
        """What code it executes beside the core and its paper; see Run."""
        return ()

    def images_of(self, data: Dataset) -> int:
        """On how many of the training images of its cell it trains."""
        return len(data.labels["train"])

    def parts(self, kind: type[Part]) -> Iterator[tuple[str, Part]]:
        """The objects of a kind in its fields, with the name of the field; other jobs are not looked into."""
        for name in type(self).model_fields:
            for part in parts(getattr(self, name), kind, Job):
                yield name, part

    @cached_property
    def needs(self) -> tuple[Job, ...]:
        """The jobs that it starts from, each once, in the order of the fields."""
        return tuple({need.run.settings_hash: need for _, need in self.parts(Job)}.values())

    @cached_property
    def run(self) -> Run:
        """The job as it is scheduled, kept and recorded. In its settings a needed job stands by its name."""
        names = [name for name in type(self).model_fields if name not in Job.model_fields]
        settings = {name: to_jsonable_python(getattr(self, name)) for name in names}
        settings |= {
            "job": type(self).__name__,
            **self.cell.model_dump(mode="json", exclude={"architecture"}),
        }
        return Run(
            self.paper,
            self.variant,
            self.dataset,
            self.cell.architecture,
            self.target,
            self.seed,
            settings,
            self,
            tuple(need.run for need in self.needs),
            (*self.code, *own_code(self.cell.architecture)),
        )

    @model_serializer
    def _named(self) -> str:
        return f"{self.variant} at {self.target:g}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.run}>"


@dataclass
class Outcome:
    """What a job comes to.

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
    """A finished run that another one starts from: its record, what it kept for others, and its curves."""

    record: Record
    state: dict[str, Any] = field(default_factory=dict)
    curves: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Tested:
    """The test images as a network of a run took them.

    scores: as of `Context.scores`. labels: true classes, [images]. classes: predicted ones, in parts by batch. network: a
    copy of it with the weights that it was tested with, where the context keeps networks.
    """

    scores: dict[str, float]
    labels: Tensor
    classes: list[Tensor]
    network: nn.Module | None = None


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

    needs: the finished runs that `run.needs` lists, in that order; a job asks for them by `of`. checkpoints: makes the
    place in which the run's next trainer keeps its state. keeps_networks: whether what is tested is kept. tested: what
    `scores` has measured so far.
    """

    run: Run
    compute: Compute
    needs: tuple[Needed, ...]
    checkpoints: Callable[[], Checkpoints] | None = None
    keeps_networks: bool = False
    tested: list[Tested] = field(default_factory=list)

    @property
    def job(self) -> Job:
        """The job that is executed."""
        return self.run.job

    def of(self, need: Job) -> Needed:
        """What a job that this one needs has left. Raises KeyError for another one."""
        wanted = need.run.settings_hash
        for other, left in zip(self.job.needs, self.needs, strict=True):
            if other.run.settings_hash == wanted:
                return left
        raise KeyError(f"{self.run} does not need {need.run}")

    @cached_property
    def data(self) -> Dataset:
        """The images of the job's cell, on this run's device."""
        return self.dataset(self.job.cell.data)

    def network(self, **options: Any) -> Network:
        """A fresh network of the job's cell, on this run's device.

        Its values depend on the run's seed alone, unless the options have a `seed`. options: of `build`.
        """
        seed = {"seed": stream(self.run.seed, "init")}
        network: Network = self.compute.place(self.job.cell.build(self.data, **{**seed, **options}))
        return network

    def dataset(self, settings: DatasetSettings) -> Dataset:
        """The data set on this run's device, with the training and validation images of its seed.

        It is loaded once per process.
        """
        seed = self.run.seed if settings.split == "per_seed" else 0
        return _dataset(settings, seed, self.compute.device)

    def trainer(
        self,
        model: nn.Module,
        data: Dataset,
        batch_size: int,
        hooks: Hooks | Sequence[Hooks] = (),
        seed: int | None = None,
        **options: Unpack[TrainerOptions],
    ) -> Trainer:
        """A Trainer on the shuffled, augmented training split, measured on validation each epoch.

        Order and augmentation depend on `seed` alone, which is the run's when absent, so runs of equal seed are paired.
        options: as for Trainer.
        """
        seed = self.run.seed if seed is None else seed
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
        """test_accuracy, test_loss, validation_accuracy and validation_loss of the trainer's network as it is now.

        What it predicts for the test images is kept, too, if the run's outcome has this accuracy and loss.
        """
        found: dict[str, float] = {}
        classes: list[Tensor] = []
        for split, predicted in (("validation", None), ("test", classes)):
            scores = trainer.evaluate(Batches(data, split), predicted)
            found |= {f"{split}_{name}": value for name, value in scores.items()}
        network = _frozen(trainer) if self.keeps_networks else None
        self.tested.append(Tested(found, data.labels["test"], classes, network))
        return found

    def reported(self, metrics: Mapping[str, Any]) -> Tested | None:
        """What has been tested last with the accuracy and loss of these metrics; None where they are of no network of this
        run (interpolated, or those of a run that it needs)."""
        wanted = tested_as(metrics)
        return next((one for one in reversed(self.tested) if tested_as(one.scores) == wanted), None)

    def measured(
        self,
        trainer: Trainer,
        data: Dataset | None = None,
        *,
        costs: Mapping[str, Any] | None = None,
        state: dict[str, Any] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> Outcome:
        """Scores, cost and curves of the trainer's network as it is now.

        data: in place of the cell's. costs: in place of the network's cost by itself. state, details: as of Outcome.
        """
        data = data or self.data
        costs = cost(trainer.model, data.image_shape) if costs is None else costs
        return Outcome(self.scores(trainer, data), dict(costs), trainer.history, state, dict(details or {}))


def tested_as(metrics: Mapping[str, Any]) -> tuple[Any, Any]:
    """Test accuracy and loss, by which one knows a network again."""
    # a tuple equals another with the same object in it, so also one of NaN
    return metrics.get("test_accuracy"), metrics.get("test_loss")


@torch.no_grad()
def _frozen(trainer: Trainer) -> nn.Module:
    twin = copy.deepcopy(trainer.model)
    for name, weights in trainer.effective().items():
        twin.get_parameter(name).copy_(weights)
    return twin


@functools.lru_cache(maxsize=8)
def _dataset(settings: DatasetSettings, seed: int, device: torch.device) -> Dataset:
    return _source(settings).drawn(seed).to(device)


@functools.lru_cache(maxsize=2)
def _source(settings: DatasetSettings) -> loading.Source:
    return loading.read(settings)
