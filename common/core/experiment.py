"""A declared experiment: in which cells, and with which jobs for each seed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, Field, model_validator

from common.core import loading
from common.core.data import Dataset
from common.core.identity import canonical
from common.core.models import ArchitectureName, check_options
from common.core.recipe import Batched, Recipe
from common.core.run import Cell, Job, Run
from common.settings import DataError, DatasetSettings, PaperSettings, Profile, SettingsError, Strict, Targets


def _above_0(targets: tuple[float, ...]) -> tuple[float, ...]:
    if min(targets) <= 0:
        raise ValueError("must be above 0; the network that is not pruned is always run")
    return targets


Cuts = Annotated[Targets, AfterValidator(_above_0)]
"""Targets of pruned networks."""


class CellSettings(Strict):
    """A network and its images, and what is other there than elsewhere in the paper."""

    architecture: ArchitectureName
    options: dict[str, Any] = {}
    """As of `common.core.run.Cell`."""
    data: DatasetSettings | None = None
    """In place of the profile's data set."""
    settings: dict[str, Any] = {}
    """Settings of the paper that are others here; tables are merged, as in a profile that extends another."""

    @model_validator(mode="after")
    def _options_are_known(self) -> CellSettings:
        try:
            check_options(self.architecture, self.options)
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return self


Cells = Annotated[tuple[CellSettings, ...], Field(min_length=1)]


class ExperimentSettings(PaperSettings):
    """Base of the settings of a paper that declares its experiment; it gives the fields their defaults."""

    cells: Cells
    """The experiment is made in each."""
    targets: Cuts

    @model_validator(mode="before")
    @classmethod
    def _completed(cls, values: Any) -> Any:
        """Of a recipe, a profile says what is other than by default."""
        if not isinstance(values, Mapping):
            return values
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return {
            name: {**defaults[name].model_dump(), **value}
            if isinstance(defaults.get(name), Recipe) and isinstance(value, Mapping)
            else value
            for name, value in values.items()
        }


class VariantSettings(ExperimentSettings):
    """Base of the settings of a paper that has a table of variants; it says which names there are."""

    variants: dict[Any, Cuts | Literal["all"]]
    """What is run, and at which of the targets; `all` is as `targets` says."""

    @property
    def wanted(self) -> dict[str, tuple[float, ...]]:
        """The targets of each variant."""
        return {name: self.targets if own == "all" else own for name, own in self.variants.items()}


Settings = TypeVar("Settings", bound=ExperimentSettings)
JobKind = TypeVar("JobKind", bound=Job)


class Experiment(Generic[Settings]):
    """The experiment in one cell; a paper derives its own and lists the jobs.

    settings: the paper's, with what the cell changes. cell: of the jobs. data: its images. network: without values.
    Raises SettingsError for a network that cannot be.
    """

    def __init__(self, settings: Settings, cell: Cell, data: Dataset):
        self.settings, self.cell, self.data = settings, cell, data
        try:
            self.network = cell.build(data, device="meta")
        except SettingsError:
            raise
        except Exception as error:  # a network with odd options raises whatever its layers do
            raise SettingsError(" ".join(str(error).split())) from None
        empty = [name for name, parameter in self.network.named_parameters() if not parameter.numel()]
        if empty and "widths" not in cell.options:
            raise SettingsError(f"with options {dict(cell.options)} {empty[0]} has no entries")

    def job(
        self, kind: type[JobKind], variant: str, seed: int, target: float = 0.0, **fields: Any
    ) -> JobKind:
        """A job of this cell. A field that is not given, and that the settings have under its name, is theirs."""
        names = kind.model_fields.keys() & type(self.settings).model_fields.keys()
        own = {name: getattr(self.settings, name) for name in names} | fields
        return kind(variant=variant, cell=self.cell, seed=seed, target=target, **own)

    def jobs(self, seed: int) -> Iterable[Job]:
        """The jobs of one seed; what they need may be left out. Raises SettingsError for what cannot be."""
        raise NotImplementedError


def listed(paper: str, experiment: type[Experiment[Any]], profile: Profile) -> list[Run]:
    """The runs of a paper in all its cells and with all seeds.

    Raises SettingsError that names the cell, and DataError where images are not there.
    """
    load = functools.cache(loading.load)
    found: list[Run] = []
    cells: dict[str, int] = {}  # by the names of their runs
    for number, entry in enumerate(profile.paper.cells):
        where = f"{paper}.cells[{number}]"
        settings = profile.paper.changed(entry.settings, f"{where}.settings")
        data = entry.data or profile.dataset
        cell = Cell(architecture=entry.architecture, options=entry.options, data=data)
        try:
            own = experiment(settings, cell, load(data))
            jobs = [job for seed in settings.seeds for job in own.jobs(seed)]
            every = _with_needs(jobs)
            _check_recipes(every, load)
            _check_batches(every, load)
            for job in jobs:
                if (other := cells.setdefault(canonical(job.run.identity), number)) != number:
                    raise SettingsError(
                        f"must not repeat {job.run} on {data.name}, which is in cells[{other}]"
                    )
        except DataError:
            raise
        except SettingsError as error:
            raise SettingsError(f"{where} ({entry.architecture}): {error}") from None
        found += [job.run for job in jobs]
    return found


def _check_recipes(jobs: Iterable[Job], load: Callable[[DatasetSettings], Dataset]) -> None:
    """Raise SettingsError for a recipe that does not fit the images, with the name that its job gives it."""
    for name, recipe, data in dict.fromkeys(entry for job in jobs for entry in _recipes(job)):
        try:
            recipe.rates(recipe.per_epoch(load(data)))
        except SettingsError as error:
            raise SettingsError(f"{name}.{error}") from None


def _check_batches(jobs: Iterable[Job], load: Callable[[DatasetSettings], Dataset]) -> None:
    """Raise SettingsError for a network that cannot be trained on the smallest batch that its images leave."""
    sound: set[tuple[str, int]] = set()
    for job in jobs:
        data = load(job.cell.data)
        images = job.images_of(data)
        for name, part in job.parts(Batched):
            least = images % part.batch_size or min(images, part.batch_size)
            # nothing depends on the size of a batch but on whether it is one image
            if (key := (canonical(job.cell), min(least, 2))) in sound:
                continue
            try:
                job.cell.check(data, key[1])
            except SettingsError as error:
                last = f"{name}.batch_size = {part.batch_size}: {images} training images leave a last batch of one: "
                raise SettingsError(f"{last if least == 1 else ''}{job.cell.architecture} {error}") from None
            sound.add(key)


def _with_needs(jobs: Iterable[Job]) -> Collection[Job]:
    """The jobs and all that they need, each once, needed ones first: their recipes have the names of settings."""
    found: dict[str, Job] = {}

    def add(job: Job) -> None:
        if job.run.settings_hash not in found:
            for need in job.needs:
                add(need)
            found[job.run.settings_hash] = job

    for job in jobs:
        add(job)
    return found.values()


def _recipes(job: Job) -> Iterator[tuple[str, Recipe, DatasetSettings]]:
    for name, recipe in job.parts(Recipe):
        yield name, recipe, job.cell.data
