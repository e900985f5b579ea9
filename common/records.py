"""Records: what a run leaves in the results. The one schema for all that write, read, import, judge and report them.

`replications/CLAIMS.md` says what each field holds. Nothing here loads torch, so that statistics need not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from common.reading import NAME_RULE, Exact, decoded, is_name, json_value, read_bytes, shown
from common.settings import SettingsError, validated

CURVES_SUFFIX = ".curves.jsonl"
"""How the names of files end that hold the curves of the runs in `<paper>.jsonl`."""

Failure = Literal["diverged", "unreachable", "resources", "died", "error", "needs"]
"""Why a run failed.

diverged: training, or what a method makes of it, is no longer a finite number. unreachable: no network meets the target
or the budget, or what is asked for does not exist (an interpolation out of range). resources: there was not enough
memory. died: its process did. error: its code raised one, by a defect or for what it has found. needs: a run that it
starts from failed.
"""


TRIAL = "tuning-"
"""Begins the variants of runs from which a setting is chosen."""


LARGEST = 1e100
"""No measurement is beyond it, and sums, squares and ratios of what is below are numbers. JSON has larger ones."""
_LEAST, _MOST = 1e-24, 1e24
_COSTS = (
    *("parameters", "nonzero_parameters", "dense_parameters", "macs", "sparse_macs", "dense_macs"),
    *("compression", "theoretical_speedup"),
)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a measurement."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


def _name(text: str) -> str:
    if not is_name(text):
        raise ValueError(NAME_RULE)
    return text


def _words(text: str) -> str:
    if not text.isprintable() or not text.strip():
        raise ValueError("must be text in one line")
    return text


def _metrics(found: dict[str, Any]) -> dict[str, Any]:
    for name, most in (("test_accuracy", 1.0), ("validation_accuracy", 1.0), ("test_loss", LARGEST)):
        value = found.get(name)
        if value is not None and not (is_number(value) and 0 <= value <= most):
            raise ValueError(f"{name} = {shown(value)}: must be a number from 0 to {most:g}")
    return found


def _few(found: dict[str, Any]) -> dict[str, Any]:
    count = 0
    level: list[Any] = [found]
    while level and count <= MOST_SETTINGS:
        inner = [item for held in level for item in (held.values() if isinstance(held, dict) else held)]
        count += len(inner)
        level = [item for item in inner if isinstance(item, (dict, list))]
    if count > MOST_SETTINGS:
        raise ValueError(f"more than {MOST_SETTINGS:,} keys and values")
    return found


def _cost(found: dict[str, Any]) -> dict[str, Any]:
    for name in _COSTS:
        value = found.get(name)
        if value is not None and not (is_number(value) and (value == 0 or _LEAST <= value <= _MOST)):
            raise ValueError(f"{name} = {shown(value)}: must be 0 or a number from {_LEAST:g} to {_MOST:g}")
    return found


MOST_REASON = 10_000
"""Characters of a reason."""
MOST_SETTINGS = 10_000
"""Keys and values of a run's settings."""
PaperName = Annotated[str, AfterValidator(_name)]
Words = Annotated[str, Field(max_length=255), AfterValidator(_words)]
"""What a figure, a page and a filter show as it is."""
Fact = str | bool | int | float | None
Facts = dict[str, Fact]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Amount = Annotated[float, Field(ge=0, le=LARGEST)]


def _measured(found: dict[str, float]) -> dict[str, float]:
    for name in ("milliseconds", "dense_milliseconds", "bytes", "compressed_bytes"):
        if not found.get(name):
            raise ValueError(f"needs {name}, above 0")
    return found


Measured = Annotated[dict[str, Amount], AfterValidator(_measured)]
"""What a network takes on a machine, as of `common.stage.latency.measured`."""


