"""Settings: `params.yaml` becomes typed, validated objects, and every error names file, key, value and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from common.reading import Exact, shown, words
from common.reading import SettingsError as SettingsError

ROOT = Path(__file__).resolve().parent.parent
PARAMS_FILE = "params.yaml"
TARGET_DIGITS = 9
"""Digits behind the point by which the targets of two runs are told apart."""
_MOST_PROBLEMS, _LONG = 50, 600
"""Wrong values that are looked at, and characters of an error from which on they are only counted."""
_MOST_KNOWN = 30
"""Names that one error lists."""


class DataError(SettingsError):
    """Data that is missing, damaged or of the wrong shape; the message names it in one line."""


class Strict(Exact):
    """Base of all settings: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_what_null_takes_out(cls, values: Any) -> Any:
        """In a table whose keys are one's own (variants, say), null takes out what a profile would inherit."""
        if not isinstance(values, Mapping):
            return values
        tables = {name for name, field in cls.model_fields.items() if _has_own_keys(field.annotation)}
        return {
            name: {key: item for key, item in value.items() if item is not None}
            if name in tables and isinstance(value, Mapping)
            else value
            for name, value in values.items()
        }


def _has_own_keys(annotation: Any) -> bool:
    """Whether a field is a table with any keys, of which none can have the value null."""
    if get_origin(annotation) is not dict:
        return False
    item = get_args(annotation)[1]
    return item is not Any and type(None) not in get_args(item)


Part = TypeVar("Part")
_PLAIN = frozenset((str, int, float, bool, type(None)))
"""Types of values that hold no other."""


def parts(value: Any, kind: type[Part], closed: type | tuple[()] = ()) -> Iterator[Part]:
    """The objects of a kind in `value`: itself, or in a list, a table or the fields of a value object, at any depth.

    What they hold themselves is not looked at, nor what objects of the kind `closed` hold.
    """
    inner: Iterable[Any] = ()
    if isinstance(value, kind):
        yield value
    elif isinstance(value, closed):
        return
    elif isinstance(value, BaseModel):
        inner = (getattr(value, name) for name in type(value).model_fields)
    elif is_dataclass(value):
        inner = (getattr(value, field.name) for field in fields(value))
    elif isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, (tuple, list)):
        inner = value
    for item in inner:
        if type(item) not in _PLAIN or isinstance(item, kind):
            yield from parts(item, kind, closed)


def _distinct(values: tuple) -> tuple:
    if len(set(values)) != len(values):
        raise ValueError("must not repeat a value")
    return values


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be text in one line")
    return text


def apart(values: tuple[float, ...]) -> tuple[float, ...]:
    """The targets, which records tell apart. Raises ValueError where they do not."""
    if len({round(value, TARGET_DIGITS) for value in values}) != len(values):
        raise ValueError(f"must not repeat a value; {TARGET_DIGITS} digits behind the point tell them apart")
    return values


def _rising(values: tuple[int, ...]) -> tuple[int, ...]:
    if list(values) != sorted(set(values)):
        raise ValueError("must rise")
    return values


