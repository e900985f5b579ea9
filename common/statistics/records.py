"""Records as the runs left them, and the numbers that a claim asks of them, seed by seed."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from common.predictions import Predictions, beside
from common.reading import shown
from common.records import LARGEST, Identity, Record, files, is_number, read
from common.settings import MOST_SEEDS, TARGET_DIGITS, SettingsError

SECTIONS = ("metrics", "cost", "details")
_READ = (
    *("status", "reason", "failure", "cause", *SECTIONS, "settings", "data"),
    *("chance", "device", "precision", "torch"),
)
"""What is read of a run's record, besides what names it."""
PER_SEED = ("split_seed", "seed", "seeds", "trials", "tuned", "chosen")
"""Settings in which runs of one arm may differ between seeds: splits, and what is tuned for each."""
SHARE = "a share of images"
COLLAPSED = 0.1
"""A run is collapsed up to this share of the way from chance to the dense network."""
Place = tuple[str | None, str | None, str | None, float]
"""Variant, data set, architecture and target of runs that differ in their seed; None where a claim names nothing."""
_DIVERGED = re.compile(
    r"diverg|\bnan\b|\binf(inite|inity)?\b|\b(not|no longer)( a)? finite|non.?finite", re.I
)
_ACCURACY = re.compile(r"accuracy(_(before|after|at|without)_\S+)?$")
_MOST_IMAGES = 1_000_000


class Placed(Protocol):
    """What has the name of a run but for its seed."""

    @property
    def variant(self) -> str | None: ...
    @property
    def dataset(self) -> str | None: ...
    @property
    def architecture(self) -> str | None: ...
    @property
    def target(self) -> float | None: ...


@dataclass(frozen=True)
class Quantity:
    """One number (or vector) per seed: a metric of a variant in a cell, less another if `minus` is given."""

    variant: str | None
    dataset: str | None
    architecture: str | None
    target: float | None
    metric: str
    minus: Quantity | None = None

    @property
    def parts(self) -> list[Quantity]:
        """The quantity, and what is subtracted from it."""
        return [self, self.minus] if self.minus else [self]


class Lost(Exception):
    """A seed without the number that is asked for; the message is the reason."""


class WithoutChance(Lost):
    """Lost because the run diverged, and nobody knows what chance is in its data set."""


def read_all(paths: list[Path]) -> dict[str, Records]:
    """The records of files, and of folders (`*.jsonl`, curves left aside), by paper, with the predictions beside them.

    The same record given twice counts once. Raises SettingsError naming file and line for a damaged line and
    for two different records of one run, and the file for predictions that are not those of the records.
    """
    found: dict[tuple[Any, ...], tuple[str, Record]] = {}
    predictions: dict[str, Predictions] = {}
    for path in paths:
        for file in _files(path):
            lines = list(read(file, Record))
            predictions |= beside(file, [record for _, record in lines])
            for where, record in lines:
                key = (record.paper, *place_of(record), record.seed)
                other, same = found.setdefault(key, (where, record))
                if name := next(
                    (name for name in _READ if getattr(same, name) != getattr(record, name)), None
                ):
                    raise SettingsError(f"{where}: another record of the run in {other}, with another {name}")
    counts = Counter(key[:-1] for key in found)
    for key, (where, record) in found.items():
        if counts[key[:-1]] > MOST_SEEDS:
            raise SettingsError(f"{where}: one of more than {MOST_SEEDS:,} seeds: {record.name}")
    papers: dict[str, list[Record]] = {}
    for _, record in found.values():
        papers.setdefault(record.paper, []).append(record)
    chances = chances_of(record for _, record in found.values())
    return {paper: Records(records, chances, predictions) for paper, records in papers.items()}


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if not (found := files(path)):
        raise SettingsError(f"{path}: no records (*.jsonl) in this folder")
    return found


def place_of(run: Placed) -> Place:
    """The place of a run, or of the runs that a quantity is measured on."""
    target = math.nan if run.target is None else _rounded(run.target)
    return run.variant, run.dataset, run.architecture, target


def _rounded(target: float) -> float:
    return round(target, TARGET_DIGITS)


def chances_of(records: Iterable[Record]) -> dict[str, float]:
    """Chance by data set, for records that do not say it; the largest where they differ (other test images)."""
    found: dict[str, float] = {}
    for record in records:
        if record.chance is not None:
            found[record.dataset] = max(record.chance, found.get(record.dataset, 0.0))
    return found