class _Line(Exact):
    """What one line of a file holds. Fields of a later revision are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Identity(_Line):
    """The fields that name a run."""

    paper: PaperName
    variant: Words
    dataset: Words
    architecture: Words
    target: float = Field(ge=0, le=1e9)
    seed: int = Field(ge=0, lt=2**63)

    @property
    def identity(self) -> dict[str, Any]:
        """These fields alone."""
        return {name: getattr(self, name) for name in Identity.model_fields}

    @property
    def name(self) -> str:
        """What messages call the run."""
        return f"{self.paper}/{self.variant} {self.architecture} target {self.target:g} seed {self.seed}"


class Cause(Identity):
    """The run at the root of a failure: the one that failed by itself."""

    settings_hash: str
    failure: Literal["diverged", "unreachable", "resources", "died", "error"]


class Record(Identity):
    """One run: what determines it and all it measured, except clocks.

    Fields that are None are absent from the file; an earlier revision has not written those of the last paragraph.

    reason, failure: why a failed run failed, in words and in kind; cause: of a failure of kind `needs`. settings:
    everything else that determines the run. data: fingerprints of its data sets.
    metrics: measured values, None where one is not a finite number. cost: sizes and MACs, as of
    `common.core.pruning.counting.cost`. details: other facts, as JSON values.

    chance: share of the most frequent class among the test images, None for a run without data. device, precision,
    torch: what it was executed with. predictions: digest of what it takes the test images for, by which
    `common.predictions` finds them; None for a run that has failed or has tested nothing.
    """

    status: Literal["ok", "failed"]
    reason: Annotated[str, Field(max_length=MOST_REASON)] | None = None
    failure: Failure | None = None
    cause: Cause | None = None
    settings: Annotated[dict[str, Any], AfterValidator(_few)] = {}
    settings_hash: str = ""
    data: list[str] = []
    metrics: Annotated[dict[str, Any], AfterValidator(_metrics)] = {}
    cost: Annotated[dict[str, Any], AfterValidator(_cost)] = {}
    details: dict[str, Any] = {}
    chance: float | None = Field(None, ge=0, le=1)
    device: Literal["cpu", "cuda"] | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    torch: str | None = None
    predictions: str | None = None

    @property
    def root(self) -> Cause:
        """What a run that starts from this failed one names as its cause."""
        own = {name: getattr(self, name) for name in Cause.model_fields}
        return self.cause or Cause.model_validate(own)

    @property
    def is_lost_trial(self) -> bool:
        """Whether it says of the setting that it tries, and of nothing else, that it is no good."""
        return self.variant.startswith(TRIAL) and self.root_failure in ("diverged", "unreachable")

    @property
    def root_failure(self) -> Failure | None:
        """How it failed, or what it starts from did; None if it has not."""
        return self.cause.failure if self.cause else self.failure

    @property
    def may_pass(self) -> bool:
        """Whether it failed in a way in which another attempt may not, so it never counts as done."""
        return self.root_failure in ("died", "resources", "error")

    def content(self) -> dict[str, Any]:
        """The record as JSON values, as it stands in its file."""
        return self.model_dump(mode="json", exclude_none=True)


class Curves(_Line):
    """A run's measurements, one row per epoch."""

    settings_hash: str
    curves: list[Facts]


class Entry(_Line):
    """A record with what is kept beside it.

    seconds: of its execution; ended: when that was over (`time.time()`). has_state: whether the run has left something for
    others to start from. machine: on which it was executed, as of `common.stage.records.machine`. An earlier revision has
    written neither the end nor the machine. predictions: those of the record, as the text
    of `common.predictions.Predictions`. measured: what its network takes on that machine, as of
    `common.stage.latency.measured`; None where it was not measured.
    """

    record: Record
    curves: list[Facts] = []
    seconds: Seconds
    ended: float | None = None
    has_state: bool = False
    machine: Facts | None = None
    predictions: str | None = None
    measured: Measured | None = None


class Environment(Exact):
    """What stands beside the records of a stage, as far as a page shows it; the rest of it is kept as it is.

    machine, versions: of all runs, but for those that another machine has executed (elsewhere, by settings hash). seconds:
    of each run; ended: when it was over, of those of which that is known (`time.time()`). measured: what networks take on their machine. unfinished: how many runs of the stage are not there.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    machine: Facts = {}
    versions: Facts = {}
    seconds: dict[str, Seconds] = {}
    ended: dict[str, float] = {}
    elsewhere: dict[str, Facts] = {}
    measured: dict[str, Measured] = {}
    unfinished: int = Field(0, ge=0)


# ------------------------------------------------------------------------------------------ files

Line = TypeVar("Line", bound=BaseModel)


def files(folder: Path) -> list[Path]:
    """The files of records in a folder."""
    return sorted(file for file in folder.glob("*.jsonl") if not file.name.endswith(CURVES_SUFFIX))


def curves_file(records: Path) -> Path:
    """The file with the curves of the runs in a file of records."""
    return records.with_suffix(CURVES_SUFFIX)


def read(file: Path, kind: type[Line]) -> Iterator[tuple[str, Line]]:
    """Each line of a file that is not blank, with the place that errors name. Raises SettingsError."""
    return parsed(read_bytes(file), file, kind)


def parsed(content: bytes, file: Path, kind: type[Line], finite: bool = False) -> Iterator[tuple[str, Line]]:
    """As `read`, of what has been read already. Raises SettingsError that names file and line, and the field.

    finite: whether NaN is an error and not null.
    """
    for number, line in enumerate(decoded(content, file).split("\n"), start=1):
        if line.strip():
            where = f"{file}, line {number}"
            try:
                values = json_value(line, finite)
            except ValueError as error:
                raise SettingsError(f"{where}: not valid JSON (half written?): {error}") from None
            yield where, validated(kind, values, where)