Sparsity = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Targets = Annotated[tuple[Sparsity, ...], Field(min_length=1), AfterValidator(apart)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Images = Annotated[int, Field(ge=1, le=1_000_000_000)]
Rate = Annotated[float, Field(gt=0, le=1e30)]
Share = Annotated[float, Field(gt=0, le=1)]
MOST_SEEDS = 1000
SeedCount = Annotated[int, Field(ge=1, le=MOST_SEEDS)]


class SeedSettings(Strict):
    """With which seeds a profile's papers are run, and how many of them are judged at once."""

    first: Seed
    count: SeedCount
    looks: Annotated[tuple[SeedCount, ...], AfterValidator(_rising)] = ()
    """Numbers of seeds after which is judged, as far as `count` goes; where absent, all at once."""

    @property
    def all(self) -> tuple[int, ...]:
        """The seeds."""
        return tuple(range(self.first, self.first + self.count))

    @property
    def planned(self) -> tuple[int, ...]:
        """The numbers of seeds after which is judged; the last is `count`."""
        return self.planned_for(self.count)

    def planned_for(self, count: int) -> tuple[int, ...]:
        """The same of a paper with so many seeds."""
        return (*(look for look in self.looks if look < count), count)


def _listed(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    try:
        return SeedSettings.model_validate(value).all
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        raise ValueError("; ".join(wrong)) from None


Seeds = Annotated[
    tuple[Seed, ...],
    BeforeValidator(_listed),
    Field(min_length=1, max_length=MOST_SEEDS),
    AfterValidator(_distinct),
]
"""A list, or as of SeedSettings."""


class AugmentationSettings(Strict):
    """Random changes of training images; all zero or off means none."""

    crop_padding: Annotated[int, Field(ge=0, le=16)] = 0
    """Zero padding in pixels before a random crop of the original size."""
    flip: bool = False
    """Mirror half of the images left to right."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation in degrees, either way."""


class DatasetSettings(Strict):
    """Where the images come from and how they are split."""

    source: Literal["digits", "mnist", "cifar10", "cifar100", "svhn", "caltech101", "npz", "folder"] = (
        "digits"
    )
    """`digits` is embedded; the next five are downloaded by torchvision; `npz` and `folder` are local data at `path`."""
    path: Annotated[str, Field(max_length=4096), AfterValidator(_printable)] | None = None
    """File (`npz`) or folder (`folder`; for a torchvision source, where its files are or go)."""
    size: Annotated[int, Field(ge=4, le=512)] | None = None
    """Height and width in pixels to which images are resized by averaging; not of `digits` and `npz`."""
    streamed: Annotated[bool, Field(exclude_if=lambda streamed: not streamed)] = False
    """Of a folder that memory cannot hold: images stay on disk. Training sees random crops of them resized to `size`,
    mirrored with `augmentation.flip`; all else sees centre crops."""
    train: Images | None = None
    """Number of training images, stratified by class; all that validation leaves when absent."""
    validation: Images = 197
    """Number of images held out of the official training images, stratified by class."""
    test: Images | None = None
    """Number of test images, stratified by class: of the source's own test split (all when absent), or held out."""
    train_per_class: Images | None = None
    """In place of `test`: images of each class that are for training and validation, the rest is for test."""
    split: Literal["per_seed", "shared"] = "per_seed"
    """`per_seed`: training and validation images are drawn anew for each seed; `shared`: once for all. Test images stay."""
    split_seed: Seed = 0
    """Of the draws, and of test images that the source does not set apart."""
    augmentation: AugmentationSettings = AugmentationSettings()

    @model_validator(mode="after")
    def _local_data_has_a_path(self) -> DatasetSettings:
        if self.source in ("npz", "folder") and not (self.path and self.name):
            raise ValueError(f"source {self.source!r} needs a path that ends in a name")
        return self

    @model_validator(mode="after")
    def _streamed_is_possible(self) -> DatasetSettings:
        if self.streamed and (self.source != "folder" or self.size is None):
            raise ValueError("streamed needs source 'folder' and a size")
        if self.streamed and self.augmentation.crop_padding:
            raise ValueError("streamed images are cropped anyway: augmentation.crop_padding must be 0")
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> DatasetSettings:
        if self.size and self.source in ("digits", "npz"):
            raise ValueError(f"images of source {self.source!r} keep their size: size must be absent")
        if self.path is not None and self.source == "digits":
            raise ValueError("source 'digits' is embedded: path must be absent")
        if self.train_per_class and self.source not in ("caltech101", "folder"):
            raise ValueError(
                f"source {self.source!r} has test images of its own: train_per_class must be absent"
            )
        if self.train_per_class and self.test:
            raise ValueError("train_per_class stands in place of test: one of them must be absent")
        return self

    @property
    def name(self) -> str:
        """What records call this data: its source, or the name of a local file or folder."""
        if self.source in ("npz", "folder"):
            return Path(self.local).name.removesuffix(".npz")
        return self.source

    @property
    def local(self) -> str:
        """The path of data that has one."""
        if self.path is None:
            raise ValueError(f"{self.source} has no path")
        return self.path

    @property
    def origin(self) -> str:
        """What messages call this data."""
        return self.path or self.source


Processes = Annotated[int, Field(ge=1, le=1024)]


_OF_RAY = ("address", "cpus_per_run", "gpus_per_run")


class ExecutionSettings(Strict):
    """How runs are executed. All but where and how many at once can change the last digits of a result."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of convolutions and matrix products; `auto` is bfloat16 on a GPU that has it and on a CPU with AMX, else float32."""
    compilation: Literal["auto", "capture", "compile", "fused", "off"] = "auto"
    """`capture`: whole steps are replayed from CUDA graphs; `compile`: passes go through torch.compile, on a GPU within such
    graphs; `fused`: on a GPU, in bfloat16, layers that fit go through kernels of the suite's own within such graphs. `auto` is
    `fused` on a Hopper (H100, H200) in bfloat16, `capture` on another GPU, and nothing on a CPU."""
    deterministic: bool = True
    """Whether a GPU must sum in a fixed order; false lets it choose faster kernels, and results differ in the last digits."""
    threads: Processes = 1
    """Threads of each process that trains on a CPU; one each is fastest for small networks."""
    workers: Literal["auto"] | Processes = "auto"
    """Runs that train at once; `auto` is one per `threads` CPU cores, or 8 on each GPU; with Ray, as many as its nodes take."""
    engine: Literal["local", "ray"] = "local"
    """What executes runs: this machine, or a cluster of Ray (docs/cluster.md)."""
    address: Annotated[str, Field(max_length=255, pattern=r"^(auto|[A-Za-z0-9._-]+:\d{1,5})$")] = "auto"
    """Of Ray's head node, HOST:PORT; `auto` is what RAY_ADDRESS names, or the cluster that was started on this machine."""
    cpus_per_run: Literal["auto"] | Processes = "auto"
    """CPUs of a Ray node that a run takes; `auto` is `threads`."""
    gpus_per_run: Literal["auto"] | Annotated[float, Field(ge=0.01, le=1)] = "auto"
    """Share of a GPU of a Ray node that a run takes, each in a process of its own; `auto` is an eighth, or nothing on a CPU."""

    @model_validator(mode="after")
    def _ray_has_its_own(self) -> Self:
        if self.engine == "ray" and ":" in self.device:
            raise ValueError("Ray chooses the GPU of a run: device must be auto, cuda or cpu")
        given = [name for name in _OF_RAY if getattr(self, name) != "auto"]
        if given and self.engine == "local":
            raise ValueError(f"engine is local: {', '.join(given)} must be absent or auto")
        if self.device == "cpu" and self.gpus_per_run != "auto":
            raise ValueError("device is cpu: gpus_per_run must be absent")
        return self

    @property
    def numbers(self) -> dict[str, Any]:
        """What of it can change a number, as it is written."""
        return self.model_dump(mode="json", exclude={"workers", "engine", *_OF_RAY})


def merged(base: Any, changes: Any) -> Any:
    """`base` with `changes`: tables are merged key by key; anything else, a list or null too, is replaced whole."""
    if not (isinstance(base, Mapping) and isinstance(changes, Mapping)):
        return changes
    return {**base, **{key: merged(base.get(key), value) for key, value in changes.items()}}


class PaperSettings(Strict):
    """Base of a paper's settings; each paper adds its own fields in its protocol."""

    seeds: Seeds = tuple(range(10))

    def changed(self, changes: Mapping[str, Any], where: str) -> Self:
        """The same with changes as a profile makes them in one that it extends.

        Raises SettingsError that names them as in `where`.
        """
        return validated(type(self), merged(self.model_dump(), changes), where)


def hint(name: object, known: list[str]) -> str:
    """What is allowed in place of `name`, nearest match first."""
    near = difflib.get_close_matches(words(name), known[: 10 * _MOST_KNOWN], n=1)
    names = ", ".join(map(words, known[:_MOST_KNOWN])) or "none"
    more = f" and {len(known) - _MOST_KNOWN} more" if len(known) > _MOST_KNOWN else ""
    return f"allowed: {names}{more}" + (f" (did you mean {words(near[0])!r}?)" if near else "")


def validated(model: type[BaseModel], values: Any, where: str) -> Any:
    """An instance of `model` from `values`; `where` is the prefix (file and key) that errors name.

    Raises SettingsError with one line for each thing that is wrong.
    """
    if not isinstance(values, Mapping):
        raise SettingsError(f"{where} = {shown(values)}: must be a table of {', '.join(model.model_fields)}")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        count = error.error_count()
        problems = error.errors(include_url=False)[:_MOST_PROBLEMS]
        # a list with a wrong item is also reported as too short, since the item does not count
        real = [
            p
            for p in problems
            if not any(q is not p and q["loc"][: len(p["loc"])] == p["loc"] for q in problems)
        ]
        parts: list[str] = []
        while len(parts) < len(real) and len("; ".join(parts)) < _LONG:
            parts.append(_explain(real[len(parts)], model, where))
        more = [f"and {count - len(parts)} more"] if len(parts) < len(real) else []
        raise SettingsError("; ".join(parts + more)) from None


def _explain(problem: Mapping[str, Any], model: type[BaseModel], where: str) -> str:
    key = where
    for part in problem["loc"]:
        if isinstance(part, int):
            key += f"[{part}]"
        elif problem["type"] == "extra_forbidden" or not _is_tag(part):
            key += (": " if key.endswith(".yaml") else ".") + words(part)
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; {hint(problem['loc'][-1], _fields_at(model, problem['loc'][:-1]))}"
    if problem["type"] == "missing":
        return f"{key}: missing"
    message = (
        problem["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(" or instance of ")[0]
    )
    # the input of a rule about a whole table is that table, which the user can look up
    value = "" if isinstance(problem["input"], (Mapping, BaseModel)) else f" = {shown(problem['input'])}"
    return f"{key}{value}: {message}"


def _is_tag(part: str) -> bool:
    # pydantic adds the names of a union's members to the location of an error
    return part.startswith(("literal[", "constrained-", "function-")) or part in (
        "int",
        "float",
        "str",
        "bool",
    )


def _fields_at(model: type[BaseModel], loc: tuple) -> list[str]:
    for part in loc:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field and (inner := _model_in(field.annotation)):
            model = inner
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The settings object that a field holds, also one of a list or an optional one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


Keep = Literal["none", "headline"]


class Profile(Strict):
    """Everything `params.yaml` says for one paper in one profile."""

    name: str
    dataset: DatasetSettings
    execution: ExecutionSettings
    seeds: SeedSettings | None = None
    """Of all papers that do not say others."""
    keep: Keep = "none"
    """`headline`: the networks of the runs that headline claims compare stay in `.runs`, and go to MLflow."""
    paper: Any
    """The settings object of the paper."""

    @property
    def looks(self) -> tuple[int, ...]:
        """The numbers of the paper's seeds after which is judged; the last is that of all."""
        count = len(self.paper.seeds)
        return self.seeds.planned_for(count) if self.seeds else (count,)