class Records:
    """The records of one paper, by run and seed.

    chances: chance by data set, where a record does not say it; of these records, where absent. predictions: by digest.
    """

    def __init__(
        self,
        records: list[Record],
        chances: Mapping[str, float] | None = None,
        predictions: Mapping[str, Predictions] | None = None,
    ):
        self._runs: dict[Place, dict[int, Record]] = {}
        for record in records:
            self._runs.setdefault(place_of(record), {})[record.seed] = record
        self._chances = chances_of(records) if chances is None else chances
        self._predictions = predictions or {}
        self._dense: dict[tuple[str, str], dict[int, float]] = {}
        self._images: dict[tuple[str, str], int | None] = {}
        self._ends: dict[tuple[str, str, str], set[float]] = {}
        self._parts: dict[tuple[int, float], Records] = {}
        self._settings: dict[tuple[Place, int], str] = {}
        self._kept: dict[Hashable, dict[Any, Any]] = {}

    def kept(self, key: Hashable) -> dict[Any, Any]:
        """A place for what was found in these records: judging on other terms asks for it again and again."""
        return self._kept.setdefault(key, {})

    def until(self, seed: int) -> Records:
        """The records of all seeds up to this one, all that a look knows."""
        return self._part(-1, seed)

    def above(self, seed: int) -> Records:
        """The records of the seeds above this one, all that may judge a claim made when it had been seen."""
        return self if seed < 0 else self._part(seed, math.inf)

    def _part(self, above: int, until: float) -> Records:
        if (above, until) not in self._parts:
            every = (record for runs in self._runs.values() for record in runs.values())
            known = [record for record in every if above < record.seed <= until]
            self._parts[above, until] = Records(known, self._chances, self._predictions)
        return self._parts[above, until]

    def cells(self, variants: set[str]) -> list[tuple[str, str]]:
        """(dataset, architecture) pairs in which one of the variants was run, sorted."""
        return sorted(
            {
                (record.dataset, record.architecture)
                for runs in self._runs.values()
                for record in runs.values()
                if record.variant in variants
            }
        )

    def targets(self, quantity: Quantity) -> list[float]:
        """Targets at which the quantity's variant was run in its cell, sorted."""
        place = (quantity.variant, quantity.dataset, quantity.architecture)
        return sorted(target for *run, target in self._runs if tuple(run) == place)

    def seeds(self, quantity: Quantity) -> dict[int, Record]:
        """seed -> record of the quantity's run."""
        return self._runs.get(place_of(quantity), {})

    def of(self, quantity: Quantity, seed: int) -> Record:
        """The record of the quantity's run. Raises Lost where nobody ran it."""
        record = self.seeds(quantity).get(seed)
        if record is None:
            raise Lost(f"no run of {place(quantity)}")
        return record

    def predictions(self, record: Record) -> Predictions | None:
        """What the run takes the test images for, None where that is not known."""
        return self._predictions.get(record.predictions or "")

    def measure(
        self, quantity: Quantity, seed: int, vector: bool = False, shared: Collection[Any] = ()
    ) -> Any:
        """The quantity's number for a seed, or its vector (a list of numbers). Raises Lost.

        A diverged run has the accuracy of a network that has learnt nothing. shared: the runs at the root of failures (`root`) that both sides of
        a pair start from: theirs is lost.
        """
        record = self.of(quantity, seed)
        if record.status == "failed":
            value = self._of_failed(quantity, record, shared)
        else:
            value = value_in(record, quantity.metric)
        if value is None:
            raise Lost(f"{quantity.metric} of {place(quantity)} is missing or null")
        if vector:
            return _vector(value, quantity)
        if not is_number(value):
            raise Lost(
                f"{quantity.metric} of {place(quantity)} is {shown(value)}, not a finite number up to {LARGEST:g}"
            )
        if is_accuracy(quantity.metric) and not 0 <= value <= 1:
            raise Lost(f"{quantity.metric} of {place(quantity)} is {value:g}, not in [0, 1]")
        return value - self.measure(quantity.minus, seed, shared=shared) if quantity.minus else value

    def _of_failed(self, quantity: Quantity, record: Record, shared: Collection[Any]) -> float:
        failed = f"the run of {place(quantity)} failed: {record.reason or 'no reason given'}"
        if not diverged(record) or not is_accuracy(quantity.metric):
            raise Lost(failed)
        if root(record) in shared:
            raise Lost(f"{failed}; both sides start from what diverged")
        chance = self.chance(record)
        if chance is None:
            raise WithoutChance(f"{failed}; no record says what chance is on {record.dataset}")
        return chance

    def settings(self, record: Record) -> str:
        """The settings as canonical text, without those of a seed; empty where the record has none."""
        key = (place_of(record), record.seed)
        if key not in self._settings:  # judging on other terms asks for it again and again
            found = json.dumps(stripped(record.settings, PER_SEED), sort_keys=True) if record.settings else ""
            self._settings[key] = found
        return self._settings[key]

    # ------------------------------------------------------------------------------- chance and collapse

    def chance(self, record: Record) -> float | None:
        """The accuracy of a network that has learnt nothing, None where no record says it."""
        return record.chance if record.chance is not None else self._chances.get(record.dataset)

    def knows_chance(self, dataset: str) -> bool:
        """Whether any record says what chance is on a data set."""
        return dataset in self._chances

    def bound(self, record: Record) -> float | None:
        """Test accuracy up to which a run of this cell and seed is collapsed, None where chance is unknown."""
        chance = self.chance(record)
        dense = self._densest(record.dataset, record.architecture).get(record.seed)
        return None if chance is None else chance + COLLAPSED * (max(dense or 0.0, chance) - chance)

    def _densest(self, dataset: str, architecture: str) -> dict[int, float]:
        """Seed -> the best accuracy of an uncompressed run in the cell, of any run where there is none."""
        if (dataset, architecture) not in self._dense:
            whole: dict[int, float] = {}
            any_: dict[int, float] = {}
            for runs in self._runs.values():
                for record in runs.values():
                    accuracy = accuracy_of(record)
                    if (record.dataset, record.architecture) != (dataset, architecture) or accuracy is None:
                        continue
                    any_[record.seed] = max(accuracy, any_.get(record.seed, 0.0))
                    if found_in(record, "cost.compression") == 1:
                        whole[record.seed] = max(accuracy, whole.get(record.seed, 0.0))
            self._dense[dataset, architecture] = any_ | whole
        return self._dense[dataset, architecture]

    def collapsed(self, record: Record) -> bool:
        """Whether the run is at or near chance, as a diverged one is."""
        bound = self.bound(record)
        if bound is None:
            return False
        accuracy = accuracy_of(record)
        return diverged(record) if accuracy is None else accuracy <= bound

    # ---------------------------------------------------------------------------- resolution and censoring

    def images(self, dataset: str, metric: str) -> int | None:
        """How many images an accuracy was measured on, None where that is unknown.

        Read from settings; else the least number of images of which all test accuracies are whole shares.
        """
        part = "validation" if _last(metric) == "validation_accuracy" else "test"
        if (dataset, part) not in self._images:
            self._images[dataset, part] = self._count_images(dataset, part)
        return self._images[dataset, part]

    def _count_images(self, dataset: str, part: str) -> int | None:
        accuracies = set()
        for record in (record for runs in self._runs.values() for record in runs.values()):
            if record.dataset != dataset:
                continue
            data = record.settings.get("data")
            if isinstance(data, Mapping) and isinstance(data.get(part), int) and data[part] > 0:
                return int(data[part])
            value = value_in(record, f"{part}_accuracy")
            if is_number(value) and 0 <= value <= 1:
                accuracies.add(float(value))
        images = 1
        for value in accuracies:
            images = math.lcm(images, Fraction(value).limit_denominator(100_000).denominator)
            if images > _MOST_IMAGES:
                return None
        return images if images > 1 else None

    def at_an_end(self, quantity: Quantity, value: float, bounds: tuple[float | None, float | None]) -> bool:
        """Whether the metric's value is its floor or cap, so that what lies beyond was not seen.

        Ends are the bounds given, 0 and 1 of an accuracy, and the smallest and largest value in the cell where several
        seeds share it to the last digit, of a metric that does not go in steps (of one image, or of whole numbers).
        """
        if any(bound is not None and math.isclose(value, bound, rel_tol=1e-9) for bound in bounds):
            return True
        if is_accuracy(quantity.metric):
            return value in (0, 1)
        return value in self._found_ends(quantity)

    def _found_ends(self, quantity: Quantity) -> set[float]:
        dataset, architecture = str(quantity.dataset), str(quantity.architecture)
        key = (dataset, architecture, quantity.metric)
        if key not in self._ends:
            found = [
                (value, record.seed)
                for runs in self._runs.values()
                for record in runs.values()
                if (record.dataset, record.architecture) == (dataset, architecture)
                and is_number(value := value_in(record, quantity.metric))
            ]
            values = [value for value, _ in found]
            steps = self.images(dataset, "test_accuracy") or 1
            stepped = all(math.isclose(value * steps, round(value * steps), abs_tol=1e-6) for value in values)
            ends = {min(values), max(values)} if values and not stepped else set()
            self._ends[key] = {end for end in ends if len({s for value, s in found if value == end}) > 1}
        return self._ends[key]


# ------------------------------------------------------------------------------------- what a record says


def is_accuracy(metric: str) -> bool:
    """Whether a metric is a share of images, by its name: `test_accuracy`, `accuracy_before_mask`; not `accuracy_drop`."""
    return bool(_ACCURACY.search(_last(metric)))


def unit(metric: str) -> str | None:
    """What a metric is counted in, as far as its name tells."""
    if is_accuracy(metric):
        return SHARE
    name = _last(metric)
    for ending, found in (
        ("percent", "percent"),
        ("loss", "a loss"),
        ("macs", "multiply-accumulate operations"),
        ("parameters", "parameters"),
        ("weights", "parameters"),
        ("epochs", "epochs"),
        ("seconds", "seconds"),
    ):
        if name.endswith(ending):
            return found
    return None


def _last(metric: str) -> str:
    head, _, rest = metric.partition(".")
    return rest if head in SECTIONS and rest else metric


def accuracy_of(record: Record) -> float | None:
    """Test accuracy of a finished run, None where it has none."""
    value = record.metrics.get("test_accuracy") if record.status == "ok" else None
    return float(value) if value is not None and is_number(value) and 0 <= value <= 1 else None


def diverged(record: Record) -> bool:
    """Whether a failed run, or the one that it needs, diverged; of an old record, by its reason."""
    if record.status != "failed":
        return False
    if record.failure == "needs":
        return record.cause is not None and record.cause.failure == "diverged"
    if record.failure is None:
        return bool(record.reason and _DIVERGED.search(record.reason))
    return record.failure == "diverged"


def root(record: Record) -> tuple[Any, ...]:
    """The run at the root of a failure."""
    first: Identity = record.cause or record
    return tuple(first.identity.values())


def stripped(value: Any, without: Collection[str]) -> Any:
    """JSON values without these keys at any depth; equal numbers are the same value, 1 as 1.0."""
    if isinstance(value, Mapping):
        return {key: stripped(item, without) for key, item in value.items() if key not in without}
    if isinstance(value, list):
        return [stripped(item, without) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def found_in(record: Record, metric: str) -> float | None:
    """A metric of a finished run, None where it is no finite number."""
    value = value_in(record, metric) if record.status == "ok" else None
    return float(value) if value is not None and is_number(value) else None


def _vector(value: Any, quantity: Quantity) -> list[float]:
    if not isinstance(value, list) or len(value) < 2 or not all(map(is_number, value)):
        raise Lost(
            f"{quantity.metric} of {place(quantity)} is {shown(value)}, not a list of at least two numbers"
        )
    if max(value) == min(value):
        raise Lost(f"{quantity.metric} of {place(quantity)} is constant: its correlation is undefined")
    return value


def value_in(record: Record, path: str) -> Any:
    """What a record has at a metric's dotted path, None where it has nothing."""
    head, _, rest = path.partition(".")
    if head in SECTIONS and rest:
        return _at(getattr(record, head), rest)
    for section in SECTIONS:
        value = _at(getattr(record, section), path)
        if value is not None:
            return value
    return None


def _at(value: Any, path: str) -> Any:
    """The value at a dotted path; a key may itself contain dots (`drop.0.9`)."""
    if not isinstance(value, Mapping):
        return None
    if path in value:
        return value[path]
    head, _, rest = path.partition(".")
    return _at(value.get(head), rest) if rest else None


def place(quantity: Quantity) -> str:
    """A quantity's run in words."""
    parts = [str(quantity.variant)]
    parts += [name for name in (quantity.dataset, quantity.architecture) if name]
    parts += [f"target {quantity.target:g}"] if quantity.target is not None else []
    return f"{parts[0]} ({', '.join(parts[1:])})" if parts[1:] else parts[0]
